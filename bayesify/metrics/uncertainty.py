"""How uncertain a prediction is, and which part of that is uncertainty about the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError
from .checks import distributions


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
    result: Tensor = torch.special.entr(distributions(probs)).sum(dim=-1)
    return result


def mutual_information(probs: Tensor) -> Tensor:
    """Mutual information between the class and the weights: the part that data remove.

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
    probs = distributions(probs)
    expected: Tensor = torch.special.entr(probs).sum(dim=-1).mean(dim=0)
    total: Tensor = torch.special.entr(probs.mean(dim=0)).sum(dim=-1)
    return (total - expected).clamp_min(0)
