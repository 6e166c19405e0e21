"""What an encoder is worth: classifiers on frozen features, and how far their doubt is to trust.

The headline is an offline linear classifier on the features at the posterior means, its learning
rate chosen on held-out training images, the same for BYOV and BYOL. The average over draws keeps
that classifier and draws the encoder alone, with the same weights for all images of a draw.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bayesify import ArgumentError, fit, to_deterministic
from bayesify.metrics import (
    brier_decomposition,
    classification_metrics,
    cross_fitted_temperature,
)
from bayesify.storage import replacing

from .data import eval_batches
from .knn import knn_scores
from .measure import features_of
from .model import Student
from .predictive import classify, drawn_probs, labels_of, moments, outputs
from .probe import ProbeResult, linear_probe
from .runs import Run, stored

Protocol = Literal["linear", "knn", "semi", "finetune"]

MEANS, AVERAGE, SCALED, TEACHER = "at the means", "MC average", "means, scaled", "teacher"
SHARES = (0.01, 0.1)
_TEMPERATURE = 0.07


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
    """

    num_samples: int = 30
    seed: int = 0
    epochs: int = 80
    learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    finetune_epochs: int = 10
    finetune_lr: float = 1e-3


def evaluate(
    run: Run,
    protocol: Protocol = "linear",
    settings: EvalSettings = EvalSettings(),
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
        "linear": lambda: _linear(run, settings),
        "knn": lambda: _knn(run, settings),
        "semi": lambda: _semi(run, settings),
        "finetune": lambda: _finetune(run, settings),
    }
    if protocol not in measures:
        raise ArgumentError(f"protocol must be one of {', '.join(measures)}, not {protocol!r}.")
    return stored(run, f"eval-{protocol}", kept, measures[protocol])


def metrics_of(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1, top-5, ECE, Brier with reliability, resolution and residual, NLL; shares and nats."""
    found = classification_metrics(probs, labels)
    parts = brier_decomposition(probs, labels)
    return {
        "top1": found["accuracy"], "top5": found["top5"], "ece": found["ece"],
        "brier": parts.brier, "reliability": parts.reliability, "resolution": parts.resolution,
        "residual": parts.residual, "nll": found["nll"], "aurc": found["aurc"],
    }  # fmt: skip


def frozen_head(
    run: Run, settings: EvalSettings = EvalSettings()
) -> tuple[nn.Module, dict[str, Any]]:
    """The classifier of all measurements of a run: trained once, kept in ``results``.

    The supervised twin has its own. It is on the run's device.
    """
    if not isinstance(run.model, Student):
        return run.encoder.get_classifier(), {"classifier": "its own"}
    path = run.folder / "results" / "probe.safetensors"
    wanted = {
        "step": run.step, "data": Path(run.data).name, "epochs": settings.epochs,
        "learning_rates": list(settings.learning_rates), "seed": settings.seed,
    }  # fmt: skip
    if path.exists():
        with safe_open(path, framework="pt") as file:
            known = json.loads((file.metadata() or {}).get("probe", "{}"))
            if {k: known.get(k) for k in wanted} == wanted:
                head = nn.Linear(*reversed(file.get_slice("weight").get_shape()))
                head.load_state_dict({k: file.get_tensor(k) for k in ("weight", "bias")})
                return head.to(run.device), known
    found = probe_of(run, run.model, settings)
    info = {
        **wanted, "classifier": "linear, on frozen means", "lr": found.lr,
        "held_out": {f"{rate:g}": share for rate, share in found.held_out.items()},
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, overwrite=True) as temporary:
        tensors = {k: v.cpu().contiguous() for k, v in found.classifier.state_dict().items()}
        save_file(tensors, temporary, metadata={"probe": json.dumps(info)})
    return found.classifier.to(run.device), info


@torch.no_grad()
def _probs(head: nn.Module, features: Tensor) -> Tensor:
    device = next(head.parameters()).device
    probs: Tensor = head(features.to(device)).double().softmax(-1).cpu()
    return probs


def features_and_labels(run: Run, model: nn.Module, split: Any) -> tuple[Tensor, Tensor]:
    """Features (N, d) at the means, and the classes (N,)."""
    return outputs(run, lambda images: features_of(model, images), split), labels_of(run, split)


def probe_of(
    run: Run, model: nn.Module, settings: EvalSettings, rows: Tensor | None = None
) -> ProbeResult:
    """A linear classifier on the features of ``model``, of all training images or of some."""
    x, y = features_and_labels(run, model, "train")
    if rows is not None:
        x, y = x[rows], y[rows]
    tx, ty = features_and_labels(run, model, "test")
    return linear_probe(
        *(v.to(run.device) for v in (x, y, tx, ty)),
        num_classes=run.source.num_classes,
        epochs=settings.epochs,
        batch_size=min(1024, max(32, len(x) // 20)),
        learning_rates=settings.learning_rates,
        seed=settings.seed,
    )


def _row(name: str, probs: Tensor, labels: Tensor, **more: Any) -> dict[str, Any]:
    return {"prediction": name, **metrics_of(probs, labels), **more}


def _linear(run: Run, settings: EvalSettings) -> dict[str, Any]:
    head, info = frozen_head(run, settings)
    labels = labels_of(run)
    means = outputs(run, classify(run, head))
    scaled = cross_fitted_temperature(means.double().clamp_min(1e-30).log(), labels)
    temperature = float(scaled.temperatures.mean())
    rows = [
        _row(MEANS, means, labels),
        _row(SCALED, scaled.probs, labels, temperature=temperature),
    ]
    k = settings.num_samples if run.config.bayesian else 0
    if k:
        average = moments(drawn_probs(run, head, k, seed=settings.seed)).mean
        rows.append(_row(AVERAGE, average, labels, draws=k))
    if run.teacher is not None:
        found = probe_of(run, run.teacher, settings)
        x, _ = features_and_labels(run, run.teacher, "test")
        probs = _probs(found.classifier, x)
        rows.append(_row(TEACHER, probs, labels, lr=found.lr))
    return {"rows": rows, "classifier": info}


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
            rows.append(_row(f"{name}, k {k}", votes, ty))
    return {"rows": rows}


def _semi(run: Run, settings: EvalSettings) -> dict[str, Any]:
    """Linear classifiers that saw a share of the labels, the same number of each class."""
    labels, test = labels_of(run, "train"), labels_of(run)
    x, _ = features_and_labels(run, run.model, "test")
    rows = []
    for share in SHARES:
        few = stratified(labels, share, settings.seed)
        found = probe_of(run, run.model, settings, few)
        probs = _probs(found.classifier, x)
        rows.append(_row(f"{share:.0%} of labels", probs, test, labels_seen=len(few), lr=found.lr))
    return {"rows": rows}


def stratified(labels: Tensor, share: float, seed: int) -> Tensor:
    """Rows of a share of each class, at least five of it, by a seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    kept = []
    for c in range(int(labels.max()) + 1):
        own = order[labels[order] == c]
        kept.append(own[: max(5, round(share * len(own)))])
    return torch.cat(kept).sort().values


class _Labelled(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """A split with its labels, for the fit."""

    def __init__(self, run: Run) -> None:
        batches = list(eval_batches(run.source, "train", batch_size=1024, workers=run.workers))
        self.images = torch.cat([images.cpu() for images, _ in batches])
        self.labels = labels_of(run, "train")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


def _finetune(run: Run, settings: EvalSettings) -> dict[str, Any]:
    """The means as a start, everything trained on all labels; images are not augmented."""
    plain: Any = to_deterministic(run.model) if run.config.bayesian else run.model
    encoder: Any = deepcopy(plain.encoder if isinstance(plain, Student) else plain)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        encoder.reset_classifier(run.source.num_classes)
        encoder.to(run.device).requires_grad_(True)
    fit(
        encoder, _Labelled(run), epochs=settings.finetune_epochs, batch_size=128,
        lr=settings.finetune_lr, seed=settings.seed, device=run.device,
    )  # fmt: skip
    probs = outputs(run, lambda images: encoder(images).double().softmax(-1))
    return {"rows": [_row("finetuned means", probs, labels_of(run))]}
