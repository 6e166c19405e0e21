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

INTERNAL = {
    "_parameters", "_buffers", "_modules", "_bayesify", "__dict__", "__class__",
    "_non_persistent_buffers_set", "_state_dict_hooks", "_load_state_dict_pre_hooks",
    "_backward_hooks", "_forward_hooks", "_forward_pre_hooks", "_backward_pre_hooks",
}  # fmt: skip


@functools.cache
def _stored_by_methods(cls: type) -> frozenset[str]:
    """Attributes that methods other than the constructor assign: caches, or things put aside."""
    names: set[str] = set()
    for base in cls.__mro__:
        if base in (nn.Module, object) or "_bayesify_original" in vars(base):
            continue
        for name, member in vars(base).items():
            if isinstance(member, types.FunctionType) and name != "__init__":
                names.update(
                    i.argval for i in dis.get_instructions(member) if i.opname == "STORE_ATTR"
                )
    return frozenset(names)


def _is_cache(value: Any) -> bool:
    items = value if isinstance(value, list | tuple) else (value,)
    tensors = [v for v in items if isinstance(v, Tensor)]
    # a list of parameters, as RNNs keep, follows the parameters by itself
    return bool(tensors) and not all(isinstance(t, nn.Parameter) for t in tensors)


def entries(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Each cache of one module and what stands in its place while it is hidden."""
    for name, value in module.__dict__.items():
        if name in INTERNAL:
            continue
        if type(value) is dict:
            if any(isinstance(v, Tensor) for v in value.values()):
                yield name, {k: v for k, v in value.items() if not isinstance(v, Tensor)}
        elif _is_cache(value) and name in _stored_by_methods(type(module)):  # type: ignore[arg-type]
            yield name, None


def hide(module: nn.Module) -> list[str]:
    """Hide the caches of one module; gives their names."""
    found = list(entries(module))
    for name, value in found:
        module.__dict__[name] = value
    return [name for name, _ in found]


@contextmanager
def hidden(owner: nn.Module) -> Iterator[None]:
    """Hide the caches of a module and of those below it, and put them back at the end."""
    saved = [(m, n, m.__dict__[n]) for m in owner.modules() for n, _ in list(entries(m))]
    empty = [
        (v, dict(v)) for m in owner.modules() for n, v in m.__dict__.items()
        if type(v) is dict and n not in INTERNAL
    ]  # fmt: skip
    for module in owner.modules():
        hide(module)
    try:
        yield
    finally:
        for module, name, value in saved:
            module.__dict__[name] = value
        for cache, content in empty:
            for key in [k for k, v in cache.items() if k not in content and isinstance(v, Tensor)]:
                del cache[key]


def drop(model: nn.Module) -> None:
    """Forget every cache: the means from which it may have been made are about to change."""
    for module in model.modules():
        hide(module)
