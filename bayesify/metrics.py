"""Quality of predicted class probabilities: accuracy, NLL, calibration error, Brier score.

Every number is computed in float64 where the device has it, whatever the input's dtype: a bfloat16
softmax often holds a confidence of exactly 1, and small sums of logs cancel in float32.
"""

import torch
from torch import Tensor

from .errors import ArgumentError

# A bfloat16 softmax misses a sum of 1 by up to 2**-8, also after a cast to a wider dtype.
_SUM_TOLERANCE = 1e-2


def classification_metrics(probs: Tensor, labels: Tensor, bins: int = 15) -> dict[str, float]:
    """Measure predicted class probabilities against the true labels.

    With confidence ``c_i = max_k p_ik``, hit ``h_i = 1[argmax_k p_ik = y_i]`` and bins
    ``I_m = ((m-1)/M, m/M]`` (the first one also holds 0)::

        accuracy = mean_i h_i
        nll      = -mean_i log p_i,y_i                                    in nats
        ece      = sum_m (n_m / n) |mean_{c_i in I_m} h_i - mean_{c_i in I_m} c_i|
        brier    = mean_i sum_k (p_ik - 1[y_i = k])^2                     from 0 to 2

    A probability of the true class below the smallest normal float64 counts as that number, so that
    one impossible image costs 708.4 nats and not infinity. ``brier`` sums over the classes; other
    texts divide that sum by the number of classes, halve it, or drop its constant 1
    (``sum_k p_ik^2 - 2 p_i,y``). Of several equal maxima the first is the predicted class.

    Args:
        probs: Class probabilities, not logits; each row sums to one within 0.01. For a Monte Carlo
            prediction, the mean of the draws' probabilities.
        labels: True classes as integers, from 0 to C - 1.
        bins: Number of equally wide confidence bins M, at least 1.

    Shape:
        probs (N, C), labels (N,), with N and C at least 1.

    Returns:
        ``accuracy``, ``nll``, ``ece`` and ``brier``.

    Raises:
        ArgumentError: If a shape or dtype is wrong, there is no image, a label is out of range or
            soft, or a row is no probability distribution.

    Reference:
        Guo, Pleiss, Sun, Weinberger 2017, arXiv 1706.04599, equation 3 (ECE); Brier 1950,
        Monthly Weather Review 78(1), equation 2.

    >>> probs = torch.tensor([[0.75, 0.25], [0.75, 0.25]])
    >>> classification_metrics(probs, torch.tensor([0, 1]))["ece"]
    0.25
    """
    metrics = ClassificationMetrics(bins)
    metrics.update(probs, labels)
    return metrics.compute()


class ClassificationMetrics:
    """The numbers of :func:`classification_metrics`, gathered batch by batch in bounded memory.

    Args:
        bins: Number of equally wide confidence bins, at least 1.

    Raises:
        ArgumentError: If ``bins`` is not a whole number above 0.
    """

    def __init__(self, bins: int = 15) -> None:
        if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
            raise ArgumentError(f"bins must be a whole number above 0, not {bins!r}.")
        # i / M rounded once: the same edges as numpy.linspace, so a confidence on an edge agrees.
        self._edges = torch.arange(1, bins, dtype=torch.float64) / bins
        self._nll = 0.0
        self._brier = 0.0
        self._count = torch.zeros(bins, dtype=torch.float64)
        self._hits = torch.zeros(bins, dtype=torch.float64)
        self._confidence = torch.zeros(bins, dtype=torch.float64)

    @torch.no_grad()
    def update(self, probs: Tensor, labels: Tensor) -> None:
        """Add a batch; a batch that raises adds nothing.

        Args:
            probs: Class probabilities; each row sums to one within 0.01.
            labels: True classes as integers, from 0 to C - 1.

        Shape:
            probs (N, C), labels (N,).

        Raises:
            ArgumentError: As :func:`classification_metrics`.
        """
        if probs.ndim != 2 or probs.numel() == 0:
            raise ArgumentError(
                f"probs must have the shape (images, classes) and hold at least one image, "
                f"not {tuple(probs.shape)}."
            )
        probs = _checked(probs)
        labels = _checked_labels(labels, probs)
        true = probs.gather(1, labels[:, None])[:, 0]
        confidence, predicted = probs.max(dim=1)
        # sum_k (p_k - 1[y = k])^2 = sum_k p_k^2 - 2 p_y + 1, without a one-hot matrix.
        brier = probs.square().sum(dim=1) - 2 * true + 1
        self._nll -= float(true.clamp_min(torch.finfo(probs.dtype).tiny).log().sum())
        self._brier += float(brier.sum())
        confidence = confidence.to("cpu", torch.float64)
        bin_index = torch.bucketize(confidence, self._edges)  # right-closed: edge m - 1 < c <= m
        self._count += torch.bincount(bin_index, minlength=len(self._count))
        self._confidence.index_add_(0, bin_index, confidence)
        self._hits.index_add_(0, bin_index, (predicted == labels).to("cpu", torch.float64))

    def compute(self) -> dict[str, float]:
        """Return ``accuracy``, ``nll``, ``ece`` and ``brier`` of every batch given so far.

        Raises:
            ArgumentError: If no batch was given.
        """
        n = float(self._count.sum())
        if n == 0:
            raise ArgumentError("There is nothing to measure: call update(probs, labels) first.")
        return {
            "accuracy": float(self._hits.sum()) / n,
            "nll": self._nll / n,
            "ece": float((self._hits - self._confidence).abs().sum()) / n,
            "brier": self._brier / n,
        }


def entropy(probs: Tensor) -> Tensor:
    """Entropy of each distribution, ``H(p) = -sum_k p_k log p_k`` with ``0 log 0 = 0``.

    Args:
        probs: Probabilities along the last dimension, which sum to one within 0.01.

    Shape:
        probs (..., C), result (...).

    Returns:
        Entropy in nats, from 0 to log C; float64 where the device has it, else float32.

    Raises:
        ArgumentError: If ``probs`` is empty or holds no probability distributions.
    """
    if probs.ndim < 1 or probs.numel() == 0:
        raise ArgumentError(f"probs must have the shape (..., classes), not {tuple(probs.shape)}.")
    result: Tensor = torch.special.entr(_checked(probs)).sum(dim=-1)
    return result


def mutual_information(probs: Tensor) -> Tensor:
    """Mutual information between the class and the weights: the part of the doubt that data remove.

    ``I = H(mean_j p_j) - mean_j H(p_j)`` over the draws j, never below 0.

    Args:
        probs: Class probabilities of each draw of the weights; rows sum to one within 0.01.

    Shape:
        probs (K, ..., C) with the K draws first, result (...).

    Returns:
        Nats, from 0 to the smaller of log K and log C; float64 where the device has it.

    Raises:
        ArgumentError: If ``probs`` has no draw dimension, is empty or holds no distributions.

    Reference:
        Houlsby, Huszar, Ghahramani, Lengyel 2011, arXiv 1112.5745, equation 2.
    """
    if probs.ndim < 2 or probs.numel() == 0:
        raise ArgumentError(
            f"probs must have the shape (draws, ..., classes), not {tuple(probs.shape)}."
        )
    probs = _checked(probs)
    expected: Tensor = torch.special.entr(probs).sum(dim=-1).mean(dim=0)
    total: Tensor = torch.special.entr(probs.mean(dim=0)).sum(dim=-1)
    return (total - expected).clamp_min(0)


def _checked(probs: Tensor) -> Tensor:
    """Return ``probs`` in the widest float of its device, or raise where it is no distribution."""
    if not probs.is_floating_point():
        raise ArgumentError(f"probs must be floating-point probabilities, not {probs.dtype}.")
    probs = probs.to(torch.float32 if probs.device.type == "mps" else torch.float64)
    if probs.isnan().any():
        raise ArgumentError("probs holds NaN: look for NaN in the model's weights or inputs.")
    if (probs < 0).any():
        raise ArgumentError(
            f"probs holds a negative number ({float(probs.min()):.4g}). "
            "Give probabilities, not logits: logits.softmax(-1)."
        )
    off = (probs.sum(dim=-1) - 1).abs().max()
    if not off <= _SUM_TOLERANCE:
        raise ArgumentError(
            f"Each row of probs must sum to one within {_SUM_TOLERANCE}; one is off by "
            f"{float(off):.4g}. Give probabilities, not logits: logits.softmax(-1)."
        )
    return probs


def _checked_labels(labels: Tensor, probs: Tensor) -> Tensor:
    """Return ``labels`` as int64 beside ``probs``, or raise where they do not fit it."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ArgumentError(
            f"labels must be whole class numbers, not {labels.dtype}; soft labels are not taken."
        )
    if labels.shape != probs.shape[:1]:
        raise ArgumentError(
            f"labels must have the shape ({len(probs)},), one for each row of probs, "
            f"not {tuple(labels.shape)}."
        )
    labels = labels.to(probs.device, torch.int64)
    wrong = ((labels < 0) | (labels >= probs.shape[1])).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ArgumentError(
            f"Label {int(labels[row])} at row {row} is out of range: probs has {probs.shape[1]} "
            f"classes, so labels go from 0 to {probs.shape[1] - 1}."
        )
    return labels
