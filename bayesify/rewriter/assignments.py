"""What the methods of a class assign, read from their bytecode: source may be missing.

A method is followed into those that it calls on itself and into functions that it gives itself to.
What is assigned in other ways (by ``vars(self)``, by a method that only a child of a child's list
knows) is not found.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

_COMMON = frozenset(n for t in (dict, list, set, str, Tensor, nn.Module) for n in dir(t))
"""Names of methods that say nothing about whose they are."""
_CALLS = ("CALL", "CALL_FUNCTION", "CALL_METHOD")  # the latter two in Python 3.10


@dataclasses.dataclass(frozen=True)
class Assigned:
    """What some methods assign to the module itself.

    Attributes:
        names: Attributes; a field of an object that is one with a dot.
        filled: Attributes into whose items something is assigned.
        computed: Those of both that are given something made of the module alone.
        called: Methods that are called on something else.
        tested: Attributes of which it is asked whether they are None.
    """

    names: frozenset[str] = frozenset()
    filled: frozenset[str] = frozenset()
    computed: frozenset[str] = frozenset()
    called: frozenset[str] = frozenset()
    tested: frozenset[str] = frozenset()


@functools.cache
def members(cls: type) -> dict[str, list[Any]]:
    """Methods and properties of a module class by name, overridden ones too: super() calls them."""
    found: dict[str, list[Any]] = {}
    for base in cls.__mro__:
        if base not in (nn.Module, object) and "_bayesify_original" not in vars(base):
            for name, member in vars(base).items():
                found.setdefault(name, []).append(member)
    return found


def is_memo(value: Any) -> bool:
    """Whether a value was made by ``functools.lru_cache`` or ``functools.cache``."""
    wrapped = getattr(value, "__wrapped__", None)
    return isinstance(wrapped, types.FunctionType) and hasattr(value, "cache_clear")


@functools.cache
def assigned_by(cls: type, roots: frozenset[str]) -> Assigned:
    """What the methods ``roots`` of a module class, and those that they call, assign."""
    reading = _Reading(cls)
    for name in sorted(roots):
        reading.follow(name)
    filled = reading.filled | (reading.appended & reading.read_otherwise)
    return Assigned(
        frozenset(reading.names), frozenset(filled),
        frozenset(reading.computed - (reading.mixed - reading.names)),
        frozenset(reading.called - _COMMON), frozenset(reading.tested),
    )  # fmt: skip


class _Reading:
    """Follows methods of one class and collects what they assign."""

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.members = members(cls)
        self.names: set[str] = set()
        self.filled: set[str] = set()
        self.computed: set[str] = set()
        self.called: set[str] = set()
        self.tested: set[str] = set()
        self.appended: set[str] = set()
        self.read_otherwise: set[str] = set()
        self.mixed: set[str] = set()  # whose items are changed by something else
        self.seen: set[Any] = set()

    def follow(self, name: str) -> None:
        for member in self.members.get(name, ()):
            if isinstance(member, functools.cached_property):
                self.names.add(name)  # it writes to the module's __dict__ by itself
                self.computed.add(name)
            for function, wraps in _functions_of(member):
                code = function.__code__
                own = frozenset(code.co_varnames[:1])
                before = self.names | self.filled
                self.read(code, own, own, function.__globals__)
                if wraps:  # what a decorator keeps is what the method gives
                    self.computed |= (self.names | self.filled) - before

    def read(
        self, code: types.CodeType, me: frozenset[str], own: frozenset[str], names: dict[str, Any]
    ) -> None:
        """Read one function; of the variables ``me``, which may be the module, ``own`` are it."""
        if code in self.seen:
            return
        self.seen.add(code)
        lines = list(dis.get_instructions(code))
        made = own | _made_of(lines, own)
        gives_itself = False
        for i, line in enumerate(lines):
            if i and line.opname == "STORE_ATTR" and _loads(lines[i - 1], me):
                self.names.add(line.argval)
                if _is_made_of(made, lines, i - 1, 0, _loaded(lines[i - 1])[:-1]):
                    self.computed.add(line.argval)
            elif i > 1 and line.opname == "STORE_ATTR" and _loads(lines[i - 2], me):
                if lines[i - 1].opname == "LOAD_ATTR":  # self.object.field
                    field = f"{lines[i - 1].argval}.{line.argval}"
                    self.names.add(field)
                    if _is_made_of(made, lines, i, 1):
                        self.computed.add(field)
            elif line.opname == "STORE_SUBSCR":
                containers = set(_container(lines, i, me))
                self.filled |= containers
                if _is_made_of(made, lines, i, 2):
                    self.computed |= containers
                elif not _is_constant(lines, i, 2):
                    self.mixed |= containers
            elif line.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
                self.attribute(lines, i, me, names)
                if i and _loads(lines[i - 1], me):
                    self.content(lines, i, made)
                if line.argval == "setdefault" and i > 1 and _loads(lines[i - 2], me):
                    self.filled.add(lines[i - 1].argval)
                    j = _call(lines, i, 2)
                    if j is not None and _is_made_of(made, lines, j, 0):
                        self.computed.add(lines[i - 1].argval)
            elif _loads(line, me) and not lines[i + 1].opname.endswith(("_ATTR", "_METHOD")):
                gives_itself = True
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self.read(constant, me, own, names)
        if gives_itself:
            for function in _globals_of(code, names):
                arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
                of = function.__globals__
                self.read(function.__code__, frozenset(arguments), frozenset(arguments[:1]), of)

    def attribute(
        self, lines: list[dis.Instruction], i: int, me: frozenset[str], names: dict[str, Any]
    ) -> None:
        name, before = lines[i].argval, lines[i - 1]
        if lines[i].opname == "LOAD_SUPER_ATTR" or _loads(before, me) or before.opname in _CALLS:
            self.follow(name)  # a call before it: super()
        elif before.opname == "LOAD_GLOBAL" and names.get(before.argval) in self.cls.__mro__:
            self.follow(name)
        else:
            self.called.add(name)

    def content(self, lines: list[dis.Instruction], i: int, made: frozenset[str]) -> None:
        """What is done with the attribute of the module that line i loads."""
        name, after = lines[i].argval, lines[i + 1 : i + 3]
        if after[0].opname == "LOAD_ATTR" and after[1].opname.endswith("NONE"):
            self.tested.add(f"{name}.{after[0].argval}")
        if after[0].opname.endswith("NONE") or "IS_OP" in [line.opname for line in after]:
            self.tested.add(name)
        elif after[0].opname in ("LOAD_ATTR", "LOAD_METHOD") and after[0].argval in _APPENDING:
            self.appended.add(name)
            count = 2 if after[0].argval == "insert" else 1
            j = _call(lines, i + 1, count)
            if j is not None and _is_made_of(made, lines, j, 0):
                self.computed.add(name)
            else:
                self.mixed.add(name)
        elif after[0].argval != "clear":
            self.read_otherwise.add(name)


_APPENDING = ("append", "extend", "insert")


def _functions_of(member: Any) -> Iterator[tuple[types.FunctionType, bool]]:
    """The Python functions behind a member of a class, and whether each is a decorator's."""
    if isinstance(member, property):
        parts: tuple[Any, ...] = (member.fget, member.fset)
    else:
        parts = (getattr(member, "func", getattr(member, "__func__", member)),)
    for part in parts:
        while callable(part):
            inner = getattr(part, "__wrapped__", None)
            if isinstance(part, types.FunctionType):
                yield part, inner is not None
            part = inner


def _globals_of(code: types.CodeType, names: dict[str, Any]) -> Iterator[types.FunctionType]:
    for name in code.co_names:
        found = names.get(name)
        parts = [vars(found).get(n) for n in code.co_names] if inspect.ismodule(found) else [found]
        for part in parts:
            if isinstance(part, types.FunctionType) and not part.__module__.startswith("torch."):
                yield part


# -- expressions -----------------------------------------------------------------------------


def _loaded(line: dis.Instruction) -> tuple[str, ...]:
    """Variables that an instruction puts on the stack; it may load two, or store one before."""
    if not line.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "STORE_FAST_LOAD")):
        return ()
    values = line.argval if isinstance(line.argval, tuple) else (line.argval,)
    return values[1:] if line.opname.startswith("STORE") else values


def _loads(line: dis.Instruction, me: frozenset[str]) -> bool:
    loaded = _loaded(line)
    return bool(loaded) and loaded[-1] in me


def _producer(lines: list[dis.Instruction], i: int, below: int) -> int:
    """The instruction that made what lies ``below`` values under the top of the stack before i.

    Walked back in a straight line, as expressions are compiled if no condition is among them.
    """
    height = 0
    for j in range(i - 1, -1, -1):
        before = height - dis.stack_effect(lines[j].opcode, lines[j].arg, jump=False)
        if height == -below or before < -below:
            return j
        height = before
    return 0


def _call(lines: list[dis.Instruction], i: int, count: int) -> int | None:
    """Where the method that line i loads is called with so many arguments."""
    for j in range(i + 1, len(lines)):
        if lines[j].opname in ("PRECALL", *_CALLS) and lines[j].arg == count:
            if _producer(lines, j, count) == i:
                return j
    return None


def _parts(lines: list[dis.Instruction], i: int, below: int) -> list[dis.Instruction]:
    """The instructions that compute what lies ``below`` values under the top before i."""
    end = _producer(lines, i, below)
    return lines[_producer(lines, i, below + 1) + 1 : end + 1] if end else []


def _is_made_of(
    own: frozenset[str], lines: list[dis.Instruction], i: int, below: int,
    also: tuple[str, ...] = (),
) -> bool:  # fmt: skip
    """Whether some expression loads no variable but ``own``, and is no constant."""
    parts = _parts(lines, i, below)
    if not parts:  # it begins beyond what can be followed, as in a loop of Python 3.10
        return False
    variables = set(also)
    for part, after in zip(parts, [*parts[1:], None], strict=True):
        loaded = _loaded(part)
        # of a tensor's shape or place, which are not what it holds
        outline = after is not None and after.opname in _READS and after.argval in _OUTLINE
        variables.update(loaded[:-1] if outline else loaded)
    return variables <= own and not _is_constant(lines, i, below)


_READS = ("LOAD_ATTR", "LOAD_METHOD")
_OUTLINE = frozenset(("shape", "size", "dtype", "device", "ndim", "dim", "numel"))


def _is_constant(lines: list[dis.Instruction], i: int, below: int) -> bool:
    parts = _parts(lines, i, below)
    return all(p.opname.startswith(("LOAD_CONST", "LOAD_SMALL")) for p in parts)


def _made_of(lines: list[dis.Instruction], me: frozenset[str]) -> frozenset[str]:
    """Local variables that are only ever given something made of the module alone."""
    stores: dict[str, list[int]] = {}
    for i, line in enumerate(lines):
        if line.opname.startswith(("STORE_FAST", "STORE_DEREF")):
            values = line.argval if isinstance(line.argval, tuple) else (line.argval,)
            stored = values[:1] if "_LOAD_" in line.opname else values
            for name in stored:
                unpacked = i > 0 and lines[i - 1].opname == "UNPACK_SEQUENCE"
                known = len(stored) == 1 or unpacked
                stores.setdefault(name, []).append(i if known else -1)
    found = frozenset(stores)
    while True:
        kept = frozenset(
            name for name in found if all(_assigns(lines, i, me | found) for i in stores[name])
        )
        if kept == found:
            return kept
        found = kept


def _assigns(lines: list[dis.Instruction], i: int, own: frozenset[str]) -> bool:
    j = i
    while j > 0 and lines[j - 1].opname.startswith("STORE_FAST"):
        j -= 1
    if j > 0 and lines[j - 1].opname == "UNPACK_SEQUENCE":  # a, b = x.shape
        i = j - 1
    if i < 1 or lines[i - 1].opname.startswith(("UNPACK", "STORE", "FOR_ITER")):
        return False
    return _is_made_of(own, lines, i, 0)


def _container(lines: list[dis.Instruction], i: int, me: frozenset[str]) -> Iterator[str]:
    """The attributes of the module that may be what ``container[key] = value`` fills."""
    j = _producer(lines, i, 1)
    line = lines[j]
    if line.opname == "LOAD_ATTR" and _loads(lines[j - 1], me):
        yield line.argval
    elif line.opname in ("BINARY_SUBSCR", "BINARY_OP"):
        yield from _container(lines, j, me)
    elif loaded := _loaded(line):
        for a, b, c in zip(lines, lines[1:], lines[2:], strict=False):  # table = self.table
            stored = c.argval if isinstance(c.argval, tuple) else (c.argval,)
            if c.opname.startswith("STORE_FAST") and stored[0] in loaded:
                if b.opname == "LOAD_ATTR" and _loads(a, me):
                    yield b.argval
