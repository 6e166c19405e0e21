"""Priors over weights. A prior turns one posterior tensor into its KL term."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import gaussian
from .errors import ArgumentError
from .numeric import real

LEAST_STD, MOST_STD = 1e-8, 1e8
"""Of a prior: beyond, float32 may not hold its KL divergence."""
STD_RANGE = f"a number from {LEAST_STD:g} to {MOST_STD:g}, whose KL divergence float32 can hold"
MEAN_RANGE = f"a number from {-MOST_STD:g} to {MOST_STD:g}"


def may_be_std(value: float) -> bool:
    """Whether a prior can have this standard deviation."""
    return LEAST_STD <= value <= MOST_STD


def may_be_mean(value: float) -> bool:
    """Whether a prior can have this mean."""
    return abs(value) <= MOST_STD


@dataclass(frozen=True)
class GaussianPrior:
    """N(mean, std**2), the same for every weight of a tensor.

    Args:
        std: Standard deviation; with ``relative=True`` in units of the root mean square of the
            tensor's weights at conversion (a tensor of zeros takes it in absolute units).
        mean: A number, or ``"initial"`` for the weights at conversion (MOPED: Krishnan et al.,
            2020, arXiv:1906.05323), which suits fine-tuning.
        relative: Scale ``std`` per tensor.

    Raises:
        ArgumentError: ``std`` is not in [1e-8, 1e8], ``mean`` is neither a number in [-1e8, 1e8]
            nor "initial", or ``relative`` is no bool.
    """

    std: float = 1.0
    mean: float | Literal["initial"] = 0.0
    relative: bool = False

    def __post_init__(self) -> None:
        std = real("GaussianPrior: std", self.std, STD_RANGE, may_be_std)
        object.__setattr__(self, "std", std)
        if not isinstance(self.mean, str) or self.mean != "initial":
            expected = f"{MEAN_RANGE}, or 'initial'"
            mean = real("GaussianPrior: mean", self.mean, expected, may_be_mean)
            object.__setattr__(self, "mean", mean)
        if not isinstance(self.relative, bool):
            raise ArgumentError(
                f"GaussianPrior: relative must be True or False, got {self.relative!r}."
            )

    @property
    def needs_initial(self) -> bool:
        """Whether the weights at conversion must be kept."""
        return self.mean == "initial"

    def __str__(self) -> str:
        mean = "w0" if self.mean == "initial" else f"{self.mean:g}"
        return f"N({mean}, {'(' if self.relative else ''}{self.std:g}" + (
            " rms)^2)" if self.relative else "^2)"
        )


@dataclass(frozen=True)
class ScaleMixturePrior:
    r"""The scale mixture ``pi N(0, std1**2) + (1 - pi) N(0, std2**2)``.

    Its KL term has no closed form: it is estimated by the draw itself,
    ``log q(w) - log p(w)`` (Blundell et al., 2015, arXiv:1505.05424, equations 2 and 7).

    Args:
        pi: Weight of the first component, in (0, 1).
        std1: Standard deviation of the first component, in [1e-8, 1e8].
        std2: Standard deviation of the second component, in [1e-8, 1e8].

    Raises:
        ArgumentError: A value is out of its range.
    """

    pi: float = 0.5
    std1: float = 1.0
    std2: float = math.exp(-6.0)

    def __post_init__(self) -> None:
        pi = real("ScaleMixturePrior: pi", self.pi, "in (0, 1)", lambda value: 0.0 < value < 1.0)
        object.__setattr__(self, "pi", pi)
        for name in ("std1", "std2"):
            std = real(f"ScaleMixturePrior: {name}", getattr(self, name), STD_RANGE, may_be_std)
            object.__setattr__(self, name, std)

    def log_density(self, value: Tensor) -> Tensor:
        """Elementwise log density in nats."""
        return torch.logaddexp(
            gaussian.log_density(value, 0.0, self.std1) + math.log(self.pi),
            gaussian.log_density(value, 0.0, self.std2) + math.log1p(-self.pi),
        )

    def __str__(self) -> str:
        return f"{self.pi:g} N(0, {self.std1:g}^2) + {1 - self.pi:g} N(0, {self.std2:.3g}^2)"


@dataclass(frozen=True, eq=False)
class LivePrior:
    """A Gaussian prior whose mean and variance are read anew on every step.

    Args:
        source: Called with the parameter's name; gives ``(mean, var)``, each a tensor of the
            parameter's shape or a number. Neither receives a gradient. A number must be as for
            :class:`GaussianPrior`; tensors are not looked at. A typical source is a teacher's
            weights (BYOV, arXiv:2312.03213, section 3).

    Raises:
        ArgumentError: ``source`` cannot be called.
    """

    source: Callable[[str], tuple[Tensor | float, Tensor | float]]

    def __post_init__(self) -> None:
        if not callable(self.source):
            raise ArgumentError(
                f"LivePrior: source must be a function of a name, got {self.source!r}."
            )

    def __str__(self) -> str:
        return "live"


Prior = GaussianPrior | ScaleMixturePrior | LivePrior
