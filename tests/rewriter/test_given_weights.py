"""Weights that ``functional_call`` puts in place are what is read, in a forward and around it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F
from torch.nn.utils import stateless

import bayesify
from bayesify import one_draw, sampled

X = torch.linspace(-1.0, 1.0, 12).view(4, 3)


class Hyper(nn.Module):
    """A network that makes the weights of another."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.Linear(3, 12)
        self.t = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        made = self.h(x.mean(0))
        return functional_call(self.t, {"weight": made[:9].view(3, 3), "bias": made[9:]}, (x,))


class Partly(Hyper):
    """The bias is the target's own, which reads it before and after as well."""

    def forward(self, x: Tensor) -> Any:
        made = self.h(x.mean(0))
        first = self.t(x)
        inner = functional_call(self.t, {"weight": made[:9].view(3, 3)}, (x,))
        return first + inner + self.t(x) + self.t.weight.sum()


class Stateless(Hyper):
    def forward(self, x: Tensor) -> Any:
        given = {"weight": self.h(x.mean(0))[:9].view(3, 3)}
        return stateless._functional_call(self.t, given, (x,))


class Nested(Hyper):
    def forward(self, x: Tensor) -> Any:
        made = self.h(x.mean(0))

        def inner(given: Tensor) -> Any:
            return functional_call(self.t, {"weight": given}, (x,))

        outer = functional_call(self.t, {"bias": made[9:]}, (x,))
        twice = vmap(inner)(torch.stack([made[:9].view(3, 3), made[:9].view(3, 3) * 2]))
        return outer + twice.sum(0) + self.t(x)


class Frozen(Hyper):
    """It puts in a Parameter, which has no posterior."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.randn(3, 3), requires_grad=False)

    def forward(self, x: Tensor) -> Any:
        return functional_call(self.t, {"weight": self.anchor}, (self.h(x)[:, :3],))


class Members(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList(nn.Linear(3, 2) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Any:
        names = [f"{i}.{n}" for i in range(3) for n in ("weight", "bias")]
        held = dict(self.members.named_parameters())
        stacked = {n: torch.stack([held[f"{i}.{n}"] for i in range(3)]) for n in ("weight", "bias")}
        assert sorted(held) == sorted(names)
        base: Any = self.members[0]
        return vmap(lambda p: functional_call(base, p, (x,)))(stacked).sum(0) * self.scale


MODELS = [Hyper, Partly, Stateless, Nested, Frozen, Members]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("training", [False, True])
def test_inside_of_a_forward(make: Any, training: bool) -> None:
    original = make().train(training)
    model = bayesify.to_bbb(original, initial_std=math.exp(-1.0))
    kept = {n: (p, p.detach().clone()) for n, p in model.named_parameters()}
    for _ in range(2):
        model.zero_grad()
        with one_draw(model, seed=3):
            found = model(X)
        weights = bayesify.draws(model, seed=3)
        expected = functional_call(original, weights, (X,))
        assert torch.equal(found, expected)
        found.square().sum().backward()
        grads = torch.autograd.grad(
            expected.square().sum(), list(weights.values()), allow_unused=True
        )
        for (name, _), grad in zip(weights.items(), grads, strict=True):
            held = model.get_parameter(name).grad
            if grad is None:
                assert held is None or not held.any(), name
            else:
                assert held is not None, name
                torch.testing.assert_close(held, grad)
        for name, parameter in model.named_parameters():
            assert parameter is kept[name][0]
            assert torch.equal(parameter, kept[name][1])
    assert torch.equal(bayesify.to_deterministic(model)(X), original(X))


@pytest.mark.parametrize("estimator", ["weight", "local", "flipout"])
def test_around_a_model_it_does_not_matter_what_was_called_before(estimator: Any) -> None:
    model = bayesify.to_bbb(
        nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)),
        estimator=estimator,
        initial_std=math.exp(-1.0),
    )
    plain = bayesify.to_deterministic(model)
    given = {n: torch.randn(p.shape) for n, p in plain.named_parameters()}
    hidden = F.linear(X, given["0.weight"], given["0.bias"]).tanh()
    expected = F.linear(hidden, given["2.weight"], given["2.bias"])
    with one_draw(model, seed=1):
        before = functional_call(model, given, (X,))
        out = model(X)
        after = functional_call(model, given, (X,))
        assert torch.equal(model(X), out)
    assert torch.equal(before, expected)
    assert torch.equal(after, expected)
    with sampled(model):
        assert torch.equal(functional_call(model, given, (X,)), expected)
    assert torch.equal(functional_call(model.train(), given, (X,)), expected)
    part = {"0.weight": given["0.weight"]}
    if estimator == "weight":
        with one_draw(model, seed=1):
            found = functional_call(model, part, (X,))
        assert torch.equal(found, functional_call(plain, bayesify.draws(model, 1) | part, (X,)))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("parameters", [False, True])
def test_means_with_log_variances_are_another_posterior(first: bool, parameters: bool) -> None:
    model, other = (bayesify.to_bbb(nn.Linear(3, 3), initial_std=math.exp(-1.0)) for _ in range(2))
    posterior: Any = dict(other.named_parameters())
    if not parameters:
        posterior = {name: value.detach().clone() for name, value in posterior.items()}
    with one_draw(model, seed=4):
        if first:
            model(X)
        found = functional_call(model, posterior, (X,))
        own = model(X)
    with one_draw(other, seed=4):
        assert torch.equal(found, other(X))
    with one_draw(model, seed=4):
        assert torch.equal(own, model(X))


def test_stacked_posteriors() -> None:
    models = [bayesify.to_bbb(nn.Linear(3, 3), initial_std=math.exp(-1.0)) for _ in range(2)]
    stacked, buffers = stack_module_state(models)
    base = models[0].train()

    def call(parameters: Any) -> Any:
        return functional_call(base, (parameters, buffers), (X,))

    with one_draw(base, seed=2):
        found = vmap(call)(stacked)
    for model, out in zip(models, found, strict=True):
        with one_draw(model, seed=2):
            torch.testing.assert_close(out, model(X))


class Copies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        return copy.deepcopy(self.layer)(x), self.layer(x)


def test_a_copy_that_a_forward_makes_has_the_draw_of_what_it_copies() -> None:
    model = bayesify.to_bbb(Copies(), initial_std=math.exp(-1.0))
    weights = bayesify.draws(model, seed=1)
    expected = F.linear(X, weights["layer.weight"], weights["layer.bias"])
    for _ in range(2):
        with one_draw(model, seed=1):
            copied, own = model(X)
        assert torch.equal(own, expected)
        assert torch.equal(copied, expected)
