"""Examples: fake tensors, metadata without data, on which a trace computes what a forward gives."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import torch_private
from ..torch_private import DeviceContext, FakeTensor, FakeTensorMode, device_constructors
from .active import ACTIVE
from .arguments import Outline
from .objects import TracedObject
from .trace_context import paused
from .values import TracedNumber, TracedParts, TracedSize, TracedTensor, TraceFailure

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


class ExampleRunner:
    """The examples of one trace, and what functions give on them.

    Args:
        fake_mode: In which they live; None: a new one.
    """

    def __init__(self, fake_mode: FakeTensorMode | None) -> None:
        self.fake_mode = fake_mode or Examples(allow_non_fake_inputs=True)
        self._known: dict[int, tuple[Tensor, Tensor]] = {}
        self._handing_on = False
        modes = [m for m in torch_private.function_mode_stack() if isinstance(m, DeviceContext)]
        self._device = modes[-1].device if modes else None

    def of(self, tensor: Tensor) -> Tensor:
        """A fake tensor with the metadata of a real one."""
        if isinstance(tensor, FakeTensor) and tensor.fake_mode is self.fake_mode:
            return tensor
        known = self._known.get(id(tensor))
        if known is None:
            # a sharded parameter has its global shape
            sharded = hasattr(tensor, "full_tensor")
            kinds = (Tensor, nn.Parameter, nn.Buffer, Outline, FakeTensor)  # that of an export
            plain = type(tensor) in kinds or sharded
            if tensor.layout != torch.strided or not plain:
                raise TraceFailure(f"a {type(tensor).__name__} of layout {tensor.layout}")
            with torch_private.DisableTorchFunction(), paused():
                example = torch.empty_strided(
                    tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype,
                    device=tensor.device, requires_grad=tensor.requires_grad,
                )  # fmt: skip
            known = self._known[id(tensor)] = (tensor, example)
        return known[1]

    def known(self, tensor: Tensor) -> Tensor | None:
        """The example of a real tensor, if one was made."""
        known = self._known.get(id(tensor))
        return None if known is None else known[1]

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run ``func`` on examples: metadata only, no data and no side effect."""
        args, kwargs = self.inside((args, kwargs))
        if self._device is not None and func in device_constructors():
            if kwargs.get("device") is None:  # `with torch.device(...)`, which acts when it runs
                kwargs["device"] = self._device
        with torch_private.DisableTorchFunction(), paused():
            return func(*args, **kwargs)

    @contextmanager
    def handing_on(self) -> Iterator[None]:
        """Objects among the arguments are allowed here, as copies that hold examples."""
        self._handing_on = True
        try:
            yield
        finally:
            self._handing_on = False

    def inside(self, value: Any) -> Any:
        """``value`` with an example for each tensor, and a number for each traced one."""
        kind = type(value)
        if kind is TracedTensor:
            return value.example
        if kind is TracedObject:
            if not self._handing_on:
                raise TraceFailure("it gives an object to a function of torch")
            return value.__dict__["example"]
        if isinstance(value, TracedNumber):
            return value.value
        if isinstance(value, Tensor):
            return self.of(value)
        if kind in (TracedSize, torch.Size):  # a slice of the one is the other
            return torch.Size(v.value if isinstance(v, TracedNumber) else v for v in value)
        if kind is functools.partial:
            return _partial_of(value, self.inside)
        if kind in (tuple, TracedParts):
            return tuple(self.inside(v) for v in tuple.__iter__(value))
        if kind is list:
            return [self.inside(v) for v in value]
        if kind is slice:
            return slice(*(self.inside(v) for v in (value.start, value.stop, value.step)))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return kind(*(self.inside(v) for v in value))
        if isinstance(value, dict):
            copy = {k: self.inside(v) for k, v in value.items()}
            if kind is dict:
                return copy
            return kind(**copy) if dataclasses.is_dataclass(kind) else kind(copy)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = [f.name for f in dataclasses.fields(value) if f.init]
            return kind(**{f: self.inside(getattr(value, f)) for f in fields})
        return value


def _partial_of(value: Any, convert: Callable[[Any], Any]) -> Any:
    return functools.partial(convert(value.func), *convert(value.args), **convert(value.keywords))
