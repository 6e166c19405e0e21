"""The numbers that decide a fit, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import ArgumentError
from ..objective import KLReduction

KLShape = Literal["linear", "cosine"]

CHANGEABLE = frozenset(
    {"lr", "logvar_lr", "kl_weight", "weight_decay", "max_grad_norm", "patience", "amp"}
)
"""What a resumed fit may have otherwise: the order of the data and the form of the state stay."""


@dataclass(frozen=True)
class Settings:
    """Arguments of :func:`bayesify.fit`, which says what each is."""

    epochs: int
    batch_size: int
    lr: float
    logvar_lr: float
    kl_weight: float
    kl_reduction: KLReduction
    kl_warmup: float
    kl_shape: KLShape
    warmup: float
    weight_decay: float
    max_grad_norm: float
    average: float
    draws_per_step: int
    accumulate: int
    augment: str
    holdout: float
    patience: int | None
    freeze_batchnorm: bool
    seed: int
    amp: bool

    def __post_init__(self) -> None:
        def count(value: Any) -> bool:
            return type(value) is int and value > 0

        def within(value: Any, low: float, high: float) -> bool:
            return type(value) in (int, float) and low <= value < high

        whole, rate, share = "a whole number above 0", "at least 0 and finite", "from 0 to below 1"
        expected = [
            ("epochs", whole, count(self.epochs)),
            ("batch_size", whole, count(self.batch_size)),
            ("draws_per_step", whole, count(self.draws_per_step)),
            ("accumulate", whole, count(self.accumulate)),
            ("lr", "above 0 and finite", self.lr != 0 and within(self.lr, 0.0, math.inf)),
            ("logvar_lr", rate, within(self.logvar_lr, 0.0, math.inf)),
            ("kl_weight", rate, within(self.kl_weight, 0.0, math.inf)),
            ("weight_decay", rate, within(self.weight_decay, 0.0, math.inf)),
            ("max_grad_norm", "above 0", self.max_grad_norm > 0.0),
            ("kl_warmup", "from 0 to 1", 0.0 <= self.kl_warmup <= 1.0),
            ("kl_shape", "'linear' or 'cosine'", self.kl_shape in get_args(KLShape)),
            ("average", "from 0 to 1", 0.0 <= self.average <= 1.0),
            ("warmup", share, within(self.warmup, 0.0, 1.0)),
            ("holdout", share, within(self.holdout, 0.0, 1.0)),
            ("patience", f"None or {whole}", self.patience is None or count(self.patience)),
            ("seed", "a whole number from 0", type(self.seed) is int and self.seed >= 0),
        ]
        for name, what, right in expected:
            if not right:
                raise ArgumentError(f"fit: {name} must be {what}, got {getattr(self, name)!r}.")
        if self.patience is not None and self.holdout == 0.0:
            raise ArgumentError(
                "fit: patience needs held-out training examples to watch: give holdout=0.1, say."
            )


def warmup_cosine(warmup: float, step: int, steps: int) -> float:
    """The factor of a learning rate: it rises over a share of the run, then falls as a cosine."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
