"""Forwards that write into their parameters: the mean gets it, and the draw follows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bayesify
from bayesify import UnsupportedModuleError


class Base(nn.Module):
    asks = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.shift = nn.Parameter(torch.zeros(3))
        self.started = False

    def asked(self, y: Tensor) -> Tensor:
        return y * (1 if not self.asks or float(y.detach().sum()) < 1e9 else 2)

    def change(self, x: Tensor) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Any:
        x = self.asked(x)
        self.change(x)
        return F.linear(x, self.weight, self.shift)


class Clamps(Base):
    def change(self, x: Tensor) -> None:
        self.weight.data.clamp_(-0.5, 0.5)


class ClampsRows(Base):
    def change(self, x: Tensor) -> None:
        with torch.no_grad():
            self.weight[1:].clamp_(-0.5, 0.5)
            self.weight[0, 0] = 2.0


class Starts(Base):
    """As ActNorm: its first call sets a parameter from data."""

    def change(self, x: Tensor) -> None:
        if not self.started:
            self.started = True
            self.shift.data.copy_(-x.mean(0))


class StartsByData(Base):
    def change(self, x: Tensor) -> None:
        if not self.started:
            self.started = True
            self.shift.data = -x.mean(0)


class StartsWithoutGrad(Base):
    def change(self, x: Tensor) -> None:
        if not self.started:
            self.started = True
            with torch.no_grad():
                self.shift += -x.mean(0)  # type: ignore[misc]


KINDS = [Clamps, ClampsRows, Starts, StartsByData, StartsWithoutGrad]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_gets_it_and_the_draw_follows(kind: type[Base], asks: bool, grad: bool) -> None:
    original = kind()
    original.asks = asks
    converted: Any = bayesify.to_bbb(original, initial_std=math.exp(-1.0))
    x = torch.randn(4, 3) + 3
    original(x)  # what the deterministic model does to its parameters
    with torch.set_grad_enabled(grad), bayesify.one_draw(converted, seed=1):
        out = converted(x)
    for name, parameter in original.named_parameters():
        assert torch.equal(getattr(converted, name), parameter), name
    drawn = bayesify.draws(converted, seed=1)  # around the new means
    torch.testing.assert_close(out, F.linear(x, drawn["weight"], drawn["shift"]))
    with bayesify.one_draw(converted, seed=1):
        torch.testing.assert_close(converted(x), out)
    if grad:
        out.sum().backward()
        torch.testing.assert_close(converted.shift.grad, torch.full((3,), 4.0))


class MaxNorm(Base):
    """Its new weight comes of the draw."""

    def change(self, x: Tensor) -> None:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.5)


class MaxNormInPlace(Base):
    def change(self, x: Tensor) -> None:
        with torch.no_grad():
            self.weight.div_(self.weight.norm())


@pytest.mark.parametrize("kind", [MaxNorm, MaxNormInPlace])
def test_what_comes_of_the_draw_is_refused(kind: type[Base]) -> None:
    converted = bayesify.to_bbb(kind(), initial_std=math.exp(-1.0))
    before = {name: p.detach().clone() for name, p in converted.named_parameters()}
    with pytest.raises(
        UnsupportedModuleError, match=f"{kind.__name__} sets its parameter 'weight'"
    ):
        converted(torch.randn(4, 3))
    for name, parameter in converted.named_parameters():
        assert torch.equal(parameter, before[name])
    with bayesify.at_mean(converted):
        converted(torch.randn(4, 3))


class Counts(Base):
    """A buffer and activations that it changes in place are its own affair."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))

    def change(self, x: Tensor) -> None:
        self.seen += x.detach().mean(0)
        (self.weight * 1).detach().mul_(2)
        x.clone().relu_()


@pytest.mark.parametrize("asks", [False, True])
def test_other_writes_stay_what_they_are(asks: bool) -> None:
    original = Counts()
    original.asks = asks
    converted: Any = bayesify.to_bbb(original, initial_std=math.exp(-1.0))
    x = torch.randn(4, 3)
    drawn = bayesify.draws(converted, seed=1)
    with bayesify.one_draw(converted, seed=1):
        out = converted(x)
    assert torch.equal(out, torch.func.functional_call(original, drawn, (x,)))
    assert torch.equal(converted.seen, original.seen)
