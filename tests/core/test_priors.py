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


NORMAL = GaussianPrior()


def layer(prior: bayesify.GaussianPrior | LivePrior = NORMAL) -> nn.Module:
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


# -- the edges of float32 ----------------------------------------------------------------------


@pytest.mark.parametrize("value", [1e30, 1e-30, 1e200, 1e-200, 0.99e-8, 1.01e8, True, 10**400])
@pytest.mark.parametrize(
    "make",
    [
        lambda v: GaussianPrior(v),
        lambda v: GaussianPrior(v, "initial", True),
        lambda v: ScaleMixturePrior(0.5, v, 1.0),
        lambda v: ScaleMixturePrior(0.5, 1.0, v),
    ],
    ids=["std", "relative", "std1", "std2"],
)
def test_a_std_that_float32_cannot_hold_the_kl_of_is_refused(
    make: Callable[[float], object], value: float
) -> None:
    with pytest.raises(ArgumentError, match=r"must be a number from 1e-08 to 1e\+08, whose KL"):
        make(value)


@pytest.mark.parametrize("value", [1e30, -1e9, True])
def test_a_mean_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(ArgumentError, match=r"mean must be a number from -1e\+08 to 1e\+08"):
        GaussianPrior(1.0, value)


def test_other_things_that_are_no_prior_are_refused() -> None:
    wrong: list[Callable[[], object]] = [
        lambda: GaussianPrior(relative="no"),  # type: ignore[arg-type]
        lambda: GaussianPrior(relative=1),  # type: ignore[arg-type]
        lambda: LivePrior(3),  # type: ignore[arg-type]
        lambda: ScaleMixturePrior(pi=True),
    ]
    for make in wrong:
        with pytest.raises(ArgumentError):
            make()


@pytest.mark.parametrize("std", [1e-8, 1e8])
@pytest.mark.parametrize("mean", [0.0, 1e8, -1e8])
@pytest.mark.parametrize("logvar", [-30.0, 0.0, 30.0])
def test_the_kl_divergence_is_right_at_the_edges_both_ways(
    std: float, mean: float, logvar: float
) -> None:
    torch.manual_seed(0)
    model = bayesify.to_bbb(
        nn.Linear(7, 5), prior=GaussianPrior(std, mean), initial_std=math.exp(logvar / 2)
    )
    double = [(p.mean.detach().double(), p.logvar.detach().double())
              for p in bayesify.posteriors(model)]  # fmt: skip
    expected = sum(
        0.5 * (((m - mean) ** 2 + v.exp()) / std**2 - 1 + 2 * math.log(std) - v).sum().item()
        for m, v in double
    )
    alone = bayesify.kl_divergence(model)
    assert alone.item() == pytest.approx(expected, rel=1e-5)
    alone.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients)

    model.zero_grad()
    outputs = model(torch.zeros(2, 7))  # the draw's backward then carries the gradient
    beside = bayesify.kl_divergence(model)
    assert beside.item() == pytest.approx(expected, rel=1e-5)
    (outputs.sum() * 0.0 + beside).backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("std", [1e-8, 1e8])
def test_the_drawn_kl_divergence_is_finite_at_the_edges(std: float) -> None:
    model = bayesify.to_bbb(
        nn.Linear(7, 5), prior=ScaleMixturePrior(0.5, std, std), initial_std=math.exp(-1.0)
    )
    kl = bayesify.kl_divergence(model)
    kl.backward()
    assert kl.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_relative_prior_that_the_weights_put_out_of_range_changes_nothing() -> None:
    model = bayesify.to_bbb(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)))
    with torch.no_grad():
        model.get_parameter("1.weight").mul_(1e-12)
    with pytest.raises(ArgumentError, match=r"prior of '1\.weight' would have .*1e-08"):
        bayesify.set_prior_(model, GaussianPrior(0.1, relative=True))
    assert {str(s.slot.prior) for s in sites(model)} == {"N(0, 1^2)"}
    plain = bayesify.to_deterministic(model)
    with pytest.raises(ArgumentError, match=r"prior of '1\.weight'"):
        bayesify.to_bbb_(plain, prior=GaussianPrior(0.1, relative=True))
    assert not list(sites(plain))


@pytest.mark.parametrize("var", [1e-30, 1e60, True, math.inf])
def test_numbers_of_a_live_prior_are_looked_at(var: float) -> None:
    model = layer(LivePrior(lambda name: (0.0, var)))
    with pytest.raises(ArgumentError, match="prior variance of 'weight' must be a number from"):
        bayesify.kl_divergence(model)
    model = layer(LivePrior(lambda name: (1e30, 1.0)))
    with pytest.raises(ArgumentError, match="prior mean of 'weight' must be a number from"):
        bayesify.kl_divergence(model)


@pytest.mark.parametrize("std", [0.0, -1.0, 2.4e17, math.inf])
def test_a_sigma_that_would_be_pruned_or_overflow_is_refused(std: float) -> None:
    with pytest.raises(ArgumentError, match="initial_std must be a number above 0 and up to"):
        bayesify.to_bbb(nn.Linear(2, 2), initial_std=std)


@pytest.mark.parametrize("std", [5e-324, 2.3e17])
def test_the_edges_of_sigma_are_held(std: float) -> None:
    [site, _] = sites(bayesify.to_bbb(nn.Linear(2, 2), initial_std=std))
    assert site.logvar.unique().item() == pytest.approx(2 * math.log(std), rel=1e-6)
    assert site.held is None
