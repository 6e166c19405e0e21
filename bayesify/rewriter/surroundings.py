"""What a method reads outside of its module: globals, closures, and objects that these lead to.

A trace sees only their values, so that its graph may be used while they are the same. They are
found without running anything: by the names that the code of the method mentions, and that of the
functions which it may call.
"""

from __future__ import annotations

import contextvars
import enum
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .assignments import members
from .guards import MISSING, PRIMITIVES, Outside, copy_plain, plain
from .trace_context import attributes_of_objects

_FIXED = frozenset((*sys.stdlib_module_names, "torch", "numpy", "bayesify")) - {"__main__"}
"""Packages whose globals say nothing that a forward would be asked to follow."""

_MOST = 500
"""Functions beyond so many are not looked into."""


def read_by(owner: nn.Module, method: Callable[..., Any]) -> tuple[Outside, ...]:
    """What a method of a module may read outside of it, as it is now.

    Args:
        owner: The module.
        method: The function of its class, or a wrapper of it.
    """
    search = _Search(type(owner))
    search.visit(method)
    if not search.functions:  # of torch, as most
        return ()
    for name, _ in attributes_of_objects(owner, set()):  # such as a configuration
        search.visit(owner.__dict__[name])
    for value in owner.__dict__.values():
        if isinstance(value, types.FunctionType | types.MethodType | functools.partial):
            search.visit(value)
    search.follow()
    return tuple(search.found())


def mentions(name: str, cls: type, method: Callable[..., Any]) -> bool:
    """Whether a method of a class, or what it may call, names a global or attribute so."""
    return name in names_in(method, cls)


def names_in(function: Any, cls: type) -> set[str]:
    """The globals and attributes that a function, or what it may call, names.

    Args:
        function: A method of ``cls``, or any function.
        cls: Into whose methods it is followed.
    """
    search = _Search(cls)
    search.visit(function)
    search.follow()
    return search.names


def memos_named_by(cls: type) -> tuple[Any, ...]:
    """The functions with a ``functools.lru_cache`` that the methods of a class may call."""
    search = _Search(cls)
    for many in members(cls).values():
        for member in many:
            search.visit(member)
    search.follow()
    return tuple(search.memos.values())


def put_back(entries: tuple[Outside, ...]) -> str | None:
    """The name of something that has changed, which then is as it was; None: nothing has."""
    changed = [entry for entry in entries if not entry.holds()]
    for entry in changed:
        found = entry.get(entry.name, MISSING)
        if type(found) is list and type(entry.value) is list:
            found[:] = entry.value
        elif type(found) is type(entry.value) and isinstance(found, dict | set):
            found.clear()
            found.update(entry.value)
        elif isinstance(holder := entry.holder, types.CellType):
            holder.cell_contents = entry.value
        elif not isinstance(holder, type | contextvars.ContextVar) and entry.value is not MISSING:
            (holder if isinstance(holder, dict) else vars(holder))[entry.name] = entry.value
    return changed[0].name if changed else None


class _Search:
    """Functions that may run, what holds the things that they mention, and those things."""

    def __init__(self, cls: type) -> None:
        self.members = members(cls)
        self.names: set[str] = set()
        self.functions: dict[types.FunctionType, frozenset[str]] = {}
        self.holders: dict[int, Any] = {}  # objects, classes and modules
        self.cells: dict[int, types.CellType] = {}
        self.variables: dict[int, contextvars.ContextVar[Any]] = {}
        self.memos: dict[int, Any] = {}

    def visit(self, value: Any) -> None:
        if isinstance(value, types.FunctionType):
            if not _fixed(value.__module__) and len(self.functions) < _MOST:
                if value not in self.functions:
                    self.functions[value] = _mentioned(value.__code__)
                    self.cells |= {id(cell): cell for cell in value.__closure__ or ()}
        elif isinstance(value, property):
            self.visit(value.fget)
        elif isinstance(value, staticmethod | classmethod | types.MethodType):
            self.visit(value.__func__)
            self.visit(getattr(value, "__self__", None))
        elif isinstance(value, functools.partial | functools.cached_property):
            self.visit(value.func)
        elif isinstance(value, types.ModuleType):
            if not _fixed(value.__name__):
                self.holders[id(value)] = value
        elif isinstance(value, type):
            if not _fixed(value.__module__) and not issubclass(value, enum.Enum):
                self.holders[id(value)] = value
        elif isinstance(value, contextvars.ContextVar):
            self.variables[id(value)] = value
        elif isinstance(value, nn.Module | torch.Tensor) or callable(value):
            wrapped = getattr(value, "__wrapped__", None)  # such as functools.lru_cache makes
            if isinstance(wrapped, types.FunctionType):
                if hasattr(value, "cache_clear") and not _fixed(wrapped.__module__):
                    self.memos[id(value)] = value
                self.visit(wrapped)
        elif type(getattr(value, "__dict__", None)) is dict:
            self.holders[id(value)] = value

    def follow(self) -> None:
        """Visit all that what is known leads to."""
        before = None
        while before != (now := (len(self.functions), len(self.holders), len(self.cells))):
            before = now
            for function, names in list(self.functions.items()):
                self.names |= names
                for name in names:
                    self.visit(function.__globals__.get(name))
            for cell in list(self.cells.values()):
                self.visit(_content(cell))
            for name in self.names & self.members.keys():
                for member in self.members[name]:
                    self.visit(member)
            for holder in list(self.holders.values()):
                for name in self.names.intersection(_names_of(holder)):
                    self.visit(inspect.getattr_static(holder, name, None))

    def found(self) -> Iterator[Outside]:
        mentioned: dict[int, tuple[dict[str, Any], str, set[str]]] = {}
        for function, names in self.functions.items():
            held = function.__globals__
            entry = mentioned.setdefault(id(held), (held, function.__module__, set()))
            entry[2].update(names & held.keys())
        for held, module, found in mentioned.values():
            known = sys.modules.get(module)
            holder = known if known is not None and vars(known) is held else held
            yield from _entries(held.get, holder, found)
        for holder in self.holders.values():
            if isinstance(holder, type):
                static = functools.partial(inspect.getattr_static, holder)
                # what a class computes is new each time
                own = {n for n in self.names.intersection(_names_of(holder)) if plain(static(n))}
                yield from _entries(functools.partial(getattr, holder), holder, own)
            else:
                yield from _entries(vars(holder).get, holder, self.names & vars(holder).keys())
        for cell in self.cells.values():
            if _content(cell) is not MISSING:
                yield from _entries(functools.partial(getattr, cell), cell, {"cell_contents"})
        for variable in self.variables.values():
            if plain(value := variable.get(MISSING)) or value is MISSING:
                get = functools.partial(_content_of_variable, variable)
                yield from _entries(get, variable, {variable.name})


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return MISSING


def _content_of_variable(variable: contextvars.ContextVar[Any], name: str, default: Any) -> Any:
    return variable.get(default)


_FOLLOWED = (
    type, types.ModuleType, property, classmethod, staticmethod, contextvars.ContextVar,
)  # fmt: skip


def _fixed(module: Any) -> bool:
    return str(module).partition(".")[0] in _FIXED


@functools.cache
def _mentioned(code: types.CodeType) -> frozenset[str]:
    """Globals and attributes that some code names, with those of functions made in it."""
    inner = (_mentioned(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return frozenset(filter(str.isidentifier, code.co_names)).union(*inner)


def _names_of(holder: Any) -> set[str]:
    """Names of what an object has that may matter; what its class has, if that is a user's."""
    if isinstance(holder, types.ModuleType):
        return set(vars(holder))
    own = set() if isinstance(holder, type) else set(vars(holder))
    cls = holder if isinstance(holder, type) else type(holder)
    for base in cls.__mro__:
        if not _fixed(base.__module__):
            own.update(vars(base))
    return own


def _entries(get: Callable[..., Any], holder: Any, names: set[str]) -> Iterator[Outside]:
    for name in sorted(names - {"__name__", "__class__"}):
        value = get(name, MISSING)
        if value is MISSING or plain(value):
            same = isinstance(value, PRIMITIVES) or value is MISSING
            yield Outside(get, name, value if same else copy_plain(value), holder, True)
        elif not isinstance(value, _FOLLOWED):
            compiles = isinstance(value, types.FunctionType | torch.Tensor)
            yield Outside(get, name, value, holder, False, compiles)
