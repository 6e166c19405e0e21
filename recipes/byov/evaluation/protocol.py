"""What all evaluations share: their settings, the names of predictions, the metrics of a row."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from bayesify.metrics import brier_decomposition, classification_metrics
from bayesify.numeric import seed_number

from .settings import EvalSettings as EvalSettings

Protocol = Literal["linear", "knn", "semi", "finetune"]

MEANS, AVERAGE, SCALED, TEACHER = "at the means", "MC average", "means, scaled", "teacher"


<<<<<<< HEAD
@dataclass(frozen=True)
class EvalSettings:
    """What the numbers of an evaluation depend on, beside the run.

    Args:
        num_samples: Draws K of the average; 0 leaves it out.
        seed: Of the draws, the classifiers' batches and what is held out.
        epochs: Passes of the linear classifier over the features.
        learning_rates: Of the linear classifier, to choose among.
        finetune_epochs: Passes over the images when all is trained.
        finetune_lr: Highest learning rate then.

    Raises:
        ArgumentError: ``seed`` is none that generators take.
    """

    num_samples: int = 30
    seed: int = 0
    epochs: int = 80
    learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    finetune_epochs: int = 10
    finetune_lr: float = 1e-3

    def __post_init__(self) -> None:
        seed_number(self.seed)


=======
>>>>>>> main
DEFAULTS = EvalSettings()


def metrics_of(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1, top-5, ECE, Brier with reliability, resolution and residual, NLL; shares and nats."""
    found = classification_metrics(probs, labels)
    parts = brier_decomposition(probs, labels)
    return {
        "top1": found["accuracy"], "top5": found["top5"], "ece": found["ece"],
        "brier": parts.brier, "reliability": parts.reliability, "resolution": parts.resolution,
        "residual": parts.residual, "nll": found["nll"], "aurc": found["aurc"],
    }  # fmt: skip


def row_of(name: str, probs: Tensor, labels: Tensor, **more: Any) -> dict[str, Any]:
    return {"prediction": name, **metrics_of(probs, labels), **more}
