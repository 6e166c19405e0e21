"""Objects that a forward hands on to its submodules, as caches of keys and values are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesify
from bayesify import one_draw
from bayesify.posterior import sites
from bayesify.rewriter.variants import rungs
from reference import functional_call, outputs, same


class Memory:
    """What attention has seen, by layer; it grows from call to call."""

    def __init__(self) -> None:
        self.seen: dict[int, Tensor] = {}
        self.calls = 0
        self.flag = False

    def update(self, x: Tensor, layer: int) -> Tensor:
        self.calls += 1
        before = self.seen.get(layer)
        self.seen[layer] = x if before is None else torch.cat([before, x], 1)
        return self.seen[layer]


class Attention(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, memory: Memory) -> Any:
        keys = memory.update(self.key(x), self.index)
        y: Tensor = (self.query(x) @ keys.transpose(1, 2)).softmax(-1) @ keys
        return y


class Layer(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.attention = Attention(index)
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor, memory: Memory, more: Any = None) -> Any:
        return x + self.attention(x, memory=memory) * self.scale


class Hands(nn.Module):
    """Hands it through two layers, and gives it back."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(0), Layer(1), Layer(0)])

    def forward(self, x: Tensor, memory: Memory, more: Any = None) -> Any:
        for layer in self.layers:
            x = layer(x, memory, {"memory": [memory]})
        return {"y": x, "memory": memory}


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Hands()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, memory: Memory) -> Any:
        out = self.inner(x, memory)
        return self.head(out["y"]), out["memory"]


class Keys(Attention):
    """Gives all keys: their number is that of all calls."""

    def forward(self, x: Tensor, memory: Memory) -> Any:
        return memory.update(self.key(x), self.index)


class Recalls(Attention):
    """Reads what another layer has put there."""

    def forward(self, x: Tensor, memory: Memory) -> Any:
        return self.query(x) @ memory.seen[0].transpose(1, 2) @ memory.seen[0]


class Shares(Hands):
    def __init__(self) -> None:
        super().__init__()
        self.layers[1].attention = Recalls(1)


class AsksSize(Hands):
    """How long the result is depends on what the object holds."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = Keys(3)

    def forward(self, x: Tensor, memory: Memory, more: Any = None) -> Any:
        y = self.keys(x, memory)
        return y.sum(1) * (2 if y.shape[1] > 3 else 1)


class UsesSize(AsksSize):
    """As it is, the size goes into the graph."""

    def forward(self, x: Tensor, memory: Memory, more: Any = None) -> Any:
        y = self.keys(x, memory)
        return y / y.shape[1]


class ReadsFlag(Hands):
    def forward(self, x: Tensor, memory: Memory, more: Any = None) -> Any:
        y = super().forward(x, memory)["y"]
        return y * 2 if memory.flag else y


class Remembers(Hands):
    def forward(self, x: Tensor, memory: Memory, more: Any = None) -> Any:
        memory.flag = not memory.flag
        return super().forward(x, memory)["y"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("make", "rung"),
    [
        (Hands, "plain"), (Shares, "plain"), (Outer, "plain"), (UsesSize, "plain"),
        (AsksSize, "swap"), (ReadsFlag, "swap"), (Remembers, "swap"),
    ],
)  # fmt: skip
def test_an_object_is_handed_on_live(
    make: Callable[[], nn.Module], rung: str, training: bool
) -> None:
    original = make().train(training)
    converted = bayesify.to_bbb(original, initial_std=math.exp(-1.5)).train(training)
    ours, theirs = Memory(), Memory()
    for step, length in enumerate((2, 1, 1, 3)):
        x = torch.randn(2, length, 4)
        ours.flag = theirs.flag = step == 2
        drawn = bayesify.draws(converted, seed=step)
        expected = functional_call(original, drawn, (x, theirs), {})
        with one_draw(converted, seed=step):
            found = converted(x, ours)
        assert same(found, expected)
        assert ours.calls == theirs.calls
        assert ours.flag == theirs.flag
        assert same(ours.seen, theirs.seen)
        assert all(type(t) is Tensor for t in ours.seen.values())
        if isinstance(found, tuple):
            assert found[1] is ours
    with one_draw(converted, seed=1):
        found = converted(torch.randn(2, 2, 4), Memory())
    sum(t.sum() for t in outputs(found)).backward()  # type: ignore[union-attr]
    used = [r for r in rungs(converted) if r.owner.endswith(("attention", "keys"))]
    assert {r.rung for r in used} == {"swap"}
    assert {r.rung for r in rungs(converted) if r.owner == ""} == {rung}
    ways = {r.rung for r in rungs(converted) if r.type == "Layer"}
    assert ways <= {"plain"}
    assert any(s.raw.grad is not None for s in sites(converted))


def test_what_holds_a_parameter_is_not_handed_on() -> None:
    class Context:
        def __init__(self, weight: Tensor) -> None:
            self.weight = weight

    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, context: Context) -> Any:
            return self.layer(x) * context.weight

    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.weight = Scales(), nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor, context: Context) -> Any:
            return self.inner(x, context)

    converted: Any = bayesify.to_bbb(Holds(), initial_std=math.exp(-1.5))
    x = torch.randn(2, 4)
    for seed in (1, 2):
        drawn = bayesify.draws(converted, seed=seed)
        right = x @ drawn["inner.layer.weight"].T + drawn["inner.layer.bias"]
        with one_draw(converted, seed=seed):
            found = converted(x, Context(converted.weight))
        torch.testing.assert_close(found, right * drawn["weight"])


def test_an_iterator_or_array_is_not_handed_on() -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, more: Any) -> Any:
            return self.layer(x) * next(more)

    class Hands(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Takes()

        def forward(self, x: Tensor, more: Any) -> Any:
            return self.inner(x, more)

    converted: Any = bayesify.to_bbb(Hands(), initial_std=math.exp(-1.5))
    x, more = torch.randn(2, 4), iter([2.0, 3.0, 5.0])
    with one_draw(converted, seed=1):
        first, second = converted(x, more), converted(x, more)
    torch.testing.assert_close(second * 2, first * 3)
    assert next(more) == 5.0


class Taps(nn.Module):
    """Gives what it computes to whoever wants to know."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, tap: Callable[[Tensor], None]) -> Any:
        y = self.layer(x)
        tap(y)
        return y


class Recorder:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor) -> None:
        self.seen.append(x)

    def note(self, x: Tensor) -> None:
        self.seen.append(x)


class RecordingModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> None:
        self.seen.append(x)


OUTSIDE = Recorder()


def closure() -> tuple[Any, list[Tensor]]:
    seen: list[Tensor] = []
    return lambda x: seen.append(x), seen


def method_of_a_list() -> tuple[Any, list[Tensor]]:
    seen: list[Tensor] = []
    return seen.append, seen


def default() -> tuple[Any, list[Tensor]]:
    seen: list[Tensor] = []

    def tap(x: Tensor, into: list[Tensor] = seen) -> None:
        into.append(x)

    return tap, seen


def callable_object() -> tuple[Any, list[Tensor]]:
    recorder = Recorder()
    return recorder, recorder.seen


def bound_method() -> tuple[Any, list[Tensor]]:
    recorder = Recorder()
    return recorder.note, recorder.seen


def module() -> tuple[Any, list[Tensor]]:
    recorder = RecordingModule()
    return recorder, recorder.seen


def outside() -> tuple[Any, list[Tensor]]:
    return OUTSIDE, OUTSIDE.seen


@pytest.mark.parametrize(
    "make",
    [closure, method_of_a_list, default, callable_object, bound_method, module, outside],
    ids=lambda f: f.__name__,
)
def test_a_callable_that_a_submodule_fills(make: Callable[[], tuple[Any, list[Tensor]]]) -> None:
    class Listens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Taps()

        def forward(self, x: Tensor) -> Any:
            tap, seen = make()
            return self.inner(x, tap) + 1, seen

    converted: Any = bayesify.to_bbb(Listens(), initial_std=math.exp(-1.5))
    OUTSIDE.seen.clear()
    for calls, seed in enumerate((1, 2), start=1):
        x = torch.randn(2, 4)
        with one_draw(converted, seed=seed):
            found, seen = converted(x)
        drawn = bayesify.draws(converted, seed=seed)
        assert len(seen) == (calls if make is outside else 1)
        assert torch.equal(seen[-1] + 1, found)
        right = x @ drawn["inner.layer.weight"].T + drawn["inner.layer.bias"]
        torch.testing.assert_close(seen[-1], right)


def test_a_callable_that_no_call_changes_stays_in_the_graph() -> None:
    scale = 3.0

    class Applies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Any:
            return function(self.layer(x))

    class Gives(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList(Applies() for _ in range(4))
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Any:
            functions = (torch.tanh, self.act, lambda y: y * scale, nn.functional.silu)
            for layer, function in zip(self.inner, functions, strict=True):
                x = layer(x, function)
            return x

    converted: Any = bayesify.to_bbb(Gives(), initial_std=math.exp(-1.5))
    x = torch.randn(2, 4)
    drawn = bayesify.draws(converted, seed=1)
    with one_draw(converted, seed=1):
        found = converted(x)
    right = functional_call(Gives(), drawn, (x,), {})
    assert torch.equal(found, right)
    assert {r.rung for r in rungs(converted) if r.owner == ""} == {"plain"}
