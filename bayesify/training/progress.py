"""What a fit says while it runs and when it is done."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..posterior import PRUNED_RAW

MOVED = 0.1
"""A log variance that went further than this has moved: its sigma changed by 5 %."""


@dataclass(frozen=True)
class Progress:
    """Where a fit is after a step; ``loss`` without the KL, at that step's draws and batches."""

    step: int
    steps: int
    epoch: int
    loss: float
    kl_weight: float
    lr: float


@dataclass(frozen=True)
class LogvarTravel:
    """How far the log variances went, the pruned ones left out.

    Args:
        bound: Sum of their learning rates: about the furthest that Adam can move one.
        mean: Mean of the distances from the start.
        largest: The largest of them.
        moved: Share of the weights whose log variance moved by more than 0.1.
    """

    bound: float
    mean: float
    largest: float
    moved: float


@dataclass(frozen=True)
class FitResult:
    """How a fit went.

    Args:
        losses: Mean of the loss without the KL, one number an epoch.
        kl: KL divergence in nats after each epoch; empty for a deterministic model.
        steps: Optimizer steps taken.
        seconds: Wall time, of all parts of a resumed fit.
        num_data: Training examples N, without those held out.
        kl_scale: The factor s before the KL, None for a deterministic model.
        noise_budget: ``beta * s * P / 2`` in units of the loss, None for a deterministic model.
        logvars: How far the log variances went, None for a deterministic model.
        holdout_losses: Loss on the held-out examples after each epoch; empty without any.
        best_epoch: The epoch, from 1, whose weights the model has; None without held-out examples.
        unreadable: Images that were left out because they cannot be read.
    """

    losses: tuple[float, ...]
    kl: tuple[float, ...]
    steps: int
    seconds: float
    num_data: int
    kl_scale: float | None
    noise_budget: float | None
    logvars: LogvarTravel | None = None
    holdout_losses: tuple[float, ...] = ()
    best_epoch: int | None = None
    unreadable: int = 0


def travel(start: list[Tensor], end: list[Tensor], bound: float) -> LogvarTravel:
    """How far log variances went from ``start`` to ``end``."""
    total = largest = 0.0
    moved = count = 0
    for before, after in zip(start, end, strict=True):
        distance = (after.float() - before.to(after.device).float()).abs()
        distance = distance[torch.isfinite(distance) & (after > PRUNED_RAW / 2)]
        if distance.numel():
            total += float(distance.double().sum())
            largest = max(largest, float(distance.max()))
            moved += int((distance > MOVED).sum())
            count += distance.numel()
    return LogvarTravel(bound, total / max(count, 1), largest, moved / max(count, 1))
