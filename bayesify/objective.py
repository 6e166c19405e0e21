"""What is minimised: the ELBO around any loss, and the weight of the KL divergence in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from .divergence import kl_beside
from .errors import ArgumentError
from .numeric import not_negative, real, whole
from .posterior import bayesian_sites
from .settings.training import KLReduction
from .unconverted import warn_of_unconverted

ScheduleShape = Literal["cosine", "linear", "constant"]

_REDUCTIONS = ("num_data", "num_weights", "sum")
_SHAPES = ("cosine", "linear", "constant")


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
    return loss + factor * kl_beside(loss, model).to(loss.device)


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


def _checked_weight(value: float, what: str = "kl_weight") -> float:
    return real(what, value, "a finite number of at least 0", not_negative)
