"""Functions that a model holds and that close over it follow the model into its copy."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesify
from bayesify import draws, one_draw, to_bbb
from bayesify.copies import copy_detached

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


class ByLambda(nn.Module):
    """What it computes stands in ``net``, a function of its own."""

    net: Any

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(3, 3)
        self.set()

    def set(self) -> None:
        self.net = lambda z: self.l(z).tanh()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class ByPartial(ByLambda):
    def set(self) -> None:
        def run(scale: float, z: Tensor) -> Tensor:
            out: Tensor = self.l(z) * scale
            return out

        self.net = functools.partial(run, 2.0)


class ByDefault(ByLambda):
    def set(self) -> None:
        self.net = [lambda z, layer=self.l: layer(z) * 3]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net[0](x)
        return out


class Helper:
    run: Any


class ByObject(ByLambda):
    def set(self) -> None:
        self.net = Helper()
        self.net.run = lambda z: self.l(z).relu() + self.l.weight.sum()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net.run(x)
        return out


class ByWrapped(ByLambda):
    def set(self) -> None:
        old = self.l.forward

        @functools.wraps(old)
        def doubled(*args: Any) -> Any:
            return old(*args) * 2

        self.l.forward = doubled  # type: ignore[method-assign,assignment]
        self.net = self.l


class ByNested(ByLambda):
    def set(self) -> None:
        def inner(z: Tensor) -> Tensor:
            out: Tensor = self.l(z)
            return out

        def outer(z: Tensor) -> Tensor:
            return inner(z) + 1

        self.net = outer


KINDS = [ByLambda, ByPartial, ByDefault, ByObject, ByWrapped, ByNested]


@pytest.mark.parametrize("kind", KINDS)
def test_the_copy_draws_its_own_weights(kind: type[ByLambda]) -> None:
    original = kind()
    expected = original(X)
    model = to_bbb(original, initial_std=math.exp(-1.0)).eval()
    assert torch.equal(model(X), expected)
    with one_draw(model, seed=3):
        found = model(X)
    same = kind()
    same.load_state_dict(draws(model, seed=3), strict=False)  # tied ones once
    torch.testing.assert_close(found, same(X))
    found.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in original.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(original(X), expected)  # and the original runs itself
    plain = bayesify.to_deterministic(model)
    assert not torch.equal(plain(X), expected)


def test_a_hook_that_closes_over_its_module() -> None:
    original = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    first = original[0]
    original[1].register_forward_hook(lambda module, args, out: out + first(X))
    model = to_bbb(original).eval()
    with torch.no_grad():
        for p in first.parameters():
            p.zero_()
    assert not torch.equal(model(X), original(X))


def test_what_does_not_lead_to_the_model_is_shared() -> None:
    count = [0]

    def counting(z: Tensor) -> Tensor:
        count[0] += 1
        return z

    original = nn.Sequential(nn.Linear(3, 3))
    original.count = counting  # type: ignore[assignment]
    copied: Any = copy_detached(original)
    assert copied.count is counting


def test_two_functions_share_what_one_of_them_changes() -> None:
    original: Any = nn.Sequential(nn.Linear(3, 3))

    def made() -> tuple[Callable[[], Any], Callable[[Any], None]]:
        layer = original[0]

        def get() -> Any:
            return layer

        def put(value: Any) -> None:
            nonlocal layer
            layer = value

        return get, put

    original.get, original.put = made()
    copied: Any = copy_detached(original)
    assert copied.get() is copied[0]
    copied.put(None)
    assert copied.get() is None
    assert original.get() is original[0]
