"""Metrics of predicted real numbers against numpy, scipy and numerical integration."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from bayesify import ArgumentError
from bayesify.likelihoods import Bernoulli, Gaussian
from bayesify.metrics import (
    RegressionMetrics,
    calibration_curve,
    calibration_error,
    crps_normal_mixture,
    regression_metrics,
)


def case(n: int = 40) -> tuple[Any, Tensor, Any, Any]:
    outputs, y = torch.randn(6, n, 2), 1.5 * torch.randn(n)
    means = outputs[..., 0].double().numpy()
    stds = np.log1p(np.exp(outputs[..., 1].double().numpy())) + 1e-6
    return Gaussian("predicted").predictive(outputs), y, means, stds


def test_crps_is_the_integral_of_its_definition() -> None:
    means, stds = np.array([-1.0, 0.5, 4.0]), np.array([0.3, 2.0, 0.05])
    for y in (-3.0, 0.4, 4.2):

        def squared(t: float, y: float = y) -> float:
            return float((stats.norm.cdf(t, means, stds).mean() - (t >= y)) ** 2)

        breaks = sorted([y, -1.0, 0.5, 4.0])
        expected, _ = integrate.quad(squared, -30, 30, points=breaks, limit=500)
        found = crps_normal_mixture(
            torch.tensor(means)[:, None], torch.tensor(stds)[:, None], torch.tensor([y])
        )
        assert found.tolist() == pytest.approx([expected], rel=1e-5)


def test_crps_of_one_gaussian_is_the_known_form() -> None:
    y, m, s = torch.randn(20), torch.randn(1, 20), torch.rand(1, 20) + 0.1
    z = ((y - m[0]) / s[0]).double().numpy()
    expected = s[0].double().numpy() * (
        z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi)
    )  # Gneiting and Raftery 2007, equation 21
    assert crps_normal_mixture(m, s, y).numpy() == pytest.approx(expected, rel=1e-5)


def test_all_numbers_against_numpy() -> None:
    found, y, means, stds = case()
    t = y.double().numpy()
    result = regression_metrics(found, y, levels=(0.5, 0.9))
    mean = means.mean(0)
    assert result["targets"] == 40
    assert result["nll"] == pytest.approx(-np.log(stats.norm.pdf(t, means, stds).mean(0)).mean())
    assert result["rmse"] == pytest.approx(np.sqrt(((mean - t) ** 2).mean()))
    assert result["mae"] == pytest.approx(np.abs(mean - t).mean())
    variance = (stds**2 + means**2).mean(0) - mean**2
    assert result["std"] == pytest.approx(np.sqrt(variance).mean(), rel=1e-5)
    pit = stats.norm.cdf(t, means, stds).mean(0)
    drawn = np.random.default_rng(0)
    samples = drawn.normal(means, stds, (4000, *means.shape)).reshape(-1, 40)
    for level in (0.5, 0.9):
        low, high = (1 - level) / 2, (1 + level) / 2
        inside = (pit >= low) & (pit <= high)
        assert result["coverage"][f"{level:g}"] == pytest.approx(inside.mean())
        ends = np.quantile(samples, [low, high], axis=0)
        assert result["width"][f"{level:g}"] == pytest.approx((ends[1] - ends[0]).mean(), rel=0.02)
    # CRPS as a mean over pairs of samples (energy form)
    drawn.shuffle(samples)  # rows of one component in turn
    a, b = samples[:12000], samples[12000:]
    crps = np.abs(a - t).mean(0) - 0.5 * np.abs(a - b).mean(0)
    assert result["crps"] == pytest.approx(crps.mean(), rel=0.03)
    levels = np.arange(1, 100) / 100
    curve = np.array([(pit <= level).mean() for level in levels])
    assert result["calibration_error"] == pytest.approx(((curve - levels) ** 2).mean(), rel=1e-6)


def test_batches_and_masks_change_nothing() -> None:
    outputs, y = torch.randn(4, 30, 3), torch.randn(30, 3)
    mask = torch.rand(30, 3) < 0.6
    likelihood = Gaussian(0.8)
    whole = RegressionMetrics()
    for rows in range(0, 30, 7):
        part = slice(rows, rows + 7)
        target = y[part].masked_fill(~mask[part], torch.nan)
        whole.update(likelihood.predictive(outputs[:, part]), target)  # type: ignore[arg-type]
    flat: Any = likelihood.predictive(outputs[:, mask][..., None])
    one = regression_metrics(flat, y[mask])
    found = whole.compute()
    assert found.keys() == one.keys()
    for name, value in one.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


def test_the_curve_of_a_calibrated_model_is_the_diagonal() -> None:
    pit = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    levels, shares = calibration_curve(pit, (0.1, 0.5, 0.9))
    assert (levels - shares).abs().max() < 4 * 0.5 / np.sqrt(4000)
    assert calibration_error(pit) < 3 / (6 * 4000)
    assert calibration_error(pit / 2) > 0.02  # all targets lie too low
    assert calibration_curve(torch.tensor([0.2, 0.4]), [0.41])[1].tolist() == [1.0]


def test_bad_input() -> None:
    found, y, _, _ = case()
    coins: Any = Bernoulli().predictive(torch.zeros(2, 3))
    bad: list[tuple[Any, str]] = [
        (lambda: regression_metrics(coins, y), "mixtures of Gaussians"),
        (lambda: regression_metrics(found, y[:3]), "do not fit"),
        (lambda: regression_metrics(found, y * torch.nan), "no target to measure"),
        (lambda: regression_metrics(found, y, levels=(1.0,)), "between 0 and 1"),
        (lambda: calibration_error(torch.tensor([1.5])), "probabilities"),
        (lambda: calibration_curve(torch.rand(3), [0.0]), "between 0 and 1"),
        (lambda: crps_normal_mixture(torch.ones(2, 3), torch.ones(3), torch.ones(3)), "one shape"),
        (
            lambda: crps_normal_mixture(torch.ones(2, 3), torch.zeros(2, 3), torch.ones(3)),
            "above 0",
        ),
    ]
    for call, message in bad:
        with pytest.raises(ArgumentError, match=message):
            call()
