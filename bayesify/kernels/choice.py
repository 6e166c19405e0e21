"""Whether draws on a device are made by Triton kernels."""

from __future__ import annotations

import functools
import warnings

import torch


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator] # no trace looks into it
def by_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on ``device``; else plain torch makes the same numbers."""
    if device.type != "cuda":
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return _works(index)


@functools.cache
def _works(index: int) -> bool:
    """Found out with one small draw: Triton may lack a compiler, or support of the device."""
    try:
        from . import triton_draw
    except ImportError:
        return False  # not part of every build of torch
    try:
        triton_draw.fill_normal(torch.empty(8, device=f"cuda:{index}"), 0, 0)
    except Exception as error:
        warnings.warn(
            f"Triton does not work on cuda:{index} ({type(error).__name__}: {error}). Draws are "
            "made by plain torch there: the same numbers, slower.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
