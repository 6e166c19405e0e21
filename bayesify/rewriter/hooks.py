"""Forward hooks that read parameters. They run around a rewritten forward and read draws too."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..scope import LOCAL
from .caches import below
from .fallback import content_of, drawn_reads, holds_parameters
from .surroundings import names_in

_LISTS = frozenset(
    ("parameters", "named_parameters", "_parameters", "get_parameter", "state_dict", "getattr")
)
_FRAMEWORKS = frozenset(("torch", "accelerate", "bayesify"))
"""What these register late moves and shards parameters, and computes nothing with them."""
_MOST = 1000
"""Things beyond so many that a hook leads to are not looked into."""


class DrawnHook:
    """A forward hook that reads parameters, run with those reads exchanged for draws."""

    def __init__(self, hook: Any) -> None:
        self.hook = hook
        self.held: bool | None = None  # whether it was seen to read some that it holds itself

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        scope = LOCAL.scope
        if scope is None or not scope.drawing:
            return self.hook(module, *args, **kwargs)
        held = self.held is not False or holds_parameters(self.hook)
        with drawn_reads(_reach(module, self.hook), held) as mode:
            result = self.hook(module, *args, **kwargs)
        if mode is not None:
            self.held = bool(self.held) or mode.met
        return result


def drawn_hook(module: nn.Module, hook: Any) -> Any:
    """A hook of a module as it is to be registered: wrapped, where its code may read parameters."""
    function = hook
    while isinstance(function, functools.partial):
        function = function.func
    home = getattr(function, "__module__", None) or type(function).__module__
    if isinstance(hook, DrawnHook) or str(home).partition(".")[0] in _FRAMEWORKS:
        return hook
    if not isinstance(function, types.FunctionType | types.MethodType) or holds_parameters(hook):
        return DrawnHook(hook)
    known = _LISTS.union(*(m._parameters for m in _reach(module, hook)))
    owner: Any = getattr(function, "__self__", None)
    cls = type(owner) if isinstance(owner, nn.Module) else nn.Module
    return hook if known.isdisjoint(names_in(hook, cls)) else DrawnHook(hook)


def draw_in_hooks_(module: nn.Module, *, every: bool) -> bool:
    """Wrap the hooks of a module, ``every`` one or those that may read; whether one is wrapped."""
    found = False
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in hooks.items():
            hooks[key] = DrawnHook(hook) if every else drawn_hook(module, hook)
            found = found or isinstance(hooks[key], DrawnHook)
    return found


def unwrap_(module: nn.Module) -> None:
    """Put back the hooks of before the conversion."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in hooks.items():
            if isinstance(hook, DrawnHook):
                hooks[key] = hook.hook


def _reach(module: nn.Module, hook: Any) -> list[nn.Module]:
    """The module of a hook and those that the hook leads to, with all below them."""
    found = {id(child): child for child in below(module)}
    for other in _modules_in(hook):
        if id(other) not in found:
            found |= {id(child): child for child in below(other)}
    return list(found.values())


def _modules_in(hook: Any) -> Iterator[nn.Module]:
    seen: dict[int, Any] = {}
    stack = [hook]
    while stack and len(seen) < _MOST:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, types.MethodType):
            stack += [value.__self__, value.__func__]
        elif isinstance(value, functools.partial):
            stack += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, types.FunctionType):
            if value.__module__.partition(".")[0] not in _FRAMEWORKS:
                names = value.__code__.co_names
                stack += [value.__globals__[n] for n in names if n in value.__globals__]
            stack += map(content_of, value.__closure__ or ())
            stack += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        elif isinstance(value, list | tuple | set):
            stack += value
        elif isinstance(value, dict):
            stack += value.values()
        elif not isinstance(value, Tensor | type | types.ModuleType):
            stack += getattr(value, "__dict__", {}).values()
