"""How good the predictions of a model are, in distribution and outside of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..classes import check_count, classes_of
from ..data import ImageData
from ..errors import ArgumentError
from ..inference import Given, Predictor, class_logits
from ..likelihoods import Categorical, Likelihood, likelihood_of, temperature_of
from ..metrics import (
    BrierDecomposition,
    BrierParts,
    ClassificationMetrics,
    Interval,
    TopLabelParts,
    cross_fitted_temperature,
    entropy,
    ood_metrics,
)
from ..models import InputConfig
from ..posterior import is_bayesian
from ..scope import at_mean
from ..settings.evaluation import EvaluateSettings
from ..settings.fields import documented, taken
from .autocast import check_amp
from .batches import Data, batches_in_order, check_data, config_for, device_of
from .examples import Batch, Inputs, inputs_of, read_batch
from .matching import by_name
from .measures import Measured, Prediction
from .readable import readable

MAX_PROBABILITY = "max probability"
ENTROPY = "entropy"
MUTUAL_INFORMATION = "mutual information"


@dataclass(frozen=True)
class Evaluation:
    """Quality of one kind of prediction.

    ``accuracy`` to ``entropy`` are the numbers of :func:`bayesify.metrics.classification_metrics`.

    Args:
        parts: Of the Brier score, by predicted class; None above 4,096 classes.
        top_label: Parts of the Brier score of the predicted class alone, by confidence.
        mutual_information: Mean over the images, nats; None where nothing was drawn.
        temperature: Mean of the fitted temperatures; None where nothing was scaled.
        intervals: Bootstrap intervals (95 %) of accuracy, nll, ece and brier, where asked for.
        ood: :func:`bayesify.metrics.ood_metrics` by score (``max probability``, ``entropy``, and
            ``mutual information`` where something was drawn), where asked for.
    """

    prediction: Prediction
    num_samples: int
    accuracy: float
    nll: float
    ece: float
    brier: float
    top5: float
    mce: float
    adaptive_ece: float
    classwise_ece: float
    aurc: float
    entropy: float
    parts: BrierParts | None
    top_label: TopLabelParts
    mutual_information: float | None = None
    temperature: float | None = None
    intervals: dict[str, Interval] | None = None
    ood: dict[str, dict[str, float]] | None = None


@documented(EvaluateSettings)
def evaluate(  # noqa: D417 - the others are fields of EvaluateSettings
    model: nn.Module,
    data: Data | DataLoader[Any],
    *,
    inputs: Inputs | None = None,
    ood: Data | None = None,
    num_samples: int = EvaluateSettings.num_samples,
    seed: int = EvaluateSettings.seed,
    batch_size: int = EvaluateSettings.batch_size,
    device: torch.device | str | None = None,
    amp: bool = EvaluateSettings.amp,
    model_config: InputConfig | None = None,
    workers: int = EvaluateSettings.workers,
    control: bool = False,
    resamples: int = EvaluateSettings.resamples,
    skip_unreadable: bool = EvaluateSettings.skip_unreadable,
    on_step: Callable[[int, int], None] | None = None,
) -> list[Any]:
    """Measure the predictions of ``model``, in ``eval()``, batch by batch.

    What is measured depends on the likelihood of the model (:func:`bayesify.set_likelihood_`): of
    one class for each example, which is also taken where there is no likelihood, an
    :class:`Evaluation`; of :class:`Gaussian` a :class:`RegressionEvaluation`; of yes or no and of
    classes for each pixel or token a :class:`ClassEvaluation`; of any other a
    :class:`DensityEvaluation`. Several heads have rows each.

    Args:
        model: A model, converted or not.
        data: As in :func:`fit`, or a DataLoader. The classes of an ``ImageData`` are found among
            the model's by name where the model knows them, from a fit or a file; a part of them in
            any order will do.
        inputs: As in :func:`fit`.
        ood: Images of none of the classes, as ``data``; their labels are not used. Each row then
            says how well its uncertainty tells them from those of ``data``.
        device: Where the model is moved to; None leaves it where it is.
        model_config: As in :func:`fit`.
        control: Also give a row ``temperature scaled``: the logits at the means divided by a
            temperature that was fitted on other images of ``data``, five-fold. A posterior is not
            worth its price where it does no better. All logits are kept until the end.
        on_step: Gets the number of batches done and of all, after every batch.

    Returns:
        One row, ``deterministic``, for a model without posterior; else two: ``at the means``, and
        ``MC average``, the mean over the draws of the class probabilities. The control, if asked
        for, comes after the first.

    Raises:
        ArgumentError: An argument has a value that cannot work, the output is no table of logits,
            or labels are missing, soft or out of range.
        DataError: ``data`` has classes that are not the model's, or a number of them other than
            that of a model without names; or an image cannot be read.

    >>> import torch, bayesify
    >>> data = torch.utils.data.TensorDataset(torch.randn(20, 2), torch.randint(3, (20,)))
    >>> rows = bayesify.evaluate(bayesify.to_bbb(torch.nn.Linear(2, 3)), data, num_samples=5)
    >>> [(row.prediction, row.num_samples) for row in rows]
    [('at the means', 1), ('MC average', 5)]
    """
    settings = taken(EvaluateSettings, locals())
    looking: dict[str, Any] = {"workers": settings.workers, "skip": settings.skip_unreadable}
    if not isinstance(data, DataLoader):
        check_data(data)
        whole_data, _ = readable(data, **looking)
        data = by_name(whole_data, model)
    if ood is not None:
        check_data(ood)
        ood, _ = readable(ood, **looking)
    if control and check_data(data.dataset if isinstance(data, DataLoader) else data) < 2:
        raise ArgumentError("control needs at least 2 images: a temperature is fitted on others.")
    target = device_of(model) if device is None else torch.device(device)
    check_amp(target, settings.amp)
    model.to(target)

    batches_of = partial(_batches, model=model, model_config=model_config, settings=settings)
    inside = batches_of(data)
    likelihood = likelihood_of(model)
    if likelihood is not None and not _one_class_each(likelihood, inside, inputs):
        if ood is not None or control or resamples:
            raise ArgumentError(
                "evaluate: ood, control and resamples are for one class an example; the model has "
                f"the likelihood {likelihood!r}."
            )
        return _by_likelihood(model, likelihood, target, settings, inside, inputs, on_step)
    outside = None if ood is None else batches_of(ood)
    run = _Runner(model, target, settings)
    return _classified(run, data, inside, outside, inputs, control, settings, on_step)


def _classified(
    run: _Runner,
    data: Any,
    inside: DataLoader[Any],
    outside: DataLoader[Any] | None,
    inputs: Inputs | None,
    control: bool,
    settings: EvaluateSettings,
    on_step: Callable[[int, int], None] | None,
) -> list[Any]:
    """The rows of one class for each example."""
    model, bayesian = run.model, run.predictor is not None
    total = len(inside) + (0 if outside is None else len(outside))
    at_means, averaged = _Row(outside is not None), _Row(outside is not None)
    kept: list[tuple[Tensor, Tensor]] = []
    for done, read in enumerate((read_batch(b, inputs) for b in inside), 1):
        targets = read.targets
        logits, summary = run(read)
        if done == 1 and isinstance(data, ImageData) and classes_of(model) is None:
            check_count(data.classes, logits.shape[1], data.name)
        at_means.add(logits.double().softmax(-1), targets)
        if control:
            kept.append((logits, targets))
        if summary is not None:
            averaged.add(summary.mean, targets, summary.mutual_information)
        if on_step is not None:
            on_step(done, total)
    ood_logits: list[Tensor] = []
    for done, batch in enumerate(outside or (), len(inside) + 1):
        logits, summary = run(inputs_of(batch, inputs))
        at_means.add_outside(logits.double().softmax(-1))
        if control:
            ood_logits.append(logits)
        if summary is not None:
            averaged.add_outside(summary.mean, summary.mutual_information)
        if on_step is not None:
            on_step(done, total)
    rows = [at_means.row("at the means" if bayesian else "deterministic", 1, settings)]
    if control:
        rows.append(_scaled(kept, ood_logits, settings))
    if bayesian:
        rows.append(averaged.row("MC average", settings.num_samples, settings))
    return rows


def _batches(
    data: Data | DataLoader[Any], model: nn.Module, model_config: InputConfig | None,
    settings: EvaluateSettings,
) -> DataLoader[Any]:  # fmt: skip
    if isinstance(data, DataLoader):
        return data
    return batches_in_order(
        data, batch_size=settings.batch_size, model_config=config_for(data, model, model_config),
        workers=settings.workers,
    )  # fmt: skip


def _by_likelihood(
    model: nn.Module, likelihood: Any, device: torch.device, settings: EvaluateSettings,
    batches: DataLoader[Any], inputs: Inputs | None, on_step: Callable[[int, int], None] | None,
) -> list[Any]:  # fmt: skip
    """What a likelihood measures of all batches."""
    measured = Measured(
        model, likelihood, device, settings.amp, settings.num_samples, settings.seed
    )
    for done, batch in enumerate(batches, 1):
        measured.add(read_batch(batch, inputs))
        if on_step is not None:
            on_step(done, len(batches))
    return measured.rows()


class _Runner:
    """Logits at the means of a batch, and the summary of the draws if there are any."""

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        settings: EvaluateSettings,
    ) -> None:
        self.model, self.device, self.amp = model, device, settings.amp
        self.predictor: Predictor | None = None
        if is_bayesian(model):
            self.predictor = Predictor(
                model, num_samples=settings.num_samples, seed=settings.seed, reduce="probabilities"
            )

    def __call__(self, batch: Batch) -> tuple[Tensor, Any]:
        model = self.model
        args, kwargs = batch.arguments(self.device)
        was_training = model.training
        model.eval()
        try:
            with (
                torch.no_grad(),
                torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp),
            ):
                with at_mean(model) if self.predictor else contextlib.nullcontext():
                    logits = class_logits(Given(args, kwargs).call(model), "evaluate")
                summary = self.predictor(*args, **kwargs) if self.predictor else None
        finally:
            model.train(was_training)
        temperature = temperature_of(model)
        return logits if temperature == 1.0 else logits / temperature, summary


class _Row:
    """Gathers what a row of the evaluation says."""

    def __init__(self, ood: bool) -> None:
        self.metrics = ClassificationMetrics()
        self.parts: BrierDecomposition | None = BrierDecomposition()
        self.ood = ood
        self.inside: dict[str, list[Tensor]] = {}
        self.outside: dict[str, list[Tensor]] = {}
        self.information = 0.0
        self.drawn = 0

    def add(self, probs: Tensor, targets: Tensor, information: Tensor | None = None) -> None:
        self.metrics.update(probs.float(), targets)
        if probs.shape[1] > 4096:  # two tables of 128 MiB and growing as the square
            self.parts = None
        if self.parts is not None:
            self.parts.update(probs.float(), targets)
        if information is not None:
            self.information += float(information.sum())
            self.drawn += len(information)
        if self.ood:
            _gather(self.inside, probs, information)

    def add_outside(self, probs: Tensor, information: Tensor | None = None) -> None:
        _gather(self.outside, probs, information)

    def row(
        self, prediction: Prediction, num_samples: int, settings: EvaluateSettings
    ) -> Evaluation:
        ood = {
            score: ood_metrics(torch.cat(found), torch.cat(self.outside[score]))
            for score, found in self.inside.items()
        }
        return Evaluation(
            prediction,
            num_samples,
            **self.metrics.compute(),
            parts=None if self.parts is None else self.parts.compute(),
            top_label=self.metrics.top_label(),
            mutual_information=self.information / self.drawn if self.drawn else None,
            intervals=(
                self.metrics.intervals(settings.resamples, seed=settings.seed)
                if settings.resamples
                else None
            ),
            ood=ood if self.ood else None,
        )


def _gather(into: dict[str, list[Tensor]], probs: Tensor, information: Tensor | None) -> None:
    """The scores of a batch: higher for an OOD image."""
    # the sum of all others keeps the order of images of which 1 - max would be rounded to 0
    rest = probs.scatter(1, probs.argmax(1, keepdim=True), 0.0).double().sum(1)
    into.setdefault(MAX_PROBABILITY, []).append(rest.cpu())
    into.setdefault(ENTROPY, []).append(entropy(probs).cpu())
    if information is not None:
        into.setdefault(MUTUAL_INFORMATION, []).append(information.double().cpu())


def _scaled(
    kept: list[tuple[Tensor, Tensor]],
    ood_logits: list[Tensor],
    settings: EvaluateSettings,
) -> Evaluation:
    """The control: each image with a temperature fitted on others, OOD images with their mean."""
    logits, targets = (torch.cat(column) for column in zip(*kept, strict=True))
    scaled = cross_fitted_temperature(logits, targets, min(5, len(targets)), settings.seed)
    temperature = float(scaled.temperatures.mean())
    measured = _Row(bool(ood_logits))
    for probs, labels in zip(
        scaled.probs.split(settings.batch_size), targets.split(settings.batch_size), strict=True
    ):
        measured.add(probs, labels)
    for outside in ood_logits:
        measured.add_outside((outside.double() / temperature).softmax(-1))
    row = measured.row("temperature scaled", 1, settings)
    return replace(row, temperature=temperature)


def _one_class_each(
    likelihood: Likelihood, batches: DataLoader[Any], inputs: Inputs | None
) -> bool:
    """Whether there is one class for each example."""
    if type(likelihood) is not Categorical:
        return False
    targets = read_batch(next(iter(batches)), inputs).targets
    return isinstance(targets, Tensor) and targets.dim() == 1
