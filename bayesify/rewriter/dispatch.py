"""Running one method of a converted module: untouched, by its variant, or by the fallback."""

from __future__ import annotations

import functools
import operator
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import scope as scopes
from ..errors import UnsupportedModuleError
from ..kernels.noise import exporting
from ..posterior import STATE, OwnerState, owner_state
from ..scope import LOCAL
from . import caches, memos, variants
from .active import ACTIVE
from .arguments import Outline, describe, flatten
from .fallback import HeldReads, drawn_reads, exchanged, owner_holds_parameters
from .trace_context import HOOKS_CHANGED, has_hooks
from .values import FREEZES, TraceFailure
from .variants import Variant

_OWNERS: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


def call(
    owner: nn.Module, method: str, original: Callable[..., Any], args: Any, kwargs: Any,
    at_mean: Callable[..., Any] | None = None,
) -> Any:  # fmt: skip
    """Run ``original`` as the present scope wants it: untouched at the means, else rewritten.

    ``at_mean``, given the original and its arguments, runs it in another way at the means.
    """
    state = owner.__dict__.get(STATE)
    if state is None or ACTIVE.tracer is not None:
        return original(owner, *args, **kwargs)
    if method in state.methods:
        original = _without_self(state.methods[method])
    scope = LOCAL.scope
    if scope is None:
        return scopes.enter(
            owner,
            method,
            functools.partial(_draw, owner, state, method, original),
            args,
            kwargs,
            functools.partial(original, owner)
            if at_mean is None
            else functools.partial(at_mean, original, owner),
        )
    if not scope.drawing:
        if ACTIVE.fake_mode is not None:
            return _example(owner, state, method, original, args, kwargs)
        if at_mean is not None:
            return at_mean(original, owner, *args, **kwargs)
        return original(owner, *args, **kwargs)
    return _draw(owner, state, method, original, *args, **kwargs)


def _without_self(bound: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that was set on the instance, in the form of a class's function."""

    @functools.wraps(bound)
    def method(_: Any, /, *args: Any, **kwargs: Any) -> Any:
        return bound(*args, **kwargs)

    return method


@torch.compiler.disable  # type: ignore[untyped-decorator]
def listed(original: Callable[..., Any], owner: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """Run a method that reads the dicts of parameters themselves with no log variance in them."""
    with exchanged(caches.below(owner)):
        return original(owner, *args, **kwargs)


def _example(
    owner: nn.Module, state: OwnerState, method: str, original: Callable[..., Any], args: Any,
    kwargs: Any,
) -> Any:  # fmt: skip
    """What a call of a leaf gives on the examples of the trace that meets it.

    Its own variant is made on the way: evaluated at the means instead, every operation would run
    once for each of the modules around it.
    """
    tensors: list[Tensor] = []
    try:
        structure = (flatten(args, tensors, [], "input"), flatten(kwargs, tensors, [], ""))
    except TypeError:
        return original(owner, *args, **kwargs)
    key = (structure, _ambient())
    variant, result = variants.find(owner, state, method, key, tensors), None
    if variant is None:
        variant, result = variants.make(owner, state, method, original, key, tensors)
        if variant.code is not None and _all_tensors(tensors):
            return result
    if variant.code is None and variant.reason.startswith((HOOKS_CHANGED, memos.FILLED)):
        # which are to see no examples
        raise TraceFailure(variant.reason)
    result = original(owner, *args, **kwargs)
    if variant.code is None and (ACTIVE.hooked or any(map(has_hooks, owner.modules()))):
        # it may give what hooks collect, those that it registers too, and no hook sees examples
        raise TraceFailure(f"its {type(owner).__name__} takes the fallback and has hooks")
    return result


def _draw(
    owner: nn.Module, state: OwnerState, method: str, original: Callable[..., Any],
    /, *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    if method == "__call__":
        # a graph of it would have to call it again, to reach hooks and forward
        around = variants.opaque(
            owner, state, method, "it is a __call__ of its own, around its forward"
        )
        return _fall_back(owner, around, method, original, args, kwargs)
    tensors: list[Tensor] = []
    names: list[str] = []
    try:
        structure = (
            flatten(args, tensors, names, "input"),
            flatten(kwargs, tensors, names, ""),
        )
    except TypeError as error:
        opaque = variants.opaque(owner, state, method, str(error))
        return _fall_back(owner, opaque, method, original, args, kwargs)
    key = (structure, _ambient())
    compiling = torch.compiler.is_compiling()
    if compiling and not _all_tensors(tensors):
        opaque = variants.opaque(
            owner, state, method, "an argument that torch.compile cannot take apart"
        )
        return _fall_back(owner, opaque, method, original, args, kwargs)
    if compiling:
        # a constant needs numbers: operator.index guards on a size that is a symbol, int does not;
        # an export's symbol stays one, unless the variant depends on it
        number = _hint if exporting() else operator.index
        shapes = tuple(
            (tuple(map(number, t.shape)), tuple(map(number, t.stride()))) for t in tensors
        )
        index = _prepare(state.handle, method, key, shapes)
        variant = state.variants[method][index]
        if not variant.matches(owner, tensors):
            raise RuntimeError("bayesify: the module changed while it was compiled")
    else:
        variant = variants.find(owner, state, method, key, tensors)
        if variant is None:
            variant, _ = variants.make(owner, state, method, original, key, tensors)
    if variant.code is None:
        return _fall_back(owner, variant, method, original, args, kwargs)
    return variant.code(owner, *tensors)


def _ambient() -> tuple[Any, ...]:
    """Grad mode and autocast: what a forward may ask torch for."""
    return (
        torch.is_grad_enabled(),
        not torch.compiler.is_compiling() and torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cpu"),
        torch.get_autocast_dtype("cuda"),
    )


def _all_tensors(values: list[Any]) -> bool:
    """Whether there is no object among the inputs of a graph, which a submodule may change."""
    return all(isinstance(v, Tensor) for v in values)


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _prepare(handle: int, method: str, key: Any, shapes: Any) -> int:
    """Make the variant of a call that torch.compile is tracing; gives its number."""
    owner = _OWNERS.get(handle)
    if owner is None:
        raise UnsupportedModuleError(
            "This converted module was copied in a way that bayesify did not see. Call it once "
            "before torch.compile."
        )
    state = owner.__dict__[STATE]
    descriptors: list[Any] = []
    describe(key[0], descriptors)
    tensors = []
    for (_, dtype, device, index, _, requires_grad), (shape, stride) in zip(
        descriptors, shapes, strict=True
    ):
        place = torch.device(device) if index is None else torch.device(device, index)
        tensors.append(Outline(shape, stride, dtype, place, requires_grad))
    original = getattr(type(owner), method).__wrapped__
    if method in state.methods:
        original = _without_self(state.methods[method])
    found: Any = variants.find(owner, state, method, key, tensors)  # type: ignore[arg-type]
    if found is None:
        found, _ = variants.make(owner, state, method, original, key, tensors)  # type: ignore[arg-type]
    known: dict[int, Variant] = state.variants[method]
    return next(number for number, variant in known.items() if variant is found)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _fall_back(
    owner: nn.Module, variant: Variant, method: str, original: Callable[..., Any], args: Any,
    kwargs: Any,
) -> Any:  # fmt: skip
    """Run the original method with its parameter reads exchanged for draws."""
    aside = owner if owner_holds_parameters(owner) else None
    held = variant.held is not False or aside is not None or variant.reason == FREEZES
    drawn = functools.partial(_drawn, owner, method, held, aside)
    outer, LOCAL.reads = LOCAL.reads, drawn
    try:
        with drawn() as mode:
            result = original(owner, *args, **kwargs)
    finally:
        LOCAL.reads = outer
    if isinstance(result, types.GeneratorType):
        return _resumed(result, LOCAL.scope, drawn)
    if mode is not None:
        result = mode.exchange(result)  # a parameter merely handed on passes through no function
        variant.held = bool(variant.held) or mode.met or mode.writes.met
    return result


def _resumed(generator: Any, scope: Any, drawn: Callable[..., Any]) -> Iterator[Any]:
    """A generator whose code runs when it is asked, in the scope of the call that made it."""
    while True:
        outer, LOCAL.scope = LOCAL.scope, scope
        try:
            with drawn():
                item = next(generator)
        except StopIteration:
            return
        finally:
            LOCAL.scope = outer
        yield item


@contextmanager
def _drawn(
    owner: nn.Module, method: str, held: bool, aside: nn.Module | None
) -> Iterator[HeldReads | None]:
    if not held and method == "forward" and id(owner) in ACTIVE.exchanged:
        yield None  # the fallback of a module around this one has seen to it
        return
    modules = caches.below(owner)
    fresh = caches.parametrizations_computed_anew()
    with (
        caches.hidden(modules, method) as make_anew,
        fresh,
        drawn_reads(modules, held, aside) as mode,
    ):
        make_anew()
        yield mode


def adopt(module: nn.Module) -> None:
    """Make a converted module known by its handle, as torch.compile needs."""
    state = owner_state(module)
    if state is not None:
        _OWNERS[state.handle] = module
