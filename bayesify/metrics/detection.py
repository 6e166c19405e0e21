"""How well a score tells inputs like the training data from others."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import scores


def ood_metrics(inside: Tensor, outside: Tensor) -> dict[str, float]:
    """Measure the detection of out-of-distribution inputs by a score, such as the entropy.

    The positive class is "out of distribution": a higher score must mean more so. Thresholds
    are the distinct scores; examples of equal score are flagged together::

        auroc    = P(outside > inside) + P(outside = inside) / 2         chance 0.5
        aupr_out = sum_t (recall_t - recall_{t-1}) precision_t           chance: share of outside
        aupr_in  = the same with "in distribution" as the positive class, found by low scores
        fpr95    = share of inside flagged at the highest threshold that flags >= 95 % of outside

    Both ``aupr`` depend on the ratio of the two numbers of examples; the others do not.

    Args:
        inside: Scores of examples in distribution: entropy, mutual information, 1 - confidence, ...
        outside: Scores of examples out of distribution.

    Shape:
        inside (N,), outside (M,), each with at least one.

    Returns:
        ``auroc``, ``aupr_out``, ``aupr_in`` and ``fpr95``, each from 0 to 1.

    Raises:
        ArgumentError: If a shape is wrong, nothing is given, or a score is NaN.

    Reference:
        Hendrycks and Gimpel 2017, arXiv 1610.02136, section 2 (AUROC, both AUPR); Hendrycks,
        Mazeika, Dietterich 2019, arXiv 1812.04606, section 4.1 (FPR95, out of distribution as
        the positive class).

    >>> ood_metrics(torch.tensor([0.1, 0.2]), torch.tensor([0.2, 0.9]))["auroc"]
    0.875
    """
    inside = scores("inside", inside)
    outside = scores("outside", outside).to(inside)
    values = torch.cat([inside, outside])
    is_out = torch.cat([torch.zeros_like(inside), torch.ones_like(outside)])
    # Flagged so far, after each distinct score from the highest down, of both kinds.
    true, false = _running(values, is_out)
    recall, fall_out = true / len(outside), false / len(inside)
    zero = recall.new_zeros(1)
    steps = fall_out.diff(prepend=zero)
    heights = (recall + torch.cat([zero, recall[:-1]])) / 2
    # compared in counts: recall >= 0.95 in floats would miss 19 of 20 on some devices
    enough = (100 * true >= 95 * len(outside)).nonzero()[0, 0]
    return {
        "auroc": float((steps * heights).sum()),
        "aupr_out": _average_precision(true, false),
        "aupr_in": _average_precision(*_running(-values, 1 - is_out)),
        "fpr95": float(fall_out[enough]),
    }


def _running(values: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Positives and negatives at or above each distinct value, from the highest down."""
    values, order = values.sort(descending=True)
    _, sizes = torch.unique_consecutive(values, return_counts=True)
    flagged = sizes.cumsum(0)
    true = positive[order].cumsum(0)[flagged - 1]
    return true, flagged - true


def _average_precision(true: Tensor, false: Tensor) -> float:
    gained = true.diff(prepend=true.new_zeros(1)) / true[-1]
    return float((gained * true / (true + false)).sum())
