"""What a report says, measured: one pass over the images, one over the OOD images, the weights."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from .. import __version__
from ..classes import check_count, classes_of
from ..data import ImageData, loader
from ..inference import Given, Predictor, class_logits
from ..metrics import (
    ClassificationMetrics,
    Examples,
    bootstrap_interval,
    cross_fitted_temperature,
    entropy,
    ood_metrics,
    reliability_bins,
)
from ..models import InputConfig, input_config
from ..posterior import bayesian_sites
from ..pruning import prune_
from ..scope import at_mean
from ..settings.evaluation import ReportSettings
from ..settings.fields import documented, taken
from ..training.matching import images_by_name
from ..training.readable import readable
from .content import Bin, Detection, Example, OodScores, Report, Row
from .curve import pruning_curve
from .weights import left_out, measure

SHOWN = 6
"""Images in a row of examples."""
SHARES = (0.0, 0.25, 0.5, 0.7, 0.85, 0.95)
CURVE_IMAGES, CURVE_DRAWS = 1000, 5
"""The pruning curve is for the eye: it is measured on so many images and draws at most."""
Step = Callable[[str, int, int], None]


@documented(ReportSettings)
def gather(  # noqa: D417 - the others are fields of ReportSettings
    model: nn.Module,
    images: ImageData,
    *,
    ood: ImageData | None = None,
    num_samples: int = ReportSettings.num_samples,
    seed: int = ReportSettings.seed,
    batch_size: int = ReportSettings.batch_size,
    resamples: int = ReportSettings.resamples,
    pruning: bool = ReportSettings.pruning,
    model_config: InputConfig | None = None,
    device: torch.device | str | None = None,
    amp: bool = ReportSettings.amp,
    workers: int = ReportSettings.workers,
    skip_unreadable: bool = ReportSettings.skip_unreadable,
    title: str | None = None,
    facts: Iterable[tuple[str, str]] = (),
    on_step: Step | None = None,
) -> Report:
    """Measure what a report shows.

    Args:
        model: A converted classifier; it is left in ``eval()`` on ``device``.
        images: Labelled images that it was not trained on; classes as :func:`bayesify.evaluate`
            finds them.
        ood: Images of another kind, whose labels are not looked at.
        model_config: How images are prepared; None asks the model.
        device: Where the model is moved to; None leaves it where it is.
        title: Name of the model; None takes its class.
        facts: Further (name, value) lines for the run's settings.
        on_step: Gets what is done, and the number of steps done and of all.

    Returns:
        A :class:`Report`, for :func:`bayesify.report.render`.

    Raises:
        ArgumentError: An argument has a value that cannot work, the output is no table of logits,
            or a label is out of range.
        DataError: An image cannot be read, or classes are not the model's.
        UnsupportedModuleError: ``model`` has no posterior.
    """
    settings = taken(ReportSettings, locals())
    bayesian_sites(model)
    looking: dict[str, Any] = {"workers": settings.workers, "skip": settings.skip_unreadable}
    images = images_by_name(readable(images, **looking)[0], model)
    ood = None if ood is None else readable(ood, **looking)[0]
    config = model_config or input_config(model)
    run = _Run(model.eval(), config, settings, device, on_step)
    found = run.over(images, "Measuring", labelled=True)
    outside = None if ood is None else run.over(ood, "Measuring OOD images")
    rows = _rows(found, settings.num_samples, settings.resamples, settings.seed)
    curve: list[dict[str, Any]] = []
    part = _spread(len(images), CURVE_IMAGES)
    curve_draws = min(CURVE_DRAWS, settings.num_samples)
    if settings.pruning:
        curve = pruning_curve(
            model, Subset(images.dataset(config), part),
            lambda pruned, share, score: prune_(pruned, share, score=score, seed=settings.seed),
            SHARES, ("snr", "magnitude", "random"), num_samples=curve_draws, seed=settings.seed,
            batch_size=settings.batch_size, device=run.device, amp=settings.amp,
            workers=settings.workers,
            on_step=lambda done: run.progress("Pruning", done, 3 * len(SHARES)),
        )  # fmt: skip
    order = found.entropy.argsort(stable=True).tolist()
    wrong = [i for i in order if int(found.probs[i].argmax()) != int(found.labels[i])]
    chosen = [
        run.examples(images, _varied(indices, found))
        for indices in (order, order[::-1], wrong)
    ]  # fmt: skip
    return Report(
        title=title or type(model).__name__,
        data=_short(images.name),
        split=images.split,
        images=len(images),
        classes=found.probs.shape[1],
        num_samples=settings.num_samples,
        resamples=settings.resamples,
        rows=rows,
        information=found.information,
        ood=None if ood is None or outside is None else _ood_scores(ood, found, outside),
        layers=tuple(measure(site) for site in bayesian_sites(model)),
        left_out=left_out(model),
        surest=chosen[0],
        least_sure=chosen[1],
        sure_and_wrong=chosen[2],
        curve=tuple(curve),
        curve_images=len(part),
        curve_draws=curve_draws,
        facts=(*facts, *_facts(run, images, ood)),
    )


# -- predictions -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """What the model says of each image, on the CPU: logits at the means, the draws' average."""

    labels: Tensor
    logits: Tensor
    probs: Tensor
    entropy: Tensor
    information: Tensor


class _Run:
    """The model and how it is run."""

    def __init__(
        self,
        model: nn.Module,
        config: InputConfig,
        settings: ReportSettings,
        device: torch.device | str | None,
        on_step: Step | None,
    ) -> None:
        self.device = bayesian_sites(model)[0].mean.device if device is None else device
        self.model = model.to(self.device)
        self.config, self.settings, self.on_step = config, settings, on_step
        self.predictor = Predictor(
            model, num_samples=settings.num_samples, seed=settings.seed, reduce="probabilities"
        )

    def progress(self, what: str, done: int, total: int) -> None:
        if self.on_step is not None:
            self.on_step(what, done, total)

    def over(self, data: ImageData, what: str, labelled: bool = False) -> _Found:
        batches = loader(
            data, self.settings.batch_size, model_config=self.config, workers=self.settings.workers
        )
        columns: list[tuple[Tensor, ...]] = []
        for done, (inputs, labels) in enumerate(batches, 1):
            logits, summary = self.predicted(inputs)
            if labelled and done == 1 and classes_of(self.model) is None:
                check_count(data.classes, logits.shape[1], data.name)
            columns.append(
                (labels, logits, summary.mean, summary.predictive_entropy,
                 summary.mutual_information)
            )  # fmt: skip
            self.progress(what, done, len(batches))
        return _Found(*(torch.cat(column).cpu() for column in zip(*columns, strict=True)))

    @torch.no_grad()
    def predicted(self, inputs: Tensor) -> tuple[Tensor, Any]:
        inputs = inputs.to(self.device)
        kind = torch.device(self.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=self.settings.amp):
            with at_mean(self.model):
                logits = class_logits(Given((inputs,)).call(self.model), "report")
            return logits, self.predictor(inputs)

    def examples(self, data: ImageData, indices: Sequence[int]) -> tuple[Example, ...]:
        """Each image again, with the spread of its classes over the draws."""
        if not indices:
            return ()
        prepared: Any = data.dataset(self.config)
        _, summary = self.predicted(torch.stack([prepared[i][0] for i in indices]))
        count = summary.mean.shape[1]
        names = data.classes if len(data.classes) == count else [str(c) for c in range(count)]
        found = []
        for row, index in enumerate(indices):
            image, label = data.read(index)
            mean, std = summary.mean[row].cpu(), summary.std[row].cpu()
            top = mean.topk(min(4, count)).indices.tolist()
            if label not in top:
                top[-1] = label
            found.append(
                Example(
                    index, image, names[label], names[top[0]],
                    float(summary.predictive_entropy[row]),
                    float(summary.mutual_information[row]),
                    tuple((names[c], float(mean[c]), float(std[c])) for c in top),
                )
            )  # fmt: skip
        return tuple(found)


def _rows(found: _Found, num_samples: int, resamples: int, seed: int) -> tuple[Row, ...]:
    measured: list[tuple[str, int, Tensor, float | None]] = [
        ("at the means", 1, found.logits.double().softmax(-1).float(), None)
    ]
    if len(found.labels) > 1:
        folds = min(5, len(found.labels))
        scaled = cross_fitted_temperature(found.logits, found.labels, folds, seed)
        temperature = float(scaled.temperatures.mean())
        measured.append(("temperature scaled", 1, scaled.probs, temperature))
    measured.append(("MC average", num_samples, found.probs, None))
    rows: list[Row] = []
    for name, draws, probs, temperature_ in measured:
        metrics = ClassificationMetrics()
        metrics.update(probs, found.labels)
        kept = metrics.examples
        excess = bootstrap_interval(
            torch.mean, kept.confidence - kept.hit, resamples=resamples, seed=seed
        )
        rows.append(
            Row(
                name, draws, metrics.compute(), metrics.intervals(resamples, seed=seed),
                kept, _bins(kept, resamples, seed), excess, temperature_,
            )
        )  # fmt: skip
    control = next((row for row in rows if row.temperature is not None), None)
    if control is None:
        return tuple(rows)
    # the same images in both, so that their difference varies less than each
    paired = rows[-1].examples.nll - control.examples.nll
    ends = bootstrap_interval(torch.mean, paired, resamples=resamples, seed=seed)
    return (*rows[:-1], replace(rows[-1], difference=ends))


def _bins(examples: Examples, resamples: int, seed: int) -> tuple[Bin, ...]:
    found = reliability_bins(examples.confidence, examples.hit)
    bins = []
    for lower, upper, size, confidence, accuracy in zip(
        *(column.tolist() for column in found), strict=True
    ):
        inside = (examples.confidence > lower) & (examples.confidence <= upper)
        if size:
            hits = examples.hit[inside]
            ends = bootstrap_interval(torch.mean, hits, resamples=resamples, seed=seed)
            bins.append(Bin(lower, upper, int(size), confidence, accuracy, ends))
    return tuple(bins)


def _ood_scores(ood: ImageData, inside: _Found, outside: _Found) -> OodScores:
    def scores(found: _Found) -> dict[str, Tensor]:
        at_means = found.logits.double().softmax(-1)
        return {
            "entropy, MC average": found.entropy,
            "mutual information": found.information,
            "1 - largest probability, MC average": 1.0 - found.probs.max(1).values,
            "entropy, at the means": entropy(at_means),
            "1 - largest probability, at the means": 1.0 - at_means.max(1).values,
        }

    of_outside = scores(outside)
    detections = []
    for name, values in scores(inside).items():
        numbers = ood_metrics(values, of_outside[name])
        detections.append(
            Detection(name, numbers["auroc"], numbers["aupr_out"], numbers["fpr95"])
        )  # fmt: skip
    return OodScores(_short(ood.name), ood.split, outside.entropy, tuple(detections))


def _varied(order: Sequence[int], found: _Found) -> list[int]:
    """The first images in ``order``, one of each predicted class before a second of any."""
    first: dict[int, int] = {}
    for index in order:
        first.setdefault(int(found.probs[index].argmax()), index)
        if len(first) == SHOWN:
            break
    chosen = list(first.values())
    chosen += [i for i in order[: 2 * SHOWN] if i not in chosen]
    place = {index: rank for rank, index in enumerate(order)}
    return sorted(chosen[:SHOWN], key=place.__getitem__)


def _short(name: str) -> str:
    """A data set's name for headings: of a path its last part."""
    return name if name.startswith("timm:") else Path(name).name or name


def _facts(run: _Run, images: ImageData, ood: ImageData | None) -> list[tuple[str, str]]:
    """How the run was made, for those who want to repeat it."""
    settings, seed = run.settings, f"seed {run.settings.seed}"
    size = " x ".join(map(str, run.config.size))
    versions = [f"Python {platform.python_version()}"]
    for package in ("torch", "timm", "torchvision"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{package} {metadata.version(package)}")
    ood_rows = (
        []
        if ood is None
        else [("out of distribution", f"{ood.name} ({ood.split}), {len(ood):,} images")]
    )
    return [
        ("measured on", f"{images.name} ({images.split}), {len(images):,} images, as {size}"),
        *ood_rows,
        ("draws", f"K = {settings.num_samples}, {seed}, batches of {settings.batch_size}"),
        ("intervals", f"95%, percentile bootstrap, {settings.resamples:,} resamples, {seed}"),
        ("computed on", f"{run.device}{', autocast to bfloat16' if settings.amp else ''}"),
        ("with", ", ".join((f"bayesify {__version__}", *versions))),
    ]


def _spread(length: int, count: int) -> list[int]:
    """At most ``count`` indices, evenly spread over ``length``: files may be sorted by class."""
    count = min(length, count)
    return [i * length // count for i in range(count)]
