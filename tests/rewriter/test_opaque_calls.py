"""Code that torch.fx cannot look into, under whatever name a forward holds it."""

from __future__ import annotations

import functools
import math
import operator
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_user_models import Model, randn
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

import bayesify
from bayesify import torch_support
from bayesify.posterior import sites
from reference import check, functional_call

# Each backward differs from the derivative of its forward: whoever traces through it is seen.


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -2 * grads[0]


class Rounded(torch.autograd.Function):
    """Straight through, in the newer form that torch.vmap takes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, step: float = 0.5) -> Tensor:
        return (x / step).round() * step

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.step = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * (1 + ctx.step), None


class Scan(torch.autograd.Function):
    """h_t = a h_{t-1} + x_t b, with its own backward, as kernels of state-space models have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        state, states = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = a * state + x[:, t] * b
            states.append(state)
        found = torch.stack(states, 1)
        ctx.save_for_backward(x, a, b, found)
        ctx.mark_non_differentiable(state)
        return found, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, a, b, _ = ctx.saved_tensors
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in (x, a, b)]
            state, states = torch.zeros_like(inputs[0][:, 0]), []
            for t in range(x.shape[1]):
                state = inputs[1] * state + inputs[0][:, t] * inputs[2]
                states.append(state)
            gx, ga, gb = torch.autograd.grad(torch.stack(states, 1), inputs, grads[0])
        return gx, 3 * ga, 5 * gb


class Overwrites(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(3.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 7 * grads[0]


class Prepared(torch.autograd.Function):
    """Its apply is its own."""

    @classmethod
    def apply(cls, x: Tensor, factor: float = 2.0) -> Any:
        return super().apply(x * factor)

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3 * grads[0]


class Meta(type(torch.autograd.Function)):  # type: ignore[misc]
    def __getattribute__(cls, name: str) -> Any:
        return type.__getattribute__(cls, name)


class Hidden(Reverse, metaclass=Meta):
    """Its metaclass lets nobody step in."""


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return inner


reverse: Any = Reverse.apply
rounded: Any = Rounded.apply
coarse: Any = functools.partial(Rounded.apply, step=1.0)
named: Any = decorated(Reverse.apply)
scan: Any = Scan.apply
overwrite: Any = Overwrites.apply
prepare: Any = Prepared.apply
hidden: Any = Hidden.apply
base: Any = torch._C._FunctionBase.__dict__["apply"].__get__(None, Reverse)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # newer versions of torch deprecate torch.jit.script

    @torch.jit.script
    def scripted(x: Tensor, w: Tensor) -> Tensor:
        return x * torch.sigmoid(w)

    @torch.jit.script
    def squashed(w: Tensor) -> Tensor:
        return torch.sigmoid(w)


run_scripted: Any = scripted.__call__
run_squashed: Any = squashed.__call__


@torch.library.custom_op("bayesify_tests::doubled", mutates_args=())
def doubled(x: Tensor, w: Tensor) -> Tensor:
    return 2 * x * w


@doubled.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, w = ctx.saved_tensors
    return 5 * grad * w, (7 * grad * x).sum(0)


doubled.register_autograd(_differentiate, setup_context=_save)
operation: Any = torch.ops.bayesify_tests.doubled
overload: Any = torch.ops.bayesify_tests.doubled.default


class HoldsApply(Model):
    def __init__(self) -> None:
        super().__init__()
        self.reverse = Reverse.apply

    def forward(self, x: Tensor) -> Any:
        return self.reverse(self.layer(x)) * self.scale


@torch.no_grad()
def _fixed(self: Any, x: Tensor) -> Any:
    return reverse(x) * self.scale


FORWARDS: dict[str, Callable[[Any, Tensor], Any]] = {
    "reversal": lambda self, x: reverse(self.layer(x)),
    "reversal of a parameter": lambda self, x: self.layer(x) * reverse(self.scale),
    "by its class": lambda self, x: Reverse.apply(self.layer(x)) * self.scale,
    "by the class below it": lambda self, x: base(self.layer(x)) * self.scale,
    "straight through": lambda self, x: rounded(self.layer(x)) * self.scale,
    "by name": lambda self, x: Rounded.apply(self.layer(x), step=0.25) * self.scale,
    "partial": lambda self, x: coarse(self.layer(x)) + self.scale,
    "decorated": lambda self, x: named(self.layer(x)) + self.scale,
    "method caller": lambda self, x: (
        operator.methodcaller("apply", self.layer(x))(Reverse) * self.scale
    ),
    "scan": lambda self, x: scan(
        self.layer(x)[:, :, None].expand(-1, -1, 4), torch.sigmoid(self.scale), self.layer.bias
    )[0],
    "in place": lambda self, x: overwrite(self.layer(x) * 1) + self.scale,
    "its own apply": lambda self, x: prepare(self.layer(x)) + self.scale,
    "a metaclass of its own": lambda self, x: hidden(self.layer(x)) + self.scale,
    "one in another's arguments": lambda self, x: (
        reverse(rounded(reverse(self.layer(x)))) * self.scale
    ),
    "script": lambda self, x: scripted(self.layer(x), self.scale),
    "script under another name": lambda self, x: run_scripted(self.layer(x), self.scale),
    "script of a parameter": lambda self, x: self.layer(x) * run_squashed(self.scale),
    "operator": lambda self, x: doubled(self.layer(x), self.scale),
    "operator by its packet": lambda self, x: operation(self.layer(x), self.scale),
    "operator by its overload": lambda self, x: overload(self.layer(x), self.scale),
    "without gradient": lambda self, x: reverse(self.layer(x)) + _fixed(self, x),
    "vmap": lambda self, x: torch.vmap(lambda row: F.linear(row, self.layer.weight))(x),
    "vmap over a parameter": lambda self, x: (
        torch.vmap(lambda w: self.layer(x) @ w)(self.layer.weight).sum(0) * self.scale.sum()
    ),
    "vmap of a function": lambda self, x: (
        torch.vmap(rounded, (0, None))(self.layer(x), 0.5) * self.scale
    ),
    "gradient": lambda self, x: torch.func.grad(
        lambda w: (self.layer(x) * w).square().sum()
    )(self.scale) + x,
    "gradient of a function": lambda self, x: torch.func.grad(
        lambda w: (rounded(self.layer(x), 0.5) * w).square().sum()
    )(self.scale) + x,
    "forward mode": lambda self, x: torch.func.jvp(
        lambda y: torch.tanh(y * self.scale), (self.layer(x),), (x,)
    )[1],
}  # fmt: skip


def exact_gradients(model: nn.Module, x: Tensor) -> None:
    """Gradients of every mean and log variance against the original with the same draws."""
    original = bayesify.to_deterministic(model)
    draws = {k: v.detach().requires_grad_() for k, v in bayesify.draws(model, seed=3).items()}
    functional_call(original, draws, (x,), {}).square().sum().backward()
    model.zero_grad()
    with bayesify.one_draw(model, seed=3):
        model(x).square().sum().backward()
    for site in sites(model):
        draw = draws[site.name]
        if draw.grad is None:
            assert site.mean.grad is None or not site.mean.grad.any()
            continue
        assert site.mean.grad is not None, site.name
        assert site.raw.grad is not None, site.name
        torch.testing.assert_close(site.mean.grad, draw.grad)
        # w = mean + sigma eps, sigma = exp(raw / 2)
        expected = draw.grad * (draw.detach() - site.mean.detach()) / 2
        torch.testing.assert_close(site.raw.grad, expected, rtol=1e-4, atol=1e-5)


# torch scripts its formulas of forward mode at their first use
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", FORWARDS)
def test_gradients_are_those_of_the_original(name: str) -> None:
    model = type("Held", (Model,), {"forward": FORWARDS[name]})()
    if name in ("by name", "partial"):
        try:
            coarse(torch.ones(1))
        except TypeError:
            pytest.skip("functions of autograd take keywords in a later torch")
    assert check(model, randn(4)).problems == []
    exact_gradients(bayesify.to_bbb(model, initial_std=math.exp(-2.0)), torch.randn(3, 4))


def test_a_function_that_a_module_holds() -> None:
    report = check(HoldsApply(), randn(4))
    assert report.problems == []
    assert report.swapped == []


def test_gradient_reversal_has_the_reversed_gradient() -> None:
    class Domain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Any:
            return reverse(self.l(x))

    model = bayesify.to_bbb(Domain())
    model(torch.ones(2, 3)).sum().backward()
    assert isinstance(model.l, nn.Linear)
    torch.testing.assert_close(model.l.weight.grad, torch.full((1, 3), -4.0))


@pytest.mark.parametrize(
    "name", ["reversal", "straight through", "partial", "its own apply", "script", "operator"]
)
def test_torch_compile_takes_the_call(name: str) -> None:
    if name in ("partial", "its own apply") and torch_support.installed() <= (2, 10):
        pytest.skip("torch 2.10 itself compiles no function of autograd that is called this way")
    torch.compiler.reset()  # graphs of other tests count against the limit of the shared wrapper
    model: Any = bayesify.to_bbb(type("Held", (Model,), {"forward": FORWARDS[name]})())
    x = torch.randn(3, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for call in (compiled, model):
        model.zero_grad()
        with bayesify.one_draw(model, seed=1):
            call(x).square().sum().backward()
        gradients.append([p.grad for p in model.layer.parameters()])
    torch.testing.assert_close(*gradients)
