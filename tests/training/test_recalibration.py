"""The one scale of a likelihood on held-out data, and conformal intervals and sets."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import optimize
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bayesify
from bayesify import ArgumentError, recalibrate_
from bayesify.likelihoods import (
    Bernoulli,
    Categorical,
    FromDistribution,
    Gaussian,
    Heads,
    Likelihood,
    likelihood_of,
)
from bayesify.metrics import fit_temperature

X = torch.randn(120, 2)


def test_the_noise_of_one_prediction_in_closed_form() -> None:
    net = nn.Linear(2, 1)
    y = net(X).detach() + 2.5 * torch.randn(120, 1)
    y[::7] = torch.nan
    bayesify.set_likelihood_(net, Gaussian(0.4))
    found = recalibrate_(net, TensorDataset(X, y), batch_size=50)
    rest = (y - net(X).detach())[~y.isnan()]
    assert found == pytest.approx(float(rest.square().mean().sqrt()) / 0.4, rel=1e-3)
    likelihood = likelihood_of(net)
    assert isinstance(likelihood, Gaussian)
    assert float(likelihood.std()) == pytest.approx(0.4 * found)  # type: ignore[operator]
    # again: the number is the scale itself, not a change of it
    assert recalibrate_(net, DataLoader(TensorDataset(X, y), 30)) == pytest.approx(found, rel=1e-3)


def test_the_temperature_of_one_prediction_is_that_of_the_metrics() -> None:
    net, labels = nn.Linear(2, 4), torch.randint(4, (120,))
    with torch.no_grad():
        net.weight.mul_(4)
    bayesify.set_likelihood_(net, Categorical())
    found = recalibrate_(net, TensorDataset(X, labels))
    assert found == pytest.approx(fit_temperature(net(X).detach(), labels), rel=1e-2)  # flat there


@pytest.mark.parametrize("kind", ["categorical", "bernoulli", "gaussian"])
def test_the_scale_divides_each_draw(kind: str, tmp_path: Path) -> None:
    net = bayesify.to_bbb(nn.Linear(2, 3), initial_std=1.0)
    with bayesify.at_mean(net), torch.no_grad():
        f = net(X)
    likelihood: Likelihood
    if kind == "categorical":
        likelihood, y = Categorical(), torch.distributions.Categorical(logits=f).sample()
    elif kind == "bernoulli":
        likelihood, y = Bernoulli(), torch.bernoulli(f.sigmoid()).long()
    else:
        likelihood, y = Gaussian(0.5), torch.randn(120, 3)
    bayesify.set_likelihood_(net, likelihood)
    found = recalibrate_(net, TensorDataset(X, y), num_samples=6, seed=2)
    drawn = bayesify.predict(net, X, num_samples=6, seed=2).double()

    def loss(exponent: float) -> float:
        c = math.exp(exponent)
        each: Tensor
        if kind == "categorical":
            each = (drawn / c).log_softmax(-1).gather(2, y.expand(6, -1)[..., None])[..., 0]
        elif kind == "bernoulli":
            each = -torch.nn.functional.softplus((1 - 2 * y) * drawn / c)
        else:
            each = torch.distributions.Normal(drawn, 0.5 * c).log_prob(y)
        return -float((each.logsumexp(0) - math.log(6)).sum())

    best = optimize.minimize_scalar(loss, bounds=(-4, 4), method="bounded").x
    assert found == pytest.approx(math.exp(best), rel=1e-2)
    before = bayesify.predict(net, X, num_samples=6, seed=2, reduce="predictive")
    bayesify.save(net, tmp_path / "a")
    again = bayesify.load(tmp_path / "a", nn.Linear(2, 3))
    after = bayesify.predict(again, X, num_samples=6, seed=2, reduce="predictive")
    assert torch.equal(before.log_prob(y), after.log_prob(y))
    sets, same = before.conformal(0.8), after.conformal(0.8)
    assert all(map(torch.equal, sets, same))


def test_conformal_intervals_cover() -> None:
    """A model that is wrong, with noise that is far too small, and covers all the same."""
    net = bayesify.to_bbb(nn.Linear(2, 1), initial_std=math.exp(-3.0))
    bayesify.set_likelihood_(net, Gaussian(0.05))
    x = torch.randn(4400, 2)
    y = x[:, :1] ** 2 + (1 + x[:, 1:].abs()) * torch.randn(4400, 1)
    recalibrate_(net, TensorDataset(x[:400], y[:400]), num_samples=5)
    found = bayesify.predict(net, x[400:], num_samples=5, seed=0, reduce="predictive")
    for level in (0.5, 0.9):
        low, high = found.conformal(level)
        share = float(((y[400:] >= low) & (y[400:] <= high)).double().mean())
        # of the 400 scores: a share of Beta(n level, n (1 - level))
        assert abs(share - level) < 4 * math.sqrt(level * (1 - level) * (1 / 400 + 1 / 4000))


def test_conformal_sets_hold_the_label() -> None:
    net, x = nn.Linear(2, 4), torch.randn(4400, 2)
    labels = torch.distributions.Categorical(logits=3 * x @ torch.randn(2, 4)).sample()
    bayesify.set_likelihood_(net, Categorical())
    recalibrate_(net, TensorDataset(x[:400], labels[:400]))
    likelihood = likelihood_of(net)
    assert likelihood is not None
    found = likelihood.predictive([net(x[400:])])
    held = found.conformal(0.9)
    share = float(held.gather(1, labels[400:, None]).double().mean())
    assert abs(share - 0.9) < 4 * math.sqrt(0.09 * (1 / 400 + 1 / 4000))
    # the rank: of 400 scores the 361st, for ceil(401 * .9) = 361
    scores = likelihood.scores
    assert scores is not None
    assert torch.equal(held, found.mean >= 1 - float(scores[360]))


def test_few_scores_give_everything() -> None:
    net, x = nn.Linear(2, 1), torch.randn(5, 2)
    bayesify.set_likelihood_(net, Gaussian(1.0))
    recalibrate_(net, TensorDataset(x, torch.randn(5, 1)))
    likelihood = likelihood_of(net)
    assert likelihood is not None
    found = likelihood.predictive([net(x).detach()])
    assert (found.conformal(0.95).high == math.inf).all()
    assert (found.conformal(0.8).high < math.inf).all()


def test_heads_have_a_scale_each() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 1), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": self.a(x), "b": self.b(x)}

    net = Two()
    y, labels = torch.randn(120, 1), torch.randint(3, (120,))
    rows: Any = [{"x": X[i], "a": y[i], "b": labels[i]} for i in range(120)]
    heads = Heads({"a": Gaussian(1.0), "b": Categorical()})
    bayesify.set_likelihood_(net, heads)
    found: Any = recalibrate_(net, DataLoader(rows, 50), inputs="x")
    one = bayesify.set_likelihood_(nn.Sequential(net.b), Categorical())
    assert found["b"] == pytest.approx(recalibrate_(one, TensorDataset(X, labels)), rel=1e-3)
    assert set(found) == {"a", "b"}


def test_bad_input() -> None:
    net, data = nn.Linear(2, 1), TensorDataset(X, torch.randn(120, 1))
    with pytest.raises(ArgumentError, match="needs a likelihood"):
        recalibrate_(net, data)
    poisson = FromDistribution(lambda f: torch.distributions.Poisson(f.exp()))
    with pytest.raises(ArgumentError, match="no temperature and no scale"):
        recalibrate_(bayesify.set_likelihood_(net, poisson), data)
    bayesify.set_likelihood_(net, Gaussian(1.0))
    with pytest.raises(ArgumentError, match="no target, or all are masked"):
        recalibrate_(net, TensorDataset(X, torch.full((120, 1), torch.nan)))
    with pytest.raises(ArgumentError, match="needs the scores of held-out data"):
        Gaussian(1.0).predictive([torch.zeros(2, 1)]).conformal(0.9)
