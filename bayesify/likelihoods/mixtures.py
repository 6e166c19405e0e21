"""Mixtures of which more is known in closed form: of Gaussians, of yes and no, of classes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical

from ..errors import ArgumentError
from .predictive import Predictive, log_mean_exp

_POINTS = 97
"""For each component, at which an entropy looks at the density."""

_MOST_POINTS = 8192
"""In all: among so many a mixture is smooth."""

_AT_ONCE = 64
"""Targets whose entropies are computed together."""


class Normals(Predictive):
    """A mixture of Gaussians."""

    def parameters(self) -> tuple[Tensor, Tensor]:
        """Means and standard deviations of the draws, (K, batch, ...)."""
        components: list[Any] = self.components
        means = torch.stack([c.loc for c in components])
        return means, torch.stack([c.scale for c in components])

    def _quantile(self, level: float) -> Tensor:
        means, stds = (v.flatten(1) for v in self.parameters())
        parts = [
            normal_mixture_quantile(m.double(), s.double(), level)
            for m, s in zip(_columns(means), _columns(stds), strict=True)
        ]
        return torch.cat(parts).view(self.mean.shape).to(self.mean.dtype)

    def cdf(self, value: Tensor) -> Tensor:
        """The probability that the target is at most ``value``, of the shape of the outputs."""
        total = torch.zeros_like(self.mean, dtype=torch.float64)
        parts: list[Any] = self.components
        for part in parts:
            total += torch.special.ndtr((value.double() - part.loc) / part.scale)
        return total / self.num_samples

    def entropy(self) -> Tensor:
        means, stds = (v.flatten(1) for v in self.parameters())
        parts = [
            _normal_mixture_entropy(m.double(), s.double())
            for m, s in zip(means.split(_AT_ONCE, 1), stds.split(_AT_ONCE, 1), strict=True)
        ]
        return torch.cat(parts).view(self.mean.shape).to(self.mean.dtype)


def _normal_mixture_entropy(means: Tensor, stds: Tensor) -> Tensor:
    """Entropies of mixtures (K, N) by the trapezoidal rule, on points around every component."""
    around = torch.linspace(-8.0, 8.0, _POINTS, dtype=torch.float64, device=means.device)
    points = (means[:, None] + stds[:, None] * around[:, None]).flatten(0, 1).sort(0).values
    points = points[:: max(1, len(points) // _MOST_POINTS)]
    values = []
    for row in points.split(16):
        z = (row - means[:, None]) / stds[:, None]
        logs = -0.5 * z.square() - stds[:, None].log() - 0.5 * math.log(2 * math.pi)
        log_density = log_mean_exp(logs)
        values.append(-log_density.exp() * log_density)
    found: Tensor = torch.trapezoid(torch.cat(values), points, dim=0)
    return found


def normal_mixture_quantile(means: Tensor, stds: Tensor, level: float) -> Tensor:
    """Quantile of equally weighted mixtures of Gaussians, (K, N) to (N,), by Newton's method.

    It lies between the least and the largest quantile of the components, and every step that leaves
    what is left of that is halved.
    """
    z = math.sqrt(2.0) * torch.erfinv(torch.tensor(2 * level - 1, dtype=torch.float64)).item()
    ends = means + z * stds
    low, high = ends.min(0).values, ends.max(0).values
    found = (low + high) / 2
    tolerance = 1e-12 * (stds.max(0).values + found.abs())
    for _ in range(200):
        scaled = (found - means) / stds
        excess = (torch.special.ndtr(scaled) - level).mean(0)
        high = torch.where(excess >= 0, found, high)
        low = torch.where(excess <= 0, found, low)
        density = ((-0.5 * scaled.square()).exp() / stds).mean(0) / math.sqrt(2 * math.pi)
        step = found - excess / density
        inside = (step > low) & (step < high)
        step = torch.where(inside, step, (low + high) / 2)
        moved = (step - found).abs()
        found = step
        if bool((moved <= tolerance).all()):
            break
    return found


def _columns(values: Tensor) -> tuple[Tensor, ...]:
    """Parts of (K, N) along N, of which a few at a time are worked on in float64."""
    parts: tuple[Tensor, ...] = values.split(max(1, (1 << 22) // max(1, len(values))), 1)
    return parts


class YesNo(Predictive):
    """A mixture of Bernoulli distributions, which is one."""

    def _held(self, quantile: float) -> Tensor:
        return torch.stack([1 - self.mean, self.mean], -1) >= 1 - quantile

    def _quantile(self, level: float) -> Tensor:
        return (level > 1 - self.mean).to(self.mean.dtype)

    def entropy(self) -> Tensor:
        entropy: Tensor = Bernoulli(self.mean, validate_args=False).entropy()
        return entropy


class Classes(Predictive):
    """A mixture of distributions over classes, which is one."""

    def _held(self, quantile: float) -> Tensor:
        return self.mean >= 1 - quantile

    def _quantile(self, level: float) -> Tensor:
        raise ArgumentError(
            "Classes have no order, and so no quantiles: predictive.mean has the probability of "
            "each, conformal(level) sets of them."
        )

    def entropy(self) -> Tensor:
        """Entropy of the classes, of the shape of the targets."""
        categorical: Any = self.likelihood
        probs = self.mean.movedim(categorical.dim, -1)
        entropy: Tensor = Categorical(probs=probs, validate_args=False).entropy()
        return entropy
