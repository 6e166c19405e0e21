"""The ways to run one method of a converted module: found, made, or the fallback."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import operator
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import scope as scopes
from .. import torch_private
from ..errors import UnsupportedModuleError
from ..kernels.noise import exporting
from ..posterior import STATE, OwnerState, Slot, owner_state
from ..scope import LOCAL
from . import caches, memos, surroundings
from .active import ACTIVE
from .arguments import Outline, argument_names, describe, flatten, shapes_of, unflatten
from .estimators import reads_to_estimates
from .fallback import HeldReads, drawn_reads, exchanged, owner_holds_parameters
from .guards import Guard
from .passes import (
    compile_source,
    masked_rows,
    reads_to_draws,
    restore_contexts,
    source_of,
)
from .trace_context import HOOKS_CHANGED, has_hooks
from .tracer import WRITES, MethodTracer, Trace
from .values import FREEZES, ForeignTensor, StateFound, TraceFailure

logger = logging.getLogger(__name__)


MAX_VARIANTS = 16
"""Variants of one method beyond this many take the fallback: something changes at every call."""


_OWNERS: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


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
    held: bool | None = None  # whether the fallback was seen to read a parameter from no module

    def matches(self, owner: nn.Module, tensors: list[Tensor]) -> bool:
        """Whether the attributes and shapes on which the code depends are as they were."""
        for guard in self.guards:
            if not guard.holds(owner):
                return False
        if self.dims is None:
            return shapes_of(tensors, self.layout) == self.shapes
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
            for variant in variants.values():
                found.append(
                    Rung(name, type(module).__name__, method, variant.rung, variant.reason, own)
                )
    return found


def generated_code(module: nn.Module) -> dict[str, str]:
    """Source of the rewritten methods of one converted module, by method, as last generated."""
    state = owner_state(module)
    if state is None:
        return {}
    last = {m: [*v.values()][-1] for m, v in state.variants.items() if v}
    return {m: variant.source for m, variant in last.items() if variant.source}


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
    variant, result = find(owner, state, method, key, tensors), None
    if variant is None:
        variant, result = make(owner, state, method, original, key, tensors)
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


def _all_tensors(values: list[Any]) -> bool:
    """Whether there is no object among the inputs of a graph, which a submodule may change."""
    return all(isinstance(v, Tensor) for v in values)


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
    if method == "__call__":
        # a graph of it would have to call it again, to reach hooks and forward
        around = _opaque(owner, state, method, "it is a __call__ of its own, around its forward")
        return _fall_back(owner, around, method, original, args, kwargs)
    tensors: list[Tensor] = []
    names: list[str] = []
    try:
        structure = (
            flatten(args, tensors, names, "input"),
            flatten(kwargs, tensors, names, ""),
        )
    except TypeError as error:
        opaque = _opaque(owner, state, method, str(error))
        return _fall_back(owner, opaque, method, original, args, kwargs)
    key = (structure, _ambient())
    compiling = torch.compiler.is_compiling()
    if compiling and not _all_tensors(tensors):
        opaque = _opaque(owner, state, method, "an argument that torch.compile cannot take apart")
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
        variant = find(owner, state, method, key, tensors)
        if variant is None:
            variant, _ = make(owner, state, method, original, key, tensors)
    if variant.code is None:
        return _fall_back(owner, variant, method, original, args, kwargs)
    return variant.code(owner, *tensors)


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def find(
    owner: nn.Module, state: OwnerState, method: str, key: Any, tensors: list[Tensor]
) -> Variant | None:
    """The variant that was made for such a call, if there is one."""
    # a guard asks for what the module holds, in the fallback of a module around it too
    exchanged, ACTIVE.exchanged = ACTIVE.exchanged, frozenset()
    try:
        for variant in state.variants.get(method, {}).values():
            if variant.key == key and variant.matches(owner, tensors):
                found: Variant = variant
                return found
        return None
    finally:
        ACTIVE.exchanged = exchanged


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
    found: Any = find(owner, state, method, key, tensors)  # type: ignore[arg-type]
    if found is None:
        found, _ = make(owner, state, method, original, key, tensors)  # type: ignore[arg-type]
    variants: dict[int, Variant] = state.variants[method]
    return next(number for number, variant in variants.items() if variant is found)


def make(
    owner: nn.Module, state: OwnerState, method: str, original: Callable[..., Any], key: Any,
    tensors: list[Tensor],
) -> tuple[Variant, Any]:  # fmt: skip
    """Trace a method for such a call and keep the variant; a failed trace keeps the fallback.

    Returns:
        The variant, and what it gives with examples for tensors.
    """
    exchanged, ACTIVE.exchanged = ACTIVE.exchanged, frozenset()
    try:
        return _make(owner, state, method, original, key, tensors)
    finally:
        ACTIVE.exchanged = exchanged


def _make(
    owner: nn.Module, state: OwnerState, method: str, original: Callable[..., Any], key: Any,
    tensors: list[Tensor],
) -> tuple[Variant, Any]:  # fmt: skip
    known = state.variants.setdefault(method, {})
    trace: Trace | None = None
    reason = ""
    if sum(v.code is not None for v in known.values()) >= MAX_VARIANTS:
        reason = f"more than {MAX_VARIANTS} variants: something it reads changes at every call"
    else:
        hiding, retried = caches.Hiding(owner, method), False
        while True:
            try:
                trace = _trace(owner, original, key, tensors, hiding)
            except StateFound as failure:
                reason = str(failure)
                continue
            except TraceFailure as failure:
                if isinstance(failure, ForeignTensor) and ACTIVE.fake_mode is not None:
                    raise  # to the caller whose tensor it is; this one may become a graph yet
                reason = str(failure)
            except Exception as error:  # the fallback runs the code itself and shows its errors
                first = (str(error).splitlines() or [""])[0]
                reason = f"{type(error).__name__}: {first}"
                # an error of a kernel says nothing of what was hidden
                if not retried and not isinstance(error, RuntimeError) and hiding.keep_missed():
                    retried = True
                    continue
                break
            hiding.note_kept()
            break
    shapes = shapes_of(tensors, trace is not None and trace.layout)
    if trace is None:
        if state.strict:
            raise UnsupportedModuleError(
                f"{type(owner).__name__}.{method} cannot become a graph: {reason}. Convert "
                "without strict, or skip this module."
            )
        logger.info("%s.%s takes the fallback: %s", type(owner).__name__, method, reason)
        held = True if reason.startswith(WRITES) else None
        variant = Variant(key, (), frozenset(), False, shapes, None, "", "swap", reason, held)
    else:
        slots = _slots_below(owner)
        _warn_of_masked(owner, method, trace, slots)
        estimated, kept = reads_to_estimates(trace, slots)
        drawn = reads_to_draws(trace, slots)
        restore_contexts(trace)
        source, names = source_of(trace, method)
        code = compile_source(source, names, method, f"{type(owner).__qualname__}.{method}")
        rung = "guided" if trace.guided else "plain"
        variant = Variant(
            key, trace.guards, trace.dims, trace.layout, shapes, code, source, rung,
            "; ".join([f"{drawn} draws" + (f", {estimated} estimated" * bool(estimated)), *kept]),
        )  # fmt: skip
    known[len(known)] = variant
    return variant, None if trace is None else trace.result


def _warn_of_masked(
    owner: nn.Module, method: str, trace: Trace, slots: dict[tuple[tuple[str, ...], str], Slot]
) -> None:
    """Name a lookup with ``padding_idx`` in a module's own code: the conversion could not know."""
    for path, attribute, row in masked_rows(trace, slots):
        home = owner.get_submodule(".".join(path))
        known = isinstance(home, nn.Embedding | nn.EmbeddingBag) and home.padding_idx is not None
        slot = slots[path, attribute]
        if not known and not slot.has_held:
            warnings.warn(
                f"{type(owner).__name__}.{method} looks up {slot.name!r} with padding_idx={row}, "
                "so that this row gets no gradient: if nothing else reads it, the KL alone moves "
                "its posterior, to the prior, and what padding reads is noise. Fix the row with "
                "bayesify.fix_(model, {name: mask}).",
                UserWarning,
                stacklevel=2,
            )


def _slots_below(owner: nn.Module) -> dict[tuple[tuple[str, ...], str], Slot]:
    found: dict[tuple[tuple[str, ...], str], Slot] = {}
    for name, module in owner.named_modules(remove_duplicate=False):
        state = owner_state(module)
        if state is not None:
            path = tuple(name.split(".")) if name else ()
            found.update(((path, a), slot) for a, slot in state.slots.items())
    return found


def _trace(
    owner: nn.Module, original: Callable[..., Any], key: Any, tensors: list[Tensor],
    hiding: caches.Hiding,
) -> Trace:  # fmt: skip
    (args_structure, kwargs_structure), _ = key
    names = argument_names(original, args_structure, kwargs_structure)

    def build(traced: list[Any]) -> tuple[Any, Any]:
        used = itertools.count()
        return unflatten(args_structure, traced, used), unflatten(kwargs_structure, traced, used)

    tracer = MethodTracer(owner, run_at_mean, hiding, ACTIVE.fake_mode)
    outside = surroundings.read_by(owner, original)
    # what examples save for backward must not reach the hooks of an enclosing checkpoint
    unseen: Any = contextlib.nullcontext()
    if torch_private.saves_to_hooks():
        # kept as it is, a result would hold the node that holds it, for good
        unseen = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, _identity)
    # inside the trace of a caller, its fake mode is on and torch functions are off
    with (
        scopes.recording(_refuse_checkpoint), unseen, torch_private.disable_current_modes(),
        torch_private.EnableTorchFunction(), memos.unfilled(caches.below(owner)),
    ):  # fmt: skip
        try:
            trace = tracer.run(functools.partial(original, owner), names, build, tensors)
        except ForeignTensor as failure:
            if failure.recorder is tracer:
                raise TraceFailure(str(failure)) from failure
            raise
        finally:
            # it holds casts of ordinary parameters, now made of examples
            torch.clear_autocast_cache()
            changed = surroundings.put_back(outside)
    if changed is not None:
        raise TraceFailure(f"it changes {changed!r}, which lies outside of the module")
    if outside:
        trace.guards += (Guard((), "outside", outside, "outside"),)
    return trace


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


def _opaque(owner: nn.Module, state: OwnerState, method: str, reason: str) -> Variant:
    """The fallback of calls whose arguments cannot be taken apart."""
    known: dict[int, Variant] = state.variants.setdefault(method, {})
    for variant in known.values():
        if variant.key is None and variant.reason == reason:
            return variant
    if state.strict:
        raise UnsupportedModuleError(
            f"{type(owner).__name__}.{method} cannot become a graph: {reason}. Convert "
            "without strict, or skip this module."
        )
    variant = Variant(None, (), frozenset(), False, (), None, "", "swap", reason)
    known[len(known)] = variant
    return variant


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
