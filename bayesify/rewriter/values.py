"""Traced values: tensors and numbers that record what is done to them and still answer questions.

A :class:`TracedTensor` is a tensor by ``isinstance`` with an example (a fake tensor: metadata, no
data) and an fx node. A number taken from its shape is a :class:`TracedInt`: arithmetic on it stays
symbolic; whoever asks for its value (``bool``, ``range``, ``==``) gets the example's, and the
recorder notes that the graph holds for this shape only.
"""

from __future__ import annotations

import dis
import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from .. import torch_private
from .active import ACTIVE

Dims = frozenset[tuple[int, int]] | None
"""Which (tensor argument, dimension) pairs a number depends on; None: it cannot be said."""


FREEZES = "it changes whether a tensor has a gradient"


class TraceFailure(BaseException):
    """This forward cannot become a graph; the message says why.

    No Exception: a forward's own ``except Exception`` must not swallow it. The trace that it ends
    knows of it all the same, since a ``finally`` may put another error in its place.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        if ACTIVE.tracer is not None:
            ACTIVE.tracer.note_error(self)


class StateFound(TraceFailure):
    """What was hidden as a cache is state: the trace must start again and see it."""


class ForeignTensor(TraceFailure):
    """A module met a tensor of a trace around it, that its caller has set: the caller's ends."""

    def __init__(self, tensor: TracedTensor) -> None:
        super().__init__("a submodule reads a tensor that it was given as an attribute")
        self.recorder = tensor.recorder


class Recorder(Protocol):
    """What traced values need of the tracer."""

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    def note_dims(self, dims: Dims) -> None: ...

    def number(self, target: Any, args: tuple[Any, ...], method: bool = False) -> fx.Node: ...


class TracedTensor(torch.Tensor):
    """A tensor argument, or a result, of the forward being traced."""

    example: Tensor
    node: fx.Node
    recorder: Recorder
    argument: int | None

    @staticmethod
    def __new__(
        cls, example: Tensor, node: fx.Node, recorder: Recorder, argument: int | None = None
    ) -> TracedTensor:
        if example.layout != torch.strided:
            raise TraceFailure(f"a tensor of layout {example.layout}")
        self: TracedTensor = torch_private.make_wrapper_subclass(
            cls,
            example.shape,
            strides=example.stride(),
            dtype=example.dtype,
            device=example.device,
            requires_grad=example.requires_grad,
        )
        self.__dict__.update(example=example, node=node, recorder=recorder, argument=argument)
        return self

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # user code looks for what belongs to an array by its class
        return torch.Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in _tensors_in((args, kwargs)):
            return value.recorder.record(func, args, kwargs or {})
        raise TraceFailure(f"{func} on a traced value that it does not name")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise TraceFailure(f"{func} was reached by code that torch.fx cannot see")


def _tensors_in(value: Any) -> Iterator[TracedTensor]:
    if type(value) is TracedTensor:
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)


def _fix(name: str) -> Callable[..., Any]:
    """A method that answers with the example's value and notes that the graph depends on it."""

    def method(self: Any, *args: Any) -> Any:
        self.recorder.note_dims(self.dims)
        return getattr(operator, name)(self.value, *(_fixed(a) for a in args))

    return method


def _fixed(value: Any) -> Any:
    if isinstance(value, TracedNumber):
        value.recorder.note_dims(value.dims)
        return value.value
    return value


def _arithmetic(target: Callable[..., Any], *, swap: bool = False) -> Callable[..., Any]:
    """A method that computes the example's value and a node, and asks for no value.

    The result depends on the dimensions of all operands: a branch on it guards on all of them.
    """

    def method(self: Any, *others: Any) -> Any:
        if any(
            type(o) not in (int, float, bool) and not isinstance(o, TracedNumber) for o in others
        ):
            return NotImplemented
        operands = (*others, self) if swap else (self, *others)
        value = target(*(o.value if isinstance(o, TracedNumber) else o for o in operands))
        dims: Dims = frozenset()
        for operand in operands:
            if isinstance(operand, TracedNumber):
                dims = None if dims is None or operand.dims is None else dims | operand.dims
        kind = TracedInt if isinstance(value, int) else TracedFloat
        return kind(value, self.recorder, dims, lambda: self.recorder.number(target, operands))

    return method


class TracedNumber:
    """Shared behaviour of :class:`TracedInt` and :class:`TracedFloat`.

    They derive from torch.SymInt and torch.SymFloat so that torch's argument parser takes them;
    nothing of those classes is used.
    """

    value: Any
    recorder: Recorder
    dims: Dims

    def __init__(
        self, value: Any, recorder: Recorder, dims: Dims, make_node: Callable[[], fx.Node]
    ) -> None:
        self.value = value
        self.recorder = recorder
        self.dims = dims
        self._make_node = make_node
        self._recorded: fx.Node | None = None
        self.source: Any = None

    def recorded(self) -> fx.Node:
        """The node that computes it."""
        if self._recorded is None:
            self._recorded = self._make_node()
        return self._recorded

    @property
    def node(self) -> Any:
        """What torch's own code, in C, asks a torch.SymInt for."""
        raise TraceFailure("a size reaches code of torch that torch.fx cannot see")

    def _get_int(self) -> int:
        return int(_fixed(self))

    __add__, __radd__ = _arithmetic(operator.add), _arithmetic(operator.add, swap=True)
    __sub__, __rsub__ = _arithmetic(operator.sub), _arithmetic(operator.sub, swap=True)
    __mul__, __rmul__ = _arithmetic(operator.mul), _arithmetic(operator.mul, swap=True)
    __mod__, __rmod__ = _arithmetic(operator.mod), _arithmetic(operator.mod, swap=True)
    __pow__, __rpow__ = _arithmetic(operator.pow), _arithmetic(operator.pow, swap=True)
    __floordiv__ = _arithmetic(operator.floordiv)
    __rfloordiv__ = _arithmetic(operator.floordiv, swap=True)
    __truediv__ = _arithmetic(operator.truediv)
    __rtruediv__ = _arithmetic(operator.truediv, swap=True)
    __neg__, __abs__, __pos__ = (
        _arithmetic(operator.neg),
        _arithmetic(operator.abs),
        _arithmetic(operator.pos),
    )
    __eq__, __ne__, __lt__ = _fix("eq"), _fix("ne"), _fix("lt")
    __le__, __gt__, __ge__ = _fix("le"), _fix("gt"), _fix("ge")
    __and__, __or__, __xor__ = _fix("and_"), _fix("or_"), _fix("xor")
    __lshift__, __rshift__ = _fix("lshift"), _fix("rshift")

    def __hash__(self) -> int:
        return hash(_fixed(self))

    def __bool__(self) -> bool:
        return bool(_fixed(self))

    def __int__(self) -> int:
        return int(_fixed(self))

    def __float__(self) -> float:
        return float(_fixed(self))

    def __round__(self, digits: int | None = None) -> Any:
        return round(_fixed(self), digits)

    def __floor__(self) -> int:
        return int(_fixed(self) // 1)

    def __ceil__(self) -> int:
        return int(-(-_fixed(self) // 1))

    def __trunc__(self) -> int:
        return int(_fixed(self))

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __format__(self, spec: str) -> str:
        return format(_fixed(self), spec)

    def __str__(self) -> str:
        return str(_fixed(self))

    def __repr__(self) -> str:
        return repr(_fixed(self))

    def bit_length(self) -> int:
        return int(_fixed(self)).bit_length()

    def is_integer(self) -> bool:
        return float(_fixed(self)).is_integer()


class TracedInt(TracedNumber, torch.SymInt):  # type: ignore[misc, override]
    """An integer taken from a shape."""

    __hash__ = TracedNumber.__hash__

    def __index__(self) -> int:
        return int(_fixed(self))

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # user code asks isinstance(size, int)
        return int


class TracedFloat(TracedNumber, torch.SymFloat):  # type: ignore[misc, override]
    """A float computed from a shape."""

    __hash__ = TracedNumber.__hash__

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return float


class TracedSize(tuple[Any, ...]):
    """A traced tensor's shape: a torch.Size whose members are :class:`TracedInt`."""

    __slots__ = ()

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return torch.Size

    def numel(self) -> Any:
        total: Any = 1
        for item in self:
            total = total * item
        return total

    def __getitem__(self, index: Any) -> Any:
        item = tuple.__getitem__(self, index)
        return TracedSize(item) if isinstance(index, slice) else item

    def __add__(self, other: Any) -> TracedSize:
        return TracedSize((*self, *other))

    def __radd__(self, other: Any) -> TracedSize:
        return TracedSize((*other, *self))


class TracedParts(tuple[Any, ...]):
    """The result of split, chunk or unbind, whose length depends on a shape.

    Unpacking into names (``q, k, v = qkv.unbind(0)``) proves the length by itself; iterating or
    asking for the length makes the graph depend on the shape.
    """

    recorder: Recorder
    node: fx.Node
    kind: type

    @staticmethod
    def make(items: tuple[Any, ...], recorder: Recorder, node: fx.Node, kind: type) -> TracedParts:
        self = TracedParts(items)
        self.recorder, self.node, self.kind = recorder, node, kind
        return self

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return self.kind

    def __iter__(self) -> Iterator[Any]:
        if not unpacks_into_names():
            self.recorder.note_dims(None)
        return tuple.__iter__(self)

    def __len__(self) -> int:
        self.recorder.note_dims(None)
        return tuple.__len__(self)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) or index < 0:
            self.recorder.note_dims(None)
        return tuple.__getitem__(self, index)


_MACHINERY = (
    "rewriter/values.py", "rewriter/recording.py", "torch/overrides.py", "torch/_tensor.py",
)  # fmt: skip


def unpacks_into_names() -> bool:
    """Whether the calling user code is executing ``a, b, ... = this``."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.replace("\\", "/").endswith(_MACHINERY) and frame.f_back:
        frame = frame.f_back
    opcode = frame.f_code.co_code[frame.f_lasti]
    return dis.opname[opcode].startswith("UNPACK_SEQUENCE")
