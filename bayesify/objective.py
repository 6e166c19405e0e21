"""What is minimised: the KL divergence of the posterior, the ELBO around any loss, its weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import gaussian, torch_private, torch_support
from .errors import ArgumentError
from .kernels import grouped
from .kernels.noise import noise
from .numeric import not_negative, real, whole
from .posterior import (
    Site,
    bayesian_sites,
    full_tensor,
    gaussian_prior,
    held_elements,
    tensors_of,
)
from .priors import LEAST_STD, MEAN_RANGE, MOST_STD, ScaleMixturePrior, may_be_mean, may_be_std
from .rewriter.active import ACTIVE
from .rewriter.values import TraceFailure
from .scope import LOCAL, new_seed, open_modes
from .settings.training import KLReduction
from .unconverted import warn_of_unconverted

ScheduleShape = Literal["cosine", "linear", "constant"]

_REDUCTIONS = ("num_data", "num_weights", "sum")
_SHAPES = ("cosine", "linear", "constant")
_VAR_RANGE = f"a number from {LEAST_STD**2:g} to {MOST_STD**2:g}"


def kl_divergence(model: nn.Module) -> Tensor:
    r"""KL divergence from the posterior to the prior, summed over all weights, tied ones once.

    .. math:: \mathrm{KL} = \sum_i \mathbb{E}_{q(w_i)} [\log q(w_i) - \log p(w_i)]

    Gaussian and live priors have a closed form. A scale mixture has none: its term is
    ``log q(w) - log p(w)`` at one draw ``w``, that of the enclosing ``one_draw`` or a fresh one,
    and its expectation over draws is the KL divergence. Pruned and fixed weights are left out.

    Args:
        model: A converted model, or a module that holds one.

    Returns:
        A scalar in nats, differentiable in the means and log variances, in float32 or in float64
        if a mean is; on the device of the first Bayesian parameter. It is the sum over the whole
        model also where FSDP2 has sharded it.

    Raises:
        UnsupportedModuleError: ``model`` has no posterior.
        ArgumentError: A live prior gives values that are no mean and variance of the tensor.

    Reference:
        Blundell et al., 2015, arXiv:1505.05424, equations 1 and 2.

    >>> import torch, bayesify
    >>> model = bayesify.to_bbb(torch.nn.Linear(2, 1), logvar=0.0)
    >>> kl = kl_divergence(model)  # sigma is the prior's: only the means differ from it
    >>> torch.isclose(kl, 0.5 * sum(p.mean.square().sum() for p in bayesify.posteriors(model)))
    tensor(True)
    """
    if ACTIVE.tracer is not None:
        raise TraceFailure("it computes a KL divergence, which reads means and not draws")
    if torch.compiler.is_dynamo_compiling():
        torch_support.check_compile()
    found = bayesian_sites(model)
    # a forward that calls this may run with its reads of parameters exchanged for draws
    with torch_private.DisableTorchFunction():
        seed: Tensor | None = None
        terms = []
        partial: dict[Any, list[Tensor]] = {}  # FSDP2: sums over the shards of this process
        hanging: list[tuple[grouped.Hook, Tensor | float, Tensor | float]] = []
        may_hang = torch.is_grad_enabled() and grouped.possible()
        for site in found:
            if isinstance(site.slot.prior, ScaleMixturePrior):
                if seed is None:
                    seed = _seed_of(found)
                term = _drawn_term(site, site.slot.prior, seed)
            else:
                prior = _closed_prior(site)
                hook = _hook(site, prior) if may_hang else None
                if hook is not None:
                    hanging.append((hook, *prior))
                    site.slot.drawn = None
                    continue
                term = _closed_term(site, prior)
            mesh = _mesh(_tensors(site)[0])
            if mesh is None:
                terms.append(term)
            else:
                partial.setdefault(mesh, []).append(term)
        if hanging:
            terms.append(grouped.gaussian_kl(hanging))
        terms += [_over_processes(torch.stack(each).sum(), *mesh) for mesh, each in partial.items()]
        device = _tensors(found[0])[0].device
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in terms) else torch.float32
        return torch.stack([t.to(device, dtype) for t in terms]).sum()


def elbo_loss(
    loss: Tensor,
    model: nn.Module,
    *,
    num_data: int | None = None,
    kl_weight: float = 1.0,
    kl_reduction: KLReduction = "num_data",
) -> Tensor:
    r"""The generalised negative ELBO around any loss, to be minimised.

    .. math:: \mathcal{L} = \mathrm{loss} + \beta \, s \, \mathrm{KL}

    Which factor s, before the KL summed in nats:

    - ``"num_data"``: s = 1/N, for a loss that is the **mean** negative log likelihood per training
      example (``cross_entropy`` as it comes). At ``kl_weight=1`` this is the ELBO over N, and the
      posterior is Bayes'. Take it for supervised training on N labelled examples.
    - ``"num_weights"``: s = 1/P, P being the number of Bayesian weights, fixed ones not counted:
      the mean KL of a weight.
      For a loss that is no likelihood, such as a self-supervised one, where 1/N would let the noise
      grow until the loss has risen by up to P / 2N (:func:`noise_budget`).
    - ``"sum"``: s = 1, for a loss that is the **sum** over the whole data set.

    Args:
        loss: A scalar, the loss of one batch at drawn weights.
        model: The converted model.
        num_data: Number N of training examples, not of the batch and not of batches. Demanded by
            ``"num_data"``, refused by the others.
        kl_weight: The factor beta, at least 0; see :func:`kl_schedule`. At 0 no KL is computed.
        kl_reduction: ``"num_data"``, ``"num_weights"`` or ``"sum"``.

    Returns:
        A scalar on the device of ``loss``. A :class:`LostPosteriorWarning` names once what the
        model was given after its conversion and is not in its KL (:func:`extend_`).

    Raises:
        ArgumentError: An argument has a value that cannot work.
        UnsupportedModuleError: ``model`` has no posterior.

    Reference:
        Blundell et al., 2015, arXiv:1505.05424, equations 2 and 8.

    >>> import torch, bayesify
    >>> model = bayesify.to_bbb(torch.nn.Linear(2, 1))
    >>> x, y = torch.randn(8, 2), torch.randn(8, 1)
    >>> loss = torch.nn.functional.mse_loss(model(x), y)
    >>> elbo_loss(loss, model, num_data=8).backward()
    """
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        given = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ArgumentError(
            f"elbo_loss: loss must be a tensor with no dimension, got {given}. Reduce it first: "
            "loss.mean()."
        )
    warn_of_unconverted(model, once=True)
    factor = _checked_weight(kl_weight) * kl_scale(
        model, num_data=num_data, kl_reduction=kl_reduction
    )
    if factor == 0.0:
        return loss
    return loss + factor * kl_divergence(model).to(loss.device)


def kl_scale(
    model: nn.Module, *, num_data: int | None = None, kl_reduction: KLReduction = "num_data"
) -> float:
    """The factor s that :func:`elbo_loss` puts before the summed KL: 1/N, 1/P or 1.

    Args:
        model: The converted model.
        num_data: As :func:`elbo_loss`.
        kl_reduction: As :func:`elbo_loss`.

    Raises:
        ArgumentError: An argument has a value that cannot work.
        UnsupportedModuleError: ``model`` has no posterior.
    """
    found = bayesian_sites(model)
    if kl_reduction not in _REDUCTIONS:
        raise ArgumentError(
            f"kl_reduction must be one of {', '.join(map(repr, _REDUCTIONS))}, got "
            f"{kl_reduction!r}."
        )
    if kl_reduction != "num_data":
        if num_data is not None:
            raise ArgumentError(
                f"kl_reduction={kl_reduction!r} does not use num_data, but num_data={num_data!r} "
                "was given: leave it out, or take kl_reduction='num_data'."
            )
        return 1.0 if kl_reduction == "sum" else 1.0 / max(1, sum(s.weights for s in found))
    if num_data is None:
        raise ArgumentError(
            "kl_reduction='num_data' needs num_data, the number of training examples (not of the "
            "batch): num_data=len(train_set). For a loss that is no mean over examples take "
            "kl_reduction='num_weights' or 'sum'."
        )
    expected = "a positive integer, the number of training examples (not of the batch)"
    return 1.0 / whole("num_data", num_data, expected)


def noise_budget(
    model: nn.Module,
    kl_weight: float = 1.0,
    *,
    num_data: int | None = None,
    kl_reduction: KLReduction = "num_data",
) -> float:
    r"""The most by which the drawn weights' noise can raise the loss at the optimum.

    .. math:: \tfrac12 \, \beta \, s \, P

    Where the loss is stationary in every log variance, its expected increase over the loss at the
    means is :math:`\tfrac12 \beta s \gamma` to second order, with :math:`\gamma \le P` the number
    of well-determined weights (MacKay, 1992). A budget far above the loss of an ignorant model
    lets the posterior run to the prior: take a smaller ``kl_weight`` or another reduction.

    Args:
        model: The converted model, with P Bayesian weights.
        kl_weight: The factor beta, as :func:`elbo_loss`.
        num_data: As :func:`elbo_loss`.
        kl_reduction: As :func:`elbo_loss`.

    Returns:
        The budget in units of the loss.

    Raises:
        ArgumentError: An argument has a value that cannot work.
        UnsupportedModuleError: ``model`` has no posterior.

    Reference:
        MacKay, 1992, Bayesian Interpolation, Neural Computation 4(3), section 4.

    >>> import torch, bayesify
    >>> noise_budget(bayesify.to_bbb(torch.nn.Linear(9, 10)), num_data=50)
    1.0
    """
    scale = kl_scale(model, num_data=num_data, kl_reduction=kl_reduction)
    return (
        0.5
        * _checked_weight(kl_weight)
        * scale
        * sum(site.weights for site in bayesian_sites(model))
    )


@dataclass(frozen=True)
class KLSchedule:
    """A KL weight as a function of the step; made by :func:`kl_schedule`."""

    shape: ScheduleShape
    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if self.shape not in _SHAPES:
            raise ArgumentError(
                f"kl_schedule: shape must be one of {', '.join(map(repr, _SHAPES))}, got "
                f"{self.shape!r}."
            )
        for name in ("start", "end"):
            value = _checked_weight(getattr(self, name), f"kl_schedule: {name}")
            object.__setattr__(self, name, value)
        steps = whole("kl_schedule: steps", self.steps, "a positive integer")
        object.__setattr__(self, "steps", steps)
        if self.shape == "constant" and self.start != self.end:
            raise ArgumentError(
                f"kl_schedule: a constant schedule needs start == end, got {self.start!r} and "
                f"{self.end!r}. Take 'linear' or 'cosine' to go from one to the other."
            )

    def __call__(self, step: float) -> float:
        step = real("kl_schedule: step", step, "a number of at least 0", not_negative)
        if step >= self.steps:
            return self.end
        done = step / self.steps
        if self.shape == "cosine":
            done = 0.5 * (1.0 - math.cos(math.pi * done))
        return self.start + (self.end - self.start) * done


def kl_schedule(shape: ScheduleShape, start: float, end: float, steps: int) -> KLSchedule:
    r"""A KL weight that goes from ``start`` to ``end`` over ``steps`` steps and stays there.

    Linear: :math:`\beta_0 + (\beta_1 - \beta_0) t/T`; cosine:
    :math:`\beta_0 + (\beta_1 - \beta_0) (1 - \cos(\pi t/T)) / 2`.

    Args:
        shape: ``"cosine"``, ``"linear"`` or ``"constant"`` (which needs ``start == end``).
        start: The weight at step 0, at least 0.
        end: The weight from step ``steps`` on, at least 0.
        steps: Number of optimizer steps T over which it changes, at least 1.

    Returns:
        A picklable function of the step, for ``elbo_loss(..., kl_weight=schedule(step))``.

    Raises:
        ArgumentError: A value is out of its range.

    >>> schedule = kl_schedule("linear", 0.0, 1.0, 10)
    >>> schedule(0), schedule(5), schedule(99)
    (0.0, 0.5, 1.0)
    """
    return KLSchedule(shape, start, end, steps)


def _seed_of(found: list[Site]) -> Tensor:
    """The seed of the draw that the model is in now, or a new one."""
    running = LOCAL.scope
    if running is not None and running.seed is not None:
        return running.seed
    module = id(found[0].module)
    for mode in reversed(open_modes()):
        if mode.scope is not None and mode.scope.seed is not None and module in mode.modules:
            return mode.scope.seed
    return new_seed()


def _tensors(site: Site) -> tuple[Tensor, Tensor]:
    """Mean and trained spread, by no property: torch.compile of torch 2.10 cannot follow one."""
    return tensors_of(site.module, site.attribute, site.slot)


def _closed_prior(site: Site) -> tuple[Tensor | float, Tensor | float]:
    mean, _ = _tensors(site)
    prior_mean, prior_var = (_beside(value, mean) for value in gaussian_prior(site))
    if not isinstance(prior_mean, Tensor):
        prior_mean = real(f"The prior mean of {site.name!r}", prior_mean, MEAN_RANGE, may_be_mean)
    if not isinstance(prior_var, Tensor):
        prior_var = real(
            f"The prior variance of {site.name!r}", prior_var, _VAR_RANGE,
            lambda var: var > 0.0 and may_be_std(math.sqrt(var)),
        )  # fmt: skip
    return prior_mean, prior_var


def _closed_term(site: Site, prior: tuple[Tensor | float, Tensor | float]) -> Tensor:
    whole, raw = _tensors(site)
    held = _shard(_beside(held_elements(raw), whole)) if site.slot.has_held else None
    mean, raw = _shard(whole), _shard(_wide(raw, whole))
    prior_mean, prior_var = map(_shard, prior)
    if held is not None:
        raw = raw.masked_fill(held, 0.0)  # at a sigma of 0 its logarithm has no gradient
        if isinstance(prior_var, Tensor):  # of another model, whose weights may be held as well
            prior_var = prior_var.masked_fill(held, 1.0)
    logvar = gaussian.logvar_from_raw(raw, site.slot.parameterization)
    return gaussian.kl_divergence(mean, logvar, prior_mean, prior_var, held=held)


def _hook(site: Site, prior: tuple[Tensor | float, Tensor | float]) -> grouped.Hook | None:
    """The backward of the site's last draw, if it can add the gradient of the KL divergence."""
    hook = site.slot.drawn
    if hook is None:
        return None
    mean, raw = site.tensors
    if not hook.node.may_carry(mean, raw) or hook.node.item.held != site.slot.has_held:
        return None
    if any(isinstance(v, Tensor) and v.dtype != mean.dtype for v in prior):
        return None
    return hook


def _drawn_term(site: Site, prior: ScaleMixturePrior, seed: Tensor) -> Tensor:
    full, raw = _tensors(site)
    std = gaussian.std_from_raw(raw, site.slot.parameterization)
    mean, std = _shard(full), _shard(_wide(std, full))
    held = _shard(_beside(held_elements(raw), full)) if site.slot.has_held else None
    if held is not None:
        std = std.masked_fill(held, 1.0)
    epsilon = _shard(_beside(noise(seed, site.slot.key, full.shape, std.dtype, full.device), full))
    # From the noise itself: (w - mean) / std would lose it where w has been rounded to bfloat16.
    log_q = gaussian.log_density(epsilon, 0.0, 1.0) - torch.log(std)
    value = gaussian.draw(mean.to(std.dtype), std, epsilon)
    terms = log_q - prior.log_density(value)
    return (terms if held is None else terms.masked_fill(held, 0.0)).sum()


def _wide(tensor: Tensor, mean: Tensor) -> Tensor:
    return tensor.double() if mean.dtype == torch.float64 else tensor.float()


def _mesh(mean: Tensor) -> tuple[Any, tuple[Any, ...]] | None:
    """Where FSDP2 has sharded a tensor: the mesh and the placements; None if it has not."""
    sharded: Any = mean
    return (sharded.device_mesh, sharded.placements) if hasattr(mean, "placements") else None


def _shard(value: Any) -> Any:
    """The part of this process. An operation on a whole DTensor may give a gradient that is placed
    in another way than its parameter, where a dimension has fewer rows than there are processes.
    """
    return value.to_local() if hasattr(value, "placements") else value


def _over_processes(part: Tensor, mesh: Any, placements: tuple[Any, ...]) -> Tensor:
    """The sum of what every process has of its shards."""
    from torch.distributed.tensor import DTensor, Partial

    summed = [Partial() if placement.is_shard() else placement for placement in placements]
    full: Tensor = DTensor.from_local(part, mesh, summed, run_check=False).full_tensor()
    return full


def _beside(value: Tensor | float, mean: Tensor) -> Tensor | float:
    """``value`` on the device of ``mean``, and sharded as it is under FSDP2."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(mean.device)
    sharded: Any = mean
    if not hasattr(mean, "placements"):
        return full_tensor(value)  # FSDP2 leaves the root's parameters whole after a forward
    if hasattr(value, "placements") or value.dim() == 0:
        return value
    from torch.distributed.tensor import DTensor, Replicate

    # every rank holds the whole value, so that nothing is sent
    mesh = sharded.device_mesh
    here: Any = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return here.redistribute(placements=sharded.placements)  # type: ignore[no-any-return]


def _checked_weight(value: float, what: str = "kl_weight") -> float:
    return real(what, value, "a finite number of at least 0", not_negative)
