"""Numbers as arguments: what counts as one, and the Python number that it becomes."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from .errors import ArgumentError


def whole(
    what: str,
    value: Any,
    expected: str,
    *,
    least: int = 1,
    below: float = math.inf,
    kind: type[ArgumentError] = ArgumentError,
) -> int:
    """``value`` as an int: of Python's own, or of numpy's of any size.

    A bool is no number, nor is an array or tensor, also of no dimension.

    Args:
        what: Its name in the message.
        value: What was given.
        expected: What it must be, in words.
        least: The smallest number that it may be.
        below: A number above the largest.
        kind: Of the error.

    Raises:
        ArgumentError: It is not such a number.
    """
    if isinstance(value, Integral) and not isinstance(value, bool):
        number = int(value)
        if least <= number < below:
            return number
    raise kind(f"{what} must be {expected}, got {value!r}{_hint(value)}.")


def real(
    what: str,
    value: Any,
    expected: str,
    fits: Callable[[float], bool],
    *,
    kind: type[ArgumentError] = ArgumentError,
) -> float:
    """``value`` as a float, where it is a number as for :func:`whole`, or one with a fraction.

    Args:
        what: Its name in the message.
        value: What was given.
        expected: What it must be, in words.
        fits: Whether it is; NaN must not be.
        kind: Of the error.

    Raises:
        ArgumentError: It is not such a number.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        number = _float(value)
        if fits(number):
            return number
    raise kind(f"{what} must be {expected}, got {value!r}{_hint(value)}.")


def count(
    what: str, value: Any, *, least: int = 1, kind: type[ArgumentError] = ArgumentError
) -> int:
    """``value`` as a number of things."""
    expected = "a whole number above 0" if least == 1 else f"a whole number of at least {least}"
    return whole(what, value, expected, least=least, kind=kind)


def seed_number(seed: Any) -> int:
    """``seed`` as what all generators take."""
    return whole("seed", seed, "an integer in [0, 2**63)", least=0, below=1 << 63)


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # of an int
        return math.inf if value > 0 else -math.inf


def positive(value: float) -> bool:
    """Finite and above 0."""
    return 0.0 < value < math.inf


def not_negative(value: float) -> bool:
    """Finite and at least 0."""
    return 0.0 <= value < math.inf


def _hint(value: Any) -> str:
    """What to do with a tensor or an array of one number."""
    is_array = hasattr(value, "__len__") and hasattr(value, "item")  # numpy's scalars have no len
    return " (take the number out of it: value.item())" if is_array else ""
