"""What ends a run before its time: a loss that is not finite, a collapse, a process that died."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bayesify import BayesifyError

from ..config import BYOVConfig

COLLAPSED = 3
"""Alarms in a row, one a log line, that end a run."""


def check_finite(
    pending: list[tuple[int, Tensor]],
    newest: Path | None,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Refuse to go on from a loss or gradient that is not finite.

    Args:
        pending: Steps that were not looked at yet, each with a value that NaN and infinity reach.
        newest: The last checkpoint.
        optimizer: Whose rates may be the cause.

    Raises:
        BayesifyError: With the step, the likely cause and the last good checkpoint.
    """
    if not pending or bool(torch.isfinite(torch.stack([v for _, v in pending])).all()):
        return
    step = next(step for step, value in pending if not bool(torch.isfinite(value)))
    rates = {group["name"]: group["peak_lr"] for group in optimizer.param_groups}
    raise BayesifyError(
        f"The loss or its gradient is not finite at step {step + 1:,}. Likely cause: a learning "
        f"rate that is too high (peak {max(rates.values()):.3g}); lower lr or logvar_lr_ratio, "
        f"lengthen warmup_epochs, or set clip_norm. {_good(newest)}"
    )


def collapse_message(
    config: BYOVConfig, step: int, values: dict[str, float], newest: Path | None
) -> str:
    """Why a run ends whose embeddings have collapsed: the step, the likely cause, a checkpoint."""
    if config.predictor == "none":
        cause = "there is no predictor, without which BYOL collapses"
    elif config.head_norm == "none" and config.head_init == "default":
        cause = "heads without a norm need head_init 'modified'"
    elif config.tau_base < 0.9:
        cause = f"tau_base ({config.tau_base}) lets the teacher follow too fast"
    else:
        cause = "lr is too high, or warmup_epochs too short"
    return (
        f"The embeddings have collapsed at step {step:,}: standard deviation x sqrt(d) is "
        f"{values['std']:.3f} (1 is healthy), effective rank {values['effective_rank']:.1f}. "
        f"Likely cause: {cause}. {_good(newest)} stop_on_collapse=False goes on all the same."
    )


def _good(newest: Path | None) -> str:
    return f"The last good checkpoint is {newest}." if newest else "There is no checkpoint yet."
