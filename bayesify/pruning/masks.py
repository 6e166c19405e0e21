"""The mask of pruned weights: where it is kept, and how training leaves it alone."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..posterior import (
    PRUNED_RAW,
    Site,
    Slot,
    bayesian_sites,
    fixed_elements,
    held_elements,
    owner_state,
    pruned_elements,
    tensors_of,
)


class PrunedSlot(Slot):
    """The slot of a tensor with pruned weights; a copy of it keeps them pruned as well."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        held = _HELD.get(self.uid)
        module = None if held is None else held.module()
        if held is None or module is None:
            return PrunedSlot, self.settings
        return PrunedSlot, self.settings, (module, held.attribute)

    def __setstate__(self, state: tuple[nn.Module, str]) -> None:
        _hold(self, *state)


class _Held:
    """Where a slot with pruned weights is; the hooks are on the parameters in ``guarded``."""

    __slots__ = ("attribute", "guarded", "module")

    def __init__(self, module: nn.Module, attribute: str) -> None:
        self.module = weakref.ref(module)
        self.attribute = attribute
        self.guarded: list[weakref.ref[Tensor]] = []


_HELD: dict[int, _Held] = {}
_HOOK: list[Any] = []


def prune_site(site: Site, mask: Tensor) -> None:
    """Prune the weights of one tensor where ``mask`` is True, and keep them pruned."""
    mean, raw = site.mean.detach(), site.raw.detach()
    mask = mask & ~fixed_elements(raw)
    mean.masked_fill_(mask, 0.0)
    raw.masked_fill_(mask, PRUNED_RAW)
    keep_site(site)


def keep_site(site: Site) -> None:
    """Keep the pruned weights of one tensor pruned."""
    _clear(site.mean, site.raw)
    # Not another slot: tied modules, also those outside of this model, share the one that is.
    site.slot.__class__ = PrunedSlot
    site.slot.has_held = True
    held = _hold(site.slot, site.module, site.attribute)
    _guard(held, site.mean, site.raw)


def keep_pruned_(model: nn.Module) -> nn.Module:
    """Let pruned weights stay pruned in training, where nothing has seen to it yet.

    :func:`prune_` and copies of its model need no call. A model whose state_dict was loaded from
    that of a pruned one does, and so does one with fixed weights (:func:`bayesify.fix_`) that were
    not fixed in it, which then stay fixed.

    After every step of a torch optimizer the pruned weights are set to 0 again, whatever momentum,
    weight decay or an optimizer's state would make of them; their gradients are 0.

    Args:
        model: A converted model.

    Returns:
        ``model``.

    Raises:
        UnsupportedModuleError: ``model`` has no posterior.

    >>> import torch, bayesify
    >>> pruned = bayesify.prune_(bayesify.to_bbb(torch.nn.Linear(9, 9)), 0.5)
    >>> model = bayesify.to_bbb(torch.nn.Linear(9, 9))
    >>> _ = model.load_state_dict(pruned.state_dict())
    >>> bayesify.sparsity(keep_pruned_(model)) == bayesify.sparsity(pruned)
    True
    """
    for site in bayesian_sites(model):
        if bool(held_elements(site.raw).any()):
            site.slot.has_held = True
            if bool(pruned_elements(site.raw).any()):
                keep_site(site)
    return model


def _hold(slot: Slot, module: nn.Module, attribute: str) -> _Held:
    if not _HOOK:
        _HOOK.append(register_optimizer_step_post_hook(_after_step))
    held = _HELD.get(slot.uid)
    if held is None or held.module() is not module:
        held = _HELD[slot.uid] = _Held(module, attribute)
    return held


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for uid, held in list(_HELD.items()):
        module = held.module()
        state = None if module is None else owner_state(module)
        slot = None if state is None else state.slots.get(held.attribute)
        if module is None or slot is None or slot.uid != uid:
            del _HELD[uid]
            continue
        mean, raw = tensors_of(module, held.attribute, slot)
        if id(mean) in stepped or id(raw) in stepped:
            _clear(mean, raw)
            _guard(held, mean, raw)


def _clear(mean: Tensor, raw: Tensor) -> None:
    mask = pruned_elements(raw)
    mean.detach().masked_fill_(mask, 0.0)
    raw.detach().masked_fill_(mask, PRUNED_RAW)


def _guard(held: _Held, mean: Tensor, raw: Tensor) -> None:
    """Gradients of pruned weights must not count in their norm, nor in an optimizer's state."""
    spread = weakref.ref(raw)

    def clear(parameter: Tensor) -> None:
        found = spread()
        if found is not None and parameter.grad is not None:
            parameter.grad.masked_fill_(pruned_elements(found), 0.0)

    guarded = [reference() for reference in held.guarded]
    for parameter in (mean, raw):
        if parameter.requires_grad and not any(known is parameter for known in guarded):
            parameter.register_post_accumulate_grad_hook(clear)
            held.guarded.append(weakref.ref(parameter))
