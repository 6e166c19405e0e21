"""Bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..numeric import real, seed_number
from .checks import whole_number


class Interval(NamedTuple):
    """Ends of an interval, ``low <= high``."""

    low: float
    high: float


def bootstrap_interval(
    statistic: Callable[..., Any],
    *values: Tensor,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of any number that is computed from examples.

    ``statistic`` is computed on N examples drawn with replacement, ``resamples`` times; the ends
    are the quantiles ``(1 - level) / 2`` and ``(1 + level) / 2`` of the results, interpolated.
    It tells how the number varies with the test set, not with the training.

    A binned calibration error grows with noise and resampling adds some, so that its interval lies
    too high and may leave out the value itself where that is small.

    Args:
        statistic: From the resampled values, each as long as before, to one number.
        *values: One tensor or more, the examples along the first dimension; they are resampled
            together.
        resamples: How many, at least 2.
        level: Share of the resamples inside, between 0 and 1.
        seed: Of the resamples: two metrics with one seed are computed on the same ones.

    Shape:
        Each of values (N, ...).

    Returns:
        The two ends.

    Raises:
        ArgumentError: If nothing is given, the lengths differ, an argument has a value that cannot
            work, or ``statistic`` gives no finite number.

    Reference:
        Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.

    >>> bootstrap_interval(torch.mean, torch.ones(10))
    Interval(low=1.0, high=1.0)
    """
    resamples, seed = whole_number("resamples", resamples, least=2), seed_number(seed)
    level = real("level", level, "between 0 and 1", lambda value: 0.0 < value < 1.0)
    lengths = [len(v) if v.ndim else 0 for v in values]
    if not lengths or lengths[0] == 0 or len(set(lengths)) > 1:
        raise ArgumentError(
            "bootstrap_interval needs tensors with the same number of examples, at least one, "
            f"along the first dimension, not {[tuple(v.shape) for v in values]}."
        )
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(resamples):
        index = torch.randint(lengths[0], lengths[:1], generator=generator)
        found.append(float(statistic(*(v.detach()[index.to(v.device)] for v in values))))
        if not math.isfinite(found[-1]):
            raise ArgumentError(
                f"The statistic is {found[-1]} on a resample of the examples: it must be finite "
                "whichever of them are drawn."
            )
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.tensor(found, dtype=torch.float64).quantile(ends).tolist()
    return Interval(low, high)
