"""What an encoder is worth: one of four classifiers, its metrics and its uncertainty."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bayesify import ArgumentError
from bayesify.metrics import knn_scores

from .finetune import finetune
from .linear import features_and_labels, linear, semi
from .protocol import DEFAULTS, MEANS, TEACHER, EvalSettings, Protocol, row_of
from .runs import Run, stored

_TEMPERATURE = 0.07


def evaluate(
    run: Run,
    protocol: Protocol = "linear",
    settings: EvalSettings = DEFAULTS,
) -> dict[str, Any]:
    """Measure a run and write ``results/eval-PROTOCOL.json`` in its folder.

    Args:
        run: The run.
        protocol: ``"linear"``: a linear classifier on all labels; ``"knn"``: 20 and 200 nearest
            neighbours; ``"semi"``: a linear classifier on 1 and 10 % of the labels;
            ``"finetune"``: the whole encoder is trained on all labels.
        settings: How.

    Returns:
        What was written: ``numbers`` has the ``rows``, each a way to predict with its metrics.

    Raises:
        ArgumentError: A value cannot work.
    """
    kept: dict[str, Any] = {"seed": settings.seed}
    if protocol in ("linear", "semi"):
        kept |= {"epochs": settings.epochs, "learning_rates": list(settings.learning_rates)}
    if protocol != "finetune":
        kept["num_samples"] = settings.num_samples if run.config.bayesian else 0
    else:
        kept |= {"epochs": settings.finetune_epochs, "lr": settings.finetune_lr}
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "linear": lambda: linear(run, settings),
        "knn": lambda: _knn(run, settings),
        "semi": lambda: semi(run, settings),
        "finetune": lambda: finetune(run, settings),
    }
    if protocol not in measures:
        raise ArgumentError(f"protocol must be one of {', '.join(measures)}, not {protocol!r}.")
    return stored(run, f"eval-{protocol}", kept, measures[protocol])


def _knn(run: Run, settings: EvalSettings) -> dict[str, Any]:
    rows = []
    models = [(MEANS, run.model)] + ([(TEACHER, run.teacher)] if run.teacher is not None else [])
    for name, model in models:
        x, y = features_and_labels(run, model, "train")
        tx, ty = features_and_labels(run, model, "test")
        for k in (20, 200):
            votes = knn_scores(
                x, y, tx, num_classes=run.source.num_classes, k=min(k, len(x)),
                temperature=_TEMPERATURE,
            )  # fmt: skip
            rows.append(row_of(f"{name}, k {k}", votes, ty))
    return {"rows": rows}
