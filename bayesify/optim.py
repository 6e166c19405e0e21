"""Optimizers and posteriors: parameter groups that are right, and a check of any other ones."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import nn

from .errors import ArgumentError, SigmaBelowSpacingWarning
from .fixed import masked
from .likelihoods import likelihood_of
from .numeric import not_negative, real
from .own_lists import listed, trained_parameters
from .posterior import (
    Site,
    bayesian_sites,
    fixed_elements,
    full_tensor,
    held_elements,
    owner_state,
    root_mean_square,
)
from .spacing import Spread, below_spacing
from .unconverted import warn_of_unconverted

# A sigma above this is no initial value of a network's weight, but what a parameter near 0 gives.
_WIDE_STD = 0.5


def param_groups(
    model: nn.Module, *, lr: float, logvar_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer, with no weight decay on a log variance.

    Decay of a log variance pulls sigma towards 1. The prior already pulls the means, so that
    ``weight_decay`` on them is a second prior: leave it at 0 unless the KL is left out.

    Args:
        model: A converted model, or a module that holds one.
        lr: Learning rate of the means and of the deterministic parameters, at least 0.
        logvar_lr: Learning rate of the log variances (or of rho), at least 0; ``lr`` if None. Adam
            moves a log variance by at most about ``logvar_lr`` a step, so that a short training
            needs 5 to 20 times ``lr``.
        weight_decay: Decay of the means and of the deterministic parameters, at least 0.

    Returns:
        Groups called ``means``, ``deterministic``, ``logvars`` and ``likelihood`` (key ``name``),
        without empty ones. The last holds the noise that the likelihood learns
        (:func:`set_likelihood_`), at ``lr`` and without decay. Of ``model.parameters()`` every one
        that requires a gradient is in one of them, tied ones once, and beside each mean its log
        variance, listed there or not.

    Raises:
        ArgumentError: A number is out of its range, or the likelihood's noise has no shape yet.
        UnsupportedModuleError: ``model`` has no posterior.

    >>> import torch, bayesify
    >>> model = bayesify.to_bbb(torch.nn.Linear(2, 1))
    >>> optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, logvar_lr=1e-2))
    >>> [(g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    [('means', 0.001, 0.0), ('logvars', 0.01, 0.0)]
    """
    expected = "a finite number of at least 0"
    lr = real("param_groups: lr", lr, expected, not_negative)
    weight_decay = real("param_groups: weight_decay", weight_decay, expected, not_negative)
    logvar_lr = (
        lr if logvar_lr is None
        else real("param_groups: logvar_lr", logvar_lr, expected, not_negative)
    )  # fmt: skip
    groups = posterior_groups(model, lr, logvar_lr, weight_decay)
    return [*groups, *likelihood_groups(model, lr)]


def likelihood_groups(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """The group of what the likelihood of a model learns, if it learns anything.

    Raises:
        ArgumentError: It learns something that has no shape yet.
    """
    likelihood = likelihood_of(model)
    if likelihood is None:
        return []
    likelihood.check_shapes()
    learnt = [p for p in likelihood.parameters() if p.requires_grad]
    if not learnt:
        return []
    return [{"name": "likelihood", "params": learnt, "lr": lr, "weight_decay": 0.0}]


def posterior_groups(
    model: nn.Module, lr: float, logvar_lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """:func:`param_groups` without the likelihood, of numbers that were checked."""
    found = bayesian_sites(model)
    means = {id(site.mean) for site in found}
    raws = {id(site.raw) for site in found}
    trained = trained_parameters(model)
    groups = [
        {
            "name": "means",
            "params": [p for p in trained if id(p) in means],
            "lr": lr,
            "weight_decay": weight_decay,
        },
        {
            "name": "deterministic",
            "params": [p for p in trained if id(p) not in means | raws],
            "lr": lr,
            "weight_decay": weight_decay,
        },
        {
            "name": "logvars",
            "params": [p for p in trained if id(p) in raws],
            "lr": logvar_lr,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


def warmup_cosine(step: int, warmup_steps: int, steps: int) -> float:
    """The factor of a learning rate: it rises over the warm-up to 1, then falls as a cosine to 0.

    Args:
        step: From 0.
        warmup_steps: Steps of the linear rise; 0 starts at 1.
        steps: Of the whole run.

    >>> [warmup_cosine(step, 2, 4) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Find what would ruin the posterior of ``model`` in training with ``optimizer``.

    An error: weight decay or a layer-wise trust ratio (LARS, LAMB) on a log variance, a log
    variance that the optimizer does not hold, NaN or Inf in one; noise of the likelihood
    (:func:`set_likelihood_`) that it does not hold or decays. A warning: a posterior so wide
    that its weights are mere noise, which is what an initialisation loop over ``parameters()``
    leaves behind; weights that a module masks and that are not fixed (:func:`bayesify.fix_`), as
    where ``padding_idx`` was set after the conversion; a parameter that came after the conversion
    (:func:`extend_`); a sigma that the bfloat16 or float16 of its tensor cannot hold.

    Args:
        model: A converted model, or a module that holds one.
        optimizer: Any object with torch's ``param_groups``.

    Raises:
        ArgumentError: With every problem found and its remedy.
        UnsupportedModuleError: ``model`` has no posterior.

    >>> import torch, bayesify
    >>> model = bayesify.to_bbb(torch.nn.Linear(2, 1))
    >>> check_optimizer(model, torch.optim.AdamW(model.parameters()))
    Traceback (most recent call last):
    ...
    bayesify.errors.ArgumentError: The optimizer does not suit the posterior:
      weight decay on 2 log variances (weight_logvar, bias_logvar) pulls sigma towards 1: ...
    """
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list):
        raise ArgumentError(
            "check_optimizer: optimizer must be a torch.optim.Optimizer, got "
            f"{type(optimizer).__name__}."
        )
    found = bayesian_sites(model)
    names = {id(p): name for name, p in nn.Module.named_parameters(model)}
    group_of = {id(p): group for group in groups for p in group["params"]}
    raws = {id(site.raw): names.get(id(site.raw), site.name) for site in found}
    held = {key: group_of[key] for key in raws if key in group_of}
    decayed = [raws[key] for key, group in held.items() if group.get("weight_decay", 0)]
    adapted = [raws[key] for key, group in held.items() if group.get("always_adapt")]
    missing = [raws[id(s.raw)] for s in found if s.raw.requires_grad and id(s.raw) not in held]
    broken = [raws[id(s.raw)] for s in found if not bool(torch.isfinite(s.raw.detach()).all())]
    problems = []
    if decayed:
        problems.append(
            f"weight decay on {listed(decayed)} pulls sigma towards 1: make the optimizer from "
            "bayesify.param_groups(model, lr=...)."
        )
    if adapted:
        problems.append(
            f"always_adapt on {listed(adapted)} scales their steps with the norm of the log "
            "variance, which means nothing: switch it off for the group of the log variances."
        )
    if missing:
        strange = sum(key not in names for key in group_of)
        problems.append(
            f"the optimizer does not hold {listed(missing)}"
            + (f", but {strange} parameters that are not the model's" if strange else "")
            + ": make it after to_bbb and from the converted model, with "
            "bayesify.param_groups(model, lr=...). To keep them fixed: .requires_grad_(False)."
        )
    problems += _likelihood_problems(model, group_of)
    if broken:
        problems.append(
            f"NaN or Inf in {listed(broken)}: training has diverged or a file is damaged; load "
            "or convert the model anew, and lower logvar_lr."
        )
    if problems:
        raise ArgumentError("\n  ".join(["The optimizer does not suit the posterior:", *problems]))
    warn_of_unconverted(model)
    wide = [raws[id(site.raw)] for site in found if _is_noise(site)]
    if wide:
        warnings.warn(
            f"The posterior is wider than its weights in {listed(wide)}: draws are mere noise. "
            "Was it initialised by a loop over model.parameters()? Initialise before to_bbb, or "
            "leave out the log variances. (If training has led here, lower kl_weight.)",
            UserWarning,
            stacklevel=2,
        )
    for note in below_spacing(s for s in map(_spread, found) if s is not None):
        warnings.warn(note, SigmaBelowSpacingWarning, stacklevel=2)
    drawn = _drawn_though_masked(model, found)
    if drawn:
        warnings.warn(
            f"The KL alone moves the posterior of {'; '.join(drawn)}: they get no other gradient, "
            "and are drawn. Fix them with bayesify.fix_(model, {name: mask}).",
            UserWarning,
            stacklevel=2,
        )


def _likelihood_problems(model: nn.Module, group_of: dict[int, dict[str, Any]]) -> list[str]:
    """What an optimizer does wrong with the noise that the likelihood of a model learns."""
    likelihood = likelihood_of(model)
    if likelihood is None:
        return []
    learnt = {n: p for n, p in likelihood.named_parameters() if p.requires_grad}
    missing = [name for name, p in learnt.items() if id(p) not in group_of]
    decayed = [n for n, p in learnt.items() if group_of.get(id(p), {}).get("weight_decay", 0)]
    kind = type(likelihood).__name__
    problems = []
    if missing:
        problems.append(
            f"the optimizer does not hold {', '.join(missing)} of the likelihood {kind}, which "
            "would stay as it is: make it after set_likelihood_, with "
            "bayesify.param_groups(model, lr=...). To keep it fixed: .requires_grad_(False)."
        )
    if decayed:
        problems.append(
            f"weight decay on {', '.join(decayed)} of the likelihood {kind} pulls the noise "
            "towards 1: make the optimizer from bayesify.param_groups(model, lr=...)."
        )
    return problems


def _drawn_though_masked(model: nn.Module, found: list[Site]) -> list[str]:
    """What modules mask of their own Bayesian parameters and nothing has fixed."""
    rules = masked(model)
    result = []
    for site in found:
        rule = rules.get(id(site.mean))
        if rule is None or rule.readers:
            continue
        if not bool(full_tensor(fixed_elements(site.raw))[rule.index].all()):
            result.append(f"{site.name}: {rule.what}")
    return result


def _spread(site: Site) -> Spread | None:
    """Sigma beside the mean of a half precision tensor that is drawn whole."""
    mean = site.mean
    if mean.dtype.itemsize >= 4 or site.slot.estimator != "weight":
        return None
    with torch.no_grad():
        std, whole = full_tensor(site.std), full_tensor(mean)
        if site.slot.has_held:
            kept = ~held_elements(full_tensor(site.raw))
            std, whole = std[kept], whole[kept]
        return Spread(site.name, root_mean_square(std), root_mean_square(whole), mean.dtype)


def _is_noise(site: Site) -> bool:
    """Whether a tensor's sigma is that of a log variance near 0, without anyone's wish."""
    state = owner_state(site.module)
    asked = None if state is None or state.spec is None else state.spec.initial_std
    if isinstance(asked, float) and asked > _WIDE_STD:
        return False
    with torch.no_grad():
        logvar, rms = full_tensor(site.logvar).double(), root_mean_square(site.mean)
        if site.slot.has_held:
            logvar = logvar[~held_elements(full_tensor(site.raw))]
        std = torch.exp(0.5 * logvar.mean()).item()
    return std > _WIDE_STD and std > 0.5 * rms
