"""Tensors that a module keeps from one call to the next outside of its parameters and buffers.

levit, tiny_vit and others keep a function of a parameter in eval mode. Such a cache must neither
serve a draw nor be made of one, so it is hidden while a method is traced or run by the fallback,
and dropped when the toolkit writes means. What neither that method, nor forward, nor what they
call assigns is no cache: a user has put it there.
"""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from .. import torch_private
from .assignments import Assigned, assigned_by, is_memo, members
from .guards import INTERNAL, MISSING, held
from .objects import may_be_handed_on

# (class, attribute) of tensors that were seen to depend on an input: state, which must be kept
_STATES: set[tuple[type, str]] = set()
_TRAIN = frozenset(("train", "eval"))


class Entry(NamedTuple):
    """One cache: where it is, what it holds, and what stands in its place while it is hidden."""

    module: Any  # or an object that a module holds
    name: str
    value: Any
    empty: Any
    by_train: bool  # train() and eval() make it, not the forward
    certain: bool  # made of the module alone, as far as its code shows


@functools.cache
def _by_forward(cls: type, also: frozenset[str]) -> Assigned:
    forwards = {name for name in members(cls) if name.startswith(("forward", "__call__"))}
    return assigned_by(cls, frozenset(forwards | also))


@functools.cache
def _at_first(cls: type) -> frozenset[str]:
    """Attributes that the constructor assigns; None is what it gives to one that is empty."""
    return assigned_by(cls, frozenset(("__init__",))).names


def note_state(module: nn.Module, name: str) -> None:
    """Remember that an attribute holds state that depends on the input."""
    _STATES.add((type(module), name))


def _is_cache(value: Any) -> bool:
    # a list of parameters, as RNNs keep, follows the parameters by itself
    return not all(isinstance(t, nn.Parameter) for t in tensors_in(value))


def tensors_in(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """Tensors that a value holds, in lists and tuples and as attributes of plain objects."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict) and depth < 4:
        if depth or not isinstance(value, dict):
            for part in list(value.values()) if isinstance(value, dict) else value:
                yield from tensors_in(part, depth + 1)
    elif depth < 4 and may_be_handed_on(value):
        for part in list(vars(value).values()):
            yield from tensors_in(part, depth + 1)


def _holds_tensors(value: Any) -> bool:
    return any(True for _ in tensors_in(value))


def _never_changes(value: Any) -> bool:
    """Whether a value is of a kind that no forward adds to, as a user's object may be."""
    return isinstance(value, Tensor | list | tuple | Distribution)


def _is_result(value: Any, depth: int = 0) -> bool:
    """Whether an item of a table is a tensor, or a container or an object that holds one."""
    if isinstance(value, Tensor):
        return True
    if depth > 4 or isinstance(value, _NO_RESULTS):
        return False
    if isinstance(value, list | tuple):
        return any(_is_result(v, depth + 1) for v in value)
    held = value if type(value) is dict else getattr(value, "__dict__", {})
    return any(_is_result(v, depth + 1) for v in held.values())


_NO_RESULTS = (
    nn.Module, type, types.FunctionType, types.MethodType, types.ModuleType, functools.partial,
)  # fmt: skip


def _is_table(value: Any) -> bool:
    return type(value) is dict and any(map(_is_result, value.values()))


def below(owner: nn.Module) -> list[nn.Module]:
    """A module and those below it, each once, parents before children; ``modules()`` is slower."""
    found, stack = {id(owner): owner}, [owner]
    while stack:
        for child in stack.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                stack.append(child)
    return list(found.values())


@functools.cache
def _keeping(classes: frozenset[type], owner: type, method: str) -> dict[Any, Any]:
    """What forward and train assign, of those among some classes that may keep a cache.

    Under None, what the class of the owner assigns in the method that is called on it.
    """
    called: frozenset[str] = frozenset()
    for cls in classes:
        called |= _by_forward(cls, frozenset((method,))).called
    found: dict[Any, Any] = {}
    for cls, also in (*((c, frozenset[str]()) for c in classes), (owner, frozenset((method,)))):
        forward = _by_forward(cls, called.intersection(members(cls)) | also)
        train = assigned_by(cls, _TRAIN)
        if forward.names or forward.filled or train.names:
            found[None if also else cls] = forward, train
    return found


def _may_keep(
    modules: list[nn.Module], method: str
) -> Iterator[tuple[nn.Module, Assigned, Assigned]]:
    """The modules, the first of which is the owner, whose methods may keep a cache.

    Without a parameter of its own or below, a module's anchors and positions come of none.
    """
    classes: set[Any] = {type(m) for m in modules}
    owner: Any = type(modules[0])
    found = _keeping(frozenset(classes), owner, method)
    for module in modules if found else ():
        known = found.get(None if module is modules[0] else type(module))
        if known is not None and any(m._parameters for m in below(module)):
            yield module, *known


def entries(modules: list[nn.Module], method: str = "forward") -> Iterator[Entry]:
    """The caches of a module and of those below it, as a call of one of its methods sees them."""
    for module, forward, train in _may_keep(modules, method):
        for holder, name in _fields(module, forward):
            value = vars(holder)[name]
            if value is not None and _is_cache(value):
                yield Entry(holder, name, value, None, False, True)
        for name in forward.names | forward.filled | train.names:
            value = _held(module, name, forward)
            if (
                value is None
                or value is MISSING
                or name in INTERNAL
                or (type(module), name) in _STATES
            ):
                continue
            by_train = name not in forward.names and name in train.names
            if type(value) is dict:
                if name in forward.filled and _is_table(value):
                    empty = {k: v for k, v in value.items() if not _is_result(v)}
                    yield Entry(module, name, value, empty, False, name in forward.computed)
            elif type(value) is list and name in forward.filled & forward.computed:
                if _is_cache(value):
                    left = [v for v in value if not _holds_tensors(v)]
                    yield Entry(module, name, value, left, False, True)
            elif (name in forward.names or by_train) and _is_cache(value):
                certain = by_train or (name in forward.computed and _never_changes(value))
                cls: Any = type(module)
                nothing = None if name in _at_first(cls) else MISSING
                yield Entry(module, name, value, nothing, by_train, certain)


def _held(module: nn.Module, name: str, forward: Assigned) -> Any:
    """What may be a cache: an attribute, or a buffer that is filled where it is None."""
    if name not in module._buffers:
        return module.__dict__.get(name, MISSING)
    filled = name in forward.tested & forward.names & forward.computed
    return module._buffers[name] if filled else MISSING


def _fields(module: nn.Module, forward: Assigned) -> Iterator[tuple[Any, str]]:
    """The fields of a module's objects that a forward fills where they are None, of them alone."""
    for path in forward.names & forward.tested & forward.computed:
        name, _, field = path.partition(".")
        holder = module.__dict__.get(name)
        if may_be_handed_on(holder) and field in vars(holder):
            yield holder, field


def _put(module: Any, name: str, value: Any) -> None:
    if name in getattr(module, "_buffers", ()):
        module._buffers[name] = None if value is MISSING else value
    elif value is MISSING:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = value


class Hiding:
    """Hides the caches of one trace, and tells which of them were none.

    Attributes:
        names: (identity of the module, attribute) of what is hidden.
        by_train: Of what train() and eval() make; it stays, and no graph may read it.
        kept: (class, attribute) of what stays.
    """

    def __init__(self, owner: nn.Module, method: str) -> None:
        self.owner, self.method = owner, method
        self.names: set[tuple[int, str]] = set()
        self.by_train: set[tuple[int, str]] = set()
        self.kept: set[tuple[type, str]] = set()
        self._certain: set[tuple[int, str]] = set()
        self._missed: dict[tuple[int, str], nn.Module] = {}

    def hide(self) -> None:
        """Hide them; whoever traces puts them back."""
        for found in (self.names, self.by_train, self._certain, self._missed):
            found.clear()
        for module, name, _, empty, by_train, certain in list(
            entries(below(self.owner), self.method)
        ):
            if by_train:
                self.by_train.add((id(module), name))
            elif (type(module), name) not in self.kept:
                self.names.add((id(module), name))
                if certain:
                    self._certain.add((id(module), name))
                _put(module, name, empty)

    def read(self, module: nn.Module, name: str) -> None:
        """One that is hidden was asked for."""
        self._missed[id(module), name] = module

    def written(self, module: nn.Module, name: str) -> None:
        """One that is hidden was made anew."""
        self._missed.pop((id(module), name), None)

    def keep_missed(self) -> bool:
        """Let what was asked for in vain stay at the next attempt; whether there is any."""
        found = {
            (type(module), key[1])
            for key, module in self._missed.items()
            if key not in self._certain
        }
        self.kept |= found
        return bool(found)

    def note_kept(self) -> None:
        """What had to stay is state."""
        _STATES.update(self.kept)


@contextmanager
def parametrizations_computed_anew() -> Iterator[None]:
    """Let no ``torch.nn.utils.parametrize.cached`` keep a draw, or give one another's."""
    entered = torch_private.parametrization_cache()
    torch_private.set_parametrization_cache(0)
    try:
        yield
    finally:
        torch_private.set_parametrization_cache(entered)


@contextmanager
def hidden(modules: list[nn.Module], method: str) -> Iterator[Callable[[], None]]:
    """Hide the caches of modules, whose first holds the others, and put them back at the end.

    Where it cannot be known whether one is a cache, it stays. Gives a function that makes those
    of train() anew, of what the parameters are then.
    """
    before: list[tuple[nn.Module, str, Any, Any]] = []
    fields: list[tuple[Any, str, Any]] = []
    for module, forward, train in _may_keep(modules, method):
        fields.extend((h, n, vars(h)[n]) for h, n in _fields(module, forward))
        for name in (forward.names | forward.filled) & forward.computed | train.names:
            value = _held(module, name, forward)
            if name in INTERNAL or (type(module), name) in _STATES:
                continue
            if name in module._buffers and value is MISSING:
                continue
            if type(value) is dict or (type(value) is list and name in forward.filled):
                before.append((module, name, value, value.copy()))
            elif value is None or value is MISSING or (_is_cache(value) and _never_changes(value)):
                before.append((module, name, value, None))
    found = [entry for entry in entries(modules, method) if entry.certain]
    for entry in found:
        _put(entry.module, entry.name, entry.empty)
    try:
        yield functools.partial(_make_anew, found)
    finally:
        for holder, name, value in fields:
            if value is None or _is_cache(value):
                _put(holder, name, value)
        for module, name, value, content in before:
            if type(content) is list:
                value[:] = content
                module.__dict__[name] = value
            elif content is not None:
                for key in [k for k, v in value.items() if _is_result(v)]:
                    if key not in content:
                        del value[key]
                module.__dict__[name] = value
            elif _is_cache(value) or _is_table(value) or _is_made(held(module, name)):
                _put(module, name, value)


def _is_made(value: Any) -> bool:
    """Whether a call has left a cache where there was none."""
    if type(value) is dict:
        return any(map(_holds_tensors, value.values()))
    return _is_cache(value) and _never_changes(value)


def _make_anew(found: list[Entry]) -> None:
    """Let train() make its caches, with every module in the mode that it is in."""
    for module in dict.fromkeys(entry.module for entry in found if entry.by_train):
        modes = [(child, child.training) for child in module.modules()]
        module.train(module.training)
        for child, training in modes:
            child.training = training


def drop(model: nn.Module) -> None:
    """Forget every cache, or make it anew: the means from which it may have been made changed."""
    found = [entry for entry in entries(below(model)) if entry.certain]
    for entry in found:
        if not entry.by_train:
            _put(entry.module, entry.name, entry.empty)
    classes: set[Any] = {type(module) for module in below(model)}
    for member in itertools.chain(*(chain for cls in classes for chain in members(cls).values())):
        if is_memo(member):
            member.cache_clear()
    with torch.no_grad():
        _make_anew(found)
