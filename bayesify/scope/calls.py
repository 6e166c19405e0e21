"""An outermost call opens a scope and draws its weights together; its reads find them there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import torch_private, torch_support
from ..kernels import compiled, grouped
from ..kernels.noise import exporting
from ..posterior import STATE, Slot, given, owner_state, tensors_of
from ..seeds import fold
from .checkpoints import SEAM
from .drawing import AT_MEAN, Scope, autocast_dtype, grad_mode, suits_group
from .local import LOCAL
from .modes import Mixed, wanted
from .seeds import new_seed
from .unused import lead_to_posteriors


def enter(
    module: nn.Module, method: str, run: Callable[..., Any], args: Any, kwargs: Any, at_mean: Any
) -> Any:
    """Run an outermost call of a method: ``run`` inside a scope that draws, else ``at_mean``."""
    scope = wanted(module)
    if scope is AT_MEAN:
        LOCAL.scope = scope
        try:
            result = at_mean(*args, **kwargs)
            return result if torch.compiler.is_compiling() else lead_to_posteriors(result)
        finally:
            LOCAL.scope = None
    held = scope is not None
    if scope is not None and exporting():
        scope, held = scope.empty(), False  # an export's tensors must not outlive it
    if torch.compiler.is_dynamo_compiling():
        torch_support.check_compile()
    if scope is None:
        scope = Scope(new_seed())
    LOCAL.scope = scope
    try:
        if torch.compiler.is_compiling():
            _prefill(module, method, scope)
            return run(*args, **kwargs)
        with SEAM:
            drawn = _prefill(module, method, scope)
            result = run(*args, **kwargs)
        _note_unread(module, method, scope, drawn)
        return lead_to_posteriors(result)
    finally:
        LOCAL.scope = None
        if not held:
            scope.clear()


def read(module: nn.Module, attribute: str, autocast: bool = False) -> Tensor:
    """What a rewritten forward reads instead of ``module.attribute``.

    Args:
        module: The owner.
        attribute: Of the parameter.
        autocast: Whether autocast lowers the weight in every operation that takes this read.
    """
    slot = module.__dict__[STATE].slots[attribute]
    scope = LOCAL.scope
    assert scope is not None
    weight = given(module, attribute, slot)
    if weight is not None:
        return weight
    scope = scope.of(module)
    if not scope.drawing:
        return tensors_of(module, attribute, slot)[0]
    if autocast:
        return scope.read_lowered(module, attribute, slot)
    return scope.read(module, attribute, slot)


def _prefill(module: nn.Module, method: str, scope: Scope) -> list[Slot]:
    """Draw every weight below ``module`` now, except those that are sharded or seldom read.

    Made here, a draw lies outside every checkpointed region and every compiled sub-graph; a
    sharded parameter is drawn by the module that reads it, after its own all-gather. Where draws
    are made together in a process group, the node of each comes at its first read
    (:class:`~.grouped.Later`). Elsewhere that gains nothing, and nodes made one after the other are
    cheaper.

    Returns:
        The slots that were drawn; none while torch.compile traces, which drops what is not read,
        and none where modes of parts differ, which is rare: all is drawn when it is read.
    """
    mode = grad_mode()
    if (id(module), mode) in scope.filled or isinstance(scope, Mixed):
        return []
    compiling = torch.compiler.is_compiling()
    state = module.__dict__[STATE]
    seldom = set() if compiling else state.seldom.get((method, mode), set())
    lowered = {} if compiling else state.lowered.get((method, mode), {})
    drawn: list[Slot] = []
    scope.filled.add((id(module), mode))
    seen: dict[int, int] = {}
    # a program for elsewhere has draws by operators of torch, and no memory of this process
    tracing = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
    together = tracing or grouped.possible()
    items: dict[tuple[Any, ...], grouped.Item] = {}
    slots: list[Slot] = []
    at_once = not _in_process_group()
    for child in module.modules():
        at_once = at_once or _is_compiled(child)
        state = owner_state(child)
        if state is None:
            continue
        for attribute, slot in state.slots.items():
            if given(child, attribute, slot) is not None:
                continue
            if seen.setdefault(slot.key, slot.uid) != slot.uid:
                # a copy of a layer in the same model: not the same noise
                scope.keys.setdefault(slot.uid, fold(slot.key, 1 + len(scope.keys)))
            mean, raw = tensors_of(child, attribute, slot)
            index: tuple[Any, ...] = (slot.uid, mode)
            dtype = lowered.get(slot.uid)
            if dtype is not None and dtype == autocast_dtype(mean):
                index = (*index, dtype)
            else:
                dtype = None
            if type(mean) is not nn.Parameter or not scope.keeps(child, attribute, mean):
                continue
            if index in scope.realised or index in scope.later:
                continue
            if slot.estimator != "weight" or slot.uid in seldom:
                continue  # most of its reads need no draw, or there is none
            if not compiling:
                drawn.append(slot)
            if together and suits_group(slot, mean, raw):
                if index not in items:
                    items[index] = grouped.Item(
                        mean, raw, scope.key_of(slot), slot.buffers, dtype, slot.has_held
                    )
                    slots.append(slot)
                    if not tracing:
                        slot.drawn = None
            elif dtype is None:
                scope.draw(child, attribute, slot)
            else:
                scope.read_lowered(child, attribute, slot)
    if tracing and items:
        _draw_compiled(module, scope, items, slots)
    elif items:
        assert scope.seed is not None
        # as in realise
        with torch_private.DisableTorchFunction():
            made = grouped.prepare(list(items.values()), scope.seed)
        for index, slot, value in zip(items, slots, made, strict=True):
            if not isinstance(value, grouped.Later):
                scope.realised[index] = value
            elif at_once:
                scope.realised[index], slot.drawn = value.read(), value.hook
            else:
                scope.later[index] = value
    return drawn


def _draw_compiled(
    module: nn.Module, scope: Scope, items: dict[tuple[Any, ...], grouped.Item], slots: list[Slot]
) -> None:
    """As :func:`_prefill` draws, by one operator; what it leaves is for the KL divergence."""
    assert scope.seed is not None
    made, token = compiled.draw(list(items.values()), scope.seed)
    for index, value in zip(items, made, strict=True):
        scope.realised[index] = value
    if token is not None:
        uids = tuple(slot.uid for slot in slots)
        module.__dict__[STATE].drawn = compiled.Drawn(uids, scope.seed, token)


def _in_process_group() -> bool:
    """Whether gradients may be sent while the backward goes on, as DDP does."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile runs this part of a model: its inputs must be there as it begins."""
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"


def _note_unread(module: nn.Module, method: str, scope: Scope, drawn: list[Slot]) -> None:
    """Remember which weights a call drew in vain: later calls draw them when they read them.

    And which it read in autocast's dtype alone: later calls draw them in it.
    """
    if scope.compiled:
        return
    mode = grad_mode()
    used = {(uid, of): dtype for uid, of, dtype in scope.lowered.copy()}
    whole = module.__dict__[STATE].lowered.setdefault((method, mode), {})
    for slot in drawn:
        dtype = used.get((slot.uid, mode))
        if dtype is not None and (slot.uid, mode) not in scope.reads:
            whole[slot.uid] = dtype
        elif (slot.uid, mode) in scope.reads:
            whole.pop(slot.uid, None)
    unread = [s for s in drawn if (s.uid, mode) not in scope.reads and (s.uid, mode) not in used]
    if unread:
        seldom = module.__dict__[STATE].seldom.setdefault((method, mode), set())
        seldom.update(slot.uid for slot in unread)
        for slot in unread:
            slot.drawn = None
