"""Modules with a ``__call__`` of their own around their forward."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesify


class Adds(nn.Module):
    """It reads a parameter outside of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.shift = nn.Parameter(torch.randn(3))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) + 100 * self.shift

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


class Doubles(nn.Linear):
    """It reads none."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * 2


class OfAct(nn.Tanh):
    """Nothing in it is converted."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) + 1


class Holds(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(self.inner(x)) * 2


@pytest.mark.parametrize("nested", [0, 1, 2])
@pytest.mark.parametrize("kind", [Adds, lambda: Doubles(3, 3), OfAct])
def test_what_it_adds_is_added_once(kind: Any, nested: int) -> None:
    original = kind()
    if isinstance(original, OfAct):
        original = nn.Sequential(nn.Linear(3, 3), original)
    for _ in range(nested):
        original = Holds(original)
    converted = bayesify.to_bbb(original, initial_std=math.exp(-1.0))
    seen = []
    for model in (original, converted):
        for module in model.modules():
            if isinstance(module, Adds | Doubles):
                module.register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    x = torch.randn(2, 3)
    with bayesify.at_mean(converted):
        assert torch.equal(converted(x), original(x))
    seen.clear()
    drawn = bayesify.draws(converted, seed=1)
    right = torch.func.functional_call(original, drawn, (x,))
    calls = len(seen)
    for _ in range(2):
        seen.clear()
        with bayesify.one_draw(converted, seed=1):
            torch.testing.assert_close(converted(x), right, rtol=0, atol=0)
        assert len(seen) == calls  # hooks run as often


def test_so_under_torch_compile() -> None:
    original = Holds(Doubles(3, 3))
    converted = bayesify.to_bbb(original, initial_std=math.exp(-1.0))
    torch._dynamo.reset()
    compiled = torch.compile(converted, backend="eager", fullgraph=True)
    x = torch.randn(2, 3)
    right = torch.func.functional_call(original, bayesify.draws(converted, seed=1), (x,))
    with bayesify.one_draw(converted, seed=1):
        torch.testing.assert_close(compiled(x), right)
