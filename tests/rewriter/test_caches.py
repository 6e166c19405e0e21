"""Which tensors of a module are caches of its parameters, and which a user has put there."""

from __future__ import annotations

import copy
import dataclasses
import dis
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesify
from bayesify.rewriter import assignments
from bayesify.rewriter.variants import rungs
from reference import check


class Base(nn.Module):
    """A layer whose forward may be kept from becoming a graph by a question about a value."""

    asks = False

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.t: Tensor | None = None
        self.table: dict[str, Tensor] = {}

    def asked(self, y: Tensor) -> Tensor:
        return y * (1 if not self.asks or float(y.detach().sum()) < 1e9 else 2)

    def add(self, name: str, value: Tensor) -> None:
        self.table[name] = value


# -- what users put there --------------------------------------------------------------------


class HasSetter(Base):
    def set(self, value: Tensor) -> None:
        self.t = value

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.asked(self.layer(x))
        return y if self.t is None else y + self.t


class HasTable(Base):
    """Its forward fills another dict than that which the base class's method fills."""

    def forward(self, x: Tensor) -> Tensor:
        found: dict[str, Tensor] = {"y": self.layer(x)}
        found["sum"] = self.asked(found["y"] + self.table["a"])
        return found["sum"]


class HasLaterTable(HasTable):
    def add_later(self, name: str, value: Tensor) -> None:
        for key in (name, name):
            self.table[key] = value


class Remembers(Base):
    """Keeps what it is given, and goes on with it where it is given nothing."""

    def forward(self, x: Tensor, prompt: Tensor | None = None) -> Tensor:
        if prompt is not None:
            self.t = prompt * 2
        assert self.t is not None
        return self.asked(self.layer(x)) + self.t


def _table_of(model: Any) -> None:
    model.add("a", torch.full((3,), 100.0))


PUT: dict[str, tuple[type[Base], Callable[[Any], object]]] = {
    "set": (HasSetter, lambda m: m.set(torch.full((3,), 100.0))),
    "assigned from outside": (HasSetter, lambda m: setattr(m, "t", torch.full((3,), 100.0))),
    "base class's dict": (HasTable, _table_of),
    "later method's dict": (HasLaterTable, lambda m: m.add_later("a", torch.full((3,), 100.0))),
    "what an earlier call was given": (
        Remembers, lambda m: m(torch.zeros(1, 3), torch.full((3,), 50.0)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("name", PUT)
def test_what_a_user_has_set_is_no_cache(name: str, asks: bool, training: bool) -> None:
    make, put = PUT[name]
    original = make().train(training)
    original.asks = asks
    converted = bayesify.to_bbb(original, initial_std=math.exp(-1.5))
    put(original), put(converted)
    x = torch.randn(2, 3)
    expected = original(x)
    assert expected.mean() > 95
    with bayesify.at_mean(converted):
        assert torch.equal(converted(x), expected)
    original.load_state_dict(bayesify.draws(converted, seed=1))
    for _ in range(2):
        with bayesify.one_draw(converted, seed=1):
            assert torch.equal(converted(x), original(x))
    # it stays where weights are written as well
    bayesify.prune_(converted, 0.5)
    with bayesify.at_mean(converted):
        assert converted(x).mean() > 95
    assert any(r.rung == "swap" for r in rungs(converted) if r.owner == "") == asks


# -- what a forward keeps of a parameter -----------------------------------------------------


class Weighted(nn.Module):
    asks = False

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 3))
        self.table: dict[str, Tensor] = {}
        self.t: Tensor | None = None

    def out(self, x: Tensor, w: Tensor) -> Tensor:
        y = x @ w
        return y * (1 if not self.asks or float(y.detach().sum()) < 1e9 else 2)


class ByMethod(Weighted):
    """As levit: another method fills the dict under another name."""

    def weight(self, device: str) -> Tensor:
        table = self.table
        if device not in table:
            table[device] = self.w.tanh()
        return table[device]

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x, self.w.tanh() if self.training else self.weight(str(x.device)))


class ByMethodOfBase(ByMethod):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class BySetDefault(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.out(x, self.w.tanh())
        if "w" not in self.table:
            self.table.setdefault("w", self.w.tanh())
        return self.out(x, self.table["w"])


class ByProperty(Weighted):
    @property
    def weight(self) -> Tensor:
        if self.t is None:
            self.t = self.w.tanh()
        return self.t

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x, self.w.tanh() if self.training else self.weight)


class ByCachedProperty(Weighted):
    @functools.cached_property
    def weight(self) -> Tensor:
        return torch.tanh(self.w)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x, self.w.tanh() if self.training else self.weight)


class ByHasattr(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.out(x, self.w.tanh())
        if not hasattr(self, "kept"):
            self.kept = self.w.tanh()
        return self.out(x, self.kept)


def _fill(module: Any) -> None:
    if module.t is None:
        module.t = module.w.tanh()


class ByFunction(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.out(x, self.w.tanh())
        _fill(self)
        assert self.t is not None
        return self.out(x, self.t)


class ByTrain(Weighted):
    """As the first levit: train() and eval() make the cache."""

    def train(self, mode: bool = True) -> ByTrain:
        super().train(mode)
        self.t = None if mode else self.w.tanh()
        return self

    def forward(self, x: Tensor) -> Tensor:
        weight = self.w.tanh() if self.training else self.t
        assert weight is not None
        return self.out(x, weight)


class ByReading(Weighted):
    """Making it asks for a value, which no trace can answer; reading it does not."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.out(x, self.w.tanh() * float(self.w.detach().max()))
        if self.t is None:
            self.t = self.w.tanh() * float(self.w.detach().max())
        return self.out(x, self.t)


def _forget(model: nn.Module) -> None:
    """Clear every cache by hand; eval() makes that of ByTrain anew."""
    for module in model.modules():
        if isinstance(module, Weighted):
            module.t = None
            module.table.clear()
            for name in ("kept", "weight"):
                module.__dict__.pop(name, None)
    model.train(model.training)


CACHES = [ByMethod, ByMethodOfBase, BySetDefault, ByProperty, ByCachedProperty, ByHasattr,
          ByFunction, ByTrain, ByReading]  # fmt: skip


@pytest.mark.parametrize("filled", ["not", "before", "after"])
@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("make", CACHES)
def test_a_cache_neither_serves_a_draw_nor_is_made_of_one(
    make: type[Weighted], asks: bool, filled: str
) -> None:
    first, last = make(), make()
    first.asks = last.asks = asks
    original = nn.Sequential(first, nn.Tanh(), last)
    x = torch.randn(2, 3)
    plain = copy.deepcopy(original).eval()
    original.eval()
    expected = plain(x)
    if filled == "before":
        assert torch.equal(original(x), expected)
    converted = bayesify.to_bbb(original, initial_std=math.exp(-1.5)).eval()
    if filled == "after":
        assert torch.equal(converted(x), expected)
    for training in (False, True, False):
        converted.train(training), plain.train(training)
        for seed in (1, 2):
            plain.load_state_dict(bayesify.draws(converted, seed=seed))
            _forget(plain)
            right = plain(x)
            with bayesify.one_draw(converted, seed=seed):
                assert torch.equal(converted(x), right)
                converted(x).sum().backward()
    assert torch.equal(converted.eval()(x), expected)
    for site in bayesify.posterior.sites(converted):
        assert site.mean.grad is not None
        assert site.raw.grad is not None


class Cell(nn.Module):
    """Keeps its state from step to step, of the shape of the input."""

    state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("state", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.state.shape != x.shape:
            self.state = torch.zeros_like(x)
        self.state = self.layer(x) * self.layer.weight.sum() + self.state
        return self.state


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Sequential(Cell())

    def forward(self, x: Tensor) -> Tensor:
        inner: Any = self.cell[0]
        inner.state = torch.zeros_like(inner.state)
        return torch.stack([self.cell(step) for step in x.unbind(1)])


def test_a_state_that_a_caller_sets_is_not_taken_for_one_of_its_shape() -> None:
    report = check(Steps(), lambda n: ((torch.randn(n, 4, 3),), {}), batches=(2, 3, 2))
    assert report.problems == []
    assert report.fx_owners == report.owners == 1  # the layer
    assert {line.partition(":")[0] for line in report.swapped} == {" Steps.forward"}


class Overwrites(nn.Module):
    """Reads a state only after it has set it."""

    state: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("state", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.state = None
        if self.state is None:
            self.state = torch.zeros_like(x)
        self.state = self.layer(x) * self.layer.weight.sum() + self.state
        return self.state


def test_a_buffer_that_is_set_before_it_is_read_is_no_condition() -> None:
    model = bayesify.to_bbb(Overwrites())
    for _ in range(3):
        model(torch.ones(2, 3))
    assert [r.rung for r in rungs(model) if r.owner == ""] == ["plain"]
    assert check(Overwrites(), lambda n: ((torch.randn(n, 3),), {})).problems == []


@dataclasses.dataclass
class Pair:
    first: Tensor
    second: Tensor


def remembers(method: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that keeps what a method gives in a dict of the module."""

    @functools.wraps(method)
    def remembering(self: Any, *args: Any) -> Any:
        if self.training:
            return method(self, *args)
        if not hasattr(self, "kept"):
            make_room(self)
        if args not in self.kept:
            keep(self, args, method(self, *args))
        return self.kept[args]

    return remembering


def make_room(module: Any) -> None:
    module.kept = {}


def keep(module: Any, key: Any, value: Any) -> None:
    module.kept[key] = value


class KeepsResults(nn.Module):
    """A table of results that are no tensors, but hold some."""

    def __init__(self, kind: type, asks: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.kind, self.asks = kind, asks

    @remembers
    def twice(self, times: int) -> Any:
        weight = self.layer.weight
        first, second = weight * times, weight + times
        if self.kind is Pair:
            return Pair(first, second)
        return first if self.kind is Tensor else self.kind([first, second])

    def forward(self, x: Tensor) -> Tensor:
        if self.asks and float(x.detach().sum()) > 1e9:
            return x
        found = self.twice(2)
        first = found.first if self.kind is Pair else found if self.kind is Tensor else found[0]
        return torch.mm(x, first)


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("kind", [Tensor, tuple, list, Pair])
def test_a_table_of_results_serves_no_draw(kind: type, asks: bool) -> None:
    model = bayesify.to_bbb(KeepsResults(kind, asks)).eval()
    x = torch.randn(2, 3)
    at_the_means = model(x)
    with bayesify.one_draw(model, seed=1):
        drawn = model(x)
    weight = bayesify.draws(model, seed=1)["layer.weight"]
    assert torch.equal(drawn, x @ (weight * 2))
    with bayesify.one_draw(model, seed=2):
        assert not torch.equal(model(x), drawn)
    assert torch.equal(model(x), at_the_means)
    fresh = bayesify.to_bbb(KeepsResults(kind, asks)).eval()
    with bayesify.one_draw(fresh, seed=1):
        fresh(x)
    assert torch.equal(fresh(x), x @ (fresh.get_parameter("layer.weight") * 2))


def test_a_value_whose_making_cannot_be_followed_is_not_said_to_be_made_of_the_module() -> None:
    lines = list(dis.get_instructions(compile("", "none", "exec")))
    assert not assignments._is_made_of(frozenset(("self",)), lines, 0, 0)
