"""What a trace changes around it, and what it leaves behind: nothing."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

import bayesify
from bayesify.rewriter.tracer import MethodTracer
from bayesify.rewriter.values import TracedTensor
from bayesify.rewriter.variants import rungs
from reference import check


class Branches(nn.Module):
    """No graph can do what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x).relu()
        return y if float(y.detach().sum()) > -1 else -y


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Softmax(-1))


@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("make", [small, Branches])
def test_no_example_outlives_its_trace(make: Any, hooks: bool) -> None:
    kinds = (FakeTensor, FakeTensorMode, TracedTensor, MethodTracer)

    def left() -> int:
        gc.collect()
        return sum(issubclass(type(o), kinds) for o in gc.get_objects())

    def use() -> None:
        model = bayesify.to_bbb(make())
        x = torch.randn(3, 4)
        (checkpoint(model, x, use_reentrant=False) if hooks else model(x)).sum().backward()

    use()  # what is kept once
    before = left()
    for _ in range(3):
        use()
    assert left() <= before  # those of other tests may go


@torch.library.custom_op("bayesify_tests::undecided", mutates_args=())
def undecided(x: Tensor) -> Tensor:
    return x.clone()


@undecided.register_fake
def _(x: Tensor) -> Tensor:
    raise RuntimeError("only known once there are numbers")


class Undecided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return torch._grouped_mm(self.layer(x)[None], torch.ones(1, 4, 4)) + undecided(x)


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped_mm")
def test_what_examples_cannot_do_is_not_in_the_log_of_torch() -> None:
    log = logging.getLogger("torch._subclasses.fake_tensor")
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign, assignment]
    log.addHandler(handler)
    filters = list(log.filters)
    try:
        model = bayesify.to_bbb(Undecided())
        model(torch.randn(3, 4))
        assert [r.rung for r in rungs(model) if r.owner == ""] == ["swap"]
        assert records == []
        assert log.filters == filters
        with pytest.raises(RuntimeError), FakeTensorMode():  # a user's own is heard
            torch._grouped_mm(torch.ones(1, 3, 4), torch.ones(1, 4, 4))
        assert len(records) == 1
    finally:
        log.removeHandler(handler)


class Handles(nn.Module):
    """Does something else where an operation fails, which it does without data only."""

    def __init__(self, work: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.work = work

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        try:
            return y * self.work(x)
        except Exception:
            return y


def mapped(x: Tensor) -> Tensor:
    twice: Callable[[Tensor], Tensor] = torch.vmap(lambda row: row * 2)
    return twice(torch.arange(len(x)) + x.shape[0]).sum()


def counted(x: Tensor) -> Tensor:
    return x.nonzero().sum()


@pytest.mark.parametrize("work", [mapped, counted])
def test_a_forward_does_not_handle_errors_of_its_trace(work: Any) -> None:
    report = check(Handles(work), lambda n: ((torch.ones(n, 4),), {}))
    assert report.problems == []
    assert report.fx_owners == report.owners == 1
    assert len(report.swapped) == 2  # in eval and train
    assert all("it handles an error of its trace" in line for line in report.swapped)
