"""The Brier score under its three names, and its two decompositions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import ArgumentError
from .calibration import bin_index, bin_sums
from .checks import confidences_and_hits, probs_and_labels, widest

Convention = Literal["sum", "half", "quadratic"]


@dataclass(frozen=True)
class BrierParts:
    """``brier = uncertainty - resolution + reliability + residual``, see `brier_decomposition`."""

    brier: float
    uncertainty: float
    resolution: float
    reliability: float
    residual: float


@dataclass(frozen=True)
class TopLabelParts:
    """``brier = uncertainty - resolution + reliability + variance - 2 covariance``.

    See :func:`top_label_decomposition`.
    """

    brier: float
    uncertainty: float
    resolution: float
    reliability: float
    variance: float
    covariance: float


def brier_score(probs: Tensor, labels: Tensor, convention: Convention = "sum") -> float:
    """Measure the mean squared distance of probabilities from what happened.

    ::

        "sum"        BS = mean_i sum_k (p_ik - 1[y_i = k])^2    0 to 2, Brier 1950
        "half"       BS / 2                                     0 to 1, with two classes (p - y)^2
        "quadratic"  mean_i sum_k p_ik^2 - 2 p_i,y = BS - 1     -1 to 1, Ovadia et al. and TFP

    Lower is better in all of them. Everything else in this package is in terms of ``"sum"``.

    Args:
        probs: Class probabilities; each row sums to one within 0.01.
        labels: True classes as integers, from 0 to C - 1.
        convention: Which of the three.

    Shape:
        probs (N, C), labels (N,).

    Returns:
        The score.

    Raises:
        ArgumentError: As :func:`bayesify.metrics.classification_metrics`, or if there is no such
            convention.

    Reference:
        Brier 1950, Monthly Weather Review 78(1), equation 2; Gneiting and Raftery 2007, JASA
        102(477), section 3 (the quadratic score, there with the other sign).
    """
    if convention not in ("sum", "half", "quadratic"):
        raise ArgumentError(f"convention must be 'sum', 'half' or 'quadratic', not {convention!r}.")
    probs, labels = probs_and_labels(probs, labels)
    score = float(squared_errors(probs, labels).to("cpu", torch.float64).mean())
    return {"sum": score, "half": score / 2, "quadratic": score - 1}[convention]


def squared_errors(probs: Tensor, labels: Tensor) -> Tensor:
    """``sum_k (p_ik - 1[y_i = k])^2`` of each example, (N,).

    As ``sum_k p_ik^2 - 2 p_i,y + 1`` without a one-hot matrix.
    """
    true = probs.gather(1, labels[:, None])[:, 0]
    return probs.square().sum(dim=1) - 2 * true + 1


def brier_decomposition(probs: Tensor, labels: Tensor) -> BrierParts:
    """Split the Brier score (``"sum"``) by the predicted class.

    With the examples grouped by their predicted class ``k = argmax_l p_il``, ``n_k`` in a group,
    the shares ``d_k`` of the true classes in it and ``q`` over all examples::

        uncertainty = 1 - |q|^2                                   of the labels alone
        resolution  = sum_k (n_k / n) |d_k - q|^2                 higher is better
        reliability = mean_i |p_i - d_k(i)|^2                     lower is better
        residual    = -2 mean_i <p_i - d_k(i), e_y(i) - d_k(i)>
        brier       = uncertainty - resolution + reliability + residual

    Other texts leave out the residual, without which the parts do not add up: a group holds
    different probabilities. For the same reason ``reliability`` is above 0 for a calibrated model,
    and falls when the probabilities within a group come closer to each other. Read it beside the
    ECE and :func:`top_label_decomposition`.

    Args:
        probs: Class probabilities; each row sums to one within 0.01.
        labels: True classes as integers, from 0 to C - 1.

    Shape:
        probs (N, C), labels (N,).

    Returns:
        A :class:`BrierParts`.

    Raises:
        ArgumentError: As :func:`bayesify.metrics.classification_metrics`.

    Reference:
        Broecker 2009, Q. J. R. Meteorol. Soc. 135(643); the partition by predicted
        class is that of Ovadia et al. 2019, arXiv 1906.02530, and TensorFlow Probability.
    """
    decomposition = BrierDecomposition()
    decomposition.update(probs, labels)
    return decomposition.compute()


class BrierDecomposition:
    """The parts of :func:`brier_decomposition`, gathered batch by batch.

    It keeps two tables of C x C numbers of 8 bytes: 16 MB for 1,000 classes.
    """

    def __init__(self) -> None:
        self._count = 0
        self._squares = 0.0
        self._true = 0.0
        # Row k sums over the examples predicted as k: one-hot labels, and probabilities.
        self._labels = torch.zeros(0, 0, dtype=torch.float64)
        self._probs = torch.zeros(0, 0, dtype=torch.float64)

    @torch.no_grad()
    def update(self, probs: Tensor, labels: Tensor) -> None:
        """Add a batch; a batch that raises adds nothing.

        Args:
            probs: Class probabilities; each row sums to one within 0.01.
            labels: True classes as integers, from 0 to C - 1.

        Shape:
            probs (N, C), labels (N,).

        Raises:
            ArgumentError: As :func:`brier_decomposition`, or if C differs from earlier batches.
        """
        probs, labels = probs_and_labels(probs, labels)
        classes = probs.shape[1]
        if self._count == 0:
            self._labels = self._labels.new_zeros(classes, classes)
            self._probs = self._labels.clone()
        same_classes(classes, len(self._labels))
        predicted = probs.max(dim=1).indices
        true = probs.gather(1, labels[:, None])[:, 0]
        table = probs.new_zeros(classes, classes)
        table.view(-1).index_add_(0, predicted * classes + labels, torch.ones_like(true))
        self._labels += table.to("cpu", torch.float64)
        table.zero_().index_add_(0, predicted, probs)
        self._probs += table.to("cpu", torch.float64)
        self._count += len(probs)
        self._squares += float(probs.square().sum())
        self._true += float(true.sum())

    def compute(self) -> BrierParts:
        """Return the parts over every batch given so far.

        Raises:
            ArgumentError: If no batch was given.
        """
        n = self._count
        if n == 0:
            raise ArgumentError("There is nothing to measure: call update(probs, labels) first.")
        sizes = self._labels.sum(dim=1)
        shares = self._labels / sizes.clamp_min(1)[:, None]
        overall = self._labels.sum(dim=0) / n
        own = float((sizes * shares.square().sum(dim=1)).sum()) / n  # mean |d|^2 = mean <e_y, d>
        cross = float((shares * self._probs).sum()) / n  # mean <p, d>
        return BrierParts(
            brier=(self._squares - 2 * self._true) / n + 1,
            uncertainty=1 - float(overall.square().sum()),
            resolution=float((sizes * (shares - overall).square().sum(dim=1)).sum()) / n,
            reliability=max(0.0, self._squares / n - 2 * cross + own),
            residual=-2 * (self._true / n - cross),
        )


def top_label_decomposition(confidence: Tensor, hits: Tensor, bins: int = 15) -> TopLabelParts:
    """Split the Brier score of the predicted class alone, ``mean_i (c_i - h_i)^2``, exactly.

    With the bins of :func:`reliability_bins`, their mean confidence ``c_m`` and accuracy ``h_m``,
    and the accuracy ``h`` over all::

        uncertainty = h (1 - h)
        resolution  = sum_m (n_m / n) (h_m - h)^2
        reliability = sum_m (n_m / n) (c_m - h_m)^2               0 for a calibrated model
        variance    = mean_i (c_i - c_m(i))^2                     within the bins
        covariance  = mean_i (c_i - c_m(i)) (h_i - h_m(i))
        brier       = uncertainty - resolution + reliability + variance - 2 covariance

    Args:
        confidence: Probability of the predicted class, from 0 to 1.
        hits: Whether the prediction was right, 0 or 1 or bool.
        bins: Number of equally wide bins, at least 1.

    Shape:
        confidence and hits (N,).

    Returns:
        A :class:`TopLabelParts`.

    Raises:
        ArgumentError: As :func:`reliability_bins`.

    Reference:
        Murphy 1973, J. Appl. Meteorol. 12(4); Stephenson, Coelho, Jolliffe 2008,
        Weather and Forecasting 23(4) (the two parts within the bins).
    """
    confidence, hits = confidences_and_hits(confidence, hits)
    index = bin_index(confidence, bins)
    count, sure, right = bin_sums(index, confidence, hits, bins)
    sure, right = sure / count, right / count  # nan in empty bins, which no example reads
    sure, right, overall = sure[index], right[index], hits.mean()
    parts = {
        "brier": (confidence - hits).square(),
        "uncertainty": overall * (1 - overall),
        "resolution": (right - overall).square(),
        "reliability": (sure - right).square(),
        "variance": (confidence - sure).square(),
        "covariance": (confidence - sure) * (hits - right),
    }
    return TopLabelParts(**{name: float(widest(part).mean()) for name, part in parts.items()})


def same_classes(classes: int, earlier: int) -> None:
    """Raise where a batch has another number of classes than those before it."""
    if classes != earlier:
        raise ArgumentError(
            f"probs has {classes} classes, and {earlier} in the batches before: one object "
            "measures one model."
        )
