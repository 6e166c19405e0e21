"""Converted classes: a generated subclass of a module's class whose methods draw."""

from __future__ import annotations

import copy
import copyreg
import dis
import functools
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn, no_grad

from .. import scope as scopes
from .. import torch_private
from ..errors import UnsupportedModuleError
from ..posterior import STATE, owner_state, raw_name
from ..scope import LOCAL
from .active import ACTIVE
from .caches import below
from .dispatch import adopt, call, listed
from .hooks import DrawnHook, drawn_hook
from .memos import uncached_methods
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
    base: Any = original
    namespace: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_bayesify_original": original,
    }
    # forward also where the class has none: an instance may hold its own
    for name in {*methods_to_wrap(original, attributes), "forward"}:
        namespace[name] = _wrapper(name, getattr(original, name), original)

    def _apply(self: Any, fn: Callable[..., Any], recurse: bool = True) -> Any:
        state = self.__dict__.get(STATE)
        if state is None:
            return base._apply(self, fn, recurse)
        state.variants.clear()  # they hold for one dtype and device
        for slot in state.slots.values():
            slot.buffers.clear()
        names = [raw_name(a, s) for a, s in state.slots.items()]
        raws = [self._parameters[n] for n in names]
        kept = {id(t) for r in raws for t in (r, r.grad)}

        def keep_float32(tensor: Tensor) -> Any:
            result = fn(tensor)
            if id(tensor) in kept and result.dtype != tensor.dtype:
                return tensor.to(result.device)
            return result

        return base._apply(self, keep_float32, recurse)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        if isinstance(self, fx.GraphModule):
            return self.__reduce__()
        reduced = base.__reduce_ex__(self, protocol)
        if isinstance(reduced, tuple) and reduced[0] in _RECONSTRUCTORS:
            return (_rebuild, (original, attributes, hooked), *reduced[2:])
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

    def no_weight_decay(self: Any) -> set[str]:
        inherited = getattr(base, "no_weight_decay", None)
        names = set(inherited(self)) if inherited is not None else set()
        for prefix, module in self.named_modules():
            state = owner_state(module)
            if state is not None:
                for attribute, slot in state.slots.items():
                    raw = raw_name(attribute, slot)
                    names.add(f"{prefix}.{raw}" if prefix else raw)
        return names

    def extra_repr(self: Any) -> str:
        text = str(base.extra_repr(self))
        state = self.__dict__.get(STATE)
        if state is None or not state.slots:
            return text
        priors = ", ".join(dict.fromkeys(str(s.prior) for s in state.slots.values()))
        kinds = dict.fromkeys(s.estimator for s in state.slots.values() if s.estimator != "weight")
        posterior = f"posterior of {', '.join(state.slots)}, prior {priors}"
        return ", ".join(filter(None, [text, posterior, *kinds]))

    reset = getattr(original, "reset_classifier", None)
    if reset is not None:

        @functools.wraps(reset)
        def reset_classifier(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = reset(self, *args, **kwargs)
            state = self.__dict__.get(STATE)
            if state is not None and state.extend is not None:
                state.extend(self)  # the new head is Bayesian as the old one was
            return result

        namespace["reset_classifier"] = reset_classifier

    def _named_members(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = base._named_members(self, *args, **kwargs)
        if LOCAL.scope is None or ACTIVE.tracer is not None:
            return found
        # a forward knows the parameters of before the conversion
        raws = {id(raw) for module in below(self) for raw in _spreads(module).values()}
        return (entry for entry in found if id(entry[1]) not in raws)

    namespace.update(
        _apply=_apply,
        _named_members=_named_members,
        __reduce_ex__=__reduce_ex__,
        __setstate__=__setstate__,
        _replicate_for_data_parallel=_replicate_for_data_parallel,
        no_weight_decay=no_weight_decay,
        extra_repr=extra_repr,
    )
    if attributes and not hasattr(original, "qconfig"):
        namespace["qconfig"] = property(_qconfig, _set_qconfig, _delete_qconfig)
    namespace.update(_listing_methods(original))
    namespace.update(_hook_methods(original))
    namespace.update(uncached_methods(original))
    if issubclass(original, fx.GraphModule):
        namespace.update(_graph_module_methods(base, hooked))
    if hooked and "__call__" not in namespace:

        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            run = functools.partial(base.__call__, self)
            if (
                ACTIVE.tracer is not None
                or LOCAL.scope is not None
                or self.__dict__.get(STATE) is None
            ):
                return run(*args, **kwargs)
            return scopes.enter(self, "__call__", run, args, kwargs, run)

        namespace["__call__"] = __call__
    return type(original)(original.__name__, (original,), namespace)


def _qconfig(self: Any) -> Any:
    try:
        return self.__dict__["qconfig"]
    except KeyError:
        raise AttributeError("qconfig") from None


def _set_qconfig(self: Any, value: Any) -> None:
    """What torch.ao.quantization sets on each module before it asks for the modules' classes.

    It takes it off again, and nothing else of its call can be seen.
    """
    self.__dict__["qconfig"] = value
    if value is None or type(value).__name__ in ("QConfig", "QConfigDynamic"):
        kind = type(self).__name__
        warnings.warn(
            f"torch.ao.quantization leaves this {kind} as it is: it goes by exact classes, and a "
            f"converted {kind} has one of its own. Quantise the means: "
            "bayesify.to_deterministic(model).",
            UserWarning,
            stacklevel=3,
        )


def _delete_qconfig(self: Any) -> None:
    del self.__dict__["qconfig"]


def _listing_methods(base: Any) -> dict[str, Any]:
    """Where a class lists its own state, the trained spreads are saved and loaded beside it.

    Inside of a forward there are none, as before the conversion.
    """

    def _save_to_state_dict(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
        base._save_to_state_dict(self, destination, prefix, keep_vars)
        for name, raw in _spreads(self).items():
            if LOCAL.scope is not None:  # a forward knows what there was before the conversion
                destination.pop(prefix + name, None)
            else:
                destination.setdefault(prefix + name, raw if keep_vars else raw.detach())

    def _load_from_state_dict(
        self: Any, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        raws = _spreads(self)
        lists = missing_keys, unexpected_keys, error_msgs
        if LOCAL.scope is not None or not lists_itself:
            base._load_from_state_dict(self, state_dict, prefix, local_metadata, strict, *lists)
            if LOCAL.scope is not None:
                unknown = {prefix + name for name in raws}
                missing_keys[:] = [key for key in missing_keys if key not in unknown]
            return
        # the class's own code sees what it knows: the module and the keys of before the conversion
        given = {prefix + n: state_dict.pop(prefix + n) for n in raws if prefix + n in state_dict}
        held = self._parameters
        self.__dict__["_parameters"] = {n: p for n, p in held.items() if n not in raws}
        try:
            base._load_from_state_dict(self, state_dict, prefix, local_metadata, strict, *lists)
        finally:
            held.update(self._parameters)
            self.__dict__["_parameters"] = held
        state_dict.update(given)
        spreads = nn.Module()
        spreads._parameters.update(raws)
        torch_private.load_from_state_dict(spreads, given, prefix, local_metadata, strict, *lists)
        held.update(spreads._parameters)  # assign=True puts the given tensors in place

    def load_state_dict(self: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(state_dict)
        result = base.load_state_dict(self, state_dict, *args, **kwargs)
        for prefix, module in self.named_modules(prefix="", remove_duplicate=False):
            for name, raw in _spreads(module).items():
                value = given.get(f"{prefix}.{name}" if prefix else name)
                if isinstance(value, Tensor) and value.shape == raw.shape:
                    with no_grad():
                        raw.copy_(value)
        return result

    lists_itself = base._load_from_state_dict is not torch_private.load_from_state_dict
    methods: tuple[Any, ...] = (_save_to_state_dict, _load_from_state_dict)
    if base.load_state_dict is not nn.Module.load_state_dict:
        methods += (load_state_dict,)
    return {method.__name__: method for method in methods}


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


def _spreads(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trained spreads that a module holds, by their names in it."""
    state = owner_state(module)
    names = [raw_name(a, s) for a, s in state.slots.items()] if state is not None else []
    held = {name: module._parameters.get(name) for name in names}
    return {name: raw for name, raw in held.items() if raw is not None}


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
