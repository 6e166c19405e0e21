"""A plan becomes a posterior: parameters, slots and classes of a model, all of it or nothing."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .conversion import Conversion
from .errors import UnsupportedModuleError
from .gaussian import raw_from_logvar
from .planning import Planned
from .posterior import (
    FIXED_RAW,
    PRIOR_MEAN_SUFFIX,
    STATE,
    OwnerState,
    Site,
    Slot,
    attach_prior,
    owner_state,
    raw_name,
)
from .rewriter.dispatch import adopt
from .rewriter.hooks import draw_in_hooks_, unwrap_
from .rewriter.owner import generated_class, original_class, regenerate
from .unconverted import has_slot, settle
from .validation import Found

Undo = list[Callable[[], object]]
Place = tuple[str, nn.Module, str]
"""A parameter's qualified name, the module that holds it, and its name there."""
Slots = dict[int, dict[str, Slot]]
"""New slots by the id of the module that holds the parameter, and the parameter's name there."""
UNMEASURED_LOGVAR = -10.0
"""Of a tensor without data, which no initial sigma in units of its weights can be of."""


@contextmanager
def whole_or_not() -> Iterator[Undo]:
    """Take back what the block has done if it ends with an error."""
    undo: Undo = []
    try:
        yield undo
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def apply_plan(
    model: nn.Module,
    planned: Planned,
    extend: Callable[[nn.Module], object],
    undo: Undo,
    prefix: str = "",
) -> None:
    """Do what a plan says: first the parameters and slots, then the classes of all owners.

    Every module with a posterior anywhere below it becomes an owner, since a parent may read the
    parameters of its children. What has none below it keeps its class; only its hooks draw.

    Args:
        model: The module that the plan is of.
        planned: The plan. Of its parameters, those that are tied to one with a posterior share it.
        extend: Converts what the model is given later, by itself where it changes its own head.
        undo: Gets how to take back each step that was done.
        prefix: Of the slots' names, before those in ``model``.
    """
    slots: Slots = {}
    for item in planned.chosen:
        held = [place for place in item.places if has_slot(place[1], place[2])]
        if held:
            _share(item, held[0], slots, undo)
        else:
            _give_posterior(item, planned.conversion, prefix, slots, undo)
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        if not any(id(m) in slots or owner_state(m) is not None for m in module.modules()):
            undo.append(functools.partial(unwrap_, module))
            draw_in_hooks_(module, every=False)
            continue
        _own(module, slots.get(id(module), {}), planned.conversion, extend, undo)
    settle(model)


def _give_posterior(item: Found, spec: Conversion, prefix: str, slots: Slots, undo: Undo) -> None:
    """Put a trained spread beside a mean, in every place that holds it, all with one slot."""
    slot = Slot(
        prefix + item.name, spec.prior, spec.config.parameterization, estimator=item.estimator
    )
    raw = nn.Parameter(_initial_raw(item, slot))
    for _, module, attribute in item.places:
        name = raw_name(attribute, slot)
        if name not in module._parameters:
            module._parameters[name] = raw  # register_parameter asks a module's own __getattr__
            undo.append(functools.partial(module._parameters.pop, name, None))
        slots.setdefault(id(module), {})[attribute] = slot
    first, *others = item.places
    _, home, attribute = first
    undo.append(functools.partial(_forget, home, attribute + PRIOR_MEAN_SUFFIX))
    attach_prior(Site(item.name, home, attribute, slot), spec.prior)
    for _, module, attribute in others:
        _share_prior_mean(first, module, attribute)
        undo.append(functools.partial(_forget, module, attribute + PRIOR_MEAN_SUFFIX))


def _initial_raw(item: Found, slot: Slot) -> torch.Tensor:
    """The trained spread of the planned sigma, in float32; of fixed elements that of none."""
    logvar = UNMEASURED_LOGVAR if item.std is None else 2.0 * math.log(item.std)
    double = torch.tensor(logvar, dtype=torch.float64, device="cpu")
    value = float(raw_from_logvar(double, slot.parameterization))
    filled = torch.full_like(item.parameter, value, dtype=torch.float32, requires_grad=False)
    if item.fixed is not None:
        filled[item.fixed.index] = FIXED_RAW
        slot.has_held = True
    return filled


def _share(item: Found, held: Place, slots: Slots, undo: Undo) -> None:
    """Let the posterior that a parameter has in one place hold in the others too."""
    _, home, there = held
    state = owner_state(home)
    assert state is not None
    slot = state.slots[there]
    undo.append(functools.partial(setattr, slot, "estimator", slot.estimator))
    slot.estimator = "weight"  # what is tied is one draw in all places
    for _, module, attribute in item.places:
        if has_slot(module, attribute):
            continue
        name = raw_name(attribute, slot)
        undo.append(functools.partial(module._parameters.pop, name, None))
        module._parameters[name] = home._parameters[raw_name(there, slot)]
        slots.setdefault(id(module), {})[attribute] = slot
        _share_prior_mean(held, module, attribute)
        undo.append(functools.partial(_forget, module, attribute + PRIOR_MEAN_SUFFIX))


def _share_prior_mean(place: Place, module: nn.Module, attribute: str) -> None:
    buffer = place[1]._buffers.get(place[2] + PRIOR_MEAN_SUFFIX)
    if buffer is not None and attribute + PRIOR_MEAN_SUFFIX not in module._buffers:
        module.register_buffer(attribute + PRIOR_MEAN_SUFFIX, buffer, persistent=False)


def _forget(module: nn.Module, buffer: str) -> None:
    module._buffers.pop(buffer, None)
    module._non_persistent_buffers_set.discard(buffer)


def _own(
    module: nn.Module,
    slots: dict[str, Slot],
    spec: Conversion,
    extend: Callable[[nn.Module], object],
    undo: Undo,
) -> None:
    """Make one module an owner: its state, and a class whose ``forward*`` draw.

    A forward that was set on the instance goes into the state, or it would hide that of the class.
    An owner that gets more slots gets another class, and code made for the old ones is dropped.
    """
    state = owner_state(module)
    if state is not None:
        undo.extend(functools.partial(state.slots.pop, attribute) for attribute in slots)
        undo.append(functools.partial(setattr, module, "__class__", type(module)))
        state.slots.update(slots)
        state.variants.clear()
        regenerate(module)
        return
    original = original_class(type(module))  # type(layer)(...) makes one of a generated class
    methods = {
        name: value
        for name, value in module.__dict__.items()
        if name.startswith("forward") and callable(value)
    }
    state = OwnerState(
        slots=slots, methods=methods, strict=spec.config.strict, spec=spec, extend=extend
    )
    undo.append(functools.partial(unwrap_, module))
    hooked = draw_in_hooks_(module, every=bool(slots))
    try:
        module.__class__ = generated_class(original, frozenset(slots), hooked)
    except Exception as error:  # a class may forbid subclasses in its own way
        raise UnsupportedModuleError(
            f"{original.__name__} does not allow a subclass in its place ({error}). Skip it."
        ) from error
    undo.append(functools.partial(revert_, module))
    for name in methods:
        del module.__dict__[name]
    module.__dict__[STATE] = state
    adopt(module)


def revert_(module: nn.Module) -> None:
    """Take state, class and posterior off one module; its means stay."""
    state = module.__dict__.pop(STATE, None)
    module.__class__ = original_class(type(module))
    if not isinstance(module, torch.jit.ScriptModule):
        unwrap_(module)
    if state is None:
        return
    for attribute, slot in state.slots.items():
        module._parameters.pop(raw_name(attribute, slot), None)
        _forget(module, attribute + PRIOR_MEAN_SUFFIX)
    module.__dict__.update(state.methods)


def drop_lost(model: nn.Module, undo: Undo) -> None:
    """Drop the posteriors of parameters that are gone, of another shape, or tied to a first one."""
    first: dict[int, Slot] = {}
    for module in model.modules():
        state = owner_state(module)
        for attribute, slot in list(state.slots.items()) if state is not None else ():
            mean = module._parameters.get(attribute)
            raw = module._parameters.get(raw_name(attribute, slot))
            lost = mean is None or raw is None or mean.shape != raw.shape
            if not lost and first.setdefault(id(mean), slot) is slot:
                continue
            assert state is not None
            undo.append(functools.partial(setattr, state, "slots", dict(state.slots)))
            del state.slots[attribute]
            places: tuple[tuple[dict[str, Any], str], ...] = (
                (module._parameters, raw_name(attribute, slot)),
                (module._buffers, attribute + PRIOR_MEAN_SUFFIX),
            )
            for held, name in places:
                if name in held:
                    undo.append(functools.partial(held.__setitem__, name, held.pop(name)))
