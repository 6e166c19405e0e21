"""A function of autograd whose backward calls a module: adjoint methods, reversible blocks."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesify
from bayesify.posterior import sites
from reference import exchanged


class Adjoint(torch.autograd.Function):
    """As an adjoint solver: no graph in forward, the module anew in backward."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor, *weights: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x, *weights)
        return run(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        with torch.enable_grad():
            y = ctx.run(x)
        # unused ones are zero, as in torchdiffeq
        found = torch.autograd.grad(y, weights, gradient, allow_unused=True)
        return None, None, *found


held: Any = Adjoint.apply


class Solved(nn.Module):
    """The function gets a module, or a method that reads a parameter itself."""

    def __init__(self, method: bool, apply: Any = Adjoint.apply) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3)
        self.method, self.apply_ = method, apply

    def read(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.layer.weight) * self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        run = self.read if self.method else self.layer
        y: Tensor = self.apply_(run, x, self.layer.weight, self.layer.bias)
        return y.square()


X = torch.linspace(-1, 1, 6).reshape(2, 3)


def expected(model: nn.Module, draws: dict[str, Tensor]) -> dict[str, Tensor]:
    draws = {name: draw.detach().requires_grad_() for name, draw in draws.items()}
    with exchanged(model, draws):
        found = torch.autograd.grad(model(X).sum(), list(draws.values()))
    return dict(zip(draws, found, strict=True))


@pytest.mark.parametrize("method", [False, True], ids=["module", "method"])
@pytest.mark.parametrize("name", ["resolved", "held"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_backward_finds_the_draw_of_its_forward(method: bool, name: str, training: bool) -> None:
    model = Solved(method, held if name == "held" else lambda *a: Adjoint.apply(*a))
    converted = bayesify.to_bbb(model, initial_std=math.exp(-1.0)).train(training)
    wanted = expected(model, bayesify.draws(converted, seed=3))
    with bayesify.one_draw(converted, seed=3):
        loss = converted(X).sum()
    loss.backward()
    for site in sites(converted):
        assert site.mean.grad is not None
        torch.testing.assert_close(site.mean.grad, wanted[site.name])


def test_an_ordinary_step_has_gradients() -> None:
    converted = bayesify.to_bbb(Solved(method=False), initial_std=math.exp(-1.0)).train()
    converted(X).sum().backward()
    for site in sites(converted):
        assert site.mean.grad is not None
        assert site.mean.grad.abs().max() > 0.1
        assert site.raw.grad is not None
        assert site.raw.grad.abs().max() > 0


def test_nothing_is_kept_after_backward() -> None:
    converted = bayesify.to_bbb(Solved(method=False)).train()
    gc.collect()
    gc.disable()
    try:
        y = converted(X)
        node = weakref.ref(y.grad_fn.next_functions[0][0])
        assert node() is not None
        y.sum().backward()
        del y
        assert node() is None
    finally:
        gc.enable()


def test_the_class_of_nodes_is_as_it_was() -> None:
    own = "__init__" in vars(torch.autograd.function.BackwardCFunction)
    bayesify.to_bbb(Solved(method=True)).train()(X).sum().backward()
    assert ("__init__" in vars(torch.autograd.function.BackwardCFunction)) == own


class Passed:
    """A callable object that keeps a partial of a method and a tensor."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.run(x)
        return y


class Conditioned(nn.Module):
    """Gives a function, as the transforms of flows do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def shifted(self, context: Tensor, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) + context
        return y

    def forward(self, context: Tensor) -> Passed:
        import functools

        return Passed(functools.partial(self.shifted, context * 2))


class Flow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transform = Conditioned()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.transform(x)(x)
        return y


def test_a_function_that_holds_a_traced_tensor() -> None:
    model = Flow()
    converted = bayesify.to_bbb(model, initial_std=math.exp(-1.0))
    with bayesify.one_draw(converted, seed=1):
        found = converted(X)
    wanted = torch.func.functional_call(model, bayesify.draws(converted, seed=1), (X,))
    assert torch.equal(found, wanted)


class Penalised(nn.Module):
    """Looks over its own parameters, as a weight penalty inside a forward does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y + sum(p.square().sum() for p in self.parameters())


def test_a_forward_knows_of_no_log_variances() -> None:
    model = Penalised()
    converted = bayesify.to_bbb(model, initial_std=math.exp(-1.0))
    with bayesify.one_draw(converted, seed=1):
        found = converted(X)
    assert {rung.rung for rung in bayesify.rungs(converted)} <= {"plain", "guided"}
    wanted = torch.func.functional_call(model, bayesify.draws(converted, seed=1), (X,))
    assert torch.equal(found, wanted)


class Frequencies:
    """Not a module: makes its table when it is first asked."""

    def __init__(self) -> None:
        self.table: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(3.0).cos()
        return x * self.table


class Positioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.frequencies = nn.Linear(3, 3), Frequencies()

    def forward(self, x: Tensor, power: float = 1.0) -> Tensor:
        y: Tensor = self.frequencies(self.layer(x)) ** power
        return y


def test_a_trace_leaves_nothing_in_the_objects_of_a_module() -> None:
    model = Positioned()
    converted: Any = bayesify.to_bbb(model, initial_std=math.exp(-1.0))
    for power in (1.0, 2.0):  # the second call finds what the first one left
        with bayesify.one_draw(converted, seed=1):
            found = converted(X, power)
        draws = bayesify.draws(converted, seed=1)
        assert torch.equal(found, torch.func.functional_call(model, draws, (X, power)))
    assert type(converted.frequencies.table) in (Tensor, type(None))
