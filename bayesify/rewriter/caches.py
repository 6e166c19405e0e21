"""Tensors that a module keeps from one call to the next outside of its parameters and buffers.

levit, tiny_vit and others keep a function of a parameter in eval mode. Such a cache must neither
serve a draw nor be made of one, so it is hidden while a method is traced or run by the fallback,
and dropped when the toolkit writes means.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

INTERNAL = {
    "_parameters", "_buffers", "_modules", "_bayesify", "__dict__", "__class__",
    "_non_persistent_buffers_set", "_state_dict_hooks", "_load_state_dict_pre_hooks",
    "_backward_hooks", "_forward_hooks", "_forward_pre_hooks", "_backward_pre_hooks",
}  # fmt: skip


HOOKS = {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"}


# (class, attribute) of tensors that were seen to depend on an input: state, which must be kept
_STATES: set[tuple[type, str]] = set()


@functools.cache
def _kept_by_forward(cls: type) -> tuple[frozenset[str], frozenset[str]]:
    """Attributes that methods assign, and those whose items they may assign.

    Methods that the constructor calls set things up: what they assign is no cache.
    """
    functions = {
        name: member
        for base in reversed(cls.__mro__)
        if base not in (nn.Module, object) and "_bayesify_original" not in vars(base)
        for name, member in vars(base).items()
        if isinstance(member, types.FunctionType)
    }
    constructor = functions.pop("__init__", None)
    setting_up = set(constructor.__code__.co_names) if constructor is not None else set()
    assigned: set[str] = set()
    filled: set[str] = set()
    for name, function in functions.items():
        if name in setting_up and not name.startswith("forward"):
            continue
        code = list(dis.get_instructions(function))
        assigned.update(i.argval for i in code if i.opname == "STORE_ATTR")
        if any(i.opname == "STORE_SUBSCR" for i in code):
            filled.update(i.argval for i in code if i.opname == "LOAD_ATTR")
    return frozenset(assigned), frozenset(filled)


def note_state(module: nn.Module, name: str) -> None:
    """Remember that an attribute holds state that depends on the input."""
    _STATES.add((type(module), name))


def _is_cache(value: Any) -> bool:
    items = value if isinstance(value, list | tuple) else (value,)
    tensors = [v for v in items if isinstance(v, Tensor)]
    # a list of parameters, as RNNs keep, follows the parameters by itself
    return bool(tensors) and not all(isinstance(t, nn.Parameter) for t in tensors)


def entries(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Each cache of one module and what stands in its place while it is hidden."""
    if next(nn.Module.named_parameters(module), None) is None:
        return  # anchors, positions: nothing here can come of a parameter of its own
    assigned, filled = _kept_by_forward(type(module))  # type: ignore[arg-type]
    for name, value in module.__dict__.items():
        if name in INTERNAL or (type(module), name) in _STATES:
            continue
        if type(value) is dict:
            if name in filled and any(isinstance(v, Tensor) for v in value.values()):
                yield name, {k: v for k, v in value.items() if not isinstance(v, Tensor)}
        elif name in assigned and _is_cache(value):
            yield name, None


def hide(module: nn.Module) -> list[str]:
    """Hide the caches of one module; gives their names."""
    found = list(entries(module))
    for name, value in found:
        module.__dict__[name] = value
    return [name for name, _ in found]


@contextmanager
def parametrizations_computed_anew() -> Iterator[None]:
    """Let no ``torch.nn.utils.parametrize.cached`` keep a draw, or give one another's."""
    enabled, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = enabled


@contextmanager
def hidden(owner: nn.Module) -> Iterator[None]:
    """Hide the caches of a module and of those below it, and put them back at the end."""
    before: list[tuple[nn.Module, str, Any, dict[Any, Any] | None]] = []
    for module in owner.modules():
        if next(nn.Module.named_parameters(module), None) is None:
            continue
        assigned, filled = _kept_by_forward(type(module))  # type: ignore[arg-type]
        for name, value in module.__dict__.items():
            if name not in INTERNAL and (type(module), name) not in _STATES:
                if type(value) is dict and name in filled:
                    before.append((module, name, value, dict(value)))
                elif name in assigned and (value is None or _is_cache(value)):
                    before.append((module, name, value, None))
        hide(module)
    try:
        yield
    finally:
        for module, name, value, content in before:
            if content is not None:
                for key in [k for k, v in value.items() if isinstance(v, Tensor)]:
                    if key not in content:
                        del value[key]
                module.__dict__[name] = value
            elif value is not None or _is_cache(module.__dict__.get(name)):
                module.__dict__[name] = value


def drop(model: nn.Module) -> None:
    """Forget every cache: the means from which it may have been made are about to change."""
    for module in model.modules():
        hide(module)
