"""The C library of native.c: noise, draws and KL divergences on the CPU, in one pass each.

It is compiled when bayesify is installed, where there is a compiler. Without it plain torch does
the same work (:mod:`.cpu_draw`), with the noise of torch's generators, and one warning says so.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import warnings
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..gaussian import HELD

Prior = tuple[Tensor | float, Tensor | float]
"""Mean and variance, each a number or a tensor of the parameter's shape."""

MISSING = (
    "bayesify's C library is not there: draws on the CPU are made by plain torch, several times "
    "slower and with other numbers for a seed. In a checkout, pip install -e . compiles it, with "
    "a C compiler such as gcc."
)

FILE = "_native.dll" if os.name == "nt" else "_native.so"
"""As in setup.py. It has no suffix of one Python: each can load it."""

INTERFACE = 2
"""Of native.c: a library with other arguments would crash, or be wrong."""

_MASK = (1 << 64) - 1


class _KL(ctypes.Structure):
    _fields_ = (
        ("mean", ctypes.c_void_p), ("logvar", ctypes.c_void_p),
        ("prior_mean", ctypes.c_void_p), ("prior_var", ctypes.c_void_p),
        ("one_mean", ctypes.c_float), ("one_var", ctypes.c_float), ("least", ctypes.c_float),
    )  # fmt: skip


class DrawRow(NamedTuple):
    """One tensor to draw: ``value = mean + std * noise`` and ``half = std * noise / 2``.

    All are contiguous float32 tensors of the CPU; what is None is not wanted.
    """

    mean: Tensor
    logvar: Tensor
    value: Tensor | None
    half: Tensor | None
    key: int


class KLRow(NamedTuple):
    """One tensor whose KL divergence is wanted; with ``held``, that of log variances from HELD."""

    mean: Tensor
    logvar: Tensor
    prior: Prior
    held: bool = False


def there() -> bool:
    """Whether the library was compiled and can be loaded."""
    return _library() is not None


def fill_normal(tensor: Tensor, seed: int, key: int) -> None:
    """Fill a contiguous CPU tensor as :func:`.philox.fill_normal` does.

    The numbers are the same up to the rounding of logarithm, sine and cosine; where float64 is not
    asked for they have the same bits on all processors.
    """
    double, single = tensor.dtype is torch.float64, tensor.dtype is torch.float32
    made = tensor if double or single else torch.empty(tensor.shape, dtype=torch.float32)
    _loaded().bayesify_noise(
        made.data_ptr(), made.numel(), seed & _MASK, key & _MASK, int(double),
        torch.get_num_threads(),
    )  # fmt: skip
    if made is not tensor:
        tensor.copy_(made)


def draw(rows: Sequence[DrawRow], seed: int) -> None:
    """Draw all rows, with the noise of :func:`fill_normal`."""
    table, sizes = array("Q"), array("q")
    for mean, logvar, value, half, key in rows:
        table.extend((
            mean.data_ptr(), logvar.data_ptr(), 0 if value is None else value.data_ptr(),
            0 if half is None else half.data_ptr(), seed & _MASK, key & _MASK,
        ))  # fmt: skip
        sizes.append(mean.numel())
    _loaded().bayesify_draw(_at(table), _at(sizes), len(rows), torch.get_num_threads())


def kl(rows: Sequence[KLRow]) -> float:
    """Sum of the KL divergences of N(mean, e^logvar) from N(prior mean, prior variance)."""
    table = (_KL * len(rows))(
        *(
            _KL(row.mean.data_ptr(), row.logvar.data_ptr(), *_prior(*row.prior), _least(row.held))
            for row in rows
        )
    )
    sizes = array("q", [row.mean.numel() for row in rows])
    twice = _loaded().bayesify_kl(table, _at(sizes), len(rows), torch.get_num_threads())
    return 0.5 * float(twice)


def gradient(
    mean: Tensor, logvar: Tensor, prior: Prior, factor: float, grad: Tensor | None,
    by_mean: Tensor, by_logvar: Tensor, held: bool = False,
) -> None:  # fmt: skip
    """What a draw and ``factor`` times the KL divergence give mean and log variance.

    ``by_logvar``, which holds ``std * noise / 2``, becomes
    ``grad * std * noise / 2 + factor (e^logvar / v - 1) / 2``, and
    ``by_mean = grad + factor (mean - m) / v``; without ``grad`` only the terms of the KL. With
    ``held`` there is none of the KL at log variances below HELD.
    """
    _loaded().bayesify_gradient(
        mean.data_ptr(), logvar.data_ptr(), *_prior(*prior), _least(held),
        None if grad is None else grad.data_ptr(), by_mean.data_ptr(), by_logvar.data_ptr(),
        factor, mean.numel(), torch.get_num_threads(),
    )  # fmt: skip


def suits(tensor: Any) -> bool:
    """Whether this is a contiguous float32 tensor of the CPU, or no tensor."""
    return not isinstance(tensor, Tensor) or (
        tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous()
    )


def _prior(m: Tensor | float, v: Tensor | float) -> tuple[int | None, int | None, float, float]:
    """Places of tensors, and numbers, which count where there is no tensor."""
    place_m, one_m = (m.data_ptr(), 0.0) if isinstance(m, Tensor) else (None, m)
    place_v, one_v = (v.data_ptr(), 1.0) if isinstance(v, Tensor) else (None, v)
    return place_m, place_v, one_m, one_v


def _least(held: bool) -> float:
    return HELD if held else -math.inf


def _at(numbers: array[Any]) -> int:
    return numbers.buffer_info()[0]


def _loaded() -> Any:
    library = _library()
    assert library is not None
    return library


@functools.cache
def _library() -> Any:
    path = Path(__file__).with_name(FILE)
    if not path.exists():
        warnings.warn(MISSING, RuntimeWarning, stacklevel=2)
        return None
    try:
        library: Any = ctypes.CDLL(str(path))
    except OSError as error:  # compiled for another machine, say
        warnings.warn(
            f"bayesify's C library cannot be loaded ({error}): draws on the CPU are made by plain "
            "torch, slower and with other numbers for a seed. Installing bayesify anew compiles it "
            "for this machine.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    made = getattr(library, "bayesify_interface", lambda: 1)()
    if made != INTERFACE:
        warnings.warn(
            f"bayesify's C library is of another version (interface {made}, wanted "
            f"{INTERFACE}): draws on the CPU are made by plain torch, slower and with other "
            "numbers for a seed. Compile it anew: pip install -e . in a checkout.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    big, word, pointer = ctypes.c_int64, ctypes.c_uint64, ctypes.c_void_p
    library.bayesify_noise.argtypes = pointer, big, word, word, ctypes.c_int, big
    library.bayesify_draw.argtypes = pointer, pointer, big, big
    library.bayesify_kl.argtypes = pointer, pointer, big, big
    library.bayesify_kl.restype = ctypes.c_double
    number = ctypes.c_float
    library.bayesify_gradient.argtypes = (
        pointer, pointer, pointer, pointer, number, number, number, pointer, pointer, pointer,
        number, big, big,
    )  # fmt: skip
    for function in ("bayesify_noise", "bayesify_draw", "bayesify_gradient"):
        getattr(library, function).restype = None
    library.bayesify_use_threads_of.argtypes = (pointer,)
    library.bayesify_use_threads_of.restype = None
    library.bayesify_use_threads_of(_torchs_threads())
    if hasattr(os, "register_at_fork"):
        # threads do not outlive a fork, and this OpenMP would wait for them
        os.register_at_fork(after_in_child=functools.partial(library.bayesify_use_threads_of, None))
    return library


def _torchs_threads() -> int | None:
    """``GOMP_parallel`` of the OpenMP that torch has loaded; None: the library uses one thread.

    A second OpenMP would have threads of its own, and the two would wait for each other's cores.
    """
    if os.name == "nt":
        return None  # no handle of all that is loaded, and Microsoft's OpenMP has no such function
    found = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return None if found is None else ctypes.cast(found, ctypes.c_void_p).value
