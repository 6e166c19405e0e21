"""Closed forms of a Gaussian against scipy, torch.distributions and finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bayesify import gaussian
from bayesify.gaussian import Parameterization

PARAMETERIZATIONS: tuple[Parameterization, ...] = ("exp", "softplus")

means = st.floats(-1e3, 1e3)
logvars = st.floats(-30.0, 8.0)


def scalar(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


@given(means, logvars, means, logvars)
def test_kl_is_that_of_torch_distributions(m: float, l: float, pm: float, pl: float) -> None:  # noqa: E741
    found = gaussian.kl_divergence(scalar(m), scalar(l), pm, math.exp(pl))
    q = torch.distributions.Normal(scalar(m), scalar(math.exp(l / 2)))
    p = torch.distributions.Normal(scalar(pm), scalar(math.exp(pl / 2)))
    expected = torch.distributions.kl_divergence(q, p)[0]
    # its terms cancel where q is near p; each of them is rounded once or twice
    size = 1.0 + abs(l - pl) + math.exp(l - pl) + (m - pm) ** 2 / math.exp(pl)
    assert found.item() == pytest.approx(expected.item(), rel=0, abs=8 * 2.2e-16 * size)


@given(logvars, st.floats(-1e-4, 1e-4))
def test_kl_keeps_its_precision_where_posterior_and_prior_agree(l: float, ratio: float) -> None:  # noqa: E741
    prior_var = math.exp(l)
    difference = l + ratio - math.log(prior_var)  # as rounded
    found = gaussian.kl_divergence(scalar(0.0), scalar(l + ratio), 0.0, prior_var).item()
    series = 0.5 * (difference**2 / 2 + difference**3 / 6 + difference**4 / 24)
    assert found == pytest.approx(series, rel=1e-6, abs=1e-20)


def test_kl_is_the_mean_of_the_log_ratio_over_draws() -> None:
    m, l, pm, pv = 0.3, -1.0, -0.2, 2.0  # noqa: E741
    n = 200_000
    w = m + math.exp(l / 2) * np.random.default_rng(0).standard_normal(n)
    log_ratio = scipy.stats.norm.logpdf(w, m, math.exp(l / 2)) - scipy.stats.norm.logpdf(
        w, pm, math.sqrt(pv)
    )
    found = gaussian.kl_divergence(scalar(m), scalar(l), pm, pv).item()
    assert abs(found - log_ratio.mean()) < 5 * log_ratio.std() / math.sqrt(n)


def test_kl_takes_the_prior_as_tensor_or_number() -> None:
    mean, logvar = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    tensor = gaussian.kl_divergence(
        mean, logvar, torch.full_like(mean, 0.5), torch.full_like(mean, 3.0)
    )
    number = gaussian.kl_divergence(mean, logvar, 0.5, 3.0)
    torch.testing.assert_close(tensor, number, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kl_of_a_short_mean_is_computed_in_float32(dtype: torch.dtype) -> None:
    mean, logvar = torch.randn(1000).to(dtype), torch.randn(1000)
    found = gaussian.kl_divergence(mean, logvar, 0.0, 1.0)
    expected = gaussian.kl_divergence(mean.double(), logvar.double(), 0.0, 1.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_kl_gradients_are_finite_differences() -> None:
    inputs = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    var = torch.rand(3, dtype=torch.float64).add(0.5).requires_grad_()
    assert torch.autograd.gradcheck(gaussian.kl_divergence, (*inputs, var))


@given(
    st.lists(st.integers(1, 4), max_size=3),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_draw_is_mean_plus_std_times_noise(shape: list[int], dtype: torch.dtype) -> None:
    mean, noise = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    std = torch.rand(shape, dtype=dtype)
    found = gaussian.draw(mean, std, noise)
    expected = mean.double().numpy() + std.double().numpy() * noise.double().numpy()
    assert found.dtype == dtype
    assert found.shape == mean.shape
    scale = np.abs(mean.numpy()) + np.abs(std.numpy() * noise.numpy())
    assert (np.abs(found.double().numpy() - expected) <= torch.finfo(dtype).eps * scale).all()


def test_draw_rounds_once_to_the_dtype_of_the_mean() -> None:
    mean, noise = torch.randn(1000).bfloat16(), torch.randn(1000)
    found = gaussian.draw(mean, torch.full((1000,), 0.1), noise)
    expected = torch.addcmul(mean.float(), torch.full((1000,), 0.1), noise).bfloat16()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_draw_gradients_are_finite_differences() -> None:
    mean = torch.randn(4, dtype=torch.float64, requires_grad=True)
    std = torch.rand(4, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m, s: gaussian.draw(m, s, noise), (mean, std))


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@given(raw=st.floats(-30.0, 30.0))
def test_std_and_logvar_follow_their_definition(
    parameterization: Parameterization, raw: float
) -> None:
    std = math.exp(raw / 2) if parameterization == "exp" else float(np.logaddexp(0.0, raw))
    found = gaussian.std_from_raw(scalar(raw), parameterization).item()
    assert found == pytest.approx(std, rel=1e-8)  # torch's softplus is the identity above 20
    logvar = gaussian.logvar_from_raw(scalar(raw), parameterization).item()
    assert logvar == pytest.approx(2 * math.log(std), rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@given(logvar=st.floats(-60.0, 16.0))  # sigma from 1e-13 to 3000, whose exponential overflows
def test_raw_is_the_inverse_of_logvar(parameterization: Parameterization, logvar: float) -> None:
    raw = gaussian.raw_from_logvar(scalar(logvar), parameterization)
    assert gaussian.logvar_from_raw(raw, parameterization).item() == pytest.approx(
        logvar, rel=1e-8, abs=1e-8
    )


@given(means, means, st.floats(1e-3, 1e3))
def test_log_density_is_that_of_scipy(value: float, mean: float, std: float) -> None:
    expected = scipy.stats.norm.logpdf(value, mean, std)
    assert gaussian.log_density(scalar(value), mean, std).item() == pytest.approx(expected, 1e-12)
    tensors = gaussian.log_density(scalar(value), scalar(mean), scalar(std))
    assert tensors.item() == pytest.approx(expected, 1e-12)


def test_signal_to_noise_is_the_size_of_the_mean_over_sigma() -> None:
    found = gaussian.signal_to_noise(torch.tensor([-3.0, 0.0, 2.0]), torch.tensor([1.5, 1.0, 4.0]))
    assert found.tolist() == [2.0, 0.0, 0.5]
