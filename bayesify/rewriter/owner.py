"""Converted classes: a generated subclass whose methods draw, its variants and its fallback."""

from __future__ import annotations

import copyreg
import dataclasses
import dis
import functools
import inspect
import itertools
import logging
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import scope as scopes
from ..errors import UnsupportedModuleError
from ..posterior import STATE, OwnerState, owner_state, raw_name
from ..scope import LOCAL
from . import caches
from .passes import compile_source, reads_to_draws, restore_contexts, source_of
from .tracer import ACTIVE, PRIMITIVES, Guard, MethodTracer, Trace
from .values import TraceFailure

logger = logging.getLogger(__name__)

MAX_VARIANTS = 16
"""Variants of one method beyond this many take the fallback: something changes at every call."""

_NOT_WRAPPED = (
    "init", "reset", "load", "save", "set", "train", "extra", "no_", "group", "fix", "prune",
    "register", "state", "to", "apply", "get_parameter", "zero", "half", "float", "named", "add",
    "freeze", "copy", "update", "quant", "fuse", "merge", "export", "tie", "resize",
)  # fmt: skip
_OWNERS: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
_CLASSES: weakref.WeakKeyDictionary[type, dict[Any, type]] = weakref.WeakKeyDictionary()
_CLASS_LOCK = threading.Lock()


@dataclasses.dataclass(eq=False)
class Variant:
    """One way to run one method: generated code, or the fallback (``code`` is None)."""

    key: Any
    guards: tuple[Guard, ...]
    dims: frozenset[tuple[int, int]] | None
    layout: bool
    shapes: tuple[Any, ...]
    code: Callable[..., Any] | None
    source: str
    rung: str
    reason: str

    def matches(self, owner: nn.Module, tensors: list[Tensor]) -> bool:
        """Whether the attributes and shapes on which the code depends are as they were."""
        for guard in self.guards:
            if not guard.holds(owner):
                return False
        if self.dims is None:
            return _shapes(tensors, self.layout) == self.shapes
        for index, dim in self.dims:
            if tensors[index].shape[dim] != self.shapes[index][0][dim]:
                return False
        return True


@dataclasses.dataclass(frozen=True)
class Rung:
    """How one method of one owner was rewritten: ``plain`` fx, ``guided`` fx, or ``swap``."""

    owner: str
    type: str
    method: str
    rung: str
    reason: str
    own_parameters: int


def rungs(model: nn.Module) -> list[Rung]:
    """How every method called so far while drawing was rewritten.

    ``swap`` is the fallback: the original forward runs and each read of a parameter is exchanged
    for its draw; ``reason`` says why that forward could not become a graph.
    """
    found = []
    for name, module in model.named_modules():
        state = owner_state(module)
        if state is None:
            continue
        own = sum(p is not None for p in module._parameters.values())
        for method, variants in state.variants.items():
            for variant in variants:
                found.append(
                    Rung(name, type(module).__name__, method, variant.rung, variant.reason, own)
                )
    return found


def generated_code(module: nn.Module) -> dict[str, str]:
    """Source of the rewritten methods of one converted module, by method, as last generated."""
    state = owner_state(module)
    if state is None:
        return {}
    return {m: v[-1].source for m, v in state.variants.items() if v and v[-1].source}


# -- calling ---------------------------------------------------------------------------------


def flatten(value: Any, tensors: list[Tensor], names: list[str], name: str) -> Any:
    """Split arguments into tensors and a hashable structure; None stands for opaque arguments.

    Raises:
        TypeError: Something is opaque or mutable in a way that a graph cannot follow.
    """
    if isinstance(value, Tensor):
        for index, known in enumerate(tensors):
            if known is value:  # attention asks whether query is key
                return ("same", index)
        tensors.append(value)
        names.append(name)
        return (
            "tensor", value.dtype, value.device.type, value.device.index, value.dim(),
            value.requires_grad,
        )  # fmt: skip
    kind = type(value)
    if kind in (bool, int, float, str, type(None)):
        return ("value", kind.__name__, value)
    if kind is tuple or kind is list or kind is torch.Size:
        items = [flatten(v, tensors, names, f"{name}_{i}") for i, v in enumerate(value)]
        return (kind, tuple(items))
    if kind is dict:
        entries = []
        for k, v in value.items():
            entries.append((k, flatten(v, tensors, names, f"{name}_{k}")))
        return (kind, tuple(entries))
    if isinstance(value, PRIMITIVES):
        return ("value", kind.__name__, value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        items = [flatten(v, tensors, names, f"{name}_{i}") for i, v in enumerate(value)]
        return (kind, tuple(items))
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return (slice, tuple(flatten(v, tensors, names, name) for v in parts))
    if isinstance(value, dict) and kind.__module__ == "collections" and kind.__name__ == "OrderedDict":
        entries = [(k, flatten(v, tensors, names, f"{name}_{k}")) for k, v in value.items()]
        return (kind, tuple(entries))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value) if f.init]
        if isinstance(value, dict) or set(vars(value)) == set(fields):
            entries = [(f, flatten(getattr(value, f), tensors, names, f"{name}_{f}")) for f in fields]
            return ("dataclass", kind, tuple(entries))
    raise TypeError(f"an argument of type {kind.__name__}")


def unflatten(structure: Any, tensors: list[Any], used: Iterator[int]) -> Any:
    """Inverse of :func:`flatten`; ``used`` counts the tensors that were taken."""
    kind = structure[0]
    if kind == "tensor":
        return tensors[next(used)]
    if kind == "same":
        return tensors[structure[1]]
    if kind == "value":
        return structure[2]
    if kind == "dataclass":
        return structure[1](**{k: unflatten(v, tensors, used) for k, v in structure[2]})
    items = structure[1]
    if kind is slice:
        return slice(*(unflatten(v, tensors, used) for v in items))
    if issubclass(kind, dict):
        return kind((k, unflatten(v, tensors, used)) for k, v in items)
    values = [unflatten(v, tensors, used) for v in items]
    return kind(*values) if hasattr(kind, "_fields") else kind(values)


def _shapes(tensors: list[Tensor], layout: bool) -> tuple[Any, ...]:
    return tuple((tuple(t.shape), t.stride() if layout else None) for t in tensors)


def _ambient() -> tuple[Any, ...]:
    """Grad mode and autocast: what a forward may ask torch for."""
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cpu"),
        torch.get_autocast_dtype("cuda"),
    )


def call(owner: nn.Module, method: str, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run ``original`` as the present scope wants it: untouched at the means, else rewritten."""
    state = owner.__dict__.get(STATE)
    if state is None or ACTIVE.tracer is not None:
        return original(owner, *args, **kwargs)
    if method in state.methods:
        original = _without_self(state.methods[method])
    scope = LOCAL.scope
    if scope is None:
        return scopes.enter(
            owner,
            functools.partial(_draw, owner, state, method, original),
            args,
            kwargs,
            functools.partial(original, owner),
        )
    if not scope.drawing:
        return original(owner, *args, **kwargs)
    return _draw(owner, state, method, original, *args, **kwargs)


def _without_self(bound: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that was set on the instance, in the form of a class's function."""

    @functools.wraps(bound)
    def method(_: Any, /, *args: Any, **kwargs: Any) -> Any:
        return bound(*args, **kwargs)

    return method


def _draw(
    owner: nn.Module, state: OwnerState, method: str, original: Callable[..., Any],
    /, *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    tensors: list[Tensor] = []
    names: list[str] = []
    try:
        structure = (
            flatten(args, tensors, names, "input"),
            flatten(kwargs, tensors, names, ""),
        )
    except TypeError as error:
        return _swap(owner, state, method, original, args, kwargs, str(error))
    key = (structure, _ambient())
    if torch.compiler.is_compiling():
        shapes = tuple((tuple(int(s) for s in t.shape), tuple(t.stride())) for t in tensors)
        index = _prepare(state.handle, method, key, shapes)
        variant = state.variants[method][index]
        if not variant.matches(owner, tensors):
            raise RuntimeError("bayesify: the module changed while it was compiled")
    else:
        variant = find(owner, state, method, key, tensors)
        if variant is None:
            variant = make(owner, state, method, original, key, tensors)
    if variant.code is None:
        return _swap(owner, state, method, original, args, kwargs, None)
    return variant.code(owner, *tensors)


def find(
    owner: nn.Module, state: OwnerState, method: str, key: Any, tensors: list[Tensor]
) -> Variant | None:
    """The variant that was made for such a call, if there is one."""
    for variant in state.variants.get(method, ()):
        if variant.key == key and variant.matches(owner, tensors):
            found: Variant = variant
            return found
    return None


@torch.compiler.assume_constant_result
def _prepare(handle: int, method: str, key: Any, shapes: Any) -> int:
    """Make the variant of a call that torch.compile is tracing; gives its index."""
    owner = _OWNERS.get(handle)
    if owner is None:
        raise UnsupportedModuleError(
            "This converted module was copied in a way that bayesify did not see. Call it once "
            "before torch.compile."
        )
    state = owner.__dict__[STATE]
    descriptors: list[Any] = []
    _describe(key[0], descriptors)
    tensors = []
    for (_, dtype, device, index, _, requires_grad), (shape, stride) in zip(
        descriptors, shapes, strict=True
    ):
        place = torch.device(device) if index is None else torch.device(device, index)
        tensors.append(_Outline(shape, stride, dtype, place, requires_grad))
    original = getattr(type(owner), method).__wrapped__
    if method in state.methods:
        original = _without_self(state.methods[method])
    found: Any = find(owner, state, method, key, tensors)  # type: ignore[arg-type]
    if found is None:
        found = make(owner, state, method, original, key, tensors)  # type: ignore[arg-type]
    return int(state.variants[method].index(found))


@dataclasses.dataclass
class _Outline:
    """The metadata of a tensor argument."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    def stride(self) -> tuple[int, ...]:
        return self.strides


def _describe(structure: Any, found: list[Any]) -> None:
    if isinstance(structure, tuple):
        if structure and structure[0] == "tensor":
            found.append(structure)
        else:
            for item in structure:
                _describe(item, found)


def make(
    owner: nn.Module, state: OwnerState, method: str, original: Callable[..., Any], key: Any,
    tensors: list[Tensor],
) -> Variant:  # fmt: skip
    """Trace a method for such a call and keep the variant; a failed trace keeps the fallback."""
    known = state.variants.setdefault(method, [])
    trace: Trace | None = None
    reason = ""
    if sum(v.code is not None for v in known) >= MAX_VARIANTS:
        reason = f"more than {MAX_VARIANTS} variants: something it reads changes at every call"
    else:
        for hide in (True, False):
            try:
                trace = _trace(owner, method, original, key, tensors, hide)
                break
            except TraceFailure as failure:
                reason = str(failure)
            except Exception as error:  # the fallback runs the code itself and shows its errors
                first = (str(error).splitlines() or [""])[0]
                reason = f"{type(error).__name__}: {first}"
    shapes = _shapes(tensors, trace is not None and trace.layout)
    if trace is None:
        if state.strict:
            raise UnsupportedModuleError(
                f"{type(owner).__name__}.{method} cannot become a graph: {reason}. Convert "
                "without strict, or skip this module."
            )
        logger.info("%s.%s takes the fallback: %s", type(owner).__name__, method, reason)
        variant = Variant(key, (), frozenset(), False, shapes, None, "", "swap", reason)
    else:
        bayesian = _bayesian_below(owner)
        drawn = reads_to_draws(trace, bayesian)
        restore_contexts(trace)
        source, names = source_of(trace, method)
        code = compile_source(source, names, method, f"{type(owner).__qualname__}.{method}")
        rung = "guided" if trace.guided else "plain"
        variant = Variant(
            key, trace.guards, trace.dims, trace.layout, shapes, code, source, rung,
            f"{drawn} draws",
        )  # fmt: skip
    known.append(variant)
    return variant


def _bayesian_below(owner: nn.Module) -> set[tuple[tuple[str, ...], str]]:
    found = set()
    for name, module in owner.named_modules(remove_duplicate=False):
        state = owner_state(module)
        if state is not None:
            path = tuple(name.split(".")) if name else ()
            found.update((path, attribute) for attribute in state.slots)
    return found


def _trace(
    owner: nn.Module, method: str, original: Callable[..., Any], key: Any, tensors: list[Tensor],
    hide: bool,
) -> Trace:  # fmt: skip
    (args_structure, kwargs_structure), _ = key
    names = _argument_names(original, args_structure, kwargs_structure)

    def build(traced: list[Any]) -> tuple[Any, Any]:
        used = itertools.count()
        return unflatten(args_structure, traced, used), unflatten(kwargs_structure, traced, used)

    tracer = MethodTracer(owner, run_at_mean, hide)
    # what examples save for backward must not reach the hooks of an enclosing checkpoint
    unseen = torch.autograd.graph.saved_tensors_hooks(_identity, _identity)
    with scopes.recording(_refuse_checkpoint), unseen:
        return tracer.run(functools.partial(original, owner), names, build, tensors)


def _identity(tensor: Any) -> Any:
    return tensor


def _refuse_checkpoint() -> None:
    if ACTIVE.tracer is not None:
        raise TraceFailure("it checkpoints activations")


def run_at_mean(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Call a submodule at the means: on examples only the metadata matters."""
    outer, LOCAL.scope = LOCAL.scope, scopes.AT_MEAN
    try:
        return module(*args, **kwargs)
    finally:
        LOCAL.scope = outer


def _argument_names(original: Callable[..., Any], args: Any, kwargs: Any) -> list[str]:
    """A readable name for every tensor argument, after the method's signature."""
    try:
        parameters = list(inspect.signature(original).parameters.values())[1:]
    except (TypeError, ValueError):
        parameters = []
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    found: list[str] = []

    def walk(structure: Any, name: str) -> None:
        if structure[0] == "tensor":
            found.append(name if name.isidentifier() else "input")
        elif structure[0] == "dataclass":
            for key, item in structure[2]:
                walk(item, f"{name}_{key}")
        elif isinstance(structure[0], type):
            for i, item in enumerate(structure[1]):
                if issubclass(structure[0], dict):
                    walk(item[1], f"{name}_{item[0]}" if name else str(item[0]))
                else:
                    walk(item, f"{name}_{i}")

    for i, item in enumerate(args[1]):
        walk(item, positional[i] if i < len(positional) else f"input_{i}")
    walk(kwargs, "")
    return found


# -- the fallback ----------------------------------------------------------------------------


class SwapMode(TorchFunctionMode):
    """Exchanges each Bayesian parameter among a torch function's arguments for its draw."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.where: dict[int, tuple[nn.Module, str]] = {}
        for module in owner.modules():
            state = owner_state(module)
            for attribute in state.slots if state is not None else ():
                self.where.setdefault(id(module._parameters[attribute]), (module, attribute))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if LOCAL.scope is None or not LOCAL.scope.drawing or ACTIVE.tracer is not None:
            return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "__get__" and func.__self__.__name__ in _HARMLESS:
            return func(*args, **(kwargs or {}))
        return func(*self.exchange(args), **self.exchange(kwargs or {}))

    def exchange(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            found = self.where.get(id(value))
            return value if found is None else scopes.read(*found)
        kind = type(value)
        if kind in (tuple, list):
            return kind(self.exchange(v) for v in value)
        if kind is dict:
            return {k: self.exchange(v) for k, v in value.items()}
        return value


_HARMLESS = {"shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad"}


def _swap(
    owner: nn.Module, state: OwnerState, method: str, original: Callable[..., Any], args: Any,
    kwargs: Any, reason: str | None,
) -> Any:  # fmt: skip
    """The fallback: run the original method with its parameter reads exchanged for draws."""
    if reason is not None:
        known = state.variants.setdefault(method, [])
        if not any(v.code is None and v.reason == reason for v in known):
            if state.strict:
                raise UnsupportedModuleError(
                    f"{type(owner).__name__}.{method} cannot become a graph: {reason}. Convert "
                    "without strict, or skip this module."
                )
            known.append(Variant(None, (), frozenset(), False, (), None, "", "swap", reason))
    mode = SwapMode(owner)
    outer, LOCAL.reads = LOCAL.reads, functools.partial(SwapMode, owner)
    try:
        with caches.hidden(owner), mode:
            result = original(owner, *args, **kwargs)
    finally:
        LOCAL.reads = outer
    return mode.exchange(result)  # a parameter merely handed on passes through no function


# -- classes ---------------------------------------------------------------------------------


def methods_to_wrap(cls: type, attributes: frozenset[str]) -> tuple[str, ...]:
    """Methods of ``cls`` that are rewritten: ``forward*``, and public ones that read a parameter."""
    found = []
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        for name, member in vars(base).items():
            if not isinstance(member, types.FunctionType) or name in found:
                continue
            if name.startswith("forward") or (
                not name.startswith(("_", *_NOT_WRAPPED)) and _reads(member, attributes)
            ):
                found.append(name)
    return tuple(sorted(found))


def _reads(function: types.FunctionType, attributes: frozenset[str]) -> bool:
    if not attributes or function.__code__.co_argcount < 2:
        return False
    return any(
        i.opname in ("LOAD_ATTR", "LOAD_METHOD") and i.argval in attributes
        for i in dis.get_instructions(function)
    )


def _wrapper(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
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


def _generate(original: type, attributes: frozenset[str], hooked: bool) -> type:
    base: Any = original
    namespace: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_bayesify_original": original,
    }
    for name in methods_to_wrap(original, attributes):
        namespace[name] = _wrapper(name, getattr(original, name))

    def _apply(self: Any, fn: Callable[..., Any], recurse: bool = True) -> Any:
        state = self.__dict__.get(STATE)
        if state is None:
            return base._apply(self, fn, recurse)
        state.variants.clear()  # they hold for one dtype and device
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
        reduced = base.__reduce_ex__(self, protocol)
        if isinstance(reduced, tuple) and reduced[0] in (copyreg.__newobj__, copyreg._reconstructor):  # type: ignore[attr-defined]
            return (_rebuild, (original, attributes, hooked), *reduced[2:])
        return reduced

    def __setstate__(self: Any, state: Any) -> None:
        base.__setstate__(self, state)
        adopt(self)

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
        return ", ".join(filter(None, [text, f"posterior of {', '.join(state.slots)}, prior {priors}"]))

    namespace.update(
        _apply=_apply,
        __reduce_ex__=__reduce_ex__,
        __setstate__=__setstate__,
        no_weight_decay=no_weight_decay,
        extra_repr=extra_repr,
    )
    if hooked:

        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            run = functools.partial(base.__call__, self)
            if ACTIVE.tracer is not None or LOCAL.scope is not None or self.__dict__.get(STATE) is None:
                return run(*args, **kwargs)
            return scopes.enter(self, run, args, kwargs, run)

        namespace["__call__"] = __call__
    return type(original)(original.__name__, (original,), namespace)


def adopt(module: nn.Module) -> None:
    """Make a converted module known by its handle, as torch.compile needs."""
    state = owner_state(module)
    if state is not None:
        _OWNERS[state.handle] = module


def _rebuild(original: type, attributes: frozenset[str], hooked: bool) -> Any:
    module = original.__new__(original)
    module.__class__ = generated_class(original, attributes, hooked)
    return module


class DrawnHook:
    """A forward hook that reads parameters, run with those reads exchanged for draws."""

    def __init__(self, hook: Any) -> None:
        self.hook = hook

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        scope = LOCAL.scope
        if scope is None or not scope.drawing:
            return self.hook(module, *args, **kwargs)
        with SwapMode(module):
            return self.hook(module, *args, **kwargs)
