"""The supervised fit of a posterior, and how good its predictions are on labelled data."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from .data import ImageData
from .errors import ArgumentError, BayesifyError
from .inference import Predictor, recompute_batchnorm_
from .metrics import (
    BrierDecomposition,
    BrierParts,
    ClassificationMetrics,
    Interval,
    TopLabelParts,
    cross_fitted_temperature,
)
from .models import InputConfig, input_config
from .objective import (
    KLReduction,
    elbo_loss,
    kl_divergence,
    kl_scale,
    kl_schedule,
    noise_budget,
)
from .optim import check_optimizer, param_groups
from .posterior import is_bayesian, sites
from .pruning import keep_pruned_
from .scope import at_mean

Data = ImageData | Dataset[Any]
Loss = Callable[[Any, Tensor], Tensor]
Prediction = Literal["deterministic", "at the means", "temperature scaled", "MC average"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where a fit is after a step; ``loss`` without the KL, at that step's draw and batch."""

    step: int
    steps: int
    epoch: int
    loss: float
    kl_weight: float
    lr: float


@dataclass(frozen=True)
class FitResult:
    """How a fit went.

    Args:
        losses: Mean of the loss without the KL, one number an epoch.
        kl: KL divergence in nats after each epoch; empty for a deterministic model.
        steps: Optimizer steps taken.
        seconds: Wall time.
        num_data: Training examples N.
        kl_scale: The factor s before the KL, None for a deterministic model.
        noise_budget: ``beta * s * P / 2`` in units of the loss, None for a deterministic model.
    """

    losses: tuple[float, ...]
    kl: tuple[float, ...]
    steps: int
    seconds: float
    num_data: int
    kl_scale: float | None
    noise_budget: float | None


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


def fit(
    model: nn.Module,
    train: Data,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    loss: Loss = F.cross_entropy,
    logvar_lr: float | None = None,
    kl_weight: float = 1.0,
    kl_reduction: KLReduction = "num_data",
    kl_warmup: float = 0.0,
    warmup: float = 0.05,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    device: torch.device | str | None = None,
    amp: bool = False,
    model_config: InputConfig | None = None,
    workers: int = 0,
    on_start: Callable[[str], None] = logger.info,
    on_step: Callable[[Progress], None] | None = None,
) -> FitResult:
    r"""Fit ``model`` to labelled examples: its posterior, or its weights if it is deterministic.

    Every step draws the weights once and minimises :func:`bayesify.elbo_loss` of one batch by
    AdamW; the learning rates rise over ``warmup`` and then fall to 0 as a cosine. Afterwards the
    statistics of BatchNorm are gathered anew at the posterior means. The model is left in
    ``eval()`` on ``device``; torch's global random state is as before.

    Args:
        model: Converted or not: without a posterior there is no KL, all else is the same.
        train: An :class:`bayesify.data.ImageData` or any torch Dataset of (input, target) with a
            length N. The last batch of an epoch is left out where it would be smaller.
        epochs: Passes over the data, at least 1.
        batch_size: Examples in a batch, at least 1.
        lr: Highest learning rate of means and deterministic parameters, above 0.
        loss: Of a batch, from the model's output and the targets: a mean negative log likelihood
            per example for ``kl_reduction="num_data"``.
        logvar_lr: Highest learning rate of the log variances; ``10 * lr`` if None, since Adam
            moves a log variance by no more than about its rate in a step.
        kl_weight: The factor beta, at least 0; below 1 a tempered posterior.
        kl_reduction: The factor s, see :func:`bayesify.elbo_loss`.
        kl_warmup: Share of the run in which beta rises linearly from 0, from 0 to 1.
        warmup: Share of the run in which the learning rates rise linearly, from 0 to below 1.
        weight_decay: Of AdamW; never on log variances. The prior already pulls the means, so leave
            it at 0 with a KL.
        max_grad_norm: Gradients are scaled down to this norm, above 0 (``math.inf``: never).
        seed: Of the batches' order, the draws and dropout.
        device: Where the model is moved to; None leaves it where it is.
        amp: Autocast to bfloat16; log variances, draws and KL stay in float32.
        model_config: How images are prepared, for an ``ImageData``; None asks the model.
        workers: Processes that read the data.
        on_start: Gets one line on the KL's scale and the noise budget.
        on_step: Gets a :class:`Progress` after every step.

    Returns:
        A :class:`FitResult`.

    Raises:
        ArgumentError: An argument has a value that cannot work, or a label is out of range.
        BayesifyError: Loss or gradient is not finite; the model then holds the weights before
            that step.

    Reference:
        Blundell et al., 2015, arXiv:1505.05424, section 3; Loshchilov and Hutter, 2019,
        arXiv:1711.05101 (AdamW) and 2017, arXiv:1608.03983 (cosine).

    >>> import torch, bayesify
    >>> data = torch.utils.data.TensorDataset(torch.randn(20, 2), torch.randint(3, (20,)))
    >>> model = bayesify.to_bbb(torch.nn.Linear(2, 3))
    >>> bayesify.fit(model, data, epochs=2, batch_size=10, lr=1e-2).steps
    4
    """
    _check_arguments(model, train, epochs, lr, kl_weight, kl_warmup, warmup, max_grad_norm)
    started = time.perf_counter()
    target_device = _device_of(model) if device is None else torch.device(device)
    model.to(target_device)
    num_data = len(train)  # type: ignore[arg-type]
    batches = _batches(train, model, batch_size, model_config, workers, shuffle_seed=seed)
    steps = epochs * len(batches)

    bayesian = is_bayesian(model)
    beta = kl_schedule("linear", 0.0, kl_weight, max(1, round(kl_warmup * steps)))
    if kl_warmup == 0.0:
        beta = kl_schedule("constant", kl_weight, kl_weight, 1)
    scaled_by = num_data if kl_reduction == "num_data" else None
    scale = budget = None
    if bayesian:
        keep_pruned_(model)
        scale = kl_scale(model, num_data=scaled_by, kl_reduction=kl_reduction)
        budget = noise_budget(model, kl_weight, num_data=scaled_by, kl_reduction=kl_reduction)
        weights = sum(site.mean.numel() for site in sites(model))
        on_start(
            f"KL of {weights:,} weights: s = {scale:.3g} ({kl_reduction}, N = {num_data:,}), "
            f"beta = {kl_weight:g}, noise budget beta*s*P/2 = {budget:.3g} nats"
        )
        groups = param_groups(
            model,
            lr=lr,
            logvar_lr=10 * lr if logvar_lr is None else logvar_lr,
            weight_decay=weight_decay,
        )
        optimizer = torch.optim.AdamW(groups)
        check_optimizer(model, optimizer)
    else:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_cosine(warmup, steps))

    losses, kls = [], []
    step = 0
    with _seeded(seed, target_device):
        for epoch in range(epochs):
            model.train()
            epoch_loss = 0.0
            for inputs, targets in batches:
                weight = beta(step)
                with torch.autocast(target_device.type, torch.bfloat16, enabled=amp):
                    outputs = model(inputs.to(target_device))
                    if loss is F.cross_entropy:
                        _check_labels(outputs, targets)
                    data_loss = loss(outputs, targets.to(target_device))
                objective = data_loss
                if bayesian:
                    objective = elbo_loss(
                        data_loss,
                        model,
                        num_data=scaled_by,
                        kl_weight=weight,
                        kl_reduction=kl_reduction,
                    )
                optimizer.zero_grad()
                objective.backward()
                norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
                values = torch.stack([data_loss.detach(), objective.detach(), norm])
                value = _finite(values, step, steps, lr)
                current_lr = optimizer.param_groups[0]["lr"]
                optimizer.step()
                rate.step()
                step += 1
                epoch_loss += value / len(batches)
                if on_step is not None:
                    on_step(Progress(step, steps, epoch, value, weight, current_lr))
            losses.append(epoch_loss)
            if bayesian:
                with torch.no_grad():
                    kls.append(float(kl_divergence(model)))
        if bayesian:
            recompute_batchnorm_(model, batches, target_device)
    model.eval()
    seconds = time.perf_counter() - started
    return FitResult(tuple(losses), tuple(kls), step, seconds, num_data, scale, budget)


def evaluate(
    model: nn.Module,
    data: Data,
    *,
    num_samples: int = 20,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    amp: bool = False,
    model_config: InputConfig | None = None,
    workers: int = 0,
    control: bool = False,
    resamples: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> list[Evaluation]:
    """Measure the predicted class probabilities of ``model``, in ``eval()``, batch by batch.

    Args:
        model: A classifier, converted or not.
        data: As in :func:`fit`.
        num_samples: Draws K of the MC average, the same K weights for every batch.
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
        on_step: Gets the number of batches done and of all, after every batch.

    Returns:
        One row, ``deterministic``, for a model without posterior; else two: ``at the means``, and
        ``MC average``, the mean over the draws of the class probabilities. The control, if asked
        for, comes after the first.

    Raises:
        ArgumentError: An argument has a value that cannot work, the output is no table of logits,
            or a label is out of range.

    >>> import torch, bayesify
    >>> data = torch.utils.data.TensorDataset(torch.randn(20, 2), torch.randint(3, (20,)))
    >>> rows = bayesify.evaluate(bayesify.to_bbb(torch.nn.Linear(2, 3)), data, num_samples=5)
    >>> [(row.prediction, row.num_samples) for row in rows]
    [('at the means', 1), ('MC average', 5)]
    """
    _check_data(data)
    if type(resamples) is not int or resamples < 0 or resamples == 1:
        raise ArgumentError(f"resamples must be 0 or a whole number above 1, got {resamples!r}.")
    if control and len(data) < 2:  # type: ignore[arg-type]
        raise ArgumentError("control needs at least 2 images: a temperature is fitted on others.")
    target_device = _device_of(model) if device is None else torch.device(device)
    model.to(target_device)
    batches = _batches(data, model, batch_size, model_config, workers)
    bayesian = is_bayesian(model)
    if bayesian:
        predictor = Predictor(model, num_samples=num_samples, seed=seed, reduce="probabilities")
    at_means, averaged = _Measured(), _Measured()
    kept: list[tuple[Tensor, Tensor]] = []
    information = 0.0
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(target_device.type, torch.bfloat16, enabled=amp):
            for done, (inputs, targets) in enumerate(batches, 1):
                inputs = inputs.to(target_device)
                with at_mean(model) if bayesian else contextlib.nullcontext():
                    logits = _logits(model(inputs))
                at_means.add(logits.double().softmax(-1).float(), targets)
                if control:
                    kept.append((logits, targets))
                if bayesian:
                    summary = predictor(inputs)
                    averaged.add(summary.mean, targets)
                    information += float(summary.mutual_information.sum())
                if on_step is not None:
                    on_step(done, len(batches))
    finally:
        model.train(was_training)
    rows = [at_means.row("at the means" if bayesian else "deterministic", 1, resamples, seed)]
    if control:
        logits, targets = (torch.cat(column) for column in zip(*kept, strict=True))
        scaled = cross_fitted_temperature(logits, targets, min(5, len(targets)), seed)
        measured = _Measured()
        for probs, labels in zip(
            scaled.probs.split(batch_size), targets.split(batch_size), strict=True
        ):
            measured.add(probs, labels)
        row = measured.row("temperature scaled", 1, resamples, seed)
        rows.append(replace(row, temperature=float(scaled.temperatures.mean())))
    if bayesian:
        row = averaged.row("MC average", num_samples, resamples, seed)
        rows.append(replace(row, mutual_information=information / len(data)))  # type: ignore[arg-type]
    return rows


class _Measured:
    """Gathers what a row of the evaluation says."""

    def __init__(self) -> None:
        self.metrics = ClassificationMetrics()
        self.parts: BrierDecomposition | None = BrierDecomposition()

    def add(self, probs: Tensor, targets: Tensor) -> None:
        self.metrics.update(probs, targets)
        if probs.shape[1] > 4096:  # two tables of 128 MiB and growing as the square
            self.parts = None
        if self.parts is not None:
            self.parts.update(probs, targets)

    def row(
        self, prediction: Prediction, num_samples: int, resamples: int, seed: int
    ) -> Evaluation:
        return Evaluation(
            prediction,
            num_samples,
            **self.metrics.compute(),
            parts=None if self.parts is None else self.parts.compute(),
            top_label=self.metrics.top_label(),
            intervals=self.metrics.intervals(resamples, seed=seed) if resamples else None,
        )


def _batches(
    data: Data,
    model: nn.Module,
    batch_size: int,
    model_config: InputConfig | None,
    workers: int,
    shuffle_seed: int | None = None,
) -> DataLoader[Any]:
    """Batches of (inputs, targets); with a seed shuffled anew each pass and all of one size."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ArgumentError(f"batch_size must be a whole number above 0, got {batch_size!r}.")
    size = len(data)  # type: ignore[arg-type]
    if isinstance(data, ImageData):
        dataset: Any = data.dataset(model_config or input_config(model))
    else:
        dataset = data
    shuffle = shuffle_seed is not None
    return DataLoader(
        dataset,
        batch_size,
        shuffle=shuffle,
        # a smaller batch would weigh its examples more; BatchNorm refuses one example alone
        drop_last=shuffle and size > batch_size,
        generator=torch.Generator().manual_seed(shuffle_seed or 0),
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def _warmup_cosine(warmup: float, steps: int) -> Callable[[int], float]:
    rising = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return factor


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's random numbers in the block, and give back the old state after it."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _device_of(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    if first is None:
        raise ArgumentError(f"{type(model).__name__} has no parameter: there is nothing to fit.")
    return first.device


def _finite(values: Tensor, step: int, steps: int, lr: float) -> float:
    """The loss, once loss, objective and gradient norm have been found finite."""
    loss, objective, norm = values.tolist()
    if math.isfinite(loss) and math.isfinite(objective) and math.isfinite(norm):
        return float(loss)
    raise BayesifyError(
        f"fit stopped at step {step + 1} of {steps}: loss {loss:.4g}, with the KL {objective:.4g}, "
        f"gradient norm {norm:.4g}. The model holds the weights before that step. Lower lr (now "
        f"{lr:g}) or logvar_lr, start from a smaller sigma, or look for NaN in the data."
    )


def _check_labels(outputs: Any, targets: Tensor) -> None:
    """cross_entropy's own complaint names neither the label nor the model's classes."""
    if not isinstance(outputs, Tensor) or targets.is_floating_point() or targets.numel() == 0:
        return
    classes = outputs.shape[1] if outputs.dim() > 1 else 0
    low, high = (int(v) for v in targets.aminmax())
    if low < 0 or high >= classes:
        raise ArgumentError(
            f"Label {low if low < 0 else high} is out of range: the model gives {classes} "
            f"classes, so labels go from 0 to {classes - 1}. Build it with num_classes=N."
        )


def _logits(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.dim() != 2 or found.shape[1] < 2:
        what = tuple(found.shape) if isinstance(found, Tensor) else type(output).__name__
        raise ArgumentError(
            f"evaluate needs logits of the shape (batch, classes) with at least 2 classes, the "
            f"model gave {what}."
        )
    return found


def _check_data(data: Any) -> None:
    length = getattr(data, "__len__", None)
    if length is None or not isinstance(data, ImageData | Dataset):
        raise ArgumentError(
            "The data must be an ImageData (bayesify.load_dataset) or a torch Dataset with a "
            f"length, got {type(data).__name__}."
        )
    if length() == 0:
        raise ArgumentError("The data set is empty: there is nothing to fit or to measure.")


def _check_arguments(
    model: nn.Module,
    train: Any,
    epochs: Any,
    lr: float,
    kl_weight: float,
    kl_warmup: float,
    warmup: float,
    max_grad_norm: float,
) -> None:
    _check_data(train)
    if not any(p.requires_grad for p in model.parameters()):
        raise ArgumentError(f"{type(model).__name__} has no trainable parameter: nothing to fit.")
    expected = [
        ("epochs", epochs, "a whole number above 0", type(epochs) is int and epochs > 0),
        ("lr", lr, "above 0 and finite", 0.0 < lr < math.inf),
        ("kl_weight", kl_weight, "at least 0 and finite", 0.0 <= kl_weight < math.inf),
        ("kl_warmup", kl_warmup, "from 0 to 1", 0.0 <= kl_warmup <= 1.0),
        ("warmup", warmup, "from 0 to below 1", 0.0 <= warmup < 1.0),
        ("max_grad_norm", max_grad_norm, "above 0", max_grad_norm > 0.0),
    ]
    for name, value, what, right in expected:
        if not right:
            raise ArgumentError(f"fit: {name} must be {what}, got {value!r}.")
