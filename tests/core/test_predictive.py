"""predict(..., reduce="predictive"): what a model's likelihood makes of its draws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesify
from bayesify import ArgumentError
from bayesify.inference import Predictor
from bayesify.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood


def model(outputs: int) -> nn.Module:
    return bayesify.to_bbb(nn.Linear(2, outputs), initial_std=math.exp(-1.0))


@pytest.mark.parametrize(
    ("likelihood", "target"),
    [
        (Gaussian(0.5), torch.randn(30, 4)),
        (Gaussian("predicted"), torch.randn(30, 2)),
        (Categorical(), torch.randint(4, (30,))),
        (Bernoulli(), torch.randint(2, (30, 4))),
    ],
)
def test_it_is_the_mixture_of_the_draws(likelihood: Likelihood, target: Tensor) -> None:
    net, x = bayesify.set_likelihood_(model(4), likelihood), torch.randn(30, 2)
    found = bayesify.predict(net, x, num_samples=7, seed=3, reduce="predictive")
    drawn = bayesify.predict(net, x, num_samples=7, seed=3)
    each = torch.stack([likelihood.log_densities(f, target) for f in drawn])
    expected = each.logsumexp(0) - math.log(7)
    torch.testing.assert_close(found.log_prob(target), expected)
    means = torch.stack([likelihood.moments(likelihood.distribution(f))[0] for f in drawn])
    torch.testing.assert_close(found.mean, means.mean(0))
    torch.testing.assert_close(found.epistemic_std, means.std(0, correction=0))


def test_classes_agree_with_the_summary_of_probabilities() -> None:
    net, x = bayesify.set_likelihood_(model(4), Categorical()), torch.randn(30, 2)
    found = bayesify.predict(net, x, num_samples=7, seed=3, reduce="predictive")
    summary = bayesify.predict(net, x, num_samples=7, seed=3, reduce="probabilities")
    torch.testing.assert_close(found.mean, summary.mean)
    torch.testing.assert_close(found.epistemic_std, summary.std)
    torch.testing.assert_close(found.entropy(), summary.predictive_entropy)


def test_a_linear_gaussian_model_has_its_exact_predictive_distribution() -> None:
    """f(x) = w x with w ~ N(m, s^2): y ~ N(m x, s^2 x^2 + sigma^2)."""
    net = bayesify.to_bbb(nn.Linear(1, 1, bias=False), initial_std=0.3)
    with torch.no_grad():
        net.weight.fill_(2.0)  # type: ignore[operator]
    bayesify.set_likelihood_(net, Gaussian(0.4))
    x = torch.tensor([[0.0], [1.0], [3.0]])
    found = bayesify.predict(net, x, num_samples=4000, seed=0, reduce="predictive")
    exact = torch.distributions.Normal(2 * x, (0.09 * x**2 + 0.16).sqrt())
    torch.testing.assert_close(found.aleatoric_std, torch.full((3, 1), 0.4))
    torch.testing.assert_close(found.epistemic_std, 0.3 * x, rtol=0.05, atol=1e-6)
    low, high = found.interval(0.9)
    edge = torch.tensor(0.95)
    torch.testing.assert_close(high, exact.icdf(edge), rtol=0, atol=0.06)
    torch.testing.assert_close(low, exact.icdf(1 - edge), rtol=0, atol=0.06)
    y = torch.tensor([[0.1], [2.5], [5.0]])
    torch.testing.assert_close(found.log_prob(y), exact.log_prob(y), rtol=0, atol=0.05)
    few = bayesify.predict(net, x, num_samples=300, seed=0, reduce="predictive")
    torch.testing.assert_close(few.entropy(), exact.entropy(), rtol=0, atol=0.1)


def test_nothing_says_what_the_outputs_mean() -> None:
    with pytest.raises(ArgumentError, match=r"set_likelihood_\(model, Gaussian\(\)\), say"):
        bayesify.predict(model(1), torch.ones(2, 2), num_samples=2, reduce="predictive")
    wrong: Any = "quantiles"
    with pytest.raises(ArgumentError, match="'moments' or 'predictive', got 'quantiles'"):
        bayesify.predict(model(1), torch.ones(2, 2), num_samples=2, reduce=wrong)
    predictor = Predictor(
        model(1), num_samples=2, reduce="predictive", likelihood={0: Gaussian(1.0)}
    )
    with pytest.raises(ArgumentError, match="names the output 0"):
        predictor(torch.ones(2, 2))
