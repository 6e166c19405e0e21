"""Quality of predicted class probabilities: accuracy, NLL, calibration error, Brier score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError
from .brier import TopLabelParts, same_classes, squared_errors, top_label_decomposition
from .calibration import (
    adaptive_calibration_error,
    classwise_gaps,
    expected_calibration_error,
    maximum_calibration_error,
)
from .checks import probs_and_labels, whole_number
from .resampling import Interval, bootstrap_interval
from .selective import area_under_risk_coverage


class Examples(NamedTuple):
    """What is kept of each example, (N,) each, float64 on the CPU.

    Attributes:
        confidence: Largest class probability.
        hit: 1 where that class is the true one, else 0.
        top5: 1 where the true class is among the five largest, else 0.
        nll: Negative log of the true class's probability, nats.
        brier: Squared error summed over the classes.
        entropy: Entropy of the probabilities, nats.
    """

    confidence: Tensor
    hit: Tensor
    top5: Tensor
    nll: Tensor
    brier: Tensor
    entropy: Tensor


def classification_metrics(probs: Tensor, labels: Tensor, bins: int = 15) -> dict[str, float]:
    """Measure predicted class probabilities against the true labels.

    With confidence ``c_i = max_k p_ik``, hit ``h_i = 1[argmax_k p_ik = y_i]`` and bins
    ``I_m = ((m-1)/M, m/M]`` (the first one also holds 0)::

        accuracy = mean_i h_i
        top5     = share of true classes among the five most probable     1 where C <= 5
        nll      = -mean_i log p_i,y_i                                    in nats
        ece      = sum_m (n_m / n) |mean_{c_i in I_m} h_i - mean_{c_i in I_m} c_i|
        brier    = mean_i sum_k (p_ik - 1[y_i = k])^2                     from 0 to 2
        entropy  = mean_i -sum_k p_ik log p_ik                            in nats

    ``mce``, ``adaptive_ece`` and ``classwise_ece`` are those of :func:`maximum_calibration_error`,
    :func:`adaptive_calibration_error` and :func:`classwise_calibration_error`, ``aurc`` is that of
    :func:`area_under_risk_coverage` by confidence.

    A probability of the true class below the smallest normal float64 counts as that number, so that
    one impossible image costs 708.4 nats and not infinity. :func:`brier_score` has the other
    conventions. Of several equal probabilities the first class is the more probable one.

    Args:
        probs: Class probabilities, not logits; each row sums to one within 0.01. For a Monte Carlo
            prediction, the mean of the draws' probabilities.
        labels: True classes as integers, from 0 to C - 1.
        bins: Number of confidence bins M, at least 1.

    Shape:
        probs (N, C), labels (N,), with N and C at least 1.

    Returns:
        ``accuracy``, ``top5``, ``nll``, ``ece``, ``mce``, ``adaptive_ece``, ``classwise_ece``,
        ``brier``, ``aurc`` and ``entropy``.

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
    """The numbers of :func:`classification_metrics`, gathered batch by batch.

    The batches are worked on where they are, the results kept on the CPU in float64: six numbers an
    example and a table of (C, bins).

    Args:
        bins: Number of confidence bins, at least 1.

    Raises:
        ArgumentError: If ``bins`` is not a whole number above 0.
    """

    def __init__(self, bins: int = 15) -> None:
        self._bins = whole_number("bins", bins)
        self._batches: list[Tensor] = []
        self._gaps = torch.zeros(0, bins, dtype=torch.float64)

    @torch.no_grad()
    def update(self, probs: Tensor, labels: Tensor) -> None:
        """Add a batch; a batch that raises adds nothing.

        Args:
            probs: Class probabilities; each row sums to one within 0.01.
            labels: True classes as integers, from 0 to C - 1.

        Shape:
            probs (N, C), labels (N,).

        Raises:
            ArgumentError: As :func:`classification_metrics`, or if C differs from earlier batches.
        """
        probs, labels = probs_and_labels(probs, labels)
        classes = probs.shape[1]
        if not self._batches:
            self._gaps = self._gaps.new_zeros(classes, self._bins)
        same_classes(classes, len(self._gaps))
        true = probs.gather(1, labels[:, None])
        confidence, predicted = probs.max(dim=1)
        # topk leaves open which of two equal probabilities comes first
        before = torch.arange(classes, device=probs.device) < labels[:, None]
        rank = ((probs > true) | ((probs == true) & before)).sum(dim=1)
        kept = Examples(
            confidence=confidence,
            hit=(predicted == labels).to(probs.dtype),
            top5=(rank < 5).to(probs.dtype),
            nll=-true[:, 0].clamp_min(torch.finfo(probs.dtype).tiny).log(),
            brier=squared_errors(probs, labels),
            entropy=torch.special.entr(probs).sum(dim=1),
        )
        gaps = classwise_gaps(probs, labels, self._bins)
        self._batches.append(torch.stack(kept).to("cpu", torch.float64))
        self._gaps += gaps.to("cpu", torch.float64)

    @property
    def examples(self) -> Examples:
        """What was kept of every example given so far, in their order.

        Raises:
            ArgumentError: If no batch was given.
        """
        if not self._batches:
            raise ArgumentError("There is nothing to measure: call update(probs, labels) first.")
        self._batches = [torch.cat(self._batches, dim=1)]
        return Examples(*self._batches[0])

    def compute(self) -> dict[str, float]:
        """Return the numbers of :func:`classification_metrics` over every batch given so far.

        Raises:
            ArgumentError: If no batch was given.
        """
        kept = self.examples
        ranked = kept.confidence, kept.hit
        return {
            "accuracy": float(kept.hit.mean()),
            "top5": float(kept.top5.mean()),
            "nll": float(kept.nll.mean()),
            "ece": expected_calibration_error(*ranked, self._bins),
            "mce": maximum_calibration_error(*ranked, self._bins),
            "adaptive_ece": adaptive_calibration_error(*ranked, self._bins),
            "classwise_ece": float(self._gaps.abs().sum()) / (len(kept.hit) * len(self._gaps)),
            "brier": float(kept.brier.mean()),
            "aurc": area_under_risk_coverage(*ranked),
            "entropy": float(kept.entropy.mean()),
        }

    def top_label(self) -> TopLabelParts:
        """Return :func:`top_label_decomposition` of every batch given so far.

        Raises:
            ArgumentError: If no batch was given.
        """
        kept = self.examples
        return top_label_decomposition(kept.confidence, kept.hit, self._bins)

    def intervals(
        self, resamples: int = 1000, level: float = 0.95, seed: int = 0
    ) -> dict[str, Interval]:
        """Bootstrap intervals of ``accuracy``, ``nll``, ``ece`` and ``brier``.

        All four come from the same resamples, see :func:`bootstrap_interval`.

        Args:
            resamples: How many, at least 2.
            level: Share of the resamples inside, between 0 and 1.
            seed: Of the resamples.

        Raises:
            ArgumentError: If no batch was given, or an argument has a value that cannot work.
        """
        kept = self.examples

        def interval(statistic: Callable[..., Any], *values: Tensor) -> Interval:
            return bootstrap_interval(
                statistic, *values, resamples=resamples, level=level, seed=seed
            )

        def ece(confidence: Tensor, hit: Tensor) -> float:
            return expected_calibration_error(confidence, hit, self._bins)

        return {
            "accuracy": interval(torch.mean, kept.hit),
            "nll": interval(torch.mean, kept.nll),
            "ece": interval(ece, kept.confidence, kept.hit),
            "brier": interval(torch.mean, kept.brier),
        }
