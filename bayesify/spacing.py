"""Sigmas that a half precision cannot hold: below the distance of its neighbouring numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

_LISTED = 3


class Spread(NamedTuple):
    """Of one tensor: its name, sigma and root mean square, and the dtype of its draws."""

    name: str
    std: float
    rms: float
    dtype: torch.dtype


def spacing(magnitude: float, dtype: torch.dtype) -> float:
    """Distance between the numbers of a dtype around a magnitude.

    >>> spacing(1.0, torch.bfloat16)
    0.0078125
    """
    info = torch.finfo(dtype)
    _, exponent = math.frexp(max(abs(magnitude), info.tiny))
    return math.ldexp(info.eps, exponent - 1)


def below_spacing(spreads: Iterable[Spread]) -> tuple[str, ...]:
    """What to tell of half precision tensors whose sigma is below the spacing; nothing of none.

    Draws rounded to steps of that distance spread by 1.04 sigma where sigma is one step, by 1.14
    where it is half of one, and by 0.01 where it is a tenth.
    """
    warnings = []
    found: dict[torch.dtype, list[Spread]] = {}
    for each in spreads:
        if each.dtype.itemsize < 4 and each.std < spacing(each.rms, each.dtype):
            found.setdefault(each.dtype, []).append(each)
    for dtype, tensors in found.items():
        shown = ", ".join(
            f"{t.name}: {t.std:.2g} against {spacing(t.rms, dtype):.2g}" for t in tensors[:_LISTED]
        )
        more = f", and {len(tensors) - _LISTED} more" if len(tensors) > _LISTED else ""
        kind = str(dtype).removeprefix("torch.")
        warnings.append(
            f"Sigma is below the spacing of {kind} numbers in {len(tensors)} "
            f"tensor{'s' if len(tensors) > 1 else ''} ({shown}{more}): many draws of a weight "
            "equal its mean, and their spread is not sigma. Keep the parameters in float32 and "
            "compute under torch.autocast, or take a larger sigma: "
            f"initial_std=RelativeStd({_enough(dtype)}) or more."
        )
    return tuple(warnings)


def _enough(dtype: torch.dtype) -> str:
    """A sigma over root mean square that is never below the spacing, of one digit."""
    eps = torch.finfo(dtype).eps
    digit = 10.0 ** math.floor(math.log10(eps))
    return f"{math.ceil(eps / digit) * digit:.1g}"
