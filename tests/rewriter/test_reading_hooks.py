"""Hooks that read parameters, whoever holds them and whenever they were registered."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import bayesify
from bayesify import one_draw
from bayesify.rewriter.fallback import DrawnParameters
from bayesify.rewriter.variants import rungs

X = torch.linspace(-1.0, 1.0, 12).view(3, 4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)
        self.act = nn.Tanh()
        self.g = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Any:
        return self.act(self.l(x))


class Around(Model):
    """Registers a hook for one call of a layer."""

    def forward(self, x: Tensor) -> Any:
        handle = self.l.register_forward_hook(lambda _, __, out: out * self.g)
        y = self.l(x)
        handle.remove()
        return y + self.l(x)


class Before(Model):
    """As prompt tuning does; no parameter is in the hook."""

    def forward(self, x: Tensor) -> Any:
        handle = self.l.register_forward_pre_hook(lambda _, args: (args[0] * 2.0 + 1.0,))
        try:
            return self.l(x) + self.g
        finally:
            handle.remove()


class Collects(Model):
    """What a hook collects is read."""

    def forward(self, x: Tensor) -> Any:
        seen: list[Tensor] = []
        handle = self.l.register_forward_hook(lambda _, __, out: seen.append(out))
        y = self.act(self.l(x))
        handle.remove()
        return y + seen[0]


class Everywhere(Model):
    """A hook of all modules."""

    def forward(self, x: Tensor) -> Any:
        def shift(module: nn.Module, args: Any) -> Any:
            return (args[0] + 1.0,) if module is self.l else None

        handle = nn.modules.module.register_module_forward_pre_hook(shift)
        y = self.l(x)
        handle.remove()
        return y


class Nested(nn.Module):
    """Its child registers hooks, which see no examples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Collects()
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.inner(x))


class Own(Model):
    """A method of its own as hook."""

    def __init__(self) -> None:
        super().__init__()
        self.l.register_forward_hook(self.scale)
        self.l.register_forward_pre_hook(self.shift, with_kwargs=True)

    def scale(self, _: Any, __: Any, out: Tensor) -> Tensor:
        return out * self.g

    def shift(self, _: Any, args: Any, kwargs: Any) -> Any:
        return (args[0] + self._sum(),), kwargs

    def _sum(self) -> Tensor:
        return self.g.sum()


class OfAnother(Model):
    """A hook of a module without a parameter reads some of the module around it."""

    def __init__(self) -> None:
        super().__init__()
        self.act.register_forward_hook(self.scale)

    def scale(self, _: Any, __: Any, out: Tensor) -> Tensor:
        return out * self.g


def same_as_the_original(model: Any, original: nn.Module) -> None:
    """Values and gradients are those of functional_call, with no draw left behind."""
    for seed in (1, 1, 2):
        model.zero_grad()
        with one_draw(model, seed=seed):
            found = model(X)
        weights = bayesify.draws(model, seed=seed)
        expected = functional_call(original, weights, (X,))
        assert torch.equal(found, expected)
        found.square().sum().backward()
        total = expected.square().sum()
        grads = torch.autograd.grad(total, [*weights.values()], allow_unused=True)
        for name, grad in zip(weights, grads, strict=True):
            held = model.get_parameter(name).grad
            if grad is None:
                assert held is None or not held.any(), name
            else:
                torch.testing.assert_close(held, grad)
    assert not any(type(m._parameters) is DrawnParameters for m in model.modules())
    assert torch.equal(model.eval()(X), original.eval()(X))
    assert torch.equal(bayesify.to_deterministic(model)(X), original(X))


@pytest.mark.parametrize("make", [Around, Before, Collects, Everywhere, Nested])
@pytest.mark.parametrize("training", [False, True])
def test_hooks_that_a_forward_registers(make: Callable[[], Any], training: bool) -> None:
    original = make().train(training)
    model = bayesify.to_bbb(original, initial_std=math.exp(-1.0))
    same_as_the_original(model, original)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("make", [Own, OfAnother])
def test_hooks_that_are_methods_of_a_module_around(make: Callable[[], Any]) -> None:
    original = make()
    model = bayesify.to_bbb(original, initial_std=math.exp(-1.0))
    same_as_the_original(model, original)
    same_as_the_original(copy.deepcopy(model), original)
    same_as_the_original(pickle.loads(pickle.dumps(model)), original)
    for module in bayesify.to_deterministic(model).modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        assert all(hasattr(hook, "__self__") for hook in hooks)


def _of_weight(module: Any, _: Any, out: Tensor) -> Any:
    return out * module.l.weight.sum()


def _of_input(module: Any, args: Any) -> Any:
    return (args[0] + module.g,)


@pytest.mark.parametrize("called", [False, True])
def test_hooks_of_after_the_conversion(called: bool) -> None:
    original = Model()
    model: Any = bayesify.to_bbb(original, initial_std=math.exp(-1.0))
    if called:
        with one_draw(model, seed=1):
            model(X)
    for module in (original, model):
        layer: Any = module.l
        layer.register_forward_hook(lambda m, _, out: out * m.weight.sum())
        module.register_forward_hook(_of_weight)
        module.register_forward_pre_hook(_of_input)
        handle = module.register_forward_hook(_of_weight)
        handle.remove()
    same_as_the_original(model, original)
    assert type(model).__name__ == "Model"
    assert isinstance(model, Model)


def test_a_hook_that_reads_no_parameter_is_left_as_it_is() -> None:
    model: Any = bayesify.to_bbb(Model(), initial_std=math.exp(-1.0))
    shapes: list[Any] = []

    def look(_: Any, __: Any, out: Tensor) -> None:
        shapes.append(out.shape)

    kind = type(model.l)
    model.l.register_forward_hook(look)
    assert type(model.l) is kind
    assert list(model.l._forward_hooks.values()) == [look]
    model(X)
    assert shapes == [(3, 4)]
    assert all(r.rung != "swap" for r in rungs(model))


# -- parameters that are held under a second name -------------------------------------------------


class InList(Model):
    def __init__(self) -> None:
        super().__init__()
        self.held: Any = [self.l.weight]

    def forward(self, x: Tensor) -> Any:
        return x @ self.held[0] + self.g


class InDict(Model):
    def __init__(self) -> None:
        super().__init__()
        self.held: Any = {"w": self.l.weight}

    def forward(self, x: Tensor) -> Any:
        return x @ self.held["w"] + self.g


class InAttribute(Model):
    held: Any

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "held", self.l.weight)

    def forward(self, x: Tensor) -> Any:
        return x @ self.held + self.g


@pytest.mark.parametrize("make", [InList, InDict, InAttribute])
def test_a_parameter_under_a_second_name(make: Callable[[], Any]) -> None:
    original = make()
    model: Any = bayesify.to_bbb(original, initial_std=math.exp(-1.0))
    weights = bayesify.draws(model, seed=1)
    with one_draw(model, seed=1):
        found = model(X)
    assert torch.equal(found, X @ weights["l.weight"] + weights["g"])
    assert torch.equal(model.eval()(X), original(X))
    found.sum().backward()
    assert model.l.weight_logvar.grad.any()


# -- parameters that a forward freezes ------------------------------------------------------------


class Freezes(Model):
    def forward(self, x: Tensor) -> Any:
        for parameter in self.l.parameters():
            parameter.requires_grad_(False)
        return self.act(self.l(x)) * self.g


class FreezesByName(Model):
    def forward(self, x: Tensor) -> Any:
        self.l.weight.requires_grad = False
        self.l.bias.requires_grad_(False)
        y = self.act(self.l(x)) * self.g
        self.l.bias.requires_grad_()
        return y


@pytest.mark.parametrize("make", [Freezes, FreezesByName])
def test_a_forward_that_freezes_parameters(make: Callable[[], Any]) -> None:
    original = make()
    model: Any = bayesify.to_bbb(original, initial_std=math.exp(-1.0))
    weights = {n: w.detach() for n, w in bayesify.draws(model, seed=1).items()}
    expected = F.linear(X, weights["l.weight"], weights["l.bias"]).tanh() * weights["g"]
    for _ in range(2):
        with one_draw(model, seed=1):
            found = model(X)
        assert torch.equal(found, expected)
        assert not model.l.weight.requires_grad
        assert model.l.bias.requires_grad is (make is FreezesByName)
        (found.sum() + bayesify.kl_divergence(model)).backward()
        assert model.g.grad.any()
        assert model.l.weight.grad is None
        assert model.l.weight_logvar.grad is None
