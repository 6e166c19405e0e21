"""KL, ELBO and schedules against torch.distributions, quadrature and a model solved exactly."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

import bayesify
from bayesify import (
    ArgumentError,
    BBBConfig,
    GaussianPrior,
    LivePrior,
    ScaleMixturePrior,
    at_mean,
    draws,
    objective,
    one_draw,
)
from bayesify.divergence import kl_divergence
from bayesify.objective import elbo_loss, kl_scale, kl_schedule, noise_budget
from bayesify.optim import param_groups
from bayesify.posterior import Site, sites
from bayesify.priors import Prior

MIXTURE = ScaleMixturePrior(0.3, 1.0, 0.1)


class Net(nn.Module):
    """Ten weights, two of which are one tensor under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.b = nn.Linear(2, 2)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).tanh())
        return out


NORMAL = GaussianPrior()


def converted(prior: Prior = NORMAL, **options: Any) -> nn.Module:
    """A float64 model whose means and log variances all differ."""
    model = bayesify.to_bbb(Net().double(), prior=prior, **options)
    with torch.no_grad():
        for site in sites(model):
            site.mean.add_(torch.randn_like(site.mean))
            site.raw.copy_(-2.0 + torch.randn_like(site.raw))
    return model


def reference_kl(site: Site, prior_mean: Any = 0.0, prior_std: Any = 1.0) -> Tensor:
    mean, std = site.mean.detach(), torch.exp(0.5 * site.raw.detach().double())
    q = torch.distributions.Normal(mean, std)
    p = torch.distributions.Normal(
        torch.as_tensor(prior_mean, dtype=mean.dtype).expand_as(mean),
        torch.as_tensor(prior_std, dtype=mean.dtype).expand_as(mean),
    )
    return torch.distributions.kl_divergence(q, p).sum()


def mixture_log_ratio(site: Site, value: Tensor) -> Tensor:
    q = torch.distributions.Normal(site.mean, site.std.double())  # a draw's sigma is float32
    stds = torch.tensor([MIXTURE.std1, MIXTURE.std2], dtype=torch.float64)
    shares = torch.tensor([MIXTURE.pi, 1 - MIXTURE.pi], dtype=torch.float64)
    components = torch.distributions.Normal(torch.zeros_like(stds), stds)
    weights = torch.distributions.Categorical(shares)
    p = torch.distributions.MixtureSameFamily(weights, components)
    log_ratio: Tensor = (q.log_prob(value) - p.log_prob(value)).sum()
    return log_ratio


# -- the closed form ---------------------------------------------------------------------------


@functools.cache
def any_model() -> nn.Module:
    return converted()


@given(st.floats(0.1, 10.0), st.floats(-3.0, 3.0))
def test_kl_is_that_of_torch_distributions(std: float, mean: float) -> None:
    model = bayesify.set_prior_(any_model(), GaussianPrior(std, mean))
    found = kl_divergence(model)
    expected = sum(reference_kl(site, mean, std) for site in sites(model))
    assert found.dtype == torch.float64
    assert found.shape == ()
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-12)


def test_kl_of_softplus_is_that_of_torch_distributions() -> None:
    model = converted(config=BBBConfig(parameterization="softplus"))
    expected = 0.0
    for site in sites(model):
        std = np.logaddexp(0.0, site.raw.detach().double().numpy())
        q = torch.distributions.Normal(site.mean.detach(), torch.from_numpy(std))
        p = torch.distributions.Normal(*torch.tensor([0.0, 1.0]).double())
        expected += torch.distributions.kl_divergence(q, p).sum().item()
    assert kl_divergence(model).item() == pytest.approx(expected, rel=1e-12)


def test_kl_of_a_prior_around_the_initial_weights() -> None:
    net = Net().double()
    initial = {name: p.detach().clone() for name, p in net.named_parameters()}
    model = bayesify.to_bbb(net, prior=GaussianPrior(0.5, "initial"), initial_std=math.exp(-1.5))
    with torch.no_grad():
        for site in sites(model):
            site.mean.add_(torch.randn_like(site.mean))
    expected = sum(reference_kl(site, initial[site.name], 0.5) for site in sites(model))
    torch.testing.assert_close(kl_divergence(model), expected, rtol=1e-13, atol=0)


def test_kl_of_a_relative_prior() -> None:
    model = bayesify.to_bbb(
        Net().double(), prior=GaussianPrior(2.0, relative=True), initial_std=math.exp(-1.5)
    )
    expected = sum(
        reference_kl(s, 0.0, 2.0 * s.mean.detach().square().mean().sqrt()) for s in sites(model)
    )
    torch.testing.assert_close(kl_divergence(model), expected, rtol=1e-13, atol=0)


def test_kl_of_a_live_prior_follows_its_source_and_gives_it_no_gradient() -> None:
    teacher = {n: torch.randn_like(p) for n, p in Net().double().named_parameters()}
    var = torch.rand(2, dtype=torch.float64).add(0.5).requires_grad_()

    def source(name: str) -> tuple[Tensor, Tensor | float]:
        return teacher[name], var if name == "a.bias" else 0.25

    model = converted(LivePrior(source))

    def expected() -> Tensor:
        return torch.stack(
            [
                reference_kl(s, teacher[s.name], var.detach().sqrt() if s.name == "a.bias" else 0.5)
                for s in sites(model)
            ]
        ).sum()

    torch.testing.assert_close(kl_divergence(model), expected(), rtol=1e-13, atol=0)
    teacher["b.bias"] = torch.ones(2, dtype=torch.float64)
    found = kl_divergence(model)
    torch.testing.assert_close(found, expected(), rtol=1e-13, atol=0)
    found.backward()
    assert var.grad is None


@pytest.mark.parametrize("var", [0.0, -1.0, math.nan])
def test_a_live_prior_without_variance_is_refused(var: float) -> None:
    with pytest.raises(ArgumentError, match=r"prior variance of 'a\.weight' must be a number from"):
        kl_divergence(converted(LivePrior(lambda name: (0.0, var))))


def test_a_tied_weight_is_counted_once() -> None:
    tied = Net().double()
    apart = copy.deepcopy(tied)
    apart.b.weight = nn.Parameter(apart.b.weight.detach().clone())
    once, twice = (
        kl_divergence(bayesify.to_bbb(m, initial_std=math.exp(-1.5))) for m in (tied, apart)
    )
    q = torch.distributions.Normal(tied.a.weight.detach(), math.exp(-1.5))
    p = torch.distributions.Normal(torch.zeros_like(q.loc), 1.0)
    weight = torch.distributions.kl_divergence(q, p).sum()
    torch.testing.assert_close((twice - once).detach(), weight, rtol=1e-12, atol=0)


def test_a_shared_module_is_counted_once() -> None:
    layer = nn.Linear(2, 2).double()
    shared = bayesify.to_bbb(nn.Sequential(layer, nn.Tanh(), layer))
    assert torch.equal(kl_divergence(shared), kl_divergence(bayesify.to_bbb(layer)))


def test_kl_counts_the_converted_part_of_a_larger_module() -> None:
    inner = converted()
    outer = nn.Sequential(nn.Linear(2, 2), inner)
    assert torch.equal(kl_divergence(outer), kl_divergence(inner))


def test_kl_gradients_are_finite_differences() -> None:
    model = converted(GaussianPrior(0.7, 0.2))
    kl_divergence(model).backward()
    for site in sites(model):
        for parameter, step in ((site.mean, 1e-5), (site.raw, 2.0**-9)):
            assert parameter.grad is not None
            found = parameter.grad.flatten()[0].item()
            with torch.no_grad():
                entry = parameter.view(-1)[0]
                value = entry.item()
                sides = []
                for sign in (1.0, -1.0):
                    entry.fill_(value + sign * step)
                    sides.append((entry.item(), kl_divergence(model).item()))
                entry.fill_(value)
            (high, above), (low, below) = sides
            assert found == pytest.approx((above - below) / (high - low), rel=1e-4)


def test_kl_is_in_float32_whatever_the_model_and_autocast() -> None:
    model = bayesify.to_bbb(nn.Linear(50, 50), initial_std=math.exp(-1.5))
    full = kl_divergence(model)
    assert full.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kl_divergence(model), full)
    short = bayesify.to_bbb(nn.Linear(50, 50).bfloat16(), initial_std=math.exp(-1.5))
    found = kl_divergence(short)
    assert found.dtype == torch.float32
    expected = torch.stack(
        [
            torch.distributions.kl_divergence(
                torch.distributions.Normal(s.mean.double(), s.std.double()),
                torch.distributions.Normal(torch.zeros(()).double(), torch.ones(()).double()),
            ).sum()
            for s in sites(short)
        ]
    ).sum()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_kl_is_graph_free_where_none_is_wanted() -> None:
    model = converted()
    with torch.no_grad():
        assert not kl_divergence(model).requires_grad
    assert kl_divergence(model).requires_grad


def test_kl_of_a_deterministic_model_is_refused() -> None:
    with pytest.raises(bayesify.UnsupportedModuleError, match="no Bayesian parameter"):
        kl_divergence(nn.Linear(1, 1))


def test_kl_compiles_without_a_break() -> None:
    model = converted()
    compiled = torch.compile(lambda: kl_divergence(model), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(), kl_divergence(model))


# -- the scale mixture -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_mixture_kl_is_the_log_ratio_at_the_held_draw(seed: int) -> None:
    model = converted(MIXTURE)
    with one_draw(model, seed=seed):
        found = kl_divergence(model)
        model(torch.zeros(1, 2, dtype=torch.float64))
        again = kl_divergence(model)
    values = draws(model, seed=seed)
    expected = sum(mixture_log_ratio(s, values[s.name]) for s in sites(model))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(found, again)


def test_mixture_kl_of_a_bfloat16_model_is_not_rounded_with_its_draw() -> None:
    model = bayesify.to_bbb(nn.Linear(64, 64).bfloat16(), prior=MIXTURE, initial_std=math.exp(-7.0))
    with one_draw(model, seed=3), torch.no_grad():
        found = kl_divergence(model)
    exact = bayesify.to_bbb(nn.Linear(64, 64), prior=MIXTURE, initial_std=math.exp(-7.0))
    exact.load_state_dict(model.state_dict())
    with one_draw(exact, seed=3), torch.no_grad():
        expected = kl_divergence(exact)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_mixture_kl_takes_the_innermost_draw_of_its_own_model() -> None:
    model, other = converted(MIXTURE), converted(MIXTURE)

    def at(seed: int) -> Tensor:
        with one_draw(model, seed=seed):
            return kl_divergence(model)

    first, second = at(1), at(2)
    with one_draw(model, seed=1):
        with one_draw(other, seed=2):
            assert torch.equal(kl_divergence(model), first)
        with one_draw(model, seed=2):
            assert torch.equal(kl_divergence(model), second)
        with at_mean(model):  # of the model's calls; the KL has no value at the means
            assert torch.equal(kl_divergence(model), first)
        with one_draw(nn.Sequential(model), seed=2):
            assert torch.equal(kl_divergence(model), second)


@pytest.mark.parametrize("prior", [GaussianPrior(), MIXTURE])
def test_kl_inside_a_forward_is_that_of_the_means_and_the_running_draw(prior: Prior) -> None:
    class WithKL(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sum() * 0.0 + kl_divergence(self)

    model = bayesify.to_bbb(WithKL().double(), prior=prior)
    x = torch.ones(1, 2, dtype=torch.float64)
    for seed in range(2):
        with one_draw(model, seed=seed):
            assert torch.equal(model(x), kl_divergence(model))
    with torch.no_grad():
        next(sites(model)).mean.add_(1.0)
    with one_draw(model, seed=0):
        assert torch.equal(model(x), kl_divergence(model))


def test_mixture_kl_inside_a_training_forward_is_that_of_its_own_draw() -> None:
    class WithKL(Net):
        def forward(self, x: Tensor) -> Tensor:
            read = [self.a.weight, self.a.bias, self.b.bias]
            return torch.cat([kl_divergence(self).view(1), *(w.flatten() for w in read)])

    model = bayesify.to_bbb(WithKL().double(), prior=MIXTURE, initial_std=math.exp(-1.0)).train()
    found, *weights = model(torch.ones(1, 2).double()).split([1, 4, 2, 2])
    expected = sum(
        mixture_log_ratio(site, w.view(site.mean.shape))
        for site, w in zip(sites(model), weights, strict=True)
    )
    torch.testing.assert_close(found[0], expected, rtol=1e-10, atol=1e-10)


def test_mixture_kl_outside_of_a_draw_takes_a_fresh_one() -> None:
    model = converted(MIXTURE)
    state = torch.get_rng_state()
    first, second = kl_divergence(model), kl_divergence(model)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(kl_divergence(model), first)


def test_mixture_kl_averages_to_the_integral() -> None:
    n, mean, logvar = 200_000, 0.4, -2.0
    layer = nn.Linear(n, 1, bias=False).double()
    nn.init.constant_(layer.weight, mean)
    model = bayesify.to_bbb(layer, prior=MIXTURE, initial_std=math.exp(logvar / 2))
    found = kl_divergence(model).item() / n
    std = math.exp(0.5 * logvar)

    def log_ratio(w: float) -> float:
        log_p = np.logaddexp(
            math.log(MIXTURE.pi) + scipy.stats.norm.logpdf(w, 0, MIXTURE.std1),
            math.log(1 - MIXTURE.pi) + scipy.stats.norm.logpdf(w, 0, MIXTURE.std2),
        )
        return float(scipy.stats.norm.logpdf(w, mean, std) - log_p)

    def moment(power: int) -> float:
        def integrand(w: float) -> float:
            return float(scipy.stats.norm.pdf(w, mean, std)) * log_ratio(w) ** power

        value, _ = scipy.integrate.quad(integrand, mean - 12 * std, mean + 12 * std, limit=200)
        return float(value)

    exact = moment(1)
    standard_error = math.sqrt((moment(2) - exact**2) / n)
    assert abs(found - exact) < 5 * standard_error


def test_mixture_of_one_component_averages_to_the_closed_form() -> None:
    n = 100_000
    model = bayesify.to_bbb(
        nn.Linear(n, 1, bias=False),
        prior=ScaleMixturePrior(0.5, 0.3, 0.3),
        initial_std=math.exp(-1.0),
    )
    found = kl_divergence(model)
    [site] = sites(model)
    bayesify.set_prior_(model, GaussianPrior(0.3))
    # log q - log p = const - eps^2 / 2 + (mu + sigma eps)^2 / (2 s^2), a quadratic of the noise
    mean, std = site.mean.detach().double(), math.exp(-1.0)
    quadratic, linear = std**2 / 0.09 - 1.0, mean * std / 0.09
    standard_error = (0.5 * quadratic**2 + linear.square()).sum().sqrt().item()
    assert abs(found.item() - kl_divergence(model).item()) < 5 * standard_error


def test_mixture_gradients_are_finite_differences() -> None:
    model = converted(MIXTURE)

    def value() -> Tensor:
        with one_draw(model, seed=7):
            return kl_divergence(model)

    value().backward()
    for site in sites(model):
        for parameter, step in ((site.mean, 1e-5), (site.raw, 2.0**-9)):
            assert parameter.grad is not None
            with torch.no_grad():
                entry = parameter.view(-1)[0]
                kept, sides = entry.item(), []
                for sign in (1.0, -1.0):
                    entry.fill_(kept + sign * step)
                    sides.append((entry.item(), value().item()))
                entry.fill_(kept)
            (high, above), (low, below) = sides
            slope = (above - below) / (high - low)
            assert parameter.grad.flatten()[0].item() == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_mixture_kl_and_loss_can_go_backward_apart() -> None:
    model = converted(MIXTURE)
    with one_draw(model, seed=0):
        model(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
        kl_divergence(model).backward()


# -- the ELBO ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"num_data": 50}, 1 / 50),
        ({"num_data": np.int64(50), "kl_weight": np.float32(0.5)}, 0.5 / 50),
        ({"kl_reduction": "num_weights"}, 1 / 8),
        ({"kl_reduction": "num_weights", "kl_weight": 3}, 3 / 8),
        ({"kl_reduction": "sum"}, 1.0),
        ({"kl_reduction": "sum", "kl_weight": 1e-3}, 1e-3),
    ],
)
def test_elbo_is_loss_plus_scaled_kl(options: dict[str, Any], factor: float) -> None:
    model = converted()
    loss = torch.tensor(2.5, dtype=torch.float64)
    found = elbo_loss(loss, model, **options)
    expected = 2.5 + factor * sum(reference_kl(site).item() for site in sites(model))
    assert found.item() == pytest.approx(expected, rel=1e-12)
    weight = float(options.pop("kl_weight", 1.0))
    assert kl_scale(model, **options) * weight == pytest.approx(factor, rel=1e-12)
    budget = noise_budget(model, weight, **options)
    assert budget == pytest.approx(factor * 8 / 2, rel=1e-12)


def test_elbo_is_the_exact_evidence_where_posterior_is_exact() -> None:
    # one weight w ~ N(0, 1), one datum y ~ N(w, 1): p(w | y) = N(y/2, 1/2), p(y) = N(0, 2); with
    # the exact posterior, -log p(y|w) + log q(w) - log p(w) = -log p(y) for every draw
    y = 0.8
    layer = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(layer.weight, y / 2)
    prior = ScaleMixturePrior(0.5, 1.0, 1.0)  # N(0, 1), by the draw
    model = bayesify.to_bbb(layer, prior=prior, initial_std=math.exp((math.log(0.5)) / 2))
    for seed in range(5):
        with one_draw(model, seed=seed):
            w = model(torch.ones(1, 1, dtype=torch.float64))
            nll = 0.5 * (y - w).square().sum() + 0.5 * math.log(2 * math.pi)
            found = elbo_loss(nll, model, kl_reduction="sum")
        evidence = -scipy.stats.norm.logpdf(y, 0, math.sqrt(2))
        assert found.item() == pytest.approx(evidence, rel=1e-6)  # sigma is kept in float32


def test_elbo_without_weight_computes_no_kl(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: nn.Module) -> Tensor:
        raise AssertionError("the KL was computed")

    monkeypatch.setattr(objective, "kl_beside", fail)
    loss = torch.tensor(1.0)
    assert elbo_loss(loss, converted(), num_data=3, kl_weight=0.0) is loss


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs num_data, the number of training examples"),
        ({"num_data": 0}, "positive integer"),
        ({"num_data": -3}, "positive integer"),
        ({"num_data": 2.5}, "positive integer"),
        ({"num_data": True}, "positive integer"),
        ({"num_data": 3, "kl_reduction": "sum"}, "'sum' does not use num_data"),
        ({"num_data": 3, "kl_reduction": "num_weights"}, "does not use num_data"),
        ({"kl_reduction": "mean"}, "must be one of 'num_data', 'num_weights', 'sum'"),
        ({"num_data": 3, "kl_weight": -0.1}, "kl_weight must be a finite number"),
        ({"num_data": 3, "kl_weight": math.nan}, "kl_weight must be"),
        ({"num_data": 3, "kl_weight": math.inf}, "kl_weight must be"),
        ({"num_data": 3, "kl_weight": "1"}, "kl_weight must be"),
        ({"kl_weight": 0.0}, "needs num_data"),
    ],
)
def test_elbo_refuses_bad_arguments(options: dict[str, Any], message: str) -> None:
    model = converted()
    with pytest.raises(ArgumentError, match=message):
        elbo_loss(torch.tensor(1.0), model, **options)
    with pytest.raises(ArgumentError, match=message):
        noise_budget(model, **options)


@pytest.mark.parametrize("loss", [torch.zeros(3), torch.zeros(1), 1.0])
def test_elbo_refuses_a_loss_that_is_no_scalar(loss: Any) -> None:
    with pytest.raises(ArgumentError, match=r"no dimension.*loss\.mean\(\)"):
        elbo_loss(loss, converted(), num_data=3)


def test_elbo_of_a_deterministic_model_is_refused() -> None:
    with pytest.raises(bayesify.UnsupportedModuleError, match="no Bayesian parameter"):
        elbo_loss(torch.tensor(1.0), nn.Linear(1, 1), num_data=3, kl_weight=0.0)


def test_elbo_gives_every_parameter_a_gradient() -> None:
    model = converted().train()
    loss = model(torch.randn(5, 2, dtype=torch.float64)).square().mean()
    elbo_loss(loss, model, num_data=5).backward()
    for site in sites(model):
        for parameter in (site.mean, site.raw):
            assert parameter.grad is not None
            assert (parameter.grad != 0).all()


# -- the schedule ------------------------------------------------------------------------------


@given(st.floats(0, 10), st.floats(0, 10), st.integers(1, 1000), st.integers(0, 2000))
def test_schedules_follow_their_definition(b0: float, b1: float, steps: int, step: int) -> None:
    t = min(step / steps, 1.0)
    linear = kl_schedule("linear", b0, b1, steps)
    cosine = kl_schedule("cosine", b0, b1, steps)
    assert linear(step) == pytest.approx(float(np.interp(step, [0, steps], [b0, b1])), abs=1e-12)
    assert cosine(step) == pytest.approx(
        b1 + (b0 - b1) * (1 + math.cos(math.pi * t)) / 2, abs=1e-12
    )
    assert linear(0) == cosine(0) == b0
    assert linear(steps) == cosine(steps + 1) == b1
    assert kl_schedule("constant", b0, b0, steps)(step) == b0


def test_a_schedule_is_a_picklable_value() -> None:
    schedule = kl_schedule("cosine", 0.0, 1.0, 7)
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    with pytest.raises(AttributeError):
        schedule.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("step", 0.0, 1.0, 5), "shape must be one of"),
        (("linear", -1.0, 1.0, 5), "start must be"),
        (("linear", 0.0, math.inf, 5), "end must be"),
        (("linear", 0.0, 1.0, 0), "steps must be"),
        (("linear", 0.0, 1.0, 2.5), "steps must be"),
        (("constant", 0.0, 1.0, 5), "needs start == end"),
    ],
)
def test_schedules_refuse_bad_arguments(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        kl_schedule(*arguments)


def test_a_schedule_refuses_a_negative_step() -> None:
    with pytest.raises(ArgumentError, match="step must be a number of at least 0"):
        kl_schedule("linear", 0.0, 1.0, 5)(-1)


# -- Bayesian linear regression, solved exactly -----------------------------------------------


class Regression:
    """y = X w + e with e ~ N(0, 1) and w ~ N(0, 1).

    The posterior is N(A^-1 X'y, A^-1) with A = X'X + 1; the best Gaussian with independent weights
    has the same mean and the variances 1 / A_ii (Bishop, 2006, section 10.1.2).
    """

    def __init__(self, size: int = 64, weights: int = 4) -> None:
        mixing = torch.eye(weights) + 0.5 * torch.diag(torch.ones(weights - 1), 1)
        self.x = (torch.randn(size, weights) @ mixing).double()
        self.y = self.x @ torch.randn(weights).double() + torch.randn(size).double()
        self.precision = self.x.T @ self.x + torch.eye(weights).double()
        self.mean = torch.linalg.solve(self.precision, self.x.T @ self.y)
        self.logvar = -self.precision.diagonal().log()
        self.model = bayesify.to_bbb(
            nn.Linear(weights, 1, bias=False).double(), initial_std=math.exp(-1.0)
        )
        [self.site] = sites(self.model.eval())

    def loss(self, seeds: Tensor) -> Tensor:
        """The mean of the ELBO's loss over some draws, in one call."""

        def output(seed: Tensor) -> Tensor:
            weights = draws(self.model, seed)
            out: Tensor = torch.func.functional_call(self.model, weights, (self.x,))
            return out[:, 0]

        nll = 0.5 * (torch.vmap(output)(seeds) - self.y).square().mean()
        return elbo_loss(nll, self.model, num_data=len(self.x))

    def gradients_at_optimum(self, seeds: Tensor) -> Tensor:
        """One row a draw: the gradient with respect to means and log variances."""
        with torch.no_grad():
            self.site.mean.copy_(self.mean)
            self.site.raw.copy_(self.logvar)
        rows = []
        for seed in seeds:
            with one_draw(self.model, seed=seed):
                nll = 0.5 * (self.model(self.x)[:, 0] - self.y).square().mean()
            loss = elbo_loss(nll, self.model, num_data=len(self.x))
            mean, raw = torch.autograd.grad(loss, [self.site.mean, self.site.raw])
            rows.append(torch.cat([mean[0], raw[0].double()]))
        return torch.stack(rows)


def test_elbo_is_stationary_at_the_mean_field_optimum() -> None:
    problem = Regression()
    gradients = problem.gradients_at_optimum(torch.arange(1000))
    standard_error = gradients.std(0) / math.sqrt(len(gradients))
    assert (gradients.mean(0).abs() < 5 * standard_error).all()


def test_training_finds_the_mean_field_optimum() -> None:
    problem, steps = Regression(), 200
    seeds = torch.arange(200)  # the same draws at every step, so that training converges
    optimizer = torch.optim.Adam(param_groups(problem.model, lr=0.2))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        problem.loss(seeds).backward()
        optimizer.step()
        schedule.step()
    found = torch.cat([problem.site.mean[0], problem.site.raw[0].double()]).detach()
    # These draws' own optimum differs from the true one by -H^-1 times their mean gradient there,
    # H being the Hessian: A for the means, 1/2 for the log variances, over N.
    half = 0.5 * torch.eye(len(problem.mean)).double()
    hessian = torch.block_diag(problem.precision, half) / len(problem.x)
    shifts = torch.linalg.solve(hessian, problem.gradients_at_optimum(seeds).T).T
    standard_error = shifts.std(0) / math.sqrt(len(seeds))
    error = (found - torch.cat([problem.mean, problem.logvar])).abs()
    assert (error < 5 * standard_error).all()
    assert standard_error[:4].max() < 0.02  # the posterior's standard deviations are about 0.1
    assert standard_error[4:].max() < 0.2


# -- sharded -----------------------------------------------------------------------------------


def _shard_and_compare(rank: int, folder: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    teacher = {"weight": torch.zeros(0), "bias": torch.zeros(0)}
    priors: list[Callable[[], Prior]] = [
        lambda: GaussianPrior(0.5, "initial"),
        lambda: MIXTURE,
        lambda: LivePrior(lambda name: (teacher[name], 2.0)),
    ]
    for prior, rows in itertools.product(priors, (5, 1)):  # with one row a process has nothing
        torch.manual_seed(0)
        teacher |= {"weight": torch.arange(3.0 * rows).view(rows, 3), "bias": torch.ones(rows)}
        model = bayesify.to_bbb(nn.Linear(3, rows), prior=prior(), initial_std=math.exp(-1.5))
        whole: dict[str, Any] = {}
        for sharded in (False, True):
            if sharded:
                fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
            model.zero_grad()
            with one_draw(model, seed=1):
                kl = kl_divergence(model)
            kl.backward()
            found: dict[str, Any] = {"kl": kl.detach()}
            for name, parameter in model.named_parameters():
                grad: Any = parameter.grad
                found[name] = grad.full_tensor() if sharded else grad.clone()
                if sharded:
                    placed: Any = parameter
                    assert grad.placements == placed.placements
            if sharded:
                assert hasattr(next(model.parameters()), "placements")
                torch.testing.assert_close(found, whole)
            whole = found
    Path(folder, f"done{rank}").touch()
    dist.barrier()
    os._exit(0)  # gloo's threads can abort an interpreter that shuts down beside a mesh


def test_kl_of_a_sharded_model_is_that_of_the_whole(tmp_path: Path) -> None:
    spawn(_shard_and_compare, (str(tmp_path),), nprocs=2)
    assert {p.name for p in tmp_path.glob("done*")} == {"done0", "done1"}
