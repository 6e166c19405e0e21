"""The ways to run one method of a converted module: found, or made by a trace."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import scope as scopes
from .. import torch_private
from ..errors import UnsupportedModuleError
from ..posterior import OwnerState, Slot, owner_state
from ..scope import LOCAL
from . import caches, memos, surroundings
from .active import ACTIVE
from .arguments import argument_names, shapes_of, unflatten
from .estimators import reads_to_estimates
from .guards import Guard
from .passes import (
    compile_source,
    masked_rows,
    reads_to_draws,
    restore_contexts,
    source_of,
)
from .tracer import WRITES, MethodTracer, Trace
from .values import ForeignTensor, StateFound, TraceFailure

logger = logging.getLogger(__name__)

MAX_VARIANTS = 16
"""Variants of one method beyond this many take the fallback: something changes at every call."""


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
    """As :func:`make`. A trace begins anew where it shows that what it hid as a cache is none.

    That is either state, which an argument went into, or something that the method reads before it
    makes it. Each attempt finds the module as it was; what had to stay is remembered of the class.
    """
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


def opaque(owner: nn.Module, state: OwnerState, method: str, reason: str) -> Variant:
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
    """Trace a method once, and leave everything as it was: the module, torch, what lies outside.

    Raises:
        TraceFailure: It cannot be a graph, or it changes what lies outside of its module.
    """
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
