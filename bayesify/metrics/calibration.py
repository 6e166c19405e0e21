"""Calibration error: how far confidence and accuracy are apart, bin by bin."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import confidences_and_hits, probs_and_labels, whole_number


class ReliabilityBins(NamedTuple):
    """The bars of a reliability diagram; one number a bin, ``nan`` where a bin is empty.

    Attributes:
        lower: Lower edge, not in the bin, except 0 in the first one.
        upper: Upper edge, in the bin.
        size: Number of examples in the bin.
        confidence: Their mean confidence.
        accuracy: Share of them that was predicted right.
    """

    lower: Tensor
    upper: Tensor
    size: Tensor
    confidence: Tensor
    accuracy: Tensor


def reliability_bins(confidence: Tensor, hits: Tensor, bins: int = 15) -> ReliabilityBins:
    """Sort examples into the bins ``I_m = ((m-1)/M, m/M]`` by confidence; the first also holds 0.

    Args:
        confidence: Probability of the predicted class, from 0 to 1.
        hits: Whether the prediction was right, 0 or 1 or bool.
        bins: Number of equally wide bins M, at least 1.

    Shape:
        confidence and hits (N,), each result (M,).

    Returns:
        A :class:`ReliabilityBins`, float64 where the device has it.

    Raises:
        ArgumentError: If the shapes differ, nothing is given, or a value is out of range or NaN.

    Reference:
        Guo, Pleiss, Sun, Weinberger 2017, arXiv 1706.04599, section 2.
    """
    confidence, hits = confidences_and_hits(confidence, hits)
    edges = _inner_edges(bins, confidence)
    count, sure, right = bin_sums(torch.bucketize(confidence, edges), confidence, hits, bins)
    ends = confidence.new_tensor([0.0, 1.0])
    return ReliabilityBins(
        torch.cat([ends[:1], edges]),
        torch.cat([edges, ends[1:]]),
        count,
        sure / count,
        right / count,
    )


def expected_calibration_error(confidence: Tensor, hits: Tensor, bins: int = 15) -> float:
    """ECE: mean distance of accuracy from confidence over bins of equal width.

    With the bins of :func:`reliability_bins` and ``n_m`` examples in bin m::

        ECE = sum_m (n_m / n) |accuracy_m - confidence_m|

    ``confidence_m`` is the mean confidence of the bin, not its centre. With finite data the error
    is biased upward, the more so the more bins.

    Args:
        confidence: Probability of the predicted class, from 0 to 1.
        hits: Whether the prediction was right, 0 or 1 or bool.
        bins: Number of equally wide bins M, at least 1.

    Shape:
        confidence and hits (N,).

    Returns:
        From 0 to 1.

    Raises:
        ArgumentError: As :func:`reliability_bins`.

    Reference:
        Guo, Pleiss, Sun, Weinberger 2017, arXiv 1706.04599, equation 3.
    """
    gap, _, n = _equal_width(confidence, hits, bins)
    return float(gap.sum()) / n


def maximum_calibration_error(confidence: Tensor, hits: Tensor, bins: int = 15) -> float:
    """MCE: largest distance of accuracy from confidence in any bin of equal width.

    ``MCE = max_m |accuracy_m - confidence_m|`` over the bins that are not empty: a single odd
    example in a sparse bin decides it.

    Args:
        confidence: Probability of the predicted class, from 0 to 1.
        hits: Whether the prediction was right, 0 or 1 or bool.
        bins: Number of equally wide bins, at least 1.

    Shape:
        confidence and hits (N,).

    Returns:
        From 0 to 1.

    Raises:
        ArgumentError: As :func:`reliability_bins`.

    Reference:
        Guo, Pleiss, Sun, Weinberger 2017, arXiv 1706.04599, section 2.
    """
    gap, count, _ = _equal_width(confidence, hits, bins)
    return float((gap / count.clamp_min(1)).max())


def adaptive_calibration_error(confidence: Tensor, hits: Tensor, bins: int = 15) -> float:
    """Adaptive ECE: as ECE, with bins that hold equally many examples.

    The upper edge of bin m is the ``ceil(m n / M)``-th smallest confidence, and belongs to it.
    Examples of equal confidence share a bin, so that the result does not depend on their order;
    the bins are then not quite equally full.

    Args:
        confidence: Probability of the predicted class, from 0 to 1.
        hits: Whether the prediction was right, 0 or 1 or bool.
        bins: Number of equally full bins M, at least 1.

    Shape:
        confidence and hits (N,).

    Returns:
        From 0 to 1.

    Raises:
        ArgumentError: As :func:`reliability_bins`.

    Reference:
        Nguyen and O'Connor 2015, EMNLP, arXiv 1508.05154; Mukhoti et al. 2020,
        arXiv 2002.09437 (AdaECE).
    """
    bins = whole_number("bins", bins)
    confidence, hits = confidences_and_hits(confidence, hits)
    n = len(confidence)
    last = [-(-m * n // bins) - 1 for m in range(1, bins)]
    edges = confidence.sort().values[torch.tensor(last, dtype=torch.int64).to(confidence.device)]
    _, sure, right = bin_sums(torch.bucketize(confidence, edges), confidence, hits, bins)
    return float((right - sure).abs().sum()) / n


def classwise_calibration_error(probs: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Class-wise ECE: the calibration error of every class probability, not only the largest.

    With the examples of bin m by their probability of class k, ``B_mk``::

        cwECE = (1/C) sum_k sum_m (n_mk / n) |mean_{i in B_mk} 1[y_i = k] - mean_{i in B_mk} p_ik|

    The bins are those of :func:`reliability_bins`. With many classes nearly all probabilities are
    in the first bin and the result is of the order 1/C.

    Args:
        probs: Class probabilities; each row sums to one within 0.01.
        labels: True classes as integers, from 0 to C - 1.
        bins: Number of equally wide bins M, at least 1.

    Shape:
        probs (N, C), labels (N,).

    Returns:
        From 0 to 1.

    Raises:
        ArgumentError: As :func:`bayesify.metrics.classification_metrics`.

    Reference:
        Kull et al. 2019, arXiv 1910.12656, section 2; Nixon et al. 2019, arXiv 1904.01685
        (there: static calibration error).
    """
    bins = whole_number("bins", bins)
    probs, labels = probs_and_labels(probs, labels)
    gaps = classwise_gaps(probs, labels, bins)
    return float(gaps.abs().sum()) / probs.numel()


def bin_index(values: Tensor, bins: int) -> Tensor:
    """The bin from 0 to ``bins - 1`` of each value, as :func:`reliability_bins` defines them."""
    return torch.bucketize(values.contiguous(), _inner_edges(bins, values))


def bin_sums(index: Tensor, confidence: Tensor, hits: Tensor, bins: int) -> Tensor:
    """Count, summed confidence and summed hits of each bin, (3, bins)."""
    columns = torch.stack([torch.ones_like(hits), confidence, hits])
    return columns.new_zeros(3, bins).index_add_(1, index, columns)


def classwise_gaps(probs: Tensor, labels: Tensor, bins: int) -> Tensor:
    """``sum_i 1[y_i = k] - p_ik`` over the examples in each bin of each class, (C, bins)."""
    classes = probs.shape[1]
    index = bin_index(probs, bins)
    index += bins * torch.arange(classes, device=probs.device)
    gaps = probs.new_zeros(classes * bins)
    gaps.index_add_(0, index.flatten(), probs.flatten(), alpha=-1)
    gaps.index_add_(0, index.gather(1, labels[:, None])[:, 0], torch.ones_like(probs[:, 0]))
    return gaps.view(classes, bins)


def _equal_width(confidence: Tensor, hits: Tensor, bins: int) -> tuple[Tensor, Tensor, int]:
    """|summed hits - summed confidence| of each bin, its count, and the number of examples."""
    confidence, hits = confidences_and_hits(confidence, hits)
    count, sure, right = bin_sums(bin_index(confidence, bins), confidence, hits, bins)
    return (right - sure).abs(), count, len(hits)


def _inner_edges(bins: int, like: Tensor) -> Tensor:
    """The edges between ``bins`` equally wide bins, (bins - 1,).

    i / M rounded once: the same edges as numpy.linspace, so a confidence on an edge agrees.
    torch.bucketize with them is right-closed, and what is outside falls into the outer bins.
    """
    bins = whole_number("bins", bins)
    return torch.arange(1, bins, dtype=like.dtype, device=like.device) / bins
