"""Converted classes: a generated subclass of a module's class whose methods draw."""

from __future__ import annotations

import copy
import copyreg
import dis
import functools
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from .. import scope as scopes
from ..errors import UnsupportedModuleError
from ..posterior import STATE, owner_state, raw_name
from ..scope import LOCAL
from .active import ACTIVE
from .dispatch import adopt, call, listed
from .hooks import DrawnHook, drawn_hook
from .memos import uncached_methods
from .methods import QCONFIG, describing_methods, listing_methods, moving_methods
from .surroundings import mentions

_NOT_WRAPPED = (
    "init", "reset", "load", "save", "set", "train", "extra", "no_", "group", "fix", "prune",
    "register", "state", "to", "apply", "get_parameter", "zero", "half", "float", "named", "add",
    "freeze", "copy", "update", "quant", "fuse", "merge", "export", "tie", "resize",
)  # fmt: skip


# parameters of modules below, as a ``__call__`` may read them
_ANY = frozenset(("weight", "bias", "parameters", "named_parameters", "_parameters"))


# what pickle calls for an object without a reduction of its own
_RECONSTRUCTORS: tuple[Any, ...] = (
    vars(copyreg)["__newobj__"],
    vars(copyreg)["_reconstructor"],
)
_CLASSES: weakref.WeakKeyDictionary[type, dict[Any, type]] = weakref.WeakKeyDictionary()


_CLASS_LOCK = threading.Lock()


def methods_to_wrap(cls: type, attributes: frozenset[str]) -> tuple[str, ...]:
    """Methods that are rewritten: ``forward*``, and public ones that read a parameter.

    These may read it by way of private ones. So with a ``__call__`` of the class's own.
    """
    found = []
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        for name, member in vars(base).items():
            if not isinstance(member, types.FunctionType) or name in found:
                continue
            if name == "__call__":
                if _reads(cls, member, attributes | _ANY):
                    found.append(name)
            elif name.startswith("forward") or (
                not name.startswith(("_", *_NOT_WRAPPED))
                and member.__code__.co_argcount >= 2
                and _reads(cls, member, attributes)
            ):
                found.append(name)
    return tuple(sorted(found))


def _reads(cls: type, function: types.FunctionType, attributes: frozenset[str]) -> bool:
    """Whether a method of ``cls`` names a parameter, or a private method that does."""
    waiting, seen = [function], {function}
    while waiting and attributes:
        names = {
            i.argval
            for i in dis.get_instructions(waiting.pop())
            if i.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
        }
        if not attributes.isdisjoint(names):
            return True
        private = [name for name in names if name.startswith("_")]
        # overridden ones too: super() may call them
        for method in (vars(base).get(name) for base in cls.__mro__ for name in private):
            if isinstance(method, types.FunctionType) and method not in seen:
                seen.add(method)
                waiting.append(method)
    return False


def _wrapper(name: str, original: Callable[..., Any], cls: Any = nn.Module) -> Callable[..., Any]:
    if mentions("_parameters", cls, original):

        @functools.wraps(original)
        def method(self: Any, /, *args: Any, **kwargs: Any) -> Any:
            return call(self, name, original, args, kwargs, listed)

    else:

        @functools.wraps(original)
        def method(self: Any, /, *args: Any, **kwargs: Any) -> Any:
            return call(self, name, original, args, kwargs)

    return method


def generated_class(original: type, attributes: frozenset[str], hooked: bool) -> type:
    """The converted form of a module class; one per class, kept while the class lives."""
    with _CLASS_LOCK:
        known = _CLASSES.setdefault(original, {})
        key = (attributes, hooked)
        if key not in known:
            known[key] = _generate(original, attributes, hooked)
        return known[key]


def original_class(cls: type) -> type:
    """The class that a generated class was made of; any other class is its own."""
    original: type = cls.__dict__.get("_bayesify_original", cls)
    return original


def regenerate(module: nn.Module, hooked: bool = False) -> None:
    """Give a converted module the class that suits the slots it has now, and its hooks."""
    cls = type(module)
    state = owner_state(module)
    if state is not None and "_bayesify_original" in cls.__dict__:  # not where FSDP2 has its own
        hooked = hooked or "__call__" in cls.__dict__
        module.__class__ = generated_class(original_class(cls), frozenset(state.slots), hooked)


def _generate(original: type, attributes: frozenset[str], hooked: bool) -> type:
    """A subclass that draws where ``original`` reads, and is ``original`` in all else.

    Its ``forward*`` ask :func:`.dispatch.call` what to run. The rest keeps what torch and users do
    with a module in step with the log variances beside the means: moves and casts, copies and
    pickles, state dicts, hooks, representations. Inside of a forward none of it shows: code that
    lists parameters finds those of before the conversion.

    Args:
        original: The class before the conversion.
        attributes: The parameters with a posterior in the module itself; they decide which methods
            beside ``forward*`` read one and draw.
        hooked: Whether ``__call__`` opens the scope, so that hooks read the draws of their call.
    """
    namespace: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_bayesify_original": original,
    }
    # forward also where the class has none: an instance may hold its own
    for name in {*methods_to_wrap(original, attributes), "forward"}:
        namespace[name] = _wrapper(name, getattr(original, name), original)
    namespace.update(moving_methods(original))
    namespace.update(_copying_methods(original, attributes, hooked))
    namespace.update(describing_methods(original))
    namespace.update(listing_methods(original))
    namespace.update(_hook_methods(original))
    namespace.update(uncached_methods(original))
    if attributes and not hasattr(original, "qconfig"):
        namespace["qconfig"] = QCONFIG
    if issubclass(original, fx.GraphModule):
        namespace.update(_graph_module_methods(original, hooked))
    if hooked and "__call__" not in namespace:
        namespace["__call__"] = _scoped_call(original)
    return type(original)(original.__name__, (original,), namespace)


def _copying_methods(base: Any, attributes: frozenset[str], hooked: bool) -> dict[str, Any]:
    """A pickle names the original class; what is read or copied generates its own again."""

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        if isinstance(self, fx.GraphModule):
            return self.__reduce__()
        reduced = base.__reduce_ex__(self, protocol)
        if isinstance(reduced, tuple) and reduced[0] in _RECONSTRUCTORS:
            return (_rebuild, (base, attributes, hooked), *reduced[2:])
        return reduced

    def __setstate__(self: Any, state: Any) -> None:
        base.__setstate__(self, state)
        adopt(self)

    def _replicate_for_data_parallel(self: Any) -> Any:
        raise UnsupportedModuleError(
            "nn.DataParallel is not supported: its copies of a module have no parameters, and so "
            "no posterior. Use DistributedDataParallel or FSDP2 (fully_shard), with one process "
            "for each device, or one device: nn.DataParallel(model, device_ids=[0])."
        )

    return {
        "__reduce_ex__": __reduce_ex__,
        "__setstate__": __setstate__,
        "_replicate_for_data_parallel": _replicate_for_data_parallel,
    }


def _scoped_call(base: Any) -> Callable[..., Any]:
    """A ``__call__`` that opens the scope before the hooks run, not only around the forward."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(base.__call__, self)
        if ACTIVE.tracer is not None or LOCAL.scope is not None or self.__dict__.get(STATE) is None:
            return run(*args, **kwargs)
        return scopes.enter(self, "__call__", run, args, kwargs, run)

    return __call__


def _hook_methods(base: Any) -> dict[str, Any]:
    """Hooks that are registered after the conversion read draws as well."""

    def taken(module: Any, hook: Any) -> Any:
        if ACTIVE.tracer is not None or module.__dict__.get(STATE) is None:
            return hook
        found = drawn_hook(module, hook)
        if isinstance(found, DrawnHook) and "__call__" not in type(module).__dict__:
            regenerate(module, hooked=True)
        return found

    @functools.wraps(base.register_forward_hook)
    def register_forward_hook(self: Any, hook: Any, *args: Any, **kwargs: Any) -> Any:
        return base.register_forward_hook(self, taken(self, hook), *args, **kwargs)

    @functools.wraps(base.register_forward_pre_hook)
    def register_forward_pre_hook(self: Any, hook: Any, *args: Any, **kwargs: Any) -> Any:
        return base.register_forward_pre_hook(self, taken(self, hook), *args, **kwargs)

    return {
        "register_forward_hook": register_forward_hook,
        "register_forward_pre_hook": register_forward_pre_hook,
    }


def _graph_module_methods(base: Any, hooked: bool) -> dict[str, Any]:
    """A GraphModule copies, pickles and compiles itself, knowing only what its graph refers to."""

    def stripped(self: Any) -> Any:
        """The module of before the conversion, with the same tensors."""
        plain = object.__new__(base)
        plain.__dict__.update(self.__dict__)
        state = plain.__dict__.pop(STATE)
        raws = {raw_name(a, s) for a, s in state.slots.items()}
        plain.__dict__["_parameters"] = {k: p for k, p in self._parameters.items() if k not in raws}
        return plain

    def extras(self: Any) -> tuple[Any, ...]:
        state = self.__dict__[STATE]
        raws = [raw_name(a, s) for a, s in state.slots.items()]
        return state, {name: self._parameters[name] for name in raws}, hooked

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        if STATE not in self.__dict__:
            return base.__deepcopy__(self, memo)
        module = copy.deepcopy(stripped(self), memo)
        memo[id(self)] = module
        return _adopt_graph_module(module, *copy.deepcopy(extras(self), memo))

    def __reduce__(self: Any) -> Any:
        if STATE not in self.__dict__:
            return base.__reduce__(self)
        return _adopt_graph_module, (stripped(self), *extras(self))

    def recompile(self: Any) -> Any:
        converted = type(self)
        self.__class__ = base  # it writes its code to its class
        try:
            code = base.recompile(self)
        finally:
            self.__class__ = converted
        state = self.__dict__.get(STATE)
        if state is not None:
            converted.forward = _wrapper("forward", base.forward)
            state.variants.clear()
        return code

    return {"__deepcopy__": __deepcopy__, "__reduce__": __reduce__, "recompile": recompile}


def _adopt_graph_module(module: Any, state: Any, raws: dict[str, Any], hooked: bool) -> Any:
    module._parameters.update(raws)
    module.__dict__[STATE] = state
    module.__class__ = generated_class(type(module), frozenset(state.slots), hooked)
    adopt(module)
    return module


def _rebuild(original: type, attributes: frozenset[str], hooked: bool) -> Any:
    module: Any = object.__new__(original)
    module.__class__ = generated_class(original, attributes, hooked)
    return module
