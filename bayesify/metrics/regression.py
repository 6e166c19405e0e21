"""How good predicted distributions of real numbers are: errors, densities, CRPS, coverage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..likelihoods import Normals
from ..numeric import real
from .checks import scores, widest

LEVELS = (0.5, 0.9, 0.95)
_CHUNK = 1 << 22
"""Numbers that are worked on at once."""


def crps_normal_mixture(means: Tensor, stds: Tensor, target: Tensor) -> Tensor:
    r"""Continuous ranked probability score of equally weighted mixtures of K Gaussians.

    .. math:: \frac1K \sum_k A(y - \mu_k, \sigma_k^2)
              - \frac{1}{2K^2} \sum_{kl} A(\mu_k - \mu_l, \sigma_k^2 + \sigma_l^2), \quad
              A(m, s^2) = 2 s \phi(m/s) + m (2 \Phi(m/s) - 1)

    which is the integral of :math:`(F(t) - [t \ge y])^2` over t. Lower is better; with one Gaussian
    of no width it is the absolute error.

    Args:
        means: Means of the components.
        stds: Their standard deviations, above 0.
        target: What was observed.

    Shape:
        means and stds (K, ...), target (...), result (...).

    Returns:
        In units of the target, float64 where the device has it.

    Raises:
        ArgumentError: The shapes differ, or a standard deviation is not above 0.

    Reference:
        Grimit, Gneiting, Berrocal, Johnson 2006, Q. J. R. Meteorol. Soc. 132, equation 5.

    >>> round(float(crps_normal_mixture(torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1))), 4)
    0.2337
    """
    if means.dim() < 1 or stds.shape != means.shape or target.shape != means.shape[1:]:
        raise ArgumentError(
            f"means {tuple(means.shape)} and stds {tuple(stds.shape)} must have one shape (K, ...),"
            f" and target {tuple(target.shape)} the same without K."
        )
    if not bool((stds > 0).all()):
        raise ArgumentError("stds must be standard deviations above 0.")
    means, stds = widest(means.detach()).flatten(1), widest(stds.detach()).flatten(1)
    flat = widest(target.detach()).to(means.device).flatten()
    number = len(means)
    parts = []
    for m, s, y in zip(
        means.split(max(1, _CHUNK // number**2), 1), stds.split(max(1, _CHUNK // number**2), 1),
        flat.split(max(1, _CHUNK // number**2)), strict=True,
    ):  # fmt: skip
        near = _mean_distance(y - m, s).mean(0)
        apart = _mean_distance(m[:, None] - m, (s[:, None].square() + s.square()).sqrt())
        parts.append(near - 0.5 * apart.mean((0, 1)))
    return torch.cat(parts).view(target.shape) if parts else flat.view(target.shape)


def _mean_distance(mean: Tensor, std: Tensor) -> Tensor:
    """The mean of the absolute value of a Gaussian."""
    z = mean / std
    density = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)
    distance: Tensor = 2 * std * density + mean * (2 * torch.special.ndtr(z) - 1)
    return distance


def calibration_curve(pit: Tensor, levels: Sequence[float] | None = None) -> tuple[Tensor, Tensor]:
    """Share of the targets below each predicted quantile; of a calibrated model the level itself.

    Args:
        pit: Probability integral transform of each target: the predicted probability of at most
            what was observed.
        levels: Of the quantiles, between 0 and 1; None takes .01, .02, ... .99.

    Shape:
        pit (N,), results as many as there are levels.

    Returns:
        The levels, and the shares.

    Raises:
        ArgumentError: ``pit`` is no table of probabilities, or a level is out of range.

    Reference:
        Kuleshov, Fenner, Ermon 2018, arXiv 1807.00263, equation 8.
    """
    values = _probabilities(pit)
    asked = [i / 100 for i in range(1, 100)] if levels is None else list(levels)
    expected = "between 0 and 1"
    asked = [real("level", v, expected, lambda value: 0.0 < value < 1.0) for v in asked]
    wanted = torch.tensor(asked, dtype=values.dtype, device=values.device)
    ordered = values.sort().values
    shares = torch.searchsorted(ordered, wanted, right=True).to(values.dtype) / len(values)
    return wanted, shares


def calibration_error(pit: Tensor) -> float:
    """Mean of the squared distances of the :func:`calibration_curve` from the diagonal.

    It is that of 99 levels, each with the same weight, from 0 to 1/3. Of a calibrated model it is
    about 1 / (6 N), by chance.

    Args:
        pit: As in :func:`calibration_curve`.

    Raises:
        ArgumentError: As :func:`calibration_curve`.

    Reference:
        Kuleshov, Fenner, Ermon 2018, arXiv 1807.00263, equation 9.
    """
    levels, shares = calibration_curve(pit)
    return float((levels - shares).square().mean())


class RegressionMetrics:
    """Gathers what is to be said of predicted mixtures of Gaussians, batch by batch.

    Args:
        levels: Of the central intervals whose coverage and width are measured, between 0 and 1.
    """

    def __init__(self, levels: Sequence[float] = LEVELS) -> None:
        expected = "between 0 and 1"
        self.levels = [real("level", v, expected, lambda value: 0.0 < value < 1.0) for v in levels]
        self.found: dict[str, list[Tensor]] = {}

    def update(self, predictive: Normals, target: Any) -> None:
        """Take one more batch.

        Args:
            predictive: What was predicted.
            target: As :meth:`bayesify.likelihoods.Likelihood.log_prob` takes it; masked ones are
                left out.

        Raises:
            ArgumentError: The targets do not fit.
        """
        if not isinstance(predictive, Normals):
            raise ArgumentError(
                "These metrics are of mixtures of Gaussians, as the likelihood Gaussian predicts, "
                f"got {type(predictive).__name__}."
            )
        plain: Tensor = target[0] if isinstance(target, tuple | list) else target
        densities = predictive.log_prob(target)
        mask = predictive.likelihood.mask(target)
        known = torch.ones_like(plain, dtype=torch.bool) if mask is None else mask
        known = known.to(predictive.mean.device)
        shape = predictive.mean.shape
        y = torch.where(known, plain.to(known.device), 0).view(shape)
        means, stds = predictive.parameters()
        inside = known.view(shape)
        rows = {
            "log_density": densities.view(shape)[inside],
            "error": (widest(predictive.mean) - y)[inside],
            "crps": crps_normal_mixture(means[:, inside], stds[:, inside], y[inside]),
            "pit": predictive.cdf(y)[inside],
            "std": predictive.std[inside],
        }
        for level in self.levels:
            low, high = predictive.interval(level)
            rows[f"width {level}"] = (high - low)[inside]
        for name, value in rows.items():
            self.found.setdefault(name, []).append(widest(value).cpu())

    def each(self, name: str) -> Tensor:
        """One number for each target: ``log_density``, ``error`` (mean less target), ``crps``,
        ``pit``, ``std``.

        Raises:
            ArgumentError: There was no target.
        """
        values = torch.cat(self.found.get(name, [torch.empty(0)]))
        if not len(values):
            raise ArgumentError("There is no target to measure: all are masked, or none was given.")
        return values

    def compute(self) -> dict[str, Any]:
        """All numbers of what was gathered; ``coverage`` and ``width`` by level.

        ``nll`` in nats a target, ``rmse``, ``mae``, ``crps``, ``std`` (mean predicted standard
        deviation) and widths in units of the target.

        Raises:
            ArgumentError: There was no target.
        """
        error, pit = self.each("error"), self.each("pit")
        return {
            "targets": len(error),
            "nll": -float(self.each("log_density").mean()),
            "rmse": float(error.square().mean().sqrt()),
            "mae": float(error.abs().mean()),
            "crps": float(self.each("crps").mean()),
            "std": float(self.each("std").mean()),
            "calibration_error": calibration_error(pit),
            "coverage": {f"{v:g}": _share_inside(pit, v) for v in self.levels},
            "width": {f"{v:g}": float(self.each(f"width {v}").mean()) for v in self.levels},
        }


def regression_metrics(
    predictive: Normals, target: Any, levels: Sequence[float] = LEVELS
) -> dict[str, Any]:
    """All numbers of :class:`RegressionMetrics` of one batch.

    Args:
        predictive: As ``predict(..., reduce="predictive")`` gives it of a Gaussian likelihood.
        target: The targets, NaN where one is not known.
        levels: Of central intervals, between 0 and 1.

    Raises:
        ArgumentError: The targets do not fit, or a level is out of range.

    >>> from bayesify.likelihoods import Gaussian
    >>> found = Gaussian(1.0).predictive(torch.zeros(1, 4, 1))
    >>> regression_metrics(found, torch.tensor([-1.0, 0.0, 0.5, 3.0]))["coverage"]
    {'0.5': 0.5, '0.9': 0.75, '0.95': 0.75}
    """
    metrics = RegressionMetrics(levels)
    metrics.update(predictive, target)
    return metrics.compute()


def _share_inside(pit: Tensor, level: float) -> float:
    """Share of the targets within the central interval: its ends are quantiles."""
    return float(((pit - 0.5).abs() <= level / 2).double().mean())


def _probabilities(pit: Tensor) -> Tensor:
    values = scores("pit", pit)
    if bool(((values < 0) | (values > 1)).any()):
        raise ArgumentError("pit must hold probabilities, from 0 to 1.")
    return values
