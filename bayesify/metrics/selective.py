"""Selective prediction: how right a model is where it answers only when it is sure."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..numeric import real
from .checks import scores_and_hits


class RiskCoverage(NamedTuple):
    """The risk-coverage curve, (N,) each.

    Attributes:
        coverage: Share of the examples that are answered, 1/N to 1.
        risk: Share of wrong answers among them.
    """

    coverage: Tensor
    risk: Tensor


def risk_coverage(confidence: Tensor, hits: Tensor) -> RiskCoverage:
    """Error rate among the j most confident examples, for j = 1 to N.

    ``risk_j = (1/j) sum_{i <= j} (1 - h_(i))`` in falling order of confidence. Examples of equal
    confidence come in no order: each counts with their mean error, which is the expectation over
    a random order.

    Args:
        confidence: Any score that is higher where the model is surer: the largest probability,
            the negative entropy, ...
        hits: Whether the prediction was right, 0 or 1 or bool.

    Shape:
        confidence and hits (N,).

    Returns:
        A :class:`RiskCoverage`, float64 where the device has it.

    Raises:
        ArgumentError: If the shapes differ, nothing is given, or a value is NaN.

    Reference:
        Geifman and El-Yaniv 2017, arXiv 1705.08500, section 2.
    """
    confidence, hits = scores_and_hits(confidence, hits)
    confidence, order = confidence.sort(descending=True)
    errors = 1 - hits[order]
    _, group, sizes = torch.unique_consecutive(confidence, return_inverse=True, return_counts=True)
    in_group = errors.new_zeros(len(sizes)).index_add_(0, group, errors)
    answered = torch.arange(1, len(errors) + 1, dtype=errors.dtype, device=errors.device)
    risk = (in_group / sizes)[group].cumsum(0) / answered
    return RiskCoverage(answered / len(errors), risk)


def area_under_risk_coverage(confidence: Tensor, hits: Tensor) -> float:
    """AURC: mean of the risk over all coverages, ``(1/N) sum_j risk_j``; lower is better.

    A score that says nothing gives the error rate.

    Args:
        confidence: Any score that is higher where the model is surer.
        hits: Whether the prediction was right, 0 or 1 or bool.

    Shape:
        confidence and hits (N,).

    Returns:
        From 0 to 1.

    Raises:
        ArgumentError: As :func:`risk_coverage`.

    Reference:
        Geifman, Uziel, El-Yaniv 2019, arXiv 1805.08206.
    """
    return float(risk_coverage(confidence, hits).risk.mean())


def selective_accuracy(confidence: Tensor, hits: Tensor, coverage: float) -> float:
    """Measure the accuracy on the ``ceil(coverage * N)`` examples of highest confidence.

    Args:
        confidence: Any score that is higher where the model is surer.
        hits: Whether the prediction was right, 0 or 1 or bool.
        coverage: Share of the examples that is answered, above 0 to 1.

    Shape:
        confidence and hits (N,).

    Returns:
        From 0 to 1; at coverage 1 the accuracy.

    Raises:
        ArgumentError: As :func:`risk_coverage`, or if ``coverage`` is out of range.
    """
    expected = "above 0 and at most 1"
    coverage = real("coverage", coverage, expected, lambda value: 0.0 < value <= 1.0)
    risk = risk_coverage(confidence, hits).risk
    # a hair below, so that 0.07 * 100 = 7.000000000000001 means 7 examples
    answered = max(1, math.ceil(coverage * len(risk) * (1 - 1e-12)))
    return 1 - float(risk[answered - 1])
