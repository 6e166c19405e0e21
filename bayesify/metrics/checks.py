"""What the metrics demand of their arguments; float64 where the device has it from here on."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..numeric import whole

# A bfloat16 softmax misses a sum of 1 by up to 2**-8, also after a cast to a wider dtype.
_SUM_TOLERANCE = 1e-2


def widest(values: Tensor) -> Tensor:
    """``values`` in the widest float of their device."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


def whole_number(name: str, value: object, least: int = 1) -> int:
    """``value`` as an int, or raise where it is none or below ``least``."""
    return whole(name, value, f"a whole number of at least {least}", least=least)


def distributions(probs: Tensor) -> Tensor:
    """Return ``probs`` in the widest float of its device, or raise where it is no distribution."""
    if not probs.is_floating_point():
        raise ArgumentError(f"probs must be floating-point probabilities, not {probs.dtype}.")
    probs = widest(probs)
    if probs.isnan().any():
        raise ArgumentError("probs holds NaN: look for NaN in the model's weights or inputs.")
    if (probs < 0).any():
        raise ArgumentError(
            f"probs holds a negative number ({float(probs.detach().min()):.4g}). "
            "Give probabilities, not logits: logits.softmax(-1)."
        )
    off = (probs.detach().sum(dim=-1) - 1).abs().max()
    if not off <= _SUM_TOLERANCE:
        raise ArgumentError(
            f"Each row of probs must sum to one within {_SUM_TOLERANCE}; one is off by "
            f"{float(off):.4g}. Give probabilities, not logits: logits.softmax(-1)."
        )
    return probs


def probs_and_labels(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both, checked: ``probs`` (N, C) in the widest float, ``labels`` (N,) int64 beside it."""
    _table("probs", probs)
    probs = distributions(probs.detach())
    return probs, _labels("probs", labels, probs)


def logits_and_labels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both, checked: finite ``logits`` (N, C) as they are, ``labels`` (N,) int64 beside them."""
    _table("logits", logits)
    if not logits.is_floating_point():
        raise ArgumentError(f"logits must be floating-point numbers, not {logits.dtype}.")
    if not logits.isfinite().all():
        raise ArgumentError(
            "logits holds NaN or infinity: look for NaN in the model's weights or inputs, and "
            "leave out classes that are masked."
        )
    logits = logits.detach()
    return logits, _labels("logits", labels, logits)


def scores(name: str, values: Tensor) -> Tensor:
    """One number an example, (N,), in the widest float; infinity is in order, NaN is not."""
    if values.ndim != 1 or len(values) == 0:
        raise ArgumentError(
            f"{name} must have the shape (examples,) and hold at least one, "
            f"not {tuple(values.shape)}."
        )
    if values.is_complex():
        raise ArgumentError(f"{name} must be real numbers, not {values.dtype}.")
    values = widest(values.detach()).contiguous()
    if values.isnan().any():
        raise ArgumentError(f"{name} holds NaN: look for NaN in the model's weights or inputs.")
    return values


def scores_and_hits(confidence: Tensor, hits: Tensor) -> tuple[Tensor, Tensor]:
    """A number an example and whether its prediction was right, both (N,) and float."""
    confidence, hits = scores("confidence", confidence), scores("hits", hits).to(confidence.device)
    if confidence.shape != hits.shape:
        raise ArgumentError(
            f"confidence and hits must have one number for each example, they have "
            f"{len(confidence)} and {len(hits)}."
        )
    if ((hits != 0) & (hits != 1)).any():
        raise ArgumentError("hits must be 0 or 1, or bool: whether each prediction was right.")
    return confidence, hits


def confidences_and_hits(confidence: Tensor, hits: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`scores_and_hits`, for a confidence that is a probability."""
    confidence, hits = scores_and_hits(confidence, hits)
    low, high = confidence.aminmax()
    if low < 0 or high > 1 + _SUM_TOLERANCE:
        raise ArgumentError(
            f"confidence must be a probability from 0 to 1; it goes from {float(low):.4g} to "
            f"{float(high):.4g}. Give probs.max(-1).values."
        )
    return confidence, hits


def _table(name: str, values: Tensor) -> None:
    if values.ndim != 2 or values.numel() == 0:
        raise ArgumentError(
            f"{name} must have the shape (images, classes) and hold at least one image, "
            f"not {tuple(values.shape)}."
        )


def _labels(name: str, labels: Tensor, table: Tensor) -> Tensor:
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ArgumentError(
            f"labels must be whole class numbers, not {labels.dtype}; soft labels are not taken."
        )
    if labels.shape != table.shape[:1]:
        raise ArgumentError(
            f"labels must have the shape ({len(table)},), one for each row of {name}, "
            f"not {tuple(labels.shape)}."
        )
    labels = labels.to(table.device, torch.int64)
    wrong = ((labels < 0) | (labels >= table.shape[1])).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ArgumentError(
            f"Label {int(labels[row])} at row {row} is out of range: {name} has {table.shape[1]} "
            f"classes, so labels go from 0 to {table.shape[1] - 1}."
        )
    return labels
