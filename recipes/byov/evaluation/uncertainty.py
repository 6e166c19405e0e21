"""The uncertainty of one run: what figures 1b, 4 (centre and right), 5 and 7 are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesify import ArgumentError
from bayesify.corruptions import SEVERITIES, corrupt, gaussian_noise, kinds

from ..model import Student
from ..runtime.seeds import Stream, seed_of
from .features import features_of
from .linear import frozen_head
from .monte_carlo import (
    Change,
    classify,
    drawn_probs,
    labels_of,
    moments,
    outputs,
)
from .protocol import EvalSettings, metrics_of
from .runs import Run, limited, stored
from .settings import UncertaintySettings as UncertaintySettings

OnProgress = Callable[[str], None]
PARTS = ("encoder", "projector", "predictor")


def spread(run: Run, settings: UncertaintySettings, head: EvalSettings) -> dict[str, Any]:
    """Figure 1b: for each test image the standard deviation, over K draws of the weights, of the
    probability of the class that their average predicts. Writes ``results/spread.json``.
    """  # fmt: skip

    def measure() -> dict[str, Any]:
        classifier, _ = frozen_head(run, head)
        found = moments(drawn_probs(run, classifier, settings.spread_draws, seed=settings.seed))
        confidence, predicted = found.mean.max(dim=1)
        return {
            "std": found.std(1).gather(1, predicted[:, None])[:, 0],
            "class_mean_std": found.std(1).mean(dim=1),
            "confidence": confidence,
            "right": (predicted == labels_of(run)).int(),
        }

    kept = {"draws": settings.spread_draws, "seed": settings.seed}
    return stored(run, "spread", kept, measure)


def corrupted(
    run: Run,
    settings: UncertaintySettings,
    head: EvalSettings,
    on_progress: OnProgress = lambda line: None,
) -> dict[str, Any]:
    """Figure 4, centre and right: the metrics under each augmentation at five severities.

    Writes ``results/corrupted.json``.
    """

    def measure() -> dict[str, Any]:
        classifier, _ = frozen_head(run, head)
        few = limited(run, settings.images)
        labels = labels_of(few)
        draws = settings.corrupted_draws if run.config.bayesian else 0
        rows = []
        for kind, severity in [("none", 0)] + [
            (kind, severity) for kind in kinds(grey=run.source.grey) for severity in SEVERITIES
        ]:
            if severity in (0, 1):
                on_progress(f"augmentation {kind}")
            change = None if kind == "none" else corruption(kind, severity, settings.seed)
            probs = outputs(few, classify(few, classifier), change=change)
            row = {"kind": kind, "severity": severity, "means": metrics_of(probs, labels)}
            if draws:
                drawn = drawn_probs(few, classifier, draws, seed=settings.seed, change=change)
                row["average"] = metrics_of(moments(drawn).mean, labels)
            rows.append(row)
        return {"rows": rows, "images": len(labels)}

    kept = {
        "draws": settings.corrupted_draws if run.config.bayesian else 0,
        "images": settings.images, "seed": settings.seed,
    }  # fmt: skip
    return stored(run, "corrupted", kept, measure)


def draws_needed(
    run: Run,
    settings: UncertaintySettings,
    head: EvalSettings,
    on_progress: OnProgress = lambda line: None,
) -> dict[str, Any]:
    """Figure 5: mean and spread of the average of K draws, of K from 1 to 50.

    The number looked at is the probability of the class that the means predict. ``std`` is over
    bootstrap samples from a pool of draws, as in the paper; ``disjoint`` over groups of K draws
    that share none, which a bootstrap cannot flatter. Writes ``results/draws.json``.
    """
    if settings.pool < 2 * settings.most:
        raise ArgumentError(
            f"pool ({settings.pool}) must hold at least two groups of {settings.most} draws."
        )

    def measure() -> dict[str, Any]:
        classifier, _ = frozen_head(run, head)
        few = limited(run, settings.images)
        known = kinds(grey=run.source.grey)
        curves = []
        for kind in ("none", *(k for k in settings.shifted if k in known)):
            on_progress(f"{settings.pool} draws, augmentation {kind}")
            change = None if kind == "none" else corruption(kind, 3, settings.seed)
            predicted = outputs(few, classify(few, classifier), change=change).argmax(dim=1)
            drawn = drawn_probs(few, classifier, settings.pool, seed=settings.seed, change=change)
            pool = torch.stack([p.gather(1, predicted[:, None])[:, 0] for p in drawn])
            curves.append({"kind": kind, **averages(pool, settings)})
        return {"curves": curves, "images": len(predicted)}

    kept = {
        "pool": settings.pool, "most": settings.most, "bootstraps": settings.bootstraps,
        "images": settings.images, "shifted": list(settings.shifted), "seed": settings.seed,
    }  # fmt: skip
    return stored(run, "draws", kept, measure)


def averages(pool: Tensor, settings: UncertaintySettings) -> dict[str, Any]:
    """Mean and spread of averages of K of the pool's draws (P, N), over the images.

    The mean is that over the images; the spread the root of their mean variance, which few groups
    do not bias.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    pool = pool.double()
    rows = []
    for k in range(1, settings.most + 1):
        picks = torch.randint(len(pool), (settings.bootstraps, k), generator=generator)
        found = moments(pool[pick].mean(dim=0) for pick in picks)
        groups = pool[: len(pool) // k * k].view(-1, k, pool.shape[1]).mean(dim=1)
        rows.append(
            {
                "k": k,
                "mean": float(found.mean.mean()),
                "std": float(found.std(1).square().mean().sqrt()),
                "disjoint": float(groups.var(dim=0).mean().sqrt()),
                "groups": len(groups),
            }
        )
    return {"rows": rows, "slope": slope(rows, "std"), "disjoint_slope": slope(rows, "disjoint")}


def slope(rows: list[dict[str, Any]], key: str) -> float | None:
    """Exponent of K in the spread, by least squares of the logarithms; -1/2 for independent draws.

    A spread over few groups counts for less: by their number less one. None where nothing spreads.
    """
    known = [
        (math.log(r["k"]), math.log(r[key]), r["groups"] - 1 if key == "disjoint" else 1)
        for r in rows
        if r[key] > 0
    ]
    if len(known) < 2:
        return None
    x, y, weight = torch.tensor(known, dtype=torch.float64).unbind(1)
    away = x - (weight * x).sum() / weight.sum()
    return float((weight * away * y).sum() / (weight * away.square()).sum())


def latent_variance(
    run: Run, settings: UncertaintySettings, on_progress: OnProgress = lambda line: None
) -> dict[str, Any]:
    """Figure 7: variance over M draws behind encoder, projector and predictor, by noise.

    Of each image the mean over the dimensions, of the vectors as they are and of unit length.
    BatchNorm in the heads uses its running statistics. Writes ``results/latents.json``.
    """
    if not isinstance(run.model, Student):
        raise ArgumentError(
            "Figure 7 needs projector and predictor: the supervised baseline has none."
        )
    model: Any = run.model

    def read(images: Tensor) -> Tensor:
        features = features_of(model, images)
        projection = model.projector(features)
        raw = (features, projection, model.predictor(projection))
        return torch.cat([*raw, *(F.normalize(v.float(), dim=-1) for v in raw)], dim=1)

    def measure() -> dict[str, Any]:
        few = limited(run, settings.images or 1000)
        with torch.no_grad():
            one = torch.zeros(1, run.source.channels, *[run.source.image_size] * 2)
            features = features_of(model, one.to(run.device))
            widths = [features.shape[1], *[model.projector(features).shape[1]] * 2] * 2
        levels = []
        for noise in settings.noises:
            on_progress(f"noise {noise:g}")
            drawn = (
                outputs(
                    few,
                    read,
                    change=noisy(noise, settings.seed),
                    draw=seed_of(Stream.MEASURED, settings.seed, m),
                )
                for m in range(settings.latent_draws)
            )
            each = moments(drawn).std(1).square().split(widths, dim=1)
            of_image = [part.mean(dim=1) for part in each]
            levels.append(
                {
                    "noise": noise,
                    "raw": dict(zip(PARTS, of_image[:3], strict=True)),
                    "unit": dict(zip(PARTS, of_image[3:], strict=True)),
                }
            )
        return {"levels": levels}

    kept = {
        "draws": settings.latent_draws, "images": settings.images or 1000,
        "noises": list(settings.noises), "seed": settings.seed,
    }  # fmt: skip
    return stored(run, "latents", kept, measure)


def corruption(kind: str, severity: int, seed: int) -> Change:
    """An augmentation as :func:`outputs` takes it; its noise differs from batch to batch."""
    return lambda pixels, number: corrupt(
        pixels, kind, severity, seed=seed_of(Stream.CORRUPTED, seed, number)
    )


def noisy(std: float, seed: int) -> Change:
    """Gaussian noise alone, cut off at black and white."""
    return lambda pixels, number: gaussian_noise(
        pixels, std, seed_of(Stream.CORRUPTED, seed, number)
    ).clamp(0, 1)
