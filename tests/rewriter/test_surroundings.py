"""What a forward reads outside of its module, and what of it changes between two calls."""

from __future__ import annotations

import contextvars
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesify
from bayesify import torch_support
from bayesify.rewriter.variants import rungs

SCALE = 2.0
DOUBLED = True
TABLE = {"scale": 2.0}
SETTINGS = types.SimpleNamespace(inner=types.SimpleNamespace(scale=2.0))
FACTOR = torch.tensor([2.0, 2.0, 2.0])
VARIABLE: contextvars.ContextVar[float] = contextvars.ContextVar("scale", default=2.0)
ACTIVATION: Callable[[Tensor], Tensor] = torch.relu
CALLS = 0
SEEN: list[int] = []


class Constants:
    scale = 2.0


class Config:
    """As libraries' configurations: an attribute by way of a property."""

    def __init__(self) -> None:
        self.values = {"scale": 2.0}

    @property
    def scale(self) -> float:
        return self.values["scale"]


def scaled(y: Tensor) -> Tensor:
    return y * SCALE


class Base(nn.Module):
    scale = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.config = Config()

    def helped(self, y: Tensor) -> Tensor:
        return scaled(y)


class Global(Base):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x) * SCALE


class Branch(Base):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x) * 2 if DOUBLED else self.layer(x)


class Dict(Base):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x) * TABLE["scale"]


class Namespace(Base):
    def forward(self, x: Tensor) -> Any:
        inner = SETTINGS.inner
        return self.layer(x) * inner.scale


class GlobalTensor(Base):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x) * FACTOR


class Variable(Base):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x) * VARIABLE.get()


class OfClass(Base):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x) * Constants.scale


class Helped(Base):
    def forward(self, x: Tensor) -> Any:
        return self.helped(self.layer(x))


class OwnClass(Base):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x) * self.scale


class OwnConfig(Base):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x) * self.config.scale


class Function(Base):
    def forward(self, x: Tensor) -> Any:
        return ACTIVATION(self.layer(x))


def closed_over() -> tuple[type[Base], Callable[[], None]]:
    scale = 2.0

    class Closure(Base):
        def forward(self, x: Tensor) -> Any:
            return self.layer(x) * scale

    def change() -> None:
        nonlocal scale
        scale = 3.0

    return Closure, change


def change_attribute(holder: Any, name: str, value: Any) -> Callable[..., None]:
    def change(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(holder, name, value)

    return change


def change_global(name: str, value: Any) -> Callable[..., None]:
    def change(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
        patch.setitem(globals(), name, value)

    return change


CHANGES: dict[type[Base], Callable[..., None]] = {
    Global: change_global("SCALE", 3.0),
    Branch: change_global("DOUBLED", False),
    Dict: lambda model, patch: patch.setitem(TABLE, "scale", 3.0),
    Namespace: change_attribute(SETTINGS.inner, "scale", 3.0),
    GlobalTensor: change_global("FACTOR", torch.tensor([3.0, 3.0, 3.0])),
    OfClass: change_attribute(Constants, "scale", 3.0),
    Helped: change_global("SCALE", 3.0),
    OwnClass: change_attribute(OwnClass, "scale", 3.0),
    OwnConfig: lambda model, patch: patch.setitem(model.config.values, "scale", 3.0),
    Function: change_global("ACTIVATION", torch.tanh),
}


def check(model: nn.Module, x: Tensor, called: Callable[..., Any] | None = None) -> Tensor:
    """A drawn call against the original with the same draws."""
    with bayesify.one_draw(model, seed=1):
        out: Tensor = (model if called is None else called)(x)
    plain = bayesify.to_deterministic(model)
    torch.testing.assert_close(
        out, torch.func.functional_call(plain, bayesify.draws(model, seed=1), (x,)), rtol=0, atol=0
    )
    return out


@pytest.mark.parametrize("kind", CHANGES, ids=lambda kind: kind.__name__)
def test_what_lies_outside_is_read_anew(kind: type[Base], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = bayesify.to_bbb(kind()), torch.randn(2, 3)
    first = check(model, x)
    CHANGES[kind](model, monkeypatch)
    assert not torch.equal(check(model, x), first)
    monkeypatch.undo()
    assert torch.equal(check(model, x), first)
    mine = [r for r in rungs(model) if not r.owner]
    assert [r.rung for r in mine] == ["plain"] * 2  # one graph for each state, used again


def test_a_context_variable_and_a_closure_are_read_anew() -> None:
    x = torch.randn(2, 3)
    model = bayesify.to_bbb(Variable())
    first = check(model, x)
    token = VARIABLE.set(3.0)
    try:
        assert not torch.equal(check(model, x), first)
    finally:
        VARIABLE.reset(token)
    assert torch.equal(check(model, x), first)

    kind, change = closed_over()
    model = bayesify.to_bbb(kind())
    first = check(model, x)
    change()
    assert not torch.equal(check(model, x), first)


def test_an_attribute_of_the_instance_takes_the_place_of_that_of_its_class() -> None:
    model: Any = bayesify.to_bbb(OwnClass())
    x = torch.randn(2, 3)
    first = check(model, x)
    model.scale = 3.0
    assert not torch.equal(check(model, x), first)


@pytest.mark.parametrize("kind", [Global, OwnConfig], ids=lambda kind: kind.__name__)
def test_torch_compile_reads_it_anew(kind: type[Base], monkeypatch: pytest.MonkeyPatch) -> None:
    if kind is OwnConfig and torch_support.installed() <= (2, 10):
        pytest.skip("torch 2.10 itself compiles no `is` between two dicts")
    model, x = bayesify.to_bbb(kind()), torch.randn(2, 3)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    first = check(model, x, compiled)
    CHANGES[kind](model, monkeypatch)
    assert not torch.equal(check(model, x, compiled), first)


class Counts(Base):
    def forward(self, x: Tensor) -> Any:
        global CALLS
        CALLS += 1
        SEEN.append(CALLS)
        return self.layer(x) + CALLS


def test_what_a_forward_does_outside_happens_once_for_each_call() -> None:
    global CALLS
    CALLS = 0
    SEEN.clear()
    model, x = bayesify.to_bbb(Counts()), torch.zeros(1, 3)
    with bayesify.one_draw(model, seed=1):
        first, second = model(x), model(x)
    torch.testing.assert_close(second - first, torch.ones(1, 3))
    assert CALLS == 2
    assert SEEN == [1, 2]
    assert [r.rung for r in rungs(model) if not r.owner] == ["swap"]
