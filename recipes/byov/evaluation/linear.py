"""A linear classifier on frozen features, of all labels or of few.

The headline is trained on the features at the posterior means, its learning rate chosen on held-out
training images, the same for BYOV and BYOL. The average over draws keeps that classifier and draws
the encoder alone, with the same weights for all images of a draw.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bayesify.metrics import ProbeResult, cross_fitted_temperature, linear_probe
from bayesify.storage import replacing

from ..model import Student
from .features import features_of
from .monte_carlo import classify, drawn_probs, labels_of, moments, outputs
from .protocol import AVERAGE, DEFAULTS, MEANS, SCALED, TEACHER, EvalSettings, row_of
from .runs import Run

SHARES = (0.01, 0.1)


def frozen_head(run: Run, settings: EvalSettings = DEFAULTS) -> tuple[nn.Module, dict[str, Any]]:
    """The classifier of all measurements of a run: trained once, kept in ``results``.

    The supervised baseline has its own. It is on the run's device.
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


def linear(run: Run, settings: EvalSettings) -> dict[str, Any]:
    head, info = frozen_head(run, settings)
    labels = labels_of(run)
    means = outputs(run, classify(run, head))
    scaled = cross_fitted_temperature(means.double().clamp_min(1e-30).log(), labels)
    temperature = float(scaled.temperatures.mean())
    rows = [
        row_of(MEANS, means, labels),
        row_of(SCALED, scaled.probs, labels, temperature=temperature),
    ]
    k = settings.num_samples if run.config.bayesian else 0
    if k:
        average = moments(drawn_probs(run, head, k, seed=settings.seed)).mean
        rows.append(row_of(AVERAGE, average, labels, draws=k))
    if run.teacher is not None:
        found = probe_of(run, run.teacher, settings)
        x, _ = features_and_labels(run, run.teacher, "test")
        probs = _probs(found.classifier, x)
        rows.append(row_of(TEACHER, probs, labels, lr=found.lr))
    return {"rows": rows, "classifier": info}


def semi(run: Run, settings: EvalSettings) -> dict[str, Any]:
    """Linear classifiers that saw a share of the labels, the same number of each class."""
    labels, test = labels_of(run, "train"), labels_of(run)
    x, _ = features_and_labels(run, run.model, "test")
    rows = []
    for share in SHARES:
        few = stratified(labels, share, settings.seed)
        found = probe_of(run, run.model, settings, few)
        probs = _probs(found.classifier, x)
        name = f"{share:.0%} of labels"
        rows.append(row_of(name, probs, test, labels_seen=len(few), lr=found.lr))
    return {"rows": rows}


def features_and_labels(run: Run, model: nn.Module, split: Any) -> tuple[Tensor, Tensor]:
    """Features (N, d) at the means, and the classes (N,)."""
    return outputs(run, lambda images: features_of(model, images), split), labels_of(run, split)


def stratified(labels: Tensor, share: float, seed: int) -> Tensor:
    """Rows of a share of each class, at least five of it, by a seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    kept = []
    for c in range(int(labels.max()) + 1):
        own = order[labels[order] == c]
        kept.append(own[: max(5, round(share * len(own)))])
    return torch.cat(kept).sort().values


@torch.no_grad()
def _probs(head: nn.Module, features: Tensor) -> Tensor:
    device = next(head.parameters()).device
    probs: Tensor = head(features.to(device)).double().softmax(-1).cpu()
    return probs
