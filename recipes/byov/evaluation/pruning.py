"""BYOV's figure 4, left: accuracy of a frozen classifier while the encoder's weights are pruned.

Nothing is retrained. Each criterion is a way to score weights from mean and sigma; the controls
tell what sigma adds: within a tensor (sigma shuffled in it), and between tensors (magnitude over
the tensor's typical sigma, which ranks as magnitude does where each tensor gives the same share).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bayesify import ArgumentError, posteriors, prune_, prune_units_, to_bbb_
from bayesify.metrics import classification_metrics
from bayesify.seeds import fold, key_of

from ..model import Student
from .features import features_of
from .linear import frozen_head
from .monte_carlo import labels_of, outputs
from .protocol import EvalSettings
from .runs import Run, limited, logvar_spread, stored

Scope = Literal["tensor", "global", "channels"]

SCOPES: tuple[Scope, ...] = ("tensor", "global", "channels")
SPARSITIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_HEAD = EvalSettings()
_LOSS = 0.01  # of top-1, for "the sparsity that costs a point"


def _magnitude(mean: Tensor, std: Tensor, seed: int) -> Tensor:
    return mean.abs()


def _snr(mean: Tensor, std: Tensor, seed: int) -> Tensor:
    return mean.abs() / std


def _precision(mean: Tensor, std: Tensor, seed: int) -> Tensor:
    return 1 / std


def _shuffled(mean: Tensor, std: Tensor, seed: int) -> Tensor:
    return mean.abs() / shuffled(std, seed)


def _typical(mean: Tensor, std: Tensor, seed: int) -> Tensor:
    return mean.abs() * (1 / std).mean()


def _random(mean: Tensor, std: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(mean.shape, generator=generator).to(mean.device)


CRITERIA: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "SNR": _snr,
    "magnitude": _magnitude,
    "1 / sigma": _precision,
    "SNR, sigma shuffled": _shuffled,
    "magnitude x mean 1 / sigma": _typical,
    "random": _random,
}
"""The score of each weight of a tensor, from mean, sigma and a seed; the lowest go first."""


def shuffled(std: Tensor, seed: int) -> Tensor:
    """The same sigmas in another order within the tensor."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(std.numel(), generator=generator).to(std.device)
    return std.flatten()[order].view_as(std)


def scores_of(encoder: nn.Module, criterion: str, *, seed: int = 0) -> dict[str, Tensor]:
    """The scores of every Bayesian tensor of an encoder, by its name.

    Raises:
        ArgumentError: There is no such criterion.
    """
    if criterion not in CRITERIA:
        raise ArgumentError(f"criterion must be one of {', '.join(CRITERIA)}, not {criterion!r}.")
    of = CRITERIA[criterion]
    with torch.no_grad():
        return {
            p.name: of(
                p.mean.float(), (p.logvar.float() / 2).exp(), fold(seed, key_of(p.name))
            )
            for p in posteriors(encoder)
        }  # fmt: skip


def matrices(encoder: nn.Module) -> list[str]:
    """Weights of Linear layers and convolutions: tokens, positions, norms and biases stay."""
    classifier = getattr(encoder, "get_classifier", lambda: None)()
    return [
        f"{name}.weight"
        for name, layer in encoder.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer is not classifier
    ]


def curve(
    run: Run,
    head: nn.Module,
    criterion: str,
    *,
    sparsities: Sequence[float] = SPARSITIES,
    scope: Scope = "tensor",
    seed: int = 0,
) -> list[dict[str, float]]:
    """Top-1 and NLL of a frozen classifier at each sparsity, at the means.

    Args:
        run: The run; without a posterior, its weights get one of equal sigmas to be pruned with.
        head: The classifier.
        criterion: A key of :data:`CRITERIA`.
        sparsities: Shares of the matrices' weights, rising.
        scope: The share of each tensor, as in the paper; of all together; or whole output channels
            of each tensor, scored by the mean over their weights.
        seed: Of what is random in a criterion.
    """
    encoder: Any = copy.deepcopy(run.encoder)
    if not run.config.bayesian:
        to_bbb_(encoder, initial_std=math.exp(-5))
    encoder.eval()
    own = head if isinstance(run.model, Student) else encoder.get_classifier()
    scores = scores_of(encoder, criterion, seed=seed)
    only = [name for name in matrices(encoder) if name in scores]
    labels, found = labels_of(run), []
    for sparsity in sparsities:
        if sparsity:
            by: Any = {"score": lambda site: scores[site.name], "only": only}
            if scope == "channels":
                prune_units_(encoder, sparsity, unit="channels", **by)
            else:
                prune_(encoder, sparsity, scope=scope, **by)
        logits = outputs(run, lambda images: own(features_of(encoder, images).float()))
        measured = classification_metrics(logits.double().softmax(-1), labels)
        found.append({"sparsity": sparsity, "top1": measured["accuracy"], "nll": measured["nll"]})
    return found


def prune_curves(
    run: Run,
    *,
    sparsities: Sequence[float] = SPARSITIES,
    scopes: Sequence[Scope] = SCOPES,
    images: int = 0,
    seed: int = 0,
    settings: EvalSettings = _HEAD,
    on_progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Every criterion that a run allows; writes ``results/prune.json`` in its folder.

    Args:
        run: The run. BYOL has magnitude and random alone: it has no sigma.
        sparsities: Rising shares in [0, 1), the first 0.
        scopes: As :func:`curve` has them.
        images: Test images, evenly spread; 0 is all.
        seed: Of what is random in a criterion.
        settings: Of the frozen classifier.
        on_progress: Gets a line before each curve.

    Raises:
        ArgumentError: ``sparsities`` do not rise from 0.
    """
    if list(sparsities) != sorted(set(sparsities)) or not sparsities or sparsities[0] != 0:
        raise ArgumentError(f"sparsities must rise from 0, not {list(sparsities)}.")
    names = list(CRITERIA) if run.config.bayesian else ["magnitude", "random"]

    def measure() -> dict[str, Any]:
        head, info = frozen_head(run, settings)
        few = limited(run, images)
        curves = []
        for scope in scopes:
            for name in names:
                on_progress(f"pruning by {name}, {scope}")
                points = curve(few, head, name, sparsities=sparsities, scope=scope, seed=seed)
                curves.append({"criterion": name, "scope": scope, "points": points})
        spread = logvar_spread(run.encoder) if run.config.bayesian else None
        return {
            "curves": curves,
            "gaps": gaps(curves),
            "encoder_logvar_spread": spread,
            "pruned_tensors": len(matrices(run.encoder)),
            "classifier": info,
        }

    kept = {"sparsities": list(sparsities), "scopes": list(scopes), "seed": seed}
    if images:
        kept["images"] = images
    return stored(run, "prune", kept, measure)


def gaps(curves: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What SNR gains over each other criterion of its scope, down and across.

    ``points``: largest difference in top-1 between 50 and 90 % sparsity, in percentage points, and
    where: a maximum, which noise alone lifts above 0; ``middle``: mean difference there, which
    noise does not; ``area``: mean difference over all sparsities; ``sparser``: how much sparser SNR
    gets before it loses a point of top-1.
    """
    found = []
    for reference in curves:
        if reference["criterion"] != "SNR":
            continue
        mine = reference["points"]
        for other in curves:
            if other["scope"] != reference["scope"] or other is reference:
                continue
            away = [
                (a["sparsity"], 100 * (a["top1"] - b["top1"]))
                for a, b in zip(mine, other["points"], strict=True)
            ]
            middle = [pair for pair in away if 0.5 <= pair[0] <= 0.9] or away
            at, points = max(middle, key=lambda pair: pair[1])
            found.append(
                {
                    "scope": reference["scope"], "over": other["criterion"], "points": points,
                    "at": at, "middle": sum(p for _, p in middle) / len(middle),
                    "area": sum(p for _, p in away) / len(away),
                    "sparser": 100 * (bearable(mine) - bearable(other["points"])),
                }
            )  # fmt: skip
    return found


def bearable(points: Sequence[dict[str, float]], loss: float = _LOSS) -> float:
    """The sparsity at which a curve first falls ``loss`` below its start, between its points."""
    floor = points[0]["top1"] - loss
    for before, after in itertools.pairwise(points):
        if after["top1"] < floor:
            way = (before["top1"] - floor) / (before["top1"] - after["top1"])
            return before["sparsity"] + way * (after["sparsity"] - before["sparsity"])
    return points[-1]["sparsity"]
