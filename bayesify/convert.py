"""From a deterministic model to a Bayesian one and back."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .copies import copy_detached
from .errors import (
    BayesifyError,
    BiasBeforeNormWarning,
    LostPosteriorWarning,
    NoMatchWarning,
    SigmaBelowSpacingWarning,
    UnsupportedModuleError,
)
from .gaussian import raw_from_logvar
from .own_lists import left_out_of_parameters, left_out_of_state, listed
from .planning import (
    BBBConfig,
    Conversion,
    ConversionPlan,
    Estimators,
    make_plan,
    specify,
)
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
    sites,
)
from .priors import Prior
from .rewriter.dispatch import adopt
from .rewriter.hooks import draw_in_hooks_, unwrap_
from .rewriter.owner import generated_class, original_class, regenerate
from .scope.unused import note_extension
from .selection import Pattern, Recorded
from .unconverted import Part, converted_parts, has_slot, settle
from .validation import Found, check_model

Undo = list[Callable[[], object]]
Place = tuple[str, nn.Module, str]
"""A parameter's qualified name, the module that holds it, and its name there."""


def to_bbb(
    model: nn.Module,
    *,
    skip: Pattern | Sequence[Pattern] = (),
    only: Pattern | Sequence[Pattern] = (),
    preset: str | None = None,
    prior: Prior | None = None,
    logvar: float | None = None,
    estimator: Estimators = "weight",
    config: BBBConfig = BBBConfig(),
) -> nn.Module:
    """A Bayesian copy of ``model``: a Gaussian posterior over each selected parameter.

    Args:
        model: Any module; it is copied and left as it is.
        skip: Patterns of what stays deterministic: a class, a class name or glob, a module's
            name, a glob on qualified names, ``re:...``, ``@last-layer`` or ``@before-batchnorm``.
        only: Patterns of what may become Bayesian; skip beats only.
        preset: ``full``, ``no-conv``, ``linear-only``, ``no-layernorm`` or ``last-layer``.
        prior: Prior over the weights; N(0, 1) if None.
        logvar: Initial log variance of every weight; None scales sigma with each tensor
            (``config.relative_std``), which keeps a pretrained model's function.
        estimator: How a weight is drawn that one linear layer, convolution or embedding reads.
            ``"weight"``: once, for the whole batch. ``"flipout"``: once, with random signs for
            each example. ``"local"``: its outputs instead, each element by itself. The last two
            give gradients of less variance; reads that cannot take them keep ``"weight"``. A
            mapping from patterns, ``{"head": "local", "*": "flipout"}``, chooses for each
            parameter: the first that matches.
        config: See :class:`BBBConfig`.

    Returns:
        A model of the same class, methods and state_dict keys, plus one ``<name>_logvar`` for
        each Bayesian parameter. It draws in ``train()`` and uses the means in ``eval()``.

    Raises:
        ArgumentError: An argument has a value that cannot work.
        NoMatchError: A pattern matches nothing, under ``config.strict``.
        UnsupportedModuleError: The model cannot be converted; the message lists every reason.

    Reference:
        Blundell et al., 2015, arXiv:1505.05424; Kingma, Salimans and Welling, 2015,
        arXiv:1506.02557 (local); Wen et al., 2018, arXiv:1803.04386 (Flipout).

    >>> import torch, bayesify
    >>> model = bayesify.to_bbb(torch.nn.Linear(3, 1))
    >>> sorted(model.state_dict())
    ['bias', 'bias_logvar', 'weight', 'weight_logvar']
    """
    check_model(model)
    try:
        copied = copy_detached(model)
    except BayesifyError:
        raise
    except Exception as error:
        # what cannot be copied may be what cannot be converted
        make_plan(model, specify(skip, only, preset, prior, logvar, estimator, config))
        raise UnsupportedModuleError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}). Convert "
            "it in place with to_bbb_(model)."
        ) from error
    return to_bbb_(
        copied, skip=skip, only=only, preset=preset, prior=prior, logvar=logvar,
        estimator=estimator, config=config,
    )  # fmt: skip


def to_bbb_(
    model: nn.Module,
    *,
    skip: Pattern | Sequence[Pattern] = (),
    only: Pattern | Sequence[Pattern] = (),
    preset: str | None = None,
    prior: Prior | None = None,
    logvar: float | None = None,
    estimator: Estimators = "weight",
    config: BBBConfig = BBBConfig(),
) -> nn.Module:
    """Convert ``model`` itself; arguments, result and errors as :func:`to_bbb`.

    A model that cannot be converted is left exactly as it was.
    """
    check_model(model)
    already = [site.name for site in sites(model)]
    if already:
        raise UnsupportedModuleError(
            f"{type(model).__name__} is already Bayesian ({len(already)} parameters, the first "
            f"being {already[0]!r}). Use it as it is, set_prior_(model, prior) for another prior, "
            "or to_deterministic(model) first."
        )
    spec = specify(skip, only, preset, prior, logvar, estimator, config)
    planned = apply_(model, spec)
    for hint in planned.hints:
        warnings.warn(hint, BiasBeforeNormWarning, stacklevel=2)
    for note in planned.spacing:
        warnings.warn(note, SigmaBelowSpacingWarning, stacklevel=2)
    for note in _left_out(model):
        warnings.warn(note, LostPosteriorWarning, stacklevel=2)
    return model


def _left_out(model: nn.Module) -> list[str]:
    """What the model's own lists miss of its posterior."""
    kind = type(model).__name__
    notes = []
    unsaved, untrained = left_out_of_state(model), left_out_of_parameters(model)
    if unsaved:
        notes.append(
            f"{kind}.state_dict() leaves out {listed(unsaved)}: a state dict brings back another "
            "posterior, and bayesify.save refuses the model. It has a state_dict or a hook of its "
            "own, which must let them pass; or skip these parameters."
        )
    if untrained:
        notes.append(
            f"parameters() leaves out {listed(untrained)}, and so does an optimizer made of it. "
            "Make the optimizer from bayesify.param_groups(model, lr=...), which holds them."
        )
    return notes


def apply_(model: nn.Module, spec: Conversion) -> ConversionPlan:
    """Convert what ``spec`` selects and is not Bayesian yet."""
    result, chosen = make_plan(model, spec)
    if not any(row.bayes for row in result.rows):
        actions = ", ".join(sorted({row.action for row in result.rows})) or "no parameter at all"
        raise UnsupportedModuleError(
            f"No parameter of {type(model).__name__} is selected ({actions}). "
            + "; ".join(result.notes)
        )
    for note in result.notes:
        warnings.warn(note, NoMatchWarning, stacklevel=3)
    with _whole_or_not() as undo:
        _apply(model, spec, chosen, "", undo)
    return result


@contextmanager
def _whole_or_not() -> Iterator[Undo]:
    """Take back what the block has done if it ends with an error."""
    undo: Undo = []
    try:
        yield undo
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def _apply(
    model: nn.Module, spec: Conversion, chosen: list[Found], prefix: str, undo: Undo
) -> None:
    """Give the chosen parameters a posterior; those that have one elsewhere share it."""
    slots: dict[int, dict[str, Slot]] = {}
    parameterization = spec.config.parameterization
    for item in chosen:
        held = [place for place in item.places if has_slot(place[1], place[2])]
        if held:
            _share(item, held[0], slots, undo)
            continue
        slot = Slot(prefix + item.name, spec.prior, parameterization, estimator=item.estimator)
        logvar = -10.0 if item.std is None else 2.0 * math.log(item.std)
        double = torch.tensor(logvar, dtype=torch.float64, device="cpu")
        value = float(raw_from_logvar(double, parameterization))
        filled = torch.full_like(item.parameter, value, dtype=torch.float32, requires_grad=False)
        if item.fixed is not None:
            filled[item.fixed.index] = FIXED_RAW
            slot.has_held = True
        raw = nn.Parameter(filled)
        for _, module, attribute in item.places:
            name = raw_name(attribute, slot)
            if name not in module._parameters:
                module._parameters[name] = raw  # register_parameter asks a module's own __getattr__
                undo.append(functools.partial(module._parameters.pop, name, None))
            slots.setdefault(id(module), {})[attribute] = slot
        _, home, attribute = item.places[0]
        undo.append(functools.partial(_forget, home, attribute + PRIOR_MEAN_SUFFIX))
        attach_prior(Site(item.name, home, attribute, slot), spec.prior)
        for _, module, attribute in item.places[1:]:
            _share_prior_mean(item.places[0], module, attribute)
            undo.append(functools.partial(_forget, module, attribute + PRIOR_MEAN_SUFFIX))
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        if not any(id(m) in slots or owner_state(m) is not None for m in module.modules()):
            undo.append(functools.partial(unwrap_, module))
            draw_in_hooks_(module, every=False)
            continue
        _adopt(module, slots.get(id(module), {}), spec, undo)
    settle(model)


def _share(item: Found, held: Place, slots: dict[int, dict[str, Slot]], undo: Undo) -> None:
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


def _adopt(module: nn.Module, slots: dict[str, Slot], spec: Conversion, undo: Undo) -> None:
    """Give one module its state and its generated class."""
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
        slots=slots, methods=methods, strict=spec.config.strict, spec=spec, extend=extend_
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


def to_deterministic(model: nn.Module) -> nn.Module:
    """A deterministic copy of a converted model at its posterior means.

    Returns:
        A model of the original classes and state_dict keys.

    Raises:
        UnsupportedModuleError: The model has no posterior.

    >>> import torch, bayesify
    >>> layer = torch.nn.Linear(3, 1)
    >>> back = bayesify.to_deterministic(bayesify.to_bbb(layer))
    >>> type(back) is torch.nn.Linear, torch.equal(back.weight, layer.weight)
    (True, True)
    """
    if not any(owner_state(m) is not None for m in model.modules()):
        raise UnsupportedModuleError(
            f"{type(model).__name__} has no Bayesian parameter: it is deterministic already."
        )
    copied = copy_detached(model)
    for module in copied.modules():
        revert_(module)
    return copied


def extend_(model: nn.Module) -> nn.Module:
    """Give a posterior to what a converted model has been given since, by the same conversion.

    A new head, an appended block, a layer that another function has exchanged
    (``SyncBatchNorm.convert_sync_batchnorm``), a parameter set to one of another shape: what the
    conversion's ``skip``, ``only`` and config select of them becomes Bayesian with its prior,
    initial sigma and estimator, all else keeps its posterior. (What was exchanged starts with the
    initial sigma again, so exchange before the training.) A weight tied since to a Bayesian one
    shares its posterior, and the posterior of a parameter that is gone is dropped. What the
    conversion has skipped, or has found frozen, stays deterministic. :func:`elbo_loss`,
    :func:`check_optimizer` and :func:`save` name what waits for this.

    The optimizer must be made anew: it does not hold what is new. ``reset_classifier`` of timm's
    models does all but that by itself.

    Args:
        model: A converted model, or a module that holds some; it is changed in place, and left as
            it was after an error.

    Returns:
        ``model``.

    Raises:
        UnsupportedModuleError: ``model`` has no conversion, or something new cannot be converted.

    >>> import torch, bayesify
    >>> model = bayesify.to_bbb(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 9)))
    >>> model[1] = torch.nn.Linear(4, 2)  # for another task
    >>> [p.name for p in bayesify.posteriors(model)]
    ['0.weight', '0.bias']
    >>> [p.name for p in bayesify.posteriors(bayesify.extend_(model))]
    ['0.weight', '0.bias', '1.weight', '1.bias']
    """
    if not any(owner_state(m) is not None for m in model.modules()):
        raise UnsupportedModuleError(
            f"{type(model).__name__} has no conversion to extend. Convert it first: "
            "model = bayesify.to_bbb(model)."
        )
    with _whole_or_not() as undo:
        _drop_lost(model, undo)
        for part in converted_parts(model):
            chosen = part.selected()
            _warn_of_recorded(part)
            lenient = replace(part.spec, config=replace(part.spec.config, strict=False))
            new = {id(item.parameter) for item in chosen}
            _, planned = make_plan(part.module, lenient)
            shared = [item for item in chosen if any(has_slot(m, a) for _, m, a in item.places)]
            chosen = [item for item in planned if id(item.parameter) in new] + shared
            # names of a part go on from its place in the model that was converted
            names = [(site.slot.name, site.name) for site in sites(part.module)]
            prefix = next((a.removesuffix(b) for a, b in names if a.endswith(b)), "")
            _apply(part.module, part.spec, chosen, prefix, undo)
    note_extension()
    return model


def _warn_of_recorded(part: Part) -> None:
    """Name what a regular expression of a file would have to decide on, and does not."""
    spec = part.spec
    patterns = (*spec.skip, *spec.only, *(pattern for pattern, _ in spec.estimators))
    recorded = [pattern for pattern in patterns if isinstance(pattern, Recorded)]
    names = [
        f"{path}.{attribute}" if path else attribute
        for path, module in part.module.named_modules(remove_duplicate=False)
        for attribute in module._parameters
        if (id(module), attribute) in part.new
    ]
    unknown = [name for name in names if recorded and name not in recorded[0].known]
    if unknown:
        warnings.warn(
            f"{', '.join(map(repr, dict.fromkeys(recorded)))} of the file that the model is from "
            "stands for the parameters that it had chosen there, since a regular expression of a "
            f"file is not run. It does not choose among {len(unknown)} new ones: "
            f"{', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}.",
            NoMatchWarning,
            stacklevel=3,
        )


def _drop_lost(model: nn.Module, undo: Undo) -> None:
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
