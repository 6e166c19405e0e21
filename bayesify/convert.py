"""From a deterministic model to a Bayesian one and back.

Every conversion goes one way: checked (``validation``), planned once (``planning``), applied once
(``applying``).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Sequence

from torch import nn

from .applying import Undo, apply_plan, drop_lost, revert_, whole_or_not
from .conversion import BBBConfig, Conversion, Estimators, InitialStd
from .copies import copy_detached
from .errors import (
    BayesifyError,
    BiasBeforeNormWarning,
    LostPosteriorWarning,
    NoMatchWarning,
    SigmaBelowSpacingWarning,
    UnsupportedModuleError,
)
from .own_lists import left_out_of_parameters, left_out_of_state, listed
from .planning import Planned, make_plan
from .posterior import owner_state, sites
from .priors import Prior
from .scope.unused import note_extension
from .selection import Pattern
from .settings.fields import documented, taken
from .unconverted import Part, converted_parts, has_slot
from .validation import check_model


@documented(Conversion)
def to_bbb(  # noqa: D417 - the others are fields of Conversion
    model: nn.Module,
    *,
    skip: Pattern | Sequence[Pattern] = (),
    only: Pattern | Sequence[Pattern] = (),
    preset: str | None = None,
    prior: Prior = Conversion.prior,
    initial_std: InitialStd | None = None,
    estimator: Estimators = "weight",
    config: BBBConfig = Conversion.config,
) -> nn.Module:
    """A Bayesian copy of ``model``: a Gaussian posterior over each selected parameter.

    Args:
        model: Any module; it is copied and left as it is.

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
    spec = taken(Conversion, locals())
    try:
        copied = copy_detached(model)
    except BayesifyError:
        raise
    except Exception as error:
        make_plan(model, spec)  # what cannot be copied may be what cannot be converted
        raise UnsupportedModuleError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}). Convert "
            "it in place with to_bbb_(model)."
        ) from error
    return _convert(copied, spec)


@documented(Conversion)
def to_bbb_(  # noqa: D417 - the others are fields of Conversion
    model: nn.Module,
    *,
    skip: Pattern | Sequence[Pattern] = (),
    only: Pattern | Sequence[Pattern] = (),
    preset: str | None = None,
    prior: Prior = Conversion.prior,
    initial_std: InitialStd | None = None,
    estimator: Estimators = "weight",
    config: BBBConfig = Conversion.config,
) -> nn.Module:
    """Convert ``model`` itself, as :func:`to_bbb` converts a copy.

    Args:
        model: Any module. One that cannot be converted is left exactly as it was.

    Returns:
        ``model``.

    Raises:
        ArgumentError: An argument has a value that cannot work.
        NoMatchError: A pattern matches nothing, under ``config.strict``.
        UnsupportedModuleError: The model cannot be converted; the message lists every reason.
    """
    check_model(model)
    return _convert(model, taken(Conversion, locals()))


def _convert(model: nn.Module, spec: Conversion) -> nn.Module:
    """Convert a model that was checked, and say what its user should know."""
    already = [site.name for site in sites(model)]
    if already:
        raise UnsupportedModuleError(
            f"{type(model).__name__} is already Bayesian ({len(already)} parameters, the first "
            f"being {already[0]!r}). Use it as it is, set_prior_(model, prior) for another prior, "
            "or to_deterministic(model) first."
        )
    planned = plan_something(model, spec)
    _tell(planned.plan.notes, NoMatchWarning)
    apply_(model, planned)
    _tell(planned.plan.hints, BiasBeforeNormWarning)
    _tell(planned.plan.spacing, SigmaBelowSpacingWarning)
    _tell(_left_out(model), LostPosteriorWarning)
    return model


def _tell(notes: Iterable[str], kind: type[Warning]) -> None:
    for note in notes:
        warnings.warn(note, kind, stacklevel=4)


def plan_something(model: nn.Module, spec: Conversion) -> Planned:
    """The plan of a model without a posterior.

    Raises:
        NoMatchError: A pattern matches nothing, under ``config.strict``.
        UnsupportedModuleError: Nothing is selected, or something that cannot have a posterior.
    """
    planned = make_plan(model, spec)
    if not planned.chosen:
        actions = ", ".join(sorted({row.action for row in planned.plan.rows}))
        raise UnsupportedModuleError(
            f"No parameter of {type(model).__name__} is selected "
            f"({actions or 'no parameter at all'}). " + "; ".join(planned.plan.notes)
        )
    return planned


def apply_(model: nn.Module, planned: Planned) -> None:
    """Do what a plan of ``model`` says; after an error the model is as it was."""
    with whole_or_not() as undo:
        apply_plan(model, planned, extend_, undo)


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
    with whole_or_not() as undo:
        drop_lost(model, undo)
        for part in converted_parts(model):
            _extend_part(part, undo)
    note_extension()
    return model


def _extend_part(part: Part, undo: Undo) -> None:
    """Plan a whole part again, and apply of it what is new."""
    new = part.selected()
    undecided = part.undecided()
    if undecided:
        warnings.warn(undecided, NoMatchWarning, stacklevel=3)
    present = list(sites(part.module))
    planned = make_plan(part.module, part.spec, present, strict=False)
    ids = {id(item.parameter) for item in new}
    shared = [item for item in new if any(has_slot(m, a) for _, m, a in item.places)]
    chosen = [item for item in planned.chosen if id(item.parameter) in ids]
    # names of a part go on from its place in the model that was converted
    names = [(site.slot.name, site.name) for site in present]
    prefix = next((a.removesuffix(b) for a, b in names if a.endswith(b)), "")
    apply_plan(part.module, planned._replace(chosen=chosen + shared), extend_, undo, prefix)
    for module in part.module.modules():
        state = owner_state(module)
        if state is not None and state.spec is part.spec:
            undo.append(functools.partial(setattr, state, "spec", state.spec))
            state.spec = planned.conversion
