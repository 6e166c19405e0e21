"""Settings of what measures predictions: ``evaluate``, the report, ``bayesify predict``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from .fields import Count, Seed, Shown, SkipUnreadable, Whole, Within, checked, refuse


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How predictions are made.

    Args:
        num_samples: Draws K of the weights.

            They are the same K for every batch; the memory needed does not depend on it.
        batch_size: Images in a batch.

            No result depends on it beyond rounding.
        workers: Processes that read images.
        seed: Seed of all that is random.
        amp: Compute in bfloat16 where that is safe.
    """

    function: ClassVar[str] = "evaluate"

    num_samples: Annotated[Count, Shown(letter="-k", metavar="K")] = 20
    batch_size: Annotated[Count, Shown(letter="-b")] = 256
    workers: Whole = 0
    seed: Seed = 0
    amp: bool = False

    def __post_init__(self) -> None:
        refuse(self.function, checked(self))


@dataclass(frozen=True, kw_only=True)
class Measuring(Drawing):
    """How predictions on labelled images are made."""

    skip_unreadable: SkipUnreadable = False


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Measuring):
    """The settings of :func:`bayesify.evaluate`.

    Args:
        resamples: Bootstrap 95 % intervals from so many resamples, 2 or more; 0: none.
    """

    resamples: Annotated[Whole, Shown(metavar="N")] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resamples == 1:
            refuse(self.function, ["resamples must be 0 or a whole number above 1, got 1."])


@dataclass(frozen=True, kw_only=True)
class ReportSettings(Measuring):
    """The settings of :func:`bayesify.report.gather`.

    Args:
        resamples: Resamples of the 95 % bootstrap intervals.
        pruning: Measure a pruning curve too, on 1,000 images and 5 draws at most.
    """

    function: ClassVar[str] = "report"

    resamples: Annotated[int, Within(least=2), Shown(metavar="N")] = 1000
    pruning: bool = True


@dataclass(frozen=True, kw_only=True)
class PredictSettings(Drawing):
    """The settings of ``bayesify predict``, as :class:`Drawing` has them."""

    function: ClassVar[str] = "predict"

    batch_size: Annotated[Count, Shown(letter="-b")] = 64
