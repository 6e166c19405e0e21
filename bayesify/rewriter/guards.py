"""What a traced method saw of plain attributes, and whether it still holds."""

from __future__ import annotations

import contextvars
import dataclasses
import decimal
import enum
import fractions
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.compiler import is_compiling as compiling

from .. import torch_private

INTERNAL = {
    "_parameters", "_buffers", "_modules", "_bayesify", "__dict__", "__class__",
    "_non_persistent_buffers_set", "_state_dict_hooks", "_load_state_dict_pre_hooks",
    "_backward_hooks", "_forward_hooks", "_forward_pre_hooks", "_backward_pre_hooks",
}  # fmt: skip

HOOKS = {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"}

PRIMITIVES = (
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout,
    torch.memory_format, enum.Enum, type(Ellipsis), range, decimal.Decimal, fractions.Fraction,
    np.number, np.bool_, np.datetime64, np.dtype,
)  # fmt: skip
"""What never changes, so that it may stand in a graph."""


MISSING: Any = type("Missing", (), {"__repr__": lambda self: "absent"})()


@dataclasses.dataclass(frozen=True)
class Outside:
    """Something that a traced forward read outside of its module, such as a global."""

    get: Callable[[str, Any], Any]
    name: str
    value: Any
    holder: Any
    plain: bool  # compared by value; else it must be the very object
    compiles: bool = True  # whether torch.compile can compare it

    def holds(self) -> bool:
        if compiling():
            if not self.compiles or isinstance(self.holder, dict | contextvars.ContextVar):
                return True  # torch.compile cannot ask them for a default
            found = getattr(self.holder, self.name, MISSING)
        else:
            found = self.get(self.name, MISSING)
        return found is self.value or (self.plain and alike(found, self.value))


@dataclasses.dataclass(frozen=True)
class Guard:
    """A plain attribute of the module or of one below it, as the traced forward saw it.

    Of two kinds it is of no attribute: of "types", whose ``value`` are (path, name, dtype, device,
    requires_grad) of parameters and buffers, and of "outside", whose are :class:`Outside`.
    """

    path: tuple[str, ...]
    name: str
    value: Any
    kind: str
    """equal, same, class, keys (of _modules and the like), shape (of a buffer), types, outside"""

    def holds(self, owner: nn.Module) -> bool:
        """Whether a call may run code that was traced under it.

        Asked at every call, also by torch.compile, which turns the answer into guards of its own.
        """
        if self.kind == "outside":
            for entry in self.value:
                same = not compiling() and entry.get(entry.name, MISSING) is entry.value
                if not same and not entry.holds():
                    return False
            return True
        if self.kind == "types":
            with torch_private.DisableTorchFunction():  # the fallback around it answers with a draw
                return all(_as_it_was(owner, *entry) for entry in self.value)
        module: Any = owner
        for part in self.path:
            module = module._modules.get(part)
            if module is None:
                return False
        if self.kind == "keys":
            return bool(tuple(module.__dict__[self.name]) == self.value)
        if self.kind == "shape":
            buffer = module._buffers.get(self.name)
            return buffer is not None and bool(tuple(buffer.shape) == self.value)
        found = held(module, self.name)
        if self.kind == "class":
            found = getattr(type(module), self.name, MISSING) if found is MISSING else MISSING
        if self.kind == "same":
            return found is self.value
        return alike(found, self.value)


def alike(a: Any, b: Any) -> bool:
    """Whether a forward cannot tell two plain values apart: True is not 1, nor 0.0 -0.0."""
    kind = type(a)
    if kind is not type(b):
        return False
    if kind in (bool, int, str, type(None)):
        return bool(a == b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return alike(list(a.items()), list(b.items()))
    if isinstance(a, (float, np.floating)):
        return bool(float_key(a) == float_key(b))
    if isinstance(a, (complex, np.complexfloating, decimal.Decimal)):
        return repr(a) == repr(b)
    return bool(a == b)


def float_key(value: Any) -> Any:
    """What is equal for floats that a forward cannot tell apart: nan is nan, 0.0 is not -0.0."""
    return value if value and value == value else str(value)


def _as_it_was(
    module: Any, path: tuple[str, ...], name: str, dtype: Any, device: Any, requires_grad: bool
) -> bool:
    for part in path:
        module = module._modules.get(part)
        if module is None:
            return False
    tensor = module._parameters.get(name)
    if tensor is None:
        tensor = module._buffers.get(name)
    return tensor is not None and bool(
        tensor.dtype == dtype and tensor.device == device and tensor.requires_grad == requires_grad
    )


def held(module: nn.Module, name: str) -> Any:
    """What a module holds under a name, whether plain, a parameter, a buffer or a child."""
    own = module.__dict__
    for place in (own, own["_parameters"], own["_buffers"], own["_modules"]):
        if name in place:  # torch 2.11's compiler cannot compare a number with MISSING by "is"
            return place[name]
    return MISSING


def plain(value: Any, depth: int = 0) -> bool:
    """Whether ``value`` is built of immutable primitives and small containers of them."""
    if isinstance(value, PRIMITIVES):
        return True
    if depth > 4:
        return False
    if type(value) in (tuple, list, set, frozenset, torch.Size) or (
        isinstance(value, tuple) and hasattr(value, "_fields")
    ):
        return len(value) <= 256 and all(plain(v, depth + 1) for v in value)
    if type(value) is dict:
        return len(value) <= 256 and all(
            plain(k, depth + 1) and plain(v, depth + 1) for k, v in value.items()
        )
    if isinstance(value, slice):
        return plain((value.start, value.stop, value.step), depth + 1)
    return False


def holds_tensor(value: Any) -> bool:
    items = value if isinstance(value, list | tuple) else (value,)
    return any(isinstance(v, Tensor) for v in items)


def copy_plain(value: Any) -> Any:
    if type(value) in (list, set):
        return type(value)(copy_plain(v) for v in value) if type(value) is list else set(value)
    if type(value) is dict:
        return {k: copy_plain(v) for k, v in value.items()}
    return value
