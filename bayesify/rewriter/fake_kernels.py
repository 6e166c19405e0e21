"""Operations whose fake kernel refuses dtypes that the real one takes."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

_NARROW = (torch.bfloat16, torch.float16)
_GROUPED = getattr(torch.ops.aten, "_grouped_mm", None)  # experts of a mixture


class ExampleMode(FakeTensorMode):
    """A fake mode in which a model may run that runs on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _GROUPED is None or func is not _GROUPED.default or args[0].dtype in _NARROW:
            return super().__torch_dispatch__(func, types, args, kwargs)
        a, b, offsets, _, dtype = (*args, None, None, None)[:5]
        given = kwargs or {}
        offsets, dtype = given.get("offs", offsets), given.get("out_dtype", dtype) or a.dtype
        if a.dim() != b.dim():
            groups = ()
        else:
            groups = (a if a.dim() == 3 else offsets).shape[:1]
        with self:
            return a.new_empty((*groups, a.shape[-2], b.shape[-1]), dtype=dtype)
