"""Priors: their values, what they keep of the weights, and what they refuse."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import bayesify
from bayesify import ArgumentError, GaussianPrior, LivePrior, ScaleMixturePrior
from bayesify.posterior import Site, gaussian_prior, sites

stds = st.floats(1e-3, 10.0)


def only_site(model: nn.Module) -> Site:
    [site] = sites(model)
    return site


def layer(prior: bayesify.GaussianPrior | LivePrior | None = None) -> nn.Module:
    return bayesify.to_bbb(nn.Linear(3, 2, bias=False), prior=prior)


@given(st.floats(0.01, 0.99), stds, stds, st.floats(-50.0, 50.0))
def test_mixture_density_is_that_of_scipy(pi: float, std1: float, std2: float, w: float) -> None:
    found = ScaleMixturePrior(pi, std1, std2).log_density(torch.tensor([w], dtype=torch.float64))
    expected = scipy.special.logsumexp(
        [
            math.log(pi) + scipy.stats.norm.logpdf(w, 0, std1),
            math.log(1 - pi) + scipy.stats.norm.logpdf(w, 0, std2),
        ]
    )
    assert found.item() == pytest.approx(expected, rel=1e-11, abs=1e-11)


def test_mixture_density_integrates_to_one() -> None:
    prior = ScaleMixturePrior(0.3, 2.0, 0.1)

    def density(w: float) -> float:
        return prior.log_density(torch.tensor(w, dtype=torch.float64)).exp().item()

    total, _ = scipy.integrate.quad(density, -40, 40, points=[-0.5, 0.0, 0.5], limit=200)
    assert total == pytest.approx(1.0, abs=1e-8)


def test_mixture_density_stays_finite_far_out() -> None:
    w = torch.tensor([0.0, 5.0, -100.0], requires_grad=True)
    value = ScaleMixturePrior(0.5, 1.0, 1e-6).log_density(w)
    value.sum().backward()
    assert w.grad is not None
    assert torch.isfinite(value).all()
    assert torch.isfinite(w.grad).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianPrior(std=0.0), "std must be a number from 1e-08 to"),
        (lambda: GaussianPrior(std=-1.0), "std must be"),
        (lambda: GaussianPrior(std=math.inf), "std must be"),
        (lambda: GaussianPrior(std=math.nan), "std must be"),
        (lambda: GaussianPrior(std="1"), "std must be"),  # type: ignore[arg-type]
        (lambda: GaussianPrior(mean="zero"), "mean must be a number from .*, or 'initial'"),  # type: ignore[arg-type]
        (lambda: GaussianPrior(mean=math.nan), "mean must be"),
        (lambda: ScaleMixturePrior(pi=0.0), "pi must be in"),
        (lambda: ScaleMixturePrior(pi=1.0), "pi must be in"),
        (lambda: ScaleMixturePrior(std1=0.0), "std1 must be"),
        (lambda: ScaleMixturePrior(std2=math.nan), "std2 must be"),
    ],
)
def test_bad_values_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


@pytest.mark.parametrize(
    ("prior", "text"),
    [
        (GaussianPrior(), "N(0, 1^2)"),
        (GaussianPrior(0.1, "initial"), "N(w0, 0.1^2)"),
        (GaussianPrior(2.0, relative=True), "N(0, (2 rms)^2)"),
        (ScaleMixturePrior(0.25, 1.0, 0.5), "0.25 N(0, 1^2) + 0.75 N(0, 0.5^2)"),
        (LivePrior(lambda name: (0.0, 1.0)), "live"),
    ],
)
def test_a_prior_says_what_it_is(prior: object, text: str) -> None:
    assert str(prior) == text


@pytest.mark.parametrize("prior", [GaussianPrior(0.5, "initial", True), ScaleMixturePrior()])
def test_priors_are_values(prior: object) -> None:
    assert pickle.loads(pickle.dumps(prior)) == prior
    assert hash(copy.deepcopy(prior)) == hash(prior)


def test_default_prior_is_the_standard_normal() -> None:
    assert gaussian_prior(only_site(layer())) == (0.0, 1.0)


def test_prior_around_the_initial_weights_stays_there() -> None:
    model = layer(GaussianPrior(0.1, "initial"))
    site = only_site(model)
    initial = site.mean.detach().clone()
    with torch.no_grad():
        site.mean.add_(1.0)
    mean, var = gaussian_prior(site)
    assert isinstance(mean, Tensor)
    assert torch.equal(mean, initial)
    assert var == pytest.approx(0.01)
    assert not any("prior" in key for key in model.state_dict())


def test_relative_prior_is_in_units_of_the_root_mean_square() -> None:
    model = layer(GaussianPrior(0.5, relative=True))
    site = only_site(model)
    rms = np.sqrt(np.mean(site.mean.detach().double().numpy() ** 2))
    mean, var = gaussian_prior(site)
    assert mean == 0.0
    assert var == pytest.approx((0.5 * rms) ** 2)


def test_relative_prior_of_a_tensor_of_zeros_is_absolute() -> None:
    zeros = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(zeros.weight)
    model = bayesify.to_bbb(zeros, prior=GaussianPrior(0.5, relative=True))
    assert gaussian_prior(only_site(model)) == (0.0, 0.25)


def test_set_prior_takes_the_present_means_as_initial() -> None:
    model = layer()
    with torch.no_grad():
        only_site(model).mean.fill_(3.0)
    assert bayesify.set_prior_(model, GaussianPrior(1.0, "initial")) is model
    mean, _ = gaussian_prior(only_site(model))
    assert isinstance(mean, Tensor)
    assert (mean == 3.0).all()
    bayesify.set_prior_(model, GaussianPrior(2.0))
    assert gaussian_prior(only_site(model)) == (0.0, 4.0)
    assert not list(model.buffers())


def test_set_prior_refuses_what_is_no_prior() -> None:
    with pytest.raises(ArgumentError, match="must be a GaussianPrior"):
        bayesify.set_prior_(layer(), 1.0)  # type: ignore[arg-type]
    with pytest.raises(bayesify.UnsupportedModuleError, match="no Bayesian parameter"):
        bayesify.set_prior_(nn.Linear(1, 1), GaussianPrior())


def test_live_prior_reads_its_source_anew_and_gives_it_no_gradient() -> None:
    teacher = {"weight": torch.zeros(2, 3, requires_grad=True)}
    model = layer(LivePrior(lambda name: (teacher[name], 2.0)))
    mean, var = gaussian_prior(only_site(model))
    assert isinstance(mean, Tensor)
    assert not mean.requires_grad
    assert var == 2.0
    teacher["weight"] = torch.ones(2, 3)
    mean, _ = gaussian_prior(only_site(model))
    assert isinstance(mean, Tensor)
    assert (mean == 1.0).all()


@pytest.mark.parametrize(
    ("value", "message"),
    [((torch.zeros(3), 1.0), "mean for 'weight'"), ((0.0, torch.ones(3, 2)), "variance for")],
)
def test_live_prior_of_another_shape_is_refused(
    value: tuple[Tensor | float, Tensor | float], message: str
) -> None:
    model = layer(LivePrior(lambda name: value))
    with pytest.raises(ArgumentError, match=message):
        gaussian_prior(only_site(model))
