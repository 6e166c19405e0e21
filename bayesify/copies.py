"""Deep copies of models, with the functions that close over them."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .rewriter.caches import tensors_in
from .rewriter.guards import INTERNAL


def copy_detached(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model that keeps results of its last call, without their graphs.

    A function that the model holds, as an attribute or a hook, and that refers to the model by its
    closure or its defaults, becomes one that refers to the copy: :func:`copy.deepcopy` keeps
    functions, so that the copy would go on to run the original.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        held = [value for name, value in module.__dict__.items() if name not in INTERNAL]
        for item in tensors_in([*held, *module._buffers.values()]):
            if not item.is_leaf:
                memo[id(item)] = item.detach().clone()
    functions = _Functions(model, memo)
    copied = copy.deepcopy(model, memo)
    functions.fill()
    return copied


class _Functions:
    """The functions that a model holds and that refer to it, and their copies."""

    def __init__(self, model: nn.Module, memo: dict[int, Any]) -> None:
        self.memo = memo
        modules = list(model.modules())
        tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values())]
        self.own = {id(part) for part in (*modules, *tensors) if part is not None}
        self.copies: list[tuple[types.FunctionType, types.FunctionType]] = []
        self.cells: dict[int, tuple[types.CellType, types.CellType]] = {}
        for module in modules:
            for function in _functions_in(module.__dict__, set(), 0):
                if id(function) not in memo and self.reaches(function, set()):
                    self._begin(function)

    def reaches(self, value: Any, seen: set[int]) -> bool:
        """Whether a value leads to a part of the model."""
        if id(value) in self.own:
            return True
        if id(value) in seen or isinstance(value, nn.Module | Tensor):
            return False
        seen.add(id(value))
        return any(self.reaches(part, seen) for part in _parts_of(value))

    def _begin(self, function: types.FunctionType) -> None:
        cells = []
        for cell in function.__closure__ or ():
            if id(cell) not in self.cells:
                leads = any(self.reaches(v, set()) for v in _content(cell))
                self.cells[id(cell)] = (cell, types.CellType() if leads else cell)
            cells.append(self.cells[id(cell)][1])
        made = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__,
            tuple(cells) or None,
        )  # fmt: skip
        made.__kwdefaults__ = function.__kwdefaults__
        made.__qualname__, made.__module__ = function.__qualname__, function.__module__
        self.memo[id(function)] = made
        self.copies.append((function, made))
        for inner in _functions_in(list(_parts_of(function)), set(), 0):
            if id(inner) not in self.memo and self.reaches(inner, set()):
                self._begin(inner)

    def fill(self) -> None:
        """Give the copies what they refer to, once the model has been copied."""
        for cell, made in self.cells.values():
            if made is not cell:
                for content in _content(cell):
                    made.cell_contents = copy.deepcopy(content, self.memo)
        for function, copied in self.copies:
            for name in ("__defaults__", "__kwdefaults__"):
                value = getattr(function, name)
                if self.reaches(value, set()):
                    setattr(copied, name, copy.deepcopy(value, self.memo))
            for name, value in vars(function).items():
                leads = self.reaches(value, set())
                copied.__dict__[name] = copy.deepcopy(value, self.memo) if leads else value


_ATOMS = (str, bytes, int, float, complex, type(None))


def _content(cell: types.CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # empty
        return []


def _parts_of(value: Any) -> Iterator[Any]:
    """What a function, method, partial or container refers to."""
    if isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            yield from _content(cell)
        yield from (value.__defaults__, value.__kwdefaults__, *vars(value).values())
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, dict):
        yield from list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from [v for v in value if not isinstance(v, _ATOMS)]


def _functions_in(value: Any, seen: set[int], depth: int) -> Iterator[types.FunctionType]:
    """The functions that a value holds, in containers, partials and plain objects too."""
    if id(value) in seen or depth > 6 or isinstance(value, nn.Module | Tensor | type):
        return
    seen.add(id(value))
    if isinstance(value, types.FunctionType):
        yield value
        return
    parts = list(_parts_of(value))
    if not parts and not isinstance(value, types.ModuleType):
        parts = list(getattr(value, "__dict__", {}).values())
    for part in parts:
        yield from _functions_in(part, seen, depth + 1)
