"""What a report says, as numbers: :mod:`.data` measures, :mod:`.plots` and :mod:`.page` show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..metrics import Examples, Interval
from .weights import Layer


class Bin(NamedTuple):
    """A bin of the reliability diagram that holds images; ``interval`` is of its accuracy."""

    lower: float
    upper: float
    size: int
    confidence: float
    accuracy: float
    interval: Interval


@dataclass(frozen=True)
class Row:
    """One kind of prediction: its numbers, their bootstrap intervals, its bins, each example.

    ``excess`` is the interval of its mean confidence less its accuracy, ``difference`` that of its
    mean NLL less that of the temperature-scaled means.
    """

    prediction: str
    draws: int
    values: dict[str, float]
    intervals: dict[str, Interval]
    examples: Examples
    bins: tuple[Bin, ...]
    excess: Interval
    temperature: float | None = None
    difference: Interval | None = None


@dataclass(frozen=True)
class Detection:
    """How well a score tells OOD images from the others."""

    score: str
    auroc: float
    aupr: float
    fpr95: float


@dataclass(frozen=True)
class OodScores:
    """Images that the model was not made for; ``entropy`` of each, nats."""

    name: str
    split: str
    entropy: Tensor
    scores: tuple[Detection, ...]


@dataclass(frozen=True)
class Example:
    """One image as it is stored, and its likeliest classes: (name, mean, std over the draws)."""

    index: int
    image: Tensor
    label: str
    predicted: str
    entropy: float
    information: float
    bars: tuple[tuple[str, float, float], ...]

    @property
    def right(self) -> bool:
        """Whether the likeliest class is the true one."""
        return self.label == self.predicted


@dataclass(frozen=True)
class Report:
    """All that the page shows. ``curve`` has the rows of :func:`pruning_curve`."""

    title: str
    data: str
    split: str
    images: int
    classes: int
    num_samples: int
    resamples: int
    rows: tuple[Row, ...]
    information: Tensor
    ood: OodScores | None
    layers: tuple[Layer, ...]
    left_out: tuple[tuple[str, int, int], ...]
    surest: tuple[Example, ...]
    least_sure: tuple[Example, ...]
    sure_and_wrong: tuple[Example, ...]
    curve: tuple[dict[str, Any], ...]
    curve_images: int
    curve_draws: int
    facts: tuple[tuple[str, str], ...]

    def row(self, prediction: str) -> Row | None:
        """The row of one kind of prediction, None if it was not measured."""
        return next((row for row in self.rows if row.prediction == prediction), None)
