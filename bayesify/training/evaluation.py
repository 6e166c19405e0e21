"""How good the predictions of a model are, in distribution and outside of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from ..numeric import count, seed_number, whole
from ..posterior import is_bayesian
from ..scope import at_mean
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


def evaluate(
    model: nn.Module,
    data: Data | DataLoader[Any],
    *,
    inputs: Inputs | None = None,
    ood: Data | None = None,
    num_samples: int = 20,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    amp: bool = False,
    model_config: InputConfig | None = None,
    workers: int = 0,
    control: bool = False,
    resamples: int = 0,
    skip_unreadable: bool = False,
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
        num_samples: Draws K of the MC average, the same K weights for every batch. The memory
            needed does not depend on it.
        seed: Of the draws.
        batch_size: Images in a batch, at least 1; no result depends on it beyond rounding.
        device: Where the model is moved to; None leaves it where it is.
        amp: Autocast to bfloat16.
        model_config: As in :func:`fit`.
        workers: Processes that read the data.
        control: Also give a row ``temperature scaled``: the logits at the means divided by a
            temperature that was fitted on other images of ``data``, five-fold. A posterior is not
            worth its price where it does no better. All logits are kept until the end.
        resamples: Of the bootstrap intervals, 0 or at least 2; 0 gives none.
        skip_unreadable: Leave out the images of an ``ImageData`` that cannot be read, with a
            warning. All are looked at before the first is measured.
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
    if not isinstance(data, DataLoader):
        check_data(data)
    batch_size, seed = count("batch_size", batch_size), seed_number(seed)
    num_samples = count("num_samples", num_samples)
    resamples = whole("resamples", resamples, "0 or a whole number above 1", least=0)
    if resamples == 1:
        raise ArgumentError("resamples must be 0 or a whole number above 1, got 1.")
    workers = count("workers", workers, least=0)
    if not isinstance(data, DataLoader):
        whole_data, _ = readable(data, workers=workers, skip=skip_unreadable)
        data = by_name(whole_data, model)
    if ood is not None:
        check_data(ood)
        ood, _ = readable(ood, workers=workers, skip=skip_unreadable)
    examples: Any = data.dataset if isinstance(data, DataLoader) else data
    if control and check_data(examples) < 2:
        raise ArgumentError("control needs at least 2 images: a temperature is fitted on others.")
    target = device_of(model) if device is None else torch.device(device)
    check_amp(target, amp)
    model.to(target)

    def batches_of(wanted: Data | DataLoader[Any]) -> DataLoader[Any]:
        if isinstance(wanted, DataLoader):
            return wanted
        config = config_for(wanted, model, model_config)
        return batches_in_order(wanted, batch_size=batch_size, model_config=config, workers=workers)

    inside = batches_of(data)
    likelihood = likelihood_of(model)
    if likelihood is not None and not _one_class_each(likelihood, inside, inputs):
        if ood is not None or control or resamples:
            raise ArgumentError(
                "evaluate: ood, control and resamples are for one class an example; the model has "
                f"the likelihood {likelihood!r}."
            )
        measured = Measured(model, likelihood, target, amp, num_samples, seed)
        for done, batch in enumerate(inside, 1):
            measured.add(read_batch(batch, inputs))
            if on_step is not None:
                on_step(done, len(inside))
        return measured.rows()
    outside = None if ood is None else batches_of(ood)
    run = _Runner(model, target, amp, num_samples, seed)
    return _classified(run, data, inside, outside, inputs, control, batch_size, resamples, on_step)


def _classified(
    run: _Runner,
    data: Any,
    inside: DataLoader[Any],
    outside: DataLoader[Any] | None,
    inputs: Inputs | None,
    control: bool,
    batch_size: int,
    resamples: int,
    on_step: Callable[[int, int], None] | None,
) -> list[Any]:
    """The rows of one class for each example."""
    model, seed, ood = run.model, run.seed, outside is not None
    total = len(inside) + (0 if outside is None else len(outside))
    at_means, averaged = _Row(ood), _Row(ood)
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
    if outside is not None:
        for done, batch in enumerate(outside, len(inside) + 1):
            logits, summary = run(inputs_of(batch, inputs))
            at_means.add_outside(logits.double().softmax(-1))
            if control:
                ood_logits.append(logits)
            if summary is not None:
                averaged.add_outside(summary.mean, summary.mutual_information)
            if on_step is not None:
                on_step(done, total)
    bayesian = run.predictor is not None
    rows = [at_means.row("at the means" if bayesian else "deterministic", 1, resamples, seed)]
    if control:
        rows.append(_scaled(kept, ood_logits, batch_size, resamples, seed))
    if bayesian:
        rows.append(averaged.row("MC average", run.num_samples, resamples, seed))
    return rows


class _Runner:
    """Logits at the means of a batch, and the summary of the draws if there are any."""

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        amp: bool,
        num_samples: int,
        seed: int,
    ) -> None:
        self.model, self.device, self.amp = model, device, amp
        self.num_samples, self.seed = num_samples, seed
        self.predictor: Predictor | None = None
        if is_bayesian(model):
            self.predictor = Predictor(
                model, num_samples=num_samples, seed=seed, reduce="probabilities"
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
        self, prediction: Prediction, num_samples: int, resamples: int, seed: int
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
            intervals=self.metrics.intervals(resamples, seed=seed) if resamples else None,
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
    batch_size: int,
    resamples: int,
    seed: int,
) -> Evaluation:
    """The control: each image with a temperature fitted on others, OOD images with their mean."""
    logits, targets = (torch.cat(column) for column in zip(*kept, strict=True))
    scaled = cross_fitted_temperature(logits, targets, min(5, len(targets)), seed)
    temperature = float(scaled.temperatures.mean())
    measured = _Row(bool(ood_logits))
    for probs, labels in zip(
        scaled.probs.split(batch_size), targets.split(batch_size), strict=True
    ):
        measured.add(probs, labels)
    for outside in ood_logits:
        measured.add_outside((outside.double() / temperature).softmax(-1))
    row = measured.row("temperature scaled", 1, resamples, seed)
    return replace(row, temperature=temperature)


def _one_class_each(
    likelihood: Likelihood, batches: DataLoader[Any], inputs: Inputs | None
) -> bool:
    """Whether there is one class for each example."""
    if type(likelihood) is not Categorical:
        return False
    targets = read_batch(next(iter(batches)), inputs).targets
    return isinstance(targets, Tensor) and targets.dim() == 1
