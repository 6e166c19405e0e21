"""Detection of images of other classes, by each way to predict and each score of uncertainty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bayesify.metrics import entropy, fit_temperature, ood_metrics
from bayesify.welford import Welford

from ..data.dataset import Source, open_source
from .features import Split
from .linear import frozen_head
from .monte_carlo import classify, drawn_probs, labels_of, outputs
from .protocol import AVERAGE, MEANS, SCALED, EvalSettings
from .runs import Run, stored

_HEAD = EvalSettings()
_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "1 - largest probability": lambda p: 1 - p.max(dim=1).values,
    "entropy": entropy,
}


def open_ood(run: Run, spec: str) -> Source:
    """Open a data set whose images are to be told from the run's, sized and normalised as these."""
    source = run.source
    return open_source(
        spec, image_size=run.config.image_size, channels=source.channels, mean=source.mean,
        std=source.std,
    )  # fmt: skip


def ood_detection(
    run: Run, others: Sequence[Source], settings: EvalSettings = _HEAD
) -> dict[str, Any]:
    """AUROC and false-positive rate at 95 % of the OOD images found; writes ``ood.json``.

    Args:
        run: The run, whose test images are the ones it knows.
        others: OOD data sets; their test images, or all where there is one split.
        settings: Of the classifier and the average. The temperature of the control is fitted on the
            run's training images: it must not depend on the fold that an image is in.
    """

    def measure() -> dict[str, Any]:
        head, _ = frozen_head(run, settings)
        logits = _log(outputs(run, classify(run, head), "train"))
        temperature = fit_temperature(logits, labels_of(run, "train"))
        inside = _predictions(run, "test", settings, temperature)
        rows = []
        for other in others:
            there = replace(run, source=other.to(run.device))
            split: Split = "train" if other.test is None else "test"
            outside = _predictions(there, split, settings, temperature, head_of=run)
            for name, scores in inside.items():
                for score, values in scores.items():
                    found = ood_metrics(values, outside[name][score])
                    rows.append(
                        {"ood": Path(other.name).name, "prediction": name, "score": score,
                         "images": len(outside[name][score]), "auroc": found["auroc"],
                         "fpr95": found["fpr95"]}
                    )  # fmt: skip
        return {"rows": rows, "temperature": temperature}

    kept = {
        "ood": [Path(other.name).name for other in others], "seed": settings.seed,
        "num_samples": settings.num_samples if run.config.bayesian else 0,
        "epochs": settings.epochs,
    }  # fmt: skip
    return stored(run, "ood", kept, measure)


def _predictions(
    run: Run, split: Split, settings: EvalSettings, temperature: float, head_of: Run | None = None
) -> dict[str, dict[str, Tensor]]:
    """Scores of uncertainty of every image, by the way to predict."""
    head, _ = frozen_head(head_of or run, settings)
    means = outputs(run, classify(run, head), split)
    scaled = (_log(means) / temperature).softmax(dim=-1)
    found = {
        MEANS: {name: of(means) for name, of in _SCORES.items()},
        SCALED: {name: of(scaled) for name, of in _SCORES.items()},
    }
    if run.config.bayesian and settings.num_samples:
        average, of_draws = Welford(means), Welford(entropy(means))
        for probs in drawn_probs(run, head, settings.num_samples, seed=settings.seed, split=split):
            average.add(probs)
            of_draws.add(entropy(probs))
        found[AVERAGE] = {name: of(average.mean) for name, of in _SCORES.items()}
        found[AVERAGE]["mutual information"] = found[AVERAGE]["entropy"] - of_draws.mean
    return found


def _log(probs: Tensor) -> Tensor:
    return probs.double().clamp_min(1e-30).log()
