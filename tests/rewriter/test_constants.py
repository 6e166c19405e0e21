"""Values that a forward makes or holds: what its graph does with them is what the original does."""

from __future__ import annotations

import decimal
import enum
import fractions
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_user_models import Model, randn
from torch import Tensor, nn
from torch.nn import functional as F

import bayesify
from bayesify.posterior import owner_state
from bayesify.rewriter.variants import rungs
from reference import check, functional_call, same


class Colour(enum.Enum):
    RED = "red"
    BLUE = object()


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Mode(str, enum.Enum):
    FAST = "fast"


class Flags(enum.Flag):
    A = enum.auto()
    B = enum.auto()


CONSTANTS: list[Any] = [
    *(kind(3) for kind in (
        np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64,
        np.float16, np.float32, np.float64, np.longdouble, np.complex64, np.complex128,
    )),
    -0.5 * np.log(2 * np.pi), np.float64("nan"), np.float32("inf"), np.float64(-0.0),
    np.bool_(True), np.str_("a'b"), np.bytes_(b"ab"), np.datetime64("2020-01-01"),
    np.timedelta64(3, "s"), np.dtype("float32"),
    decimal.Decimal("0.1"), decimal.Decimal("NaN"), fractions.Fraction(1, 3),
    Colour.RED, Level.HIGH, Mode.FAST, Flags.A | Flags.B,
    math.inf, -math.inf, math.nan, -0.0, 0.0, 1e308, 5e-324,
    2**63, -(2**63), 10**4000, True, False, None,
    complex(1, -0.0), complex(math.nan, math.inf),
    torch.bfloat16, torch.device("cpu"), torch.device("cuda", 1), torch.strided,
    torch.channels_last, torch.Size((2, 3)),
    "plain", "", "it's", 'say "no"', "two\nlines", "back\\slash", "{x}", "exit_context()",
    "ä\u2028\x00", "'''", "self", "a" * 300, b"b'\x00",
    slice(np.int64(1), None, Level.LOW), slice(None), ..., range(1, 9, 2),
    # before, copy.deepcopy of a member tries to make another, with a copy of its value
    *([Colour.BLUE] if sys.version_info >= (3, 11) else []),
    (1, np.float32(2), "x'"), [np.int64(1), [math.nan]], {"a'b": np.float64(1), 2: Colour.RED},
]  # fmt: skip


def weight_of(value: Any) -> float:
    """A number that tells any two of these constants apart."""
    return 1 + sum(ord(c) for c in f"{type(value).__name__} {value!r}"[:80]) % 101 / 50


class Takes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, value: Any, *, also: Any = None) -> Any:
        return self.layer(x) * weight_of(value) + weight_of(also)


@pytest.mark.parametrize("constant", CONSTANTS, ids=lambda c: f"{type(c).__name__} {c!r}"[:40])
def test_a_constant_that_a_forward_passes_along(constant: Any) -> None:
    class Passes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Takes()
            self.held = constant

        def forward(self, x: Tensor) -> Any:
            return self.inner(self.inner(x, constant), self.held, also=constant)

    model = Passes()
    converted = bayesify.to_bbb(model)
    x = torch.randn(3, 4)
    drawn = bayesify.draws(converted, seed=1)
    for _ in range(3):
        with bayesify.one_draw(converted, seed=1):
            assert same(converted(x), functional_call(model, drawn, (x,), {}))
    assert {r.rung for r in rungs(converted)} <= {"plain", "guided"}
    state = owner_state(converted)
    assert state is not None
    assert len(state.variants["forward"]) == 1


OPERATIONS: dict[str, Callable[[Any, Tensor], Any]] = {
    "log density": lambda self, x: -0.5 * np.log(2 * np.pi) * self.layer(x) ** np.int64(2),
    "numpy numbers": lambda self, x: (
        self.layer(x) * np.float32(0.5) + np.int64(2) - np.float64(0.25) * self.scale
    ),
    "numpy index": lambda self, x: self.layer(x)[..., np.int64(1) : np.int32(3)] * self.scale[:2],
    "numpy shape": lambda self, x: self.layer(x).reshape(-1, np.int64(2), np.prod([1, 2])),
    "infinite": lambda self, x: torch.full_like(x, -math.inf).logaddexp(self.layer(x)) + self.scale,
    "not a number": lambda self, x: (
        torch.nan_to_num(torch.full_like(x, math.nan), nan=2.0) * self.layer(x)
    ),
    "negative zero": lambda self, x: (
        torch.atan2(torch.full_like(x, -0.0), self.layer(x)) + self.scale
    ),
    "complex": lambda self, x: (self.layer(x) * complex(0.5, -0.0) + self.scale).abs(),
    "types and places": lambda self, x: (
        self.layer(x).to(torch.float64).to(torch.device("cpu"), torch.float32)
        + torch.zeros(4, layout=torch.strided, device=torch.device("cpu"))
    ).contiguous(memory_format=torch.contiguous_format),
    "index": lambda self, x: self.layer(x)[..., None, slice(0, 3)] * self.scale[:3],
    "strings": lambda self, x: (
        torch.einsum("bi,ij -> bj", x, self.layer.weight)
        + F.pad(self.scale, (1, -1), mode="constant", value=math.pi)
    ),
    "range": lambda self, x: self.layer(x)[:, list(range(0, 4, 2))] + self.scale[range(0, 4, 2)],
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_constant_among_the_arguments_of_an_operation(name: str) -> None:
    model = type("Uses", (Model,), {"forward": OPERATIONS[name]})()
    report = check(model, randn(4))
    assert report.problems == []
    assert report.swapped == []


@pytest.mark.parametrize(
    ("first", "second"),
    [(0.0, -0.0), (1.0, math.nan), (1, True), ([1.0], [True]), ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
     (np.float32(1), np.float64(1)), (math.inf, -math.inf)],
)  # fmt: skip
def test_a_graph_is_used_for_no_other_value(first: Any, second: Any) -> None:
    converted, model = bayesify.to_bbb(model := Takes()), model
    drawn = bayesify.draws(converted, seed=1)
    x = torch.randn(3, 4)
    for value in (first, second, first, second):
        with bayesify.one_draw(converted, seed=1):
            found = converted(x, value)
        assert same(found, functional_call(model, drawn, (x, value), {}))


@pytest.mark.parametrize("value", [math.nan, np.float32("nan"), [math.nan], -0.0])
def test_what_is_no_number_stays_the_same(value: Any) -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.fill = nn.Linear(4, 4), value

        def forward(self, x: Tensor, other: float) -> Any:
            return self.layer(x) * weight_of(self.fill) * weight_of(other)

    model = bayesify.to_bbb(Holds())
    for other in (math.nan, float("nan"), torch.nan):
        model(torch.randn(3, 4), other)
    state = owner_state(model)
    assert state is not None
    assert [v.rung for v in state.variants["forward"].values()] == ["plain"]


def test_a_module_whose_name_has_quotes() -> None:
    model = nn.Module()
    model.add_module('it\'s "a" layer', nn.Linear(4, 4))
    names = nn.Sequential()
    names.add_module('"', nn.Linear(4, 4))
    names.add_module("'", model._modules['it\'s "a" layer'])
    report = check(names, randn(4))
    assert report.problems == []
    assert report.swapped == []
