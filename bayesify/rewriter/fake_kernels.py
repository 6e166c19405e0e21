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
        a, b, *rest = args
        dtype = (kwargs or {}).get("out_dtype") or a.dtype
        with self:
            result = func(a.bfloat16(), b.bfloat16(), *rest, **(kwargs or {}))
            return result.to(dtype).contiguous()  # it pads the rows of the narrower dtype
