"""The numbers that decide a fit, checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import ArgumentError
from ..numeric import not_negative, positive, real, whole
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
        count, rate = "a whole number above 0", "at least 0 and finite"
        for name in ("epochs", "batch_size", "draws_per_step", "accumulate"):
            self._take(name, whole(f"fit: {name}", getattr(self, name), count))
        if self.patience is not None:
            self._take("patience", whole("fit: patience", self.patience, f"None or {count}"))
        seed = whole("fit: seed", self.seed, "a whole number from 0", least=0, below=1 << 63)
        self._take("seed", seed)
        expected: list[tuple[str, str, Callable[[float], bool]]] = [
            ("lr", "above 0 and finite", positive),
            ("logvar_lr", rate, not_negative),
            ("kl_weight", rate, not_negative),
            ("weight_decay", rate, not_negative),
            ("max_grad_norm", "above 0", lambda value: value > 0.0),
            ("kl_warmup", "from 0 to 1", lambda value: 0.0 <= value <= 1.0),
            ("average", "from 0 to 1", lambda value: 0.0 <= value <= 1.0),
            ("warmup", "from 0 to below 1", lambda value: 0.0 <= value < 1.0),
            ("holdout", "from 0 to below 1", lambda value: 0.0 <= value < 1.0),
        ]
        for name, what, fits in expected:
            self._take(name, real(f"fit: {name}", getattr(self, name), what, fits))
        if self.kl_shape not in get_args(KLShape):
            raise ArgumentError(
                f"fit: kl_shape must be 'linear' or 'cosine', got {self.kl_shape!r}."
            )
        if self.patience is not None and self.holdout == 0.0:
            raise ArgumentError(
                "fit: patience needs held-out training examples to watch: give holdout=0.1, say."
            )

    def _take(self, name: str, value: float) -> None:
        object.__setattr__(self, name, value)
