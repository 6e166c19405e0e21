"""What all evaluations share: their settings, the names of predictions, the metrics of a row."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from bayesify.metrics import brier_decomposition, classification_metrics

from .settings import EvalSettings as EvalSettings

Protocol = Literal["linear", "knn", "semi", "finetune"]

MEANS, AVERAGE, SCALED, TEACHER = "at the means", "MC average", "means, scaled", "teacher"


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
