"""Context variables that a forward sets: around its submodules, for hooks, and for good."""

from __future__ import annotations

import contextvars
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesify
from bayesify import one_draw
from bayesify.rewriter.variants import rungs
from reference import functional_call, same

SETTING: contextvars.ContextVar[Any] = contextvars.ContextVar("SETTING", default=None)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Any:
        return self.layer(x) * self.scale


class Sets(nn.Module):
    """Sets a value around two calls, and gives what it then holds."""

    def __init__(self, value: Callable[[], Any], reset: bool = True) -> None:
        super().__init__()
        self.first, self.second = Inner(), Inner()
        self.value, self.reset = value, reset

    def forward(self, x: Tensor) -> Any:
        value = self.value()
        token = SETTING.set(value)
        y = self.second(self.first(x))
        if self.reset:
            SETTING.reset(token)
        return (y, list(value.get("seen", ()))) if isinstance(value, dict) else y


def multiply(module: nn.Module, args: Any, out: Tensor) -> Any:
    return out * SETTING.get()


def collect(module: nn.Module, args: Any, out: Tensor) -> None:
    SETTING.get().setdefault("seen", []).append(out)


def number() -> Any:
    return Sets(lambda: 3.0)


def read_by_hook() -> Any:
    model = Sets(lambda: 3.0)
    model.first.layer.register_forward_hook(multiply)
    return model


def empty_dict() -> Any:
    return Sets(dict)


def filled_by_hook() -> Any:
    model = Sets(dict)
    model.second.register_forward_hook(collect)
    return model


def tensor() -> Any:
    return Sets(lambda: torch.ones(2))


def left_set() -> Any:
    return Sets(lambda: 3.0, reset=False)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("make", "rung"),
    [
        (number, "plain"), (read_by_hook, "plain"), (empty_dict, "plain"), (filled_by_hook, "swap"),
        (tensor, "swap"), (left_set, "swap"),
    ],
)  # fmt: skip
def test_a_variable_is_set_at_every_call(
    make: Callable[[], Any], rung: str, training: bool
) -> None:
    original = make().train(training)
    converted = bayesify.to_bbb(original, initial_std=math.exp(-1.5)).train(training)
    x = torch.randn(3, 4)

    def run(call: Callable[..., Any], *args: Any) -> Any:
        return call(*args), SETTING.get()

    for seed in (1, 2):
        drawn = bayesify.draws(converted, seed=seed)
        expected, after = contextvars.copy_context().run(
            run, functional_call, original, drawn, (x,), {}
        )
        with one_draw(converted, seed=seed):
            found, then = contextvars.copy_context().run(run, converted, x)
        assert same(found, expected)
        assert then is after or then == after
        assert SETTING.get() is None
    ways = {r.owner: r.rung for r in rungs(converted)}
    assert ways[""] == rung
    assert ways["first"] == "plain"


def test_a_hook_added_later_may_not_fill_it_unseen() -> None:
    converted: Any = bayesify.to_bbb(empty_dict(), initial_std=math.exp(-1.5))
    x = torch.randn(3, 4)
    converted(x)
    converted.second.register_forward_hook(collect)
    with pytest.raises(RuntimeError, match="SETTING"):
        converted(x)
