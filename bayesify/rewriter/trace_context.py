"""What surrounds a trace: the patches that let it see modules, and everything put back after it."""

from __future__ import annotations

import functools
import logging
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .. import torch_private
from ..posterior import owner_state, raw_name
from .active import ACTIVE
from .guards import HOOKS, INTERNAL, MISSING
from .values import TraceFailure

TRACE_LOCK = threading.RLock()


def transforms() -> tuple[Any, ...]:
    """How deep in transforms of torch.func and in levels of forward-mode differentiation."""
    return torch_private.functorch_level(), torch_private.forward_ad_level()


def context_state() -> tuple[Any, ...]:
    """Grad mode and autocast state, which torch.fx would drop."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
        ),
        torch.is_autocast_cache_enabled(),
    )


@contextmanager
def paused() -> Iterator[None]:
    """Run code that must not be recorded."""
    outer, ACTIVE.tracer = ACTIVE.tracer, None
    try:
        yield
    finally:
        ACTIVE.tracer = outer


def without_hooks(module: nn.Module) -> None:
    """Drop hooks for a while: a user's hook, or a collective, is not to see examples.

    Those of torch.nn.utils stay, since they compute weights. A compiled module runs uncompiled.
    """
    module.__dict__.pop("_compiled_call_impl", None)
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        hooks = module.__dict__[name]
        if hooks:
            kept = ((k, h) for k, h in hooks.items() if _computes_weights(h))
            module.__dict__[name] = type(hooks)(kept)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks that :func:`without_hooks` drops."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return not all(_computes_weights(hook) for hook in hooks)


def _computes_weights(hook: Any) -> bool:
    hook = getattr(hook, "hook", hook)
    return type(hook).__module__.startswith("torch.nn.utils")


_CONTAINERS = (dict, list, set)
_REBUILT = ("_parameters", "_modules")


@contextmanager
def untouched(modules: list[nn.Module], prepare: Callable[[nn.Module], None]) -> Iterator[None]:
    """Put every attribute of these modules back as it was."""
    saved = []
    seen: set[int] = set()
    for module in modules:
        attributes = dict(module.__dict__)
        # most are empty: dicts of hooks
        containers = [
            (v, v.copy() if v else ()) for k, v in attributes.items()
            if isinstance(v, _CONTAINERS) and k not in _REBUILT
        ]  # fmt: skip
        containers += [(held, held.copy()) for _, held in attributes_of_objects(module, seen)]
        saved.append((module, attributes, containers, dict(module._buffers)))
    try:
        for module in modules:
            prepare(module)
        yield
    finally:
        for module, attributes, containers, buffers in saved:
            # another thread may exchange them
            attributes["_parameters"] = module.__dict__["_parameters"]
            restore(module.__dict__, attributes)
            restore(module._buffers, buffers)
            for container, content in containers:
                if not content:
                    if container:
                        container.clear()
                elif isinstance(container, dict):
                    restore(container, content)  # type: ignore[arg-type]
                elif isinstance(container, list):
                    container[:] = content
                else:
                    container.clear()
                    container.update(content)


def attributes_of_objects(
    module: nn.Module, seen: set[int]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the plain objects that a module holds hold themselves, each object once."""
    for name, value in module.__dict__.items():
        held = getattr(value, "__dict__", None)
        known = isinstance(value, _NOT_PLAIN) or name in INTERNAL or id(value) in seen
        if type(held) is dict and not known:
            seen.add(id(value))
            yield name, held


_NOT_PLAIN = (
    nn.Module, torch.Tensor, type, dict, list, set, types.FunctionType, types.MethodType,
    types.ModuleType, functools.partial,
)  # fmt: skip


def restore(target: dict[Any, Any], content: dict[Any, Any]) -> None:
    if target.keys() != content.keys():
        for name in [n for n in target if n not in content]:
            del target[name]
    for name, value in content.items():
        if target.get(name, MISSING) is not value:
            target[name] = value


_EXAMPLES_LOG = logging.getLogger("torch._subclasses.fake_tensor")


def _not_of_a_trace(record: logging.LogRecord) -> bool:
    """Whether torch's log is to have a record: what examples cannot do, the fallback does."""
    return not ACTIVE.patched


@contextmanager
def patches() -> Iterator[None]:
    """Let module calls, attribute reads and writes, and opaque calls pass by the tracer.

    Other threads go through the original code; the patches are removed at the end. The trace of a
    submodule inside its caller's finds them in place.
    """
    if ACTIVE.patched:
        yield
        return
    call, set_attribute = nn.Module.__call__, nn.Module.__setattr__
    initialise = nn.Module.__init__
    inner = "__getattribute__" in nn.Module.__dict__

    def patched_init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        if ACTIVE.tracer is not None:
            ACTIVE.tracer.made[id(self)] = self

    def patched_call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tracer = ACTIVE.tracer
        if tracer is None:
            return call(self, *args, **kwargs)
        # a __call__ of the class's own is part of the trace: what it calls is torch's
        own = original_of(type(self)).__call__ is not patched_call
        return tracer.call_module(self, args, kwargs, call if own else None)

    def patched_read(self: nn.Module, name: str) -> Any:
        tracer = ACTIVE.tracer
        if tracer is None:
            return object.__getattribute__(self, name)
        try:
            value = object.__getattribute__(self, name)
        except AttributeError:
            tracer.note_absent(self, name)
            raise
        tracer.note_read(self, name, value)
        if name not in _REGISTRIES or id(self) in tracer.made:
            return value
        if name == "_parameters":
            value = _without_log_variances(self, value)
        return Registry(value, name in HOOKS)

    def patched_write(self: nn.Module, name: str, value: Any) -> None:
        tracer = ACTIVE.tracer
        if tracer is None:
            return set_attribute(self, name, value)
        tracer.note_write(self, name, value)
        own = self.__dict__
        if name in own["_buffers"]:
            own["_buffers"][name] = value
        else:
            own[name] = value
        return None

    module_class: Any = nn.Module
    module_class.__init__ = patched_init
    module_class.__call__ = patched_call
    module_class.__setattr__ = patched_write
    if not inner:
        module_class.__getattribute__ = patched_read
    ACTIVE.patched = True
    _EXAMPLES_LOG.addFilter(_not_of_a_trace)
    try:
        with opaque_calls:
            yield
    finally:
        ACTIVE.patched = False
        _EXAMPLES_LOG.removeFilter(_not_of_a_trace)
        module_class.__init__ = initialise
        module_class.__call__ = call
        module_class.__setattr__ = set_attribute
        if not inner:
            del module_class.__getattribute__


_REGISTRIES = frozenset(("_parameters", "_buffers", "_modules", *HOOKS))


class Registry(dict[Any, Any]):
    """The parameters, buffers, children or hooks of a module, as a forward sees them in a trace.

    What it puts in or takes out, ``functional_call`` for one, would act on the trace alone, also
    where it is put back at the end: the code itself must run.
    """

    def __init__(self, content: Any, hooks: bool) -> None:
        super().__init__(content)
        self.hooks = hooks

    def _refuse(self, *_: Any, **__: Any) -> Any:
        other = "it changes the parameters, buffers or children of a module"
        raise TraceFailure(HOOKS_CHANGED if self.hooks else other)

    __setitem__ = __delitem__ = __ior__ = _refuse
    pop = popitem = clear = update = setdefault = move_to_end = _refuse


HOOKS_CHANGED = "it changes the hooks of a module"


def original_of(cls: type) -> Any:
    """The class that a generated class was made of; any other class is its own."""
    return cls.__dict__.get("_bayesify_original", cls)


def _without_log_variances(module: nn.Module, parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters that a forward knows of, as its fallback has them too."""
    state = owner_state(module)
    if state is None or not state.slots:
        return parameters
    raws = {raw_name(attribute, slot) for attribute, slot in state.slots.items()}
    return {name: p for name, p in parameters.items() if name not in raws}


class _OpaqueCalls:
    """Lets a trace record, and the fallback exchange, calls that no torch-function mode sees.

    These are functions of autograd, whose backward must survive, and scripted functions. Whatever
    name a forward holds such a function under, its call ends in C, which looks ``forward`` up on
    the class: there the trace steps in. The lookup and the entry points are wrapped while a trace
    or a fallback runs, counted over threads.
    """

    _autograd: Any = torch.autograd.Function
    _scripted: Any = torch_private.ScriptFunction
    _kind: Any = type(torch.autograd.Function)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0

    def __enter__(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self._install()

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._autograd.apply = self._apply
                self._scripted.__call__ = self._call
                del self._kind.__getattribute__

    def _install(self) -> None:
        apply = self._apply = self._autograd.__dict__["apply"]
        call = self._call = self._scripted.__call__

        def patched_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            if ACTIVE.tracer is None and ACTIVE.exchange is not None:
                args, kwargs = ACTIVE.exchange((args, kwargs))
            return apply.__get__(None, cls)(*args, **kwargs)

        def patched_lookup(cls: Any, name: str) -> Any:
            found = type.__getattribute__(cls, name)
            if ACTIVE.tracer is None:
                return found
            # apply reads _backward_cls, switches the gradient off, reads forward and calls it
            if name == "_backward_cls":
                ACTIVE.applied = (cls, torch.is_grad_enabled())
            elif name == "forward" and ACTIVE.applied is not None:
                (applied, grad), ACTIVE.applied = ACTIVE.applied, None
                if applied is cls:
                    return functools.partial(record, cls, apply.__get__(None, cls), grad)
            elif name == "setup_context" and ACTIVE.recorded is cls:
                ACTIVE.recorded = None
                return _set_up_nothing
            return found

        def record(cls: Any, run: Any, grad: bool, *args: Any) -> Any:
            separate = cls.setup_context is not self._autograd.setup_context
            with torch_private.DisableTorchFunction(), torch.set_grad_enabled(grad):
                args = args if separate else args[1:]  # without ctx
                result = ACTIVE.tracer.call_opaque(run, run, args, {})  # type: ignore[union-attr]
            ACTIVE.recorded = cls if separate else None
            return result

        def patched_call(function: Any, *args: Any, **kwargs: Any) -> Any:
            if ACTIVE.tracer is not None:
                run = functools.partial(call, function)
                return ACTIVE.tracer.call_opaque(function, run, args, kwargs)
            if ACTIVE.exchange is not None:
                args, kwargs = ACTIVE.exchange((args, kwargs))
            return call(function, *args, **kwargs)

        self._autograd.apply = classmethod(patched_apply)
        self._kind.__getattribute__ = patched_lookup
        self._scripted.__call__ = patched_call


def _set_up_nothing(*_: Any) -> None:
    """In place of the setup_context of a function whose call was recorded, which ran nothing."""


opaque_calls = _OpaqueCalls()
