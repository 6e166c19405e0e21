"""A forward that walks over the parameters of its module sees those of before the conversion."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesify


def squares(module: nn.Module) -> Any:
    """A helper of a user's, which no class knows of."""
    return sum(p.square().sum() for p in module.parameters())


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
        self.scale = nn.Parameter(torch.rand(2))


class Sums(Base):
    def forward(self, x: Tensor) -> Any:
        return self.inner(x) * self.scale + squares(self)


class Names(Base):
    def forward(self, x: Tensor) -> Any:
        names = [name for name, _ in self.named_parameters()]
        assert not any("logvar" in name for name in names)
        return self.inner(x) * len(names) + sum(p.sum() for p in self.inner.parameters())


class Dicts(Base):
    def forward(self, x: Tensor) -> Any:
        y = self.inner(x)
        for module in self.modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    y = y + parameter.sum()
        return y * len(self._parameters)


class States(Base):
    def forward(self, x: Tensor) -> Any:
        held = self.state_dict(keep_vars=True)
        twin = copy.deepcopy(self.inner)
        twin.load_state_dict(self.inner.state_dict())
        return twin(x) + sum(value.sum() for value in held.values()) * len(held)


class Nested(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x).tanh()


@pytest.mark.parametrize("kind", [Sums, Names, Dicts, States])
@pytest.mark.parametrize("nested", [False, True])
def test_at_the_means_it_gives_what_the_original_gives(kind: type[Base], nested: bool) -> None:
    original: nn.Module = Nested(kind()) if nested else kind()
    converted = bayesify.to_bbb(original).eval()
    x = torch.randn(4, 3)
    assert torch.equal(converted(x), original(x))
    converted.train()
    with bayesify.at_mean(converted):
        assert torch.equal(converted(x), original(x))
    # outside of a forward there is all
    assert len(list(converted.parameters())) == 2 * len(list(original.parameters()))
    assert len(converted.state_dict()) == 2 * len(original.state_dict())
    assert all(type(m._parameters) is dict for m in converted.modules())


@pytest.mark.parametrize("kind", [Sums, Names, Dicts])
def test_gradients_at_the_means_are_those_of_the_original(kind: type[Base]) -> None:
    original = kind()
    converted = bayesify.to_bbb(original).eval()
    x = torch.randn(4, 3)
    for model in (original, converted):
        model(x).sum().backward()
    found = dict(converted.named_parameters())
    for name, parameter in original.named_parameters():
        grad, right = found[name].grad, parameter.grad
        assert (grad is None) == (right is None)
        assert grad is None or right is None or torch.equal(grad, right)
    assert all(p.grad is None for n, p in found.items() if n.endswith("logvar"))


@pytest.mark.parametrize("kind", [Sums, Dicts])
def test_so_under_torch_compile(kind: type[Base]) -> None:
    original = kind()
    converted = bayesify.to_bbb(original).eval()
    x = torch.randn(4, 3)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(converted, backend="eager")(x), original(x))
