"""Caches that hold objects with tensors in them: distributions, factors, results in a dict."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

import bayesify


class Factor:
    """A lazily multiplied matrix, as a library of linear operators has it."""

    def __init__(self, root: Tensor) -> None:
        self.root = root

    def __matmul__(self, x: Tensor) -> Tensor:
        return self.root @ (self.root.mT @ x)


def remember(owner: Any, name: str, value: Any) -> Any:
    if not hasattr(owner, "_memory"):
        owner._memory = {}
    owner._memory[name] = value
    return value


def remembered(method: Callable[..., Any]) -> Callable[..., Any]:
    """Calls a method once and keeps what it gives, whatever the arguments."""

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any) -> Any:
        if not hasattr(self, "_memory") or method.__name__ not in self._memory:
            return remember(self, method.__name__, method(self, *args))
        return self._memory[method.__name__]

    return wrapper


class Base(nn.Module):
    """Its forward may be kept from becoming a graph by a question about a value."""

    asks = False

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.randn(3))
        self.root = nn.Parameter(torch.randn(3, 3))

    def asked(self, y: Tensor) -> Tensor:
        return y * (1 if not self.asks or float(y.detach().sum()) < 1e9 else 2)


class Memoized(Base):
    """As gpytorch: a decorated method and a decorated property, cleared while it trains."""

    @remembered
    def factor(self, root: Tensor) -> Factor:
        return Factor(root * 2)

    @property
    @remembered
    def prior(self) -> Normal:
        return Normal(self.loc, torch.ones(3))

    def forward(self, x: Tensor) -> Any:
        if self.training:
            self._memory: dict[str, Any] = {}
        return self.asked(self.factor(self.root) @ x.mT + self.prior.mean[:, None])


class Called(Memoized):
    """All is done in ``__call__``, around the forward."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) + self.factor(self.root).root.sum()


class InDict(Base):
    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Any:
        if self.training or "factor" not in self.parts:
            self.parts["factor"] = Factor(self.root * 2)
        return self.asked(self.parts["factor"] @ x.mT + self.loc[:, None])


class InAttribute(Base):
    def __init__(self) -> None:
        super().__init__()
        self.prior: Normal | None = None

    def forward(self, x: Tensor) -> Any:
        if self.training or self.prior is None:
            self.prior = Normal(self.loc, self.loc.exp())
        return self.asked(x * self.prior.mean + self.prior.stddev.sum() + self.root.sum())


CACHES = [Memoized, Called, InDict, InAttribute]


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("kind", CACHES)
def test_draws_and_means_do_not_see_each_others(kind: type[Base], asks: bool) -> None:
    original = kind().eval()
    converted: Any = bayesify.to_bbb(original, initial_std=math.exp(-1.0)).eval()
    original.asks = converted.asks = asks
    fresh = kind().eval()
    fresh.asks = asks
    x = torch.randn(2, 3)
    with torch.no_grad():
        means = original(x)
        assert torch.equal(converted(x), means)
    gradients = {}
    for seed in (1, 2, 1):
        drawn = bayesify.draws(converted, seed=seed)
        with torch.no_grad():
            for name, value in drawn.items():
                getattr(fresh, name).copy_(value)
        for name in ("_memory", "parts", "prior"):
            if name in fresh.__dict__:
                fresh.__dict__[name] = None if name == "prior" else {}
        with bayesify.one_draw(converted, seed=seed):
            out = converted(x)
        assert torch.equal(out, fresh(x))
        gradients[seed] = torch.autograd.grad(out.square().sum(), list(converted.parameters()))
        right = torch.autograd.grad(fresh(x).square().sum(), [fresh.loc, fresh.root])
        found = dict(zip(dict(converted.named_parameters()), gradients[seed], strict=True))
        torch.testing.assert_close([found["loc"], found["root"]], list(right))
        with torch.no_grad():
            assert torch.equal(converted(x), means)


class Bank:
    """A memory that a layer fills from its inputs."""

    def __init__(self, size: Tensor) -> None:
        self.size = size
        self.seen: list[Tensor] = []

    def add(self, value: Tensor) -> None:
        self.seen.append(value)


class HasBank(Base):
    """It is state: drawing must not forget it, and adds to it."""

    def __init__(self) -> None:
        super().__init__()
        self.bank: Bank | None = None

    def forward(self, x: Tensor) -> Any:
        if self.bank is None:
            self.bank = Bank(self.loc.detach() * 0)
        y = self.asked(x * self.loc)
        self.bank.add(x)
        return y + torch.stack(self.bank.seen).sum(0)


@pytest.mark.parametrize("asks", [False, True])
def test_an_object_that_collects_inputs_is_kept(asks: bool) -> None:
    original = HasBank().eval()
    converted: Any = bayesify.to_bbb(original, initial_std=math.exp(-1.0)).eval()
    original.asks = converted.asks = asks
    x = torch.randn(2, 3)
    drawn = bayesify.draws(converted, seed=1)
    for _ in range(3):
        with bayesify.one_draw(converted, seed=1):
            out = converted(x)
        assert torch.equal(out, torch.func.functional_call(original, drawn, (x,)))
    assert len(converted.bank.seen) == 3
