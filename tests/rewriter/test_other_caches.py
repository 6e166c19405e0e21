"""Caches in lists, in dicts by shape, in buffers, and those of ``functools.lru_cache``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import bayesify
from bayesify import one_draw

X = torch.linspace(-1.0, 1.0, 12).view(3, 4)


class Base(nn.Module):
    """Its forward may be kept from becoming a graph by a question about a value."""

    asks = False

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def asked(self, y: Tensor) -> Tensor:
        return y * (1 if not self.asks or float(y.detach().sum()) < 1e9 else 2)


class InList(Base):
    def __init__(self) -> None:
        super().__init__()
        self.memo: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.memo:
            self.memo.append(torch.matrix_exp(self.w - self.w.t()))
        return self.asked(x @ self.memo[0])


class ByShape(Base):
    def __init__(self) -> None:
        super().__init__()
        self.memo: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        if n not in self.memo:
            self.memo[n] = torch.ones(n, 1) * self.w.sum()
        return self.asked(x @ self.w + self.memo[n])


class ByUnpackedShape(Base):
    def __init__(self) -> None:
        super().__init__()
        self.memo: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        n, width = x.shape
        if n not in self.memo:
            self.memo[n] = self.w.sum().expand(n, width)
        return self.asked(x @ self.w + self.memo[n])


class InBuffer(Base):
    kernel: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is None:
            self.kernel = torch.matrix_exp(self.w - self.w.t())
        return self.asked(x @ self.kernel)


class Settings:
    def __init__(self) -> None:
        self.kernel: Tensor | None = None


class InField(Base):
    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings()

    def forward(self, x: Tensor) -> Tensor:
        if self.settings.kernel is None:
            self.settings.kernel = torch.matrix_exp(self.w - self.w.t())
        return self.asked(x @ self.settings.kernel)


class OfMethod(Base):
    @functools.lru_cache  # noqa: B019
    def kernel(self, power: int) -> Tensor:
        return torch.matrix_exp(self.w - self.w.t()) * power

    def forward(self, x: Tensor) -> Tensor:
        return self.asked(x @ self.kernel(2))


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("means_first", [False, True])
@pytest.mark.parametrize("make", [InList, ByShape, ByUnpackedShape, InBuffer, InField, OfMethod])
def test_they_keep_no_draw_and_none_is_made_of_them(
    make: type[Base], means_first: bool, asks: bool
) -> None:
    def new() -> Any:
        found = make()
        found.load_state_dict(original.state_dict())
        return found.eval()

    original = make().eval()
    model: Any = bayesify.to_bbb(original, initial_std=math.exp(-1.0)).eval()
    model.asks = asks
    means = new()(X)
    if means_first:
        assert torch.equal(model(X), means)
    for seed in (1, 2):
        with one_draw(model, seed=seed):
            found = model(X)
            again = model(X)
        weights = bayesify.draws(model, seed=seed)
        assert torch.equal(found, functional_call(new(), weights, (X,))), seed
        assert torch.equal(again, found)
        assert torch.equal(model(X), means)
    if make is not OfMethod:  # as everywhere, its cache does not see an optimizer
        assert torch.equal(bayesify.to_deterministic(model)(X), means)
    model.train()(X).sum().backward()
    assert model.w_logvar.grad.any()
    assert torch.equal(model.eval()(X), means)


class Collects(Base):
    """What it collects is for the caller, and no cache."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.penalties: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x @ self.w)
        self.penalties.append(self.w.square().sum())
        return self.asked(self.seen[-1])


class Keys(Base):
    """State under keys of shapes, which a call changes by its input."""

    def __init__(self) -> None:
        super().__init__()
        self.state: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        if n not in self.state:
            self.state[n] = torch.zeros(n, 4)
        self.state[n][:] = self.state[n] + x.detach()
        return self.asked(self.state[n] @ self.w)


def test_what_is_collected_stays() -> None:
    model: Any = bayesify.to_bbb(Collects(), initial_std=math.exp(-1.0)).train()
    model(X)
    model(X)
    assert len(model.seen) == 2
    assert len(model.penalties) == 2
    assert all(value.requires_grad for value in model.penalties)


@pytest.mark.parametrize("asks", [False, True])
def test_state_under_keys_of_shapes_stays(asks: bool) -> None:
    original = Keys()
    model: Any = bayesify.to_bbb(original, initial_std=math.exp(-1.0))
    model.asks = asks
    for count in (1, 2, 3):
        with one_draw(model, seed=1):
            found = model(X)
        weights = bayesify.draws(model, seed=1)
        torch.testing.assert_close(found, (X * count) @ weights["w"])


# -- functools.lru_cache on a function ---------------------------------------------------------


@functools.lru_cache
def positions(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float32)


class Positions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + positions(x.shape[-1])


class Reads(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w + positions(x.shape[-1])


class Holds(Base):
    """The function is called by a child without a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = Positions()

    def forward(self, x: Tensor) -> Any:
        return self.positions(x @ self.w)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Reads()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Any:
        return self.inner(x) * self.scale


@pytest.mark.parametrize("make", [Reads, Holds, Outer])
def test_no_example_is_kept(make: Callable[[], Any]) -> None:
    positions.cache_clear()
    original = make()
    model: Any = bayesify.to_bbb(original, initial_std=math.exp(-1.0)).train()
    model(X)
    assert type(positions(4)) is Tensor
    assert torch.equal(model.eval()(X), original.eval()(X))
    with one_draw(model, seed=1):
        found = model(X)
    assert torch.equal(found, functional_call(original, bayesify.draws(model, seed=1), (X,)))
