"""Operations whose fake kernel refuses dtypes that the real one takes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _in_bfloat16(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(operation)
    def run(mat_a: Tensor, mat_b: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dtype = kwargs.get("out_dtype") or mat_a.dtype
        if mat_a.dtype in (torch.bfloat16, torch.float16):
            return operation(mat_a, mat_b, *args, **kwargs)
        result = operation(mat_a.bfloat16(), mat_b.bfloat16(), *args, **kwargs)
        return result.to(dtype).contiguous()  # it pads the rows of the narrower dtype

    return run


STAND_INS: dict[Any, Callable[..., Any]] = {
    operation: _in_bfloat16(operation)
    for operation in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None))
    if operation is not None
}
"""What is run on examples in place of an operation."""
