"""Objects among the arguments that no graph takes apart: handed to submodules as they are.

A cache of keys and values is one. It is an input of the graph, and live: what a submodule does to
it happens at every call. A forward that reads or changes one itself takes the fallback.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import numbers
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx, nn

from .guards import PRIMITIVES
from .values import TraceFailure

_HEAP_TYPE = 1 << 9  # a class made by Python code
_OTHERS = (
    list, tuple, dict, set, frozenset, str, bytes, numbers.Number, BaseException, nn.Module, Tensor,
    type, types.ModuleType,
)  # fmt: skip


def may_be_handed_on(value: Any) -> bool:
    """Whether a value is an ordinary object of a class of Python's."""
    cls = type(value)
    return (
        bool(cls.__flags__ & _HEAP_TYPE)
        and hasattr(value, "__dict__")
        and not isinstance(value, _OTHERS)
        and not callable(value)
        and not hasattr(cls, "__next__")
    )


_OF_ANY_MODULE = {*vars(nn.Module())}


def may_change(value: Any, seen: dict[int, Any] | None = None) -> bool:
    """Whether a call of a callable may change it, or what it is bound to or closes over.

    A graph that named it would fill the one of the trace at every call, with examples the first
    time. What torch's own classes hold stays.
    """
    seen = {} if seen is None else seen
    if id(value) in seen or isinstance(value, (*PRIMITIVES, type, types.ModuleType, Tensor)):
        return False
    seen[id(value)] = value
    parts: list[Any] = []
    if isinstance(value, types.MethodType | types.BuiltinFunctionType):
        parts = [value.__self__]
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # not filled yet
                parts.append(cell.cell_contents)
        parts += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    elif isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, tuple | frozenset):
        parts = list(value)
    elif isinstance(value, nn.Module):
        if next(value.buffers(), None) is not None:
            return True
        return any(vars(m).keys() - _OF_ANY_MODULE for m in value.modules() if not _of_torch(m))
    elif not _of_torch(value):
        return not callable(value) or bool(getattr(value, "__dict__", None))
    return any(may_change(part, seen) for part in parts)


def _of_torch(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "torch"


_COPIED = (*PRIMITIVES, list, tuple, dict, set, frozenset, type, types.FunctionType)


class TracedObject:
    """Stands for such an object while a method is traced.

    Attributes:
        example: A copy, with examples for tensors, on which submodules are evaluated.
        node: What the graph calls it.
    """

    def __init__(self, example: Any, node: fx.Node) -> None:
        self.__dict__.update(example=example, node=node)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # user code asks what it is
        return type(self.__dict__["example"])

    def __getattr__(self, name: str) -> Any:
        _refuse(self, f"reads {name!r} of")


def _refuse(value: Any, what: str) -> Any:
    kind = type(value.__dict__["example"]).__name__
    raise TraceFailure(f"it {what} an argument of type {kind}")


def _refusing(name: str) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: _refuse(self, f"calls {name} of")


for _name in (
    "__setattr__ __delattr__ __bool__ __len__ __iter__ __contains__ __getitem__ __setitem__ "
    "__delitem__ __call__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __hash__ __enter__ __exit__ "
    "__int__ __float__ __index__ __add__ __radd__ __mul__ __rmul__ __sub__ __rsub__ __matmul__ "
    "__rmatmul__ __str__ __repr__ __format__ __reduce_ex__ __dir__"
).split():
    setattr(TracedObject, _name, _refusing(_name))


def example_of(value: Any, example: Callable[[Tensor], Tensor]) -> Any:
    """A copy of an object with examples for tensors.

    Raises:
        TraceFailure: It cannot be copied, or holds what should be drawn.
    """
    kind = type(value).__name__
    memo: dict[int, Any] = {}
    for part in _parts(value):
        if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
            memo[id(part)] = example(part)
        elif not isinstance(part, _COPIED) and not may_be_handed_on(part):
            # it should be drawn, is large, or is shared with others
            raise TraceFailure(f"an argument of type {kind} holds a {type(part).__name__}")
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:
        raise TraceFailure(f"an argument of type {kind} cannot be copied") from error


def _parts(value: Any) -> Iterator[Any]:
    """Everything that an object holds, as far as containers and attributes lead."""
    seen: dict[int, Any] = {}
    stack = [value]
    while stack:
        part = stack.pop()
        if id(part) in seen:
            continue
        seen[id(part)] = part
        yield part
        if isinstance(part, Tensor | nn.Module | type | types.ModuleType | types.FunctionType):
            continue
        if isinstance(part, dict):
            stack.extend(part.values())
        elif isinstance(part, list | tuple | set | frozenset):
            stack.extend(part)
        stack.extend(getattr(part, "__dict__", {}).values())
