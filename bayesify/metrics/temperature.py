"""Temperature scaling: the one scalar that a posterior has to beat."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..numeric import seed_number
from .checks import logits_and_labels, whole_number, widest

_LIMIT = 100.0
_CHUNK = 4096
"""Rows that are worked on at once, so that no float64 copy of all logits is made."""


class CrossFitted(NamedTuple):
    """Probabilities of every example by a temperature that was fitted without it.

    Attributes:
        probs: (N, C), rows in the order of the logits, float64 where the device has it.
        temperatures: One of each fold, (folds,), float64.
    """

    probs: Tensor
    temperatures: Tensor


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Find the temperature T > 0 at which ``softmax(logits / T)`` has the lowest mean NLL.

    The NLL is convex in 1/T; Newton's method within a bracket finds the minimum to about ten
    digits. T stays within 1/100 and 100, which it takes where every prediction is right (no T is
    low enough) or where they are worse than chance (no T is high enough).

    Args:
        logits: Finite outputs before the softmax, of examples that the model was not trained on
            and that are not used for the final numbers.
        labels: True classes as integers, from 0 to C - 1.

    Shape:
        logits (N, C), labels (N,).

    Returns:
        T; above 1 where the model is overconfident. Logits without differences give 1.

    Raises:
        ArgumentError: If a shape or dtype is wrong, nothing is given, a label is out of range or
            a logit is not finite.

    Reference:
        Guo, Pleiss, Sun, Weinberger 2017, arXiv 1706.04599, section 4.2.

    >>> fit_temperature(torch.tensor([[4.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1])).__round__(4)
    3.641
    """
    logits, labels = logits_and_labels(logits, labels)
    with torch.no_grad():
        low, high, inverse = 1 / _LIMIT, _LIMIT, 1.0
        for iteration in range(100):
            slope, curvature = _derivatives(logits, labels, inverse)
            if slope == 0:
                break
            low, high = (low, inverse) if slope > 0 else (inverse, high)
            step = inverse - slope / curvature if curvature > 0 else low
            # where every prediction is right the slope has only a tail, on which Newton creeps
            if iteration >= 12 or not low < step < high:
                step = math.sqrt(low * high)
            moved, inverse = abs(step - inverse), step
            if moved <= 1e-10 * inverse:
                break
    return 1 / inverse


def cross_fitted_temperature(
    logits: Tensor, labels: Tensor, folds: int = 5, seed: int = 0
) -> CrossFitted:
    """Scale every example by a temperature fitted on the other folds: no held-out set is needed.

    The examples are dealt at random into folds of equal size, give or take one; the examples of a
    fold get ``softmax(logits / T)`` with the :func:`fit_temperature` of all others. What is
    measured on the result is not fitted on the examples it is measured on.

    Args:
        logits: Finite outputs before the softmax.
        labels: True classes as integers, from 0 to C - 1.
        folds: Number of folds, from 2 to N.
        seed: Of the folds.

    Shape:
        logits (N, C), labels (N,), with N at least 2.

    Returns:
        A :class:`CrossFitted`.

    Raises:
        ArgumentError: As :func:`fit_temperature`, or if ``folds`` is out of range.

    Reference:
        Guo, Pleiss, Sun, Weinberger 2017, arXiv 1706.04599, section 4.2 (the scaling); Stone 1974,
        J. R. Stat. Soc. B 36(2) (cross-fitting).
    """
    logits, labels = logits_and_labels(logits, labels)
    folds, seed = whole_number("folds", folds, least=2), seed_number(seed)
    n = len(logits)
    if folds > n:
        raise ArgumentError(f"folds must be at most the number of examples, {n}, not {folds}.")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    fold = (torch.empty_like(order).index_copy_(0, order, torch.arange(n)) % folds).to(
        logits.device
    )
    with torch.no_grad():
        temperatures = [fit_temperature(logits[fold != f], labels[fold != f]) for f in range(folds)]
        each = torch.tensor(temperatures, dtype=torch.float64)
        probs = (widest(logits) / widest(each.to(logits.device))[fold, None]).softmax(dim=-1)
    return CrossFitted(probs, each)


def _derivatives(logits: Tensor, labels: Tensor, inverse: float) -> tuple[float, float]:
    """First and second derivative of the summed NLL by 1/T.

    With ``z`` the logits and ``p = softmax(z / T)``: ``E_p[z] - z_y`` and ``Var_p[z]``.
    """
    slope = curvature = 0.0
    for rows, classes in zip(logits.split(_CHUNK), labels.split(_CHUNK), strict=True):
        z = widest(rows)
        z = z - z.gather(1, classes[:, None])
        probs = (z * inverse).softmax(dim=-1)
        mean = (probs * z).sum(dim=1, keepdim=True)
        slope += float(mean.sum())
        curvature += float((probs * (z - mean).square()).sum())
    return slope, curvature
