"""What is measured of the predictions of a likelihood, each kind by its own table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..inference import Given, Predictor
from ..inference.running import evaluating
from ..likelihoods import Bernoulli, Categorical, Gaussian, Heads, Likelihood, picked
from ..metrics import ClassificationMetrics, RegressionMetrics
from ..posterior import is_bayesian
from ..scope import at_mean
from .examples import Batch, moved

Prediction = Literal["deterministic", "at the means", "temperature scaled", "MC average"]


@dataclass(frozen=True)
class RegressionEvaluation:
    """Quality of one kind of prediction of real numbers, as
    :class:`bayesify.metrics.RegressionMetrics` measures it.

    Args:
        prediction: ``deterministic``, ``at the means`` or ``MC average``.
        num_samples: Draws behind it.
        targets: How many were measured.
        nll: Negative log density of a target, nats.
        rmse: Root of the mean squared error of the predicted mean.
        mae: Mean absolute error of it.
        crps: Mean continuous ranked probability score.
        std: Mean predicted standard deviation.
        calibration_error: Of Kuleshov et al.
        coverage: Share of the targets in the central intervals, by level.
        width: Mean width of these, by level.
        output: The name of the head, of a model with several.
    """

    prediction: str
    num_samples: int
    targets: int
    nll: float
    rmse: float
    mae: float
    crps: float
    std: float
    calibration_error: float
    coverage: dict[str, float]
    width: dict[str, float]
    output: str | int | None = None


@dataclass(frozen=True)
class ClassEvaluation:
    """Quality of one kind of prediction of classes, or of yes or no, for each target by itself.

    ``accuracy`` to ``entropy`` are the numbers of :func:`bayesify.metrics.classification_metrics`,
    with a pixel, a token or a label of several for what is called an image there.
    """

    prediction: str
    num_samples: int
    targets: int
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
    output: str | int | None = None


@dataclass(frozen=True)
class DensityEvaluation:
    """Of any other likelihood: negative log density of a target, nats; mean predicted standard
    deviation; root of the mean squared error of the predicted mean.
    """

    prediction: str
    num_samples: int
    targets: int
    nll: float
    std: float
    rmse: float
    output: str | int | None = None


class Measure(ABC):
    """Gathers what a row says."""

    def __init__(self, likelihood: Likelihood) -> None:
        self.likelihood = likelihood

    @abstractmethod
    def add(self, predictive: Any, target: Any) -> None: ...

    @abstractmethod
    def row(self, prediction: str, num_samples: int, output: str | int | None) -> Any: ...


class _Numbers(Measure):
    def __init__(self, likelihood: Likelihood) -> None:
        super().__init__(likelihood)
        self.metrics = RegressionMetrics()

    def add(self, predictive: Any, target: Any) -> None:
        self.metrics.update(predictive, target)

    def row(self, prediction: str, num_samples: int, output: str | int | None) -> Any:
        found = self.metrics.compute()
        return RegressionEvaluation(prediction, num_samples, **found, output=output)


class _Classes(Measure):
    def __init__(self, likelihood: Likelihood) -> None:
        super().__init__(likelihood)
        self.metrics = ClassificationMetrics()
        self.count = 0

    def add(self, predictive: Any, target: Any) -> None:
        probs: Tensor = predictive.mean
        plain: Tensor = target[0] if isinstance(target, tuple | list) else target
        mask = self.likelihood.mask(target)
        if isinstance(self.likelihood, Categorical):
            probs = probs.movedim(self.likelihood.dim, -1).flatten(0, -2)
        else:
            probs = torch.stack([1 - probs, probs], -1).flatten(0, -2)
        labels = plain.flatten()
        if mask is not None:
            known = mask.flatten()
            labels, probs = labels[known], probs[known.to(probs.device)]
        if len(labels):
            self.metrics.update(probs, labels.long())
            self.count += len(labels)

    def row(self, prediction: str, num_samples: int, output: str | int | None) -> Any:
        if self.count == 0:
            raise ArgumentError("There is no target to measure: all are masked.")
        found = self.metrics.compute()
        return ClassEvaluation(prediction, num_samples, self.count, **found, output=output)


class _Densities(Measure):
    def __init__(self, likelihood: Likelihood) -> None:
        super().__init__(likelihood)
        self.log_density = self.square = self.std = 0.0
        self.count = self.elements = 0

    def add(self, predictive: Any, target: Any) -> None:
        plain: Tensor = target[0] if isinstance(target, tuple | list) else target
        mask = self.likelihood.mask(target)
        self.log_density += float(predictive.log_prob(target).double().sum())
        self.count += int(self.likelihood.counts(target).sum())
        known = torch.ones_like(plain, dtype=torch.bool) if mask is None else mask
        known = known.view(predictive.mean.shape).to(predictive.mean.device)
        error = predictive.mean - plain.view(known.shape).to(known.device)
        self.square += float(error[known].double().square().sum())
        self.std += float(predictive.std[known].double().sum())
        self.elements += int(known.sum())

    def row(self, prediction: str, num_samples: int, output: str | int | None) -> Any:
        if self.count == 0:
            raise ArgumentError("There is no target to measure: all are masked.")
        nll, elements = -self.log_density / self.count, self.elements
        return DensityEvaluation(
            prediction, num_samples, self.count, nll, self.std / elements,
            (self.square / elements) ** 0.5, output,
        )  # fmt: skip


class Measured:
    """The rows of a model with a likelihood: at the means, and over the draws if there are any."""

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        device: torch.device,
        amp: bool,
        num_samples: int,
        seed: int,
    ) -> None:
        self.model, self.likelihood, self.device, self.amp = model, likelihood, device, amp
        likelihood.to(device)
        self.heads: dict[Any, Likelihood] = (
            dict(likelihood.items()) if isinstance(likelihood, Heads) else {None: likelihood}
        )
        self.bayesian = is_bayesian(model)
        self.kinds: list[tuple[Prediction, int]] = [
            ("at the means" if self.bayesian else "deterministic", 1)
        ]
        self.predictor = None
        if self.bayesian:
            self.kinds.append(("MC average", num_samples))
            self.predictor = Predictor(
                model, num_samples=num_samples, seed=seed, reduce="predictive"
            )
        self.measures = [{n: measure_for(h) for n, h in self.heads.items()} for _ in self.kinds]

    def add(self, batch: Batch) -> None:
        """Take one more batch."""
        args, kwargs = batch.arguments(self.device)
        model = self.model
        with (
            torch.no_grad(), evaluating(model),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp),
        ):  # fmt: skip
            with at_mean(model) if self.bayesian else nullcontext():
                output = Given(args, kwargs).call(model)
            self.likelihood.check(output, batch.targets)
            found: list[Any] = [self.likelihood.predictive([output])]
            if self.predictor is not None:
                found.append(self.predictor(*args, **kwargs))
        targets = moved(batch.targets, self.device)
        for predictive, row in zip(found, self.measures, strict=True):
            for name, measure in row.items():
                if name is None:
                    measure.add(predictive, targets)
                else:
                    measure.add(predictive[name], picked(targets, name, "target"))

    def rows(self) -> list[Any]:
        """A row for each head and kind of prediction."""
        return [
            row[name].row(kind, number, name)
            for name in self.heads
            for (kind, number), row in zip(self.kinds, self.measures, strict=True)
        ]


def measure_for(likelihood: Likelihood) -> Measure:
    """What measures a likelihood; without an entry density, mean and standard deviation."""
    table: dict[type, type[Measure]] = {
        Gaussian: _Numbers, Categorical: _Classes, Bernoulli: _Classes
    }  # fmt: skip
    return table.get(type(likelihood), _Densities)(likelihood)
