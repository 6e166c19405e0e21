"""The fake mode in which the examples of a trace are computed."""

from __future__ import annotations

from typing import Any

import torch

from ..torch_private import FakeTensorMode
from .active import ACTIVE
from .values import TraceFailure

_NARROW = (torch.bfloat16, torch.float16)
_GROUPED = getattr(torch.ops.aten, "_grouped_mm", None)  # experts of a mixture


class Examples(FakeTensorMode):
    """Computes examples, and refuses operations that a traced method calls unseen.

    It is on all along. What torch's functions do passes by the tracer, which runs them on examples
    while it is paused; what arrives here otherwise came of compiled code that calls operations by
    itself, and would be missing in the graph.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if ACTIVE.tracer is not None:
            if func is torch.ops.aten.lift_fresh.default:  # torch.from_numpy and its like
                return ACTIVE.tracer.made_of_data(args[0])
            raise TraceFailure(f"{func} was reached by code that torch.fx cannot see")
        if _GROUPED is not None and func is _GROUPED.default and args[0].dtype not in _NARROW:
            return self._grouped(*args, **(kwargs or {}))
        return self.dispatch(func, types, args, kwargs or {})

    def _grouped(
        self, a: Any, b: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
    ) -> Any:
        """The fake kernel refuses dtypes and alignments that the real one takes on the CPU."""
        if a.dim() != b.dim():
            groups = ()
        else:
            groups = (a if a.dim() == 3 else offs).shape[:1]
        with self:
            return a.new_empty((*groups, a.shape[-2], b.shape[-1]), dtype=out_dtype or a.dtype)
