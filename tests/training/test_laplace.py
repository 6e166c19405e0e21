"""The Laplace approximation against loops by hand, closed forms and scipy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import bayesify
from bayesify.data import ImageData, load_dataset
from bayesify.errors import ArgumentError, BayesifyError
from bayesify.likelihoods import (
    Bernoulli,
    Categorical,
    FromDistribution,
    Gaussian,
    Likelihood,
)
from bayesify.models import InputConfig
from bayesify.seeds import fold
from bayesify.training import fisher, fit_laplace_
from bayesify.training.fisher import fisher_diagonal
from bayesify.training.holdout import held_out_loss

CPU = torch.device("cpu")


class Shared(nn.Module):
    """Convolution, norms, a weight used twice, a bare parameter, and one that is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, groups=2)
        self.bn = nn.BatchNorm2d(4)
        self.token = nn.Parameter(torch.randn(4))
        self.mix = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)
        self.twin = nn.Linear(4, 4)
        self.twin.weight = self.mix.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)).tanh().mean((2, 3)) + self.token
        x = self.mix(self.mix(x)).tanh() + self.twin(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Branching(Shared):
    """A forward that vmap cannot batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if float(x.sum()) > 0 else 0.5)


def data(n: int = 9) -> TensorDataset:
    return TensorDataset(torch.randn(n, 2, 7, 7), torch.randint(3, (n,)))


def trained_means(model: nn.Module) -> dict[str, Tensor]:
    return {p.name: p.mean for p in bayesify.posteriors(model)}


def by_hand(model: nn.Module, inputs: Tensor, labels: Tensor, weights: Tensor) -> dict[str, Any]:
    """Sum over examples and classes of weights times squared gradients, one backward each."""
    means = trained_means(model)
    total = {name: torch.zeros(mean.shape, dtype=torch.float64) for name, mean in means.items()}
    model.eval()
    for x, classes, row in zip(inputs, labels, weights, strict=True):
        for c, weight in zip(classes, row, strict=True):
            log_prob = model(x[None]).log_softmax(-1)[0, c]
            grads = torch.autograd.grad(log_prob, list(means.values()), allow_unused=True)
            for name, g in zip(means, grads, strict=True):
                if g is not None:
                    total[name] += weight.double() * g.double().square()
    return {name: value / len(inputs) for name, value in total.items()}


@pytest.mark.parametrize(
    ("kind", "numbers"), [(Shared, 1 << 27), (Shared, 250), (Branching, 1 << 27)]
)
def test_exact_and_empirical_fisher_equal_a_loop_over_examples(
    kind: type[Shared], numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fisher, "_GRADIENTS", numbers)
    model = bayesify.to_bbb(kind(), initial_std=math.exp(-2.0)).eval()
    images = data()
    inputs, labels = images.tensors
    batches = [(inputs[:5], labels[:5]), (inputs[5:], labels[5:])]
    probs = model(inputs).softmax(-1).detach()
    if kind is Branching:
        probs = torch.cat([model(x[None]) for x in inputs]).softmax(-1).detach()
        batches = [(x[None], y[None]) for x, y in zip(inputs, labels, strict=True)]
    every = torch.arange(3).expand(9, 3)
    for which, classes, weights in (
        ("exact", every, probs),
        ("empirical", labels[:, None], torch.ones(9, 1)),
    ):
        found, n = fisher_diagonal(model, batches, which, device=CPU)  # type: ignore[arg-type]
        expected = by_hand(model, inputs, classes, weights)
        assert n == 9
        assert found.keys() == expected.keys()
        assert "twin.weight" not in found  # tied: once
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-9)
            assert float(value.max()) > 0


def test_drawn_labels_have_the_exact_fisher_as_their_mean() -> None:
    model = bayesify.to_bbb(nn.Linear(3, 4), initial_std=math.exp(-2.0))
    inputs = torch.randn(5, 3)
    repeated = TensorDataset(inputs.repeat(2000, 1), torch.zeros(10_000).long())
    batches = [tuple(t[i : i + 500] for t in repeated.tensors) for i in range(0, 10_000, 500)]
    exact, _ = fisher_diagonal(model, [(inputs, torch.zeros(5).long())], "exact", device=CPU)
    drawn, _ = fisher_diagonal(model, batches, "mc", device=CPU, seed=1)
    other, _ = fisher_diagonal(model, batches, "mc", device=CPU, seed=2)
    again, _ = fisher_diagonal(model, batches, "mc", device=CPU, seed=1)
    for name in exact:
        torch.testing.assert_close(drawn[name], exact[name], rtol=0.1, atol=0.003)
        assert torch.equal(drawn[name], again[name])
        assert not torch.equal(drawn[name], other[name])


def test_logistic_regression_in_closed_form() -> None:
    n, prior_std = 40, 0.7
    inputs, labels = torch.randn(n, 3), torch.randint(2, (n,))
    model = bayesify.to_bbb(nn.Linear(3, 2), prior=bayesify.GaussianPrior(prior_std))
    before = [p.mean.detach().clone() for p in bayesify.posteriors(model)]
    result = fit_laplace_(
        model, TensorDataset(inputs, labels), fisher="exact", prior_precision=2.5, temperature=0.8
    )
    x = np.concatenate([inputs.double().numpy(), np.ones((n, 1))], 1)
    w = torch.cat([before[0], before[1][:, None]], 1).double().numpy()
    logits = x @ w.T
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    # the Hessian of the log loss: sum p (1 - p) x x', of which the diagonal is taken
    hessian = np.einsum("nc,ni->ci", p * (1 - p), x**2)
    variance = 0.8 / (hessian + 2.5 / prior_std**2)
    weight, bias = bayesify.posteriors(model)
    found = torch.cat([weight.logvar.detach(), bias.logvar.detach()[:, None]], 1).exp().numpy()
    np.testing.assert_allclose(found, variance, rtol=1e-4)
    assert all(
        torch.equal(a, p.mean) for a, p in zip(before, bayesify.posteriors(model), strict=True)
    )
    assert (result.examples, result.num_data, result.prior_precision) == (n, n, 2.5)
    assert result.mean_std == pytest.approx(np.sqrt(variance).mean(), rel=1e-4)
    assert isinstance(weight.prior, bayesify.GaussianPrior)
    assert weight.prior.std == pytest.approx(prior_std / math.sqrt(2.5))
    assert not model.training


@pytest.mark.parametrize("mean", [0.0, "initial"])
def test_the_prior_of_the_largest_marginal_likelihood(mean: Any) -> None:
    n = 60
    inputs = torch.randn(n, 4)
    labels = (inputs[:, 0] > 0).long()
    linear = nn.Linear(4, 2)
    model = bayesify.to_bbb(linear, prior=bayesify.GaussianPrior(0.5, mean=mean))
    with torch.no_grad():
        model.get_parameter("weight").add_(0.3)
    information, _ = fisher_diagonal(model, [(inputs, labels)], "exact", device=CPU)
    precision = np.concatenate([n * v.flatten().numpy() for v in information.values()])
    means = torch.cat([p.mean.detach().flatten() for p in bayesify.posteriors(model)])
    centre = torch.cat([p.detach().flatten() for p in linear.parameters()])
    distance = (means - (centre if mean == "initial" else 0.0)).double().numpy()

    def loss(exponent: float) -> float:
        prior = 10.0**exponent / 0.25
        logs = np.log(prior) - np.log(precision + prior)
        return float(-0.5 * (logs - prior * distance**2).sum())

    best = scipy.optimize.minimize_scalar(loss, bounds=(-6, 12), method="bounded")
    result = fit_laplace_(
        model, TensorDataset(inputs, labels), fisher="exact", prior_precision="marglik"
    )
    assert math.log10(result.prior_precision) == pytest.approx(best.x, abs=2e-3)
    assert result.log_marginal_likelihood == pytest.approx(-best.fun / n, rel=1e-5)
    torch.testing.assert_close(
        torch.cat([p.logvar.detach().flatten() for p in bayesify.posteriors(model)]).double(),
        -torch.from_numpy(np.log(precision + result.prior_precision / 0.25)),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_the_prior_that_held_out_examples_choose() -> None:
    inputs = torch.randn(300, 2)
    labels = ((inputs[:, 0] + torch.randn(300)) > 0).long()
    linear = nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[-8.0, 0.0], [8.0, 0.0]]))  # far too sure
    model = bayesify.to_bbb(linear)
    noisy = TensorDataset(inputs, labels)
    result = fit_laplace_(model, noisy, holdout=0.3, seed=4)
    assert result.num_data == 210
    losses = dict(result.tried)
    assert losses[result.prior_precision] == min(losses.values())
    assert [p for p, _ in result.tried] == sorted(losses, reverse=True)
    # the loss it names is that of the posterior it leaves: some uncertainty helps
    order = torch.randperm(300, generator=torch.Generator().manual_seed(fold(4, 1)))
    held = order[:90].sort().values
    batch = [(inputs[held], labels[held])]
    again = held_out_loss(model, batch, Categorical(), CPU, False, seed=4)
    assert again == pytest.approx(min(losses.values()), rel=1e-4)
    assert again < 0.9 * result.tried[0][1]


def test_held_out_images_may_be_changed_at_random() -> None:
    config = InputConfig(size=(1, 28, 28), mean=(0.3,), std=(0.4,))
    images = load_dataset("fashion-sample", split="train")
    few = ImageData("few", "train", images.classes, _Part(images, 300))
    found = []
    choices: list[Any] = ["none", "flip-crop", "flip-crop"]
    for augment in choices:
        torch.manual_seed(0)
        model = bayesify.to_bbb(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)))
        result = fit_laplace_(
            model, few, augment=augment, holdout=0.2, max_examples=20, model_config=config
        )
        found.append(result)
    assert found[0].tried != found[1].tried
    assert found[1].tried == found[2].tried


class _Part:
    def __init__(self, data: ImageData, size: int) -> None:
        self.data, self.size = data, size

    def __len__(self) -> int:
        return self.size

    def read(self, index: int) -> tuple[Tensor, int]:
        return self.data.read(index)


def test_a_part_of_the_examples_stands_for_all() -> None:
    inputs = torch.randn(1, 3).repeat(50, 1)  # all alike, so that any part is exact
    alike = TensorDataset(inputs, torch.arange(50) % 4)
    logvars = []
    for limit in (None, 7, 900):
        model = bayesify.to_bbb(nn.Linear(3, 4))
        torch.manual_seed(0)
        nn.init.normal_(model.get_parameter("weight"))
        nn.init.zeros_(model.get_parameter("bias"))
        seen: list[tuple[int, int]] = []
        result = fit_laplace_(
            model, alike, fisher="exact", prior_precision=1.0, max_examples=limit, batch_size=4,
            on_step=lambda done, all_, seen=seen: seen.append((done, all_)),  # type: ignore[misc]
        )  # fmt: skip
        count = 7 if limit == 7 else 50
        assert (result.examples, result.num_data) == (count, 50)
        assert seen[-1] == (count, count)
        logvars.append([p.logvar.detach().clone() for p in bayesify.posteriors(model)])
    for other in logvars[1:]:
        for a, b in zip(logvars[0], other, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("parameterization", ["exp", "softplus"])
def test_pruned_weights_stay_pruned(parameterization: Any) -> None:
    config = bayesify.BBBConfig(parameterization=parameterization)
    model = bayesify.prune_(bayesify.to_bbb(nn.Linear(6, 3), config=config), 0.5)
    pruned = {k: v == 0 for k, v in bayesify.stddev(model).items()}
    examples = TensorDataset(torch.randn(30, 6), torch.arange(30) % 3)
    fit_laplace_(model, examples, prior_precision="marglik")
    for name, std in bayesify.stddev(model).items():
        assert torch.equal(std == 0, pruned[name])
        assert bool(torch.isfinite(std).all())
    assert bayesify.sparsity(model).pruned == sum(int(v.sum()) for v in pruned.values()) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fisher": "ggn"}, "fisher must be one of 'mc', 'exact', 'empirical', got 'ggn'"),
        ({"prior_precision": 0.0}, "prior_precision must be above 0 and finite, or 'holdout'"),
        ({"prior_precision": "cv"}, "prior_precision must be"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"holdout": 1.0}, "holdout must be between 0 and 1"),
        ({"augment": "flip-crop"}, "augment works on an ImageData"),
        ({"augment": "flip-crop", "prior_precision": 1.0}, "there are none"),
        ({"max_examples": 0}, "max_examples must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"train": TensorDataset(torch.zeros(0, 2), torch.zeros(0))}, "data set is empty"),
        ({"train": TensorDataset(torch.zeros(4, 2))}, "Labels missing"),
        (
            {"train": TensorDataset(torch.zeros(4, 2), torch.arange(4)), "fisher": "empirical"},
            "Label 3 is out of range",
        ),
        ({"model": nn.Linear(2, 3)}, "has no Bayesian parameter"),
        ({"model": bayesify.to_bbb(nn.Linear(2, 1))}, "at least 2 classes"),
        (
            {"model": bayesify.to_bbb(nn.Linear(2, 3), prior=bayesify.ScaleMixturePrior())},
            "needs Gaussian priors; that of 'weight'",
        ),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    model = change.get("model", bayesify.to_bbb(nn.Linear(2, 3), initial_std=math.exp(-2.0)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train = TensorDataset(torch.randn(9, 2), torch.arange(9) % 3)
    with pytest.raises(BayesifyError, match=message):
        fit_laplace_(**{"model": model, "train": train, **change})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert issubclass(ArgumentError, BayesifyError)


@pytest.mark.parametrize("fisher", ["exact", "mc"])
@pytest.mark.parametrize("kind", ["fixed", "learned", "bernoulli", "masked", "poisson"])
def test_likelihoods_in_closed_form(kind: str, fisher: Any) -> None:
    """The diagonal of X' H X + 1, with H the curvature in each output."""
    n = 400
    x = torch.randn(n, 3)
    model = bayesify.to_bbb(nn.Linear(3, 1, bias=False), prior=bayesify.GaussianPrior(1.0))
    with torch.no_grad():
        f = at_means(model, x)
    likelihood: Likelihood
    y, weight = f + torch.randn(n, 1), torch.ones(n, 1)
    if kind == "bernoulli":
        likelihood, y = Bernoulli(), torch.randint(2, (n, 1)).float()
        weight = f.sigmoid() * (1 - f.sigmoid())
    elif kind == "poisson":
        likelihood = FromDistribution(lambda f: torch.distributions.Poisson(f.exp()))
        y, weight = torch.poisson(f.exp()), f.exp()
    elif kind == "learned":
        # mean = scale * f and noise = scale: in f the curvature is 1
        likelihood = Gaussian(outputs=1, scale=0.5)
    else:
        likelihood, weight = Gaussian(0.5), torch.full((n, 1), 4.0)
        if kind == "masked":
            y[::3], weight[::3] = torch.nan, 0.0
    data = TensorDataset(x, y)
    options: dict[str, Any] = {"fisher": fisher, "prior_precision": 1.0, "likelihood": likelihood}
    if kind == "poisson" and fisher == "exact":
        with pytest.raises(ArgumentError, match="no closed form of its curvature"):
            bayesify.fit_laplace_(model, data, **options)
        return
    bayesify.fit_laplace_(model, data, **options)
    expected = (x.square() * weight).sum(0) + 1
    [posterior] = bayesify.posteriors(model)
    found = (-posterior.logvar.detach()[0]).exp()
    # of drawn targets each term is a squared score, with the relative variance 2 and more
    torch.testing.assert_close(found, expected, rtol=1e-4 if fisher == "exact" else 0.6, atol=0)
    assert bayesify.likelihood_of(model) is likelihood


def at_means(model: nn.Module, x: Tensor) -> Tensor:
    with bayesify.at_mean(model):
        out: Tensor = model(x)
    return out


def test_held_out_targets_choose_the_prior_by_the_likelihood() -> None:
    x = torch.randn(60, 2)
    data = TensorDataset(x, x @ torch.tensor([[0.5], [-0.5]]) + 0.3 * torch.randn(60, 1))
    model = bayesify.to_bbb(nn.Linear(2, 1))
    found = bayesify.fit_laplace_(model, data, likelihood=Gaussian(0.3), holdout=0.3, seed=2)
    assert len(found.tried) > 2
    assert found.prior_precision == min(found.tried, key=lambda pair: pair[1])[0]
