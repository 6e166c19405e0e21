"""Fits against exact posteriors: the objective is a sum over all targets of all examples.

The best diagonal Gaussian for a posterior N(m, A^-1) has the means m and the variances 1 / A_ii.
At it the gradients of an epoch add up to 0. They are asked for there by a fit whose rates are next
to nothing: one epoch tells what a thousand would find.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy import integrate, optimize
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import bayesify
from bayesify.likelihoods import FromDistribution, Gaussian
from bayesify.likelihoods import Heads as Several
from bayesify.training import Progress, fit


class Exact(NamedTuple):
    mean: Any
    std: Any


def exact(x: Tensor, y: Tensor, noise: float = 1.0, weights: Tensor | None = None) -> Exact:
    """The best diagonal posterior of y = x w + noise with a standard normal prior on w."""
    a, b = x.double().numpy(), y.double().numpy()
    scaled = a if weights is None else a * weights.double().numpy()[:, None]
    precision = scaled.T @ a / noise**2 + np.eye(a.shape[1])
    mean = np.linalg.solve(precision, scaled.T @ b / noise**2)
    return Exact(mean, 1 / np.sqrt(np.diag(precision)))


def found(model: nn.Module) -> Exact:
    [posterior] = bayesify.posteriors(model)
    mean = posterior.mean.detach().flatten().double().numpy()
    return Exact(mean, (0.5 * posterior.logvar.detach()).exp().flatten().double().numpy())


def linear(inputs: int, outputs: int = 1) -> nn.Module:
    # the noise of `local` is each example's own: a step's gradient is near its mean
    return bayesify.to_bbb(
        nn.Linear(inputs, outputs, bias=False), initial_std=math.exp(-2.0), estimator="local"
    )


def put(model: nn.Module, mean: Any, std: Any) -> nn.Module:
    [posterior] = bayesify.posteriors(model)
    with torch.no_grad():
        shape = posterior.mean.shape
        posterior.mean.copy_(torch.as_tensor(mean).view(shape))
        posterior.logvar.copy_(2 * torch.as_tensor(std).double().log().expand(shape))
    return model


def slopes(model: nn.Module, data: Any, likelihood: Any, **options: Any) -> dict[str, Any]:
    """Gradients of the parameters, summed over the steps of a fit that stays where it is."""
    total: dict[str, Tensor] = {}

    def add(_: Progress) -> None:
        named = [*model.named_parameters(), *likelihood.named_parameters()]
        for name, p in named:
            assert p.grad is not None
            total[name] = total.get(name, torch.zeros_like(p)) + p.grad

    arguments: dict[str, Any] = {"lr": 1e-12, "logvar_lr": 0.0, "max_grad_norm": math.inf}
    fit(model, data, likelihood=likelihood, on_step=add, **{**arguments, **options})
    return {name: value.flatten().double().numpy() for name, value in total.items()}


def test_a_convolution_on_images_of_targets() -> None:
    """84 images of 64 targets: sigma .0136. A mean over the targets would give .111."""
    x = torch.randn(84, 1, 8, 8)
    x *= math.sqrt(1 / 0.0136**2 - 1) / float(x.norm())
    y = 0.7 * x + torch.randn_like(x)
    theirs = exact(x.view(-1, 1), y.view(-1))
    assert theirs.std.tolist() == pytest.approx([0.0136], abs=1e-6)
    layer = nn.Conv2d(1, 1, 1, bias=False)
    model = bayesify.to_bbb(layer, initial_std=math.exp(-3.0), estimator="local")
    result = fit(model, TensorDataset(x, y), likelihood=Gaussian(1.0, dim=1), epochs=150,
                 batch_size=84, lr=0.05, logvar_lr=0.1, average=0.3)  # fmt: skip
    [posterior] = bayesify.posteriors(model)
    assert abs(float(posterior.mean.detach()) - theirs.mean[0]) < 0.3 * theirs.std[0]
    assert math.exp(0.5 * float(posterior.logvar.detach())) == pytest.approx(0.0136, rel=0.12)
    # what is shown is of one target
    assert result.losses[-1] == pytest.approx(0.5 * math.log(2 * math.pi) + 0.5, abs=0.05)
    assert result.noise_budget == pytest.approx(0.5 / 84 / 64)


def masked() -> tuple[Tensor, Tensor, Tensor, Exact, Exact]:
    """40 examples of 1 to 12 targets, more where the answers are others."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 12, 3, generator=generator)
    many = torch.arange(40) % 2 == 0
    w = torch.where(many[:, None], torch.tensor([0.9, -0.6, 0.3]), torch.tensor([-0.4, 0.5, -0.5]))
    y = (x * w[:, None]).sum(-1) + torch.randn(40, 12, generator=generator)
    counts = torch.where(many, torch.arange(40) % 4 + 9, torch.arange(40) % 3 + 1)
    known = torch.arange(12) < counts[:, None]
    y = y.masked_fill(~known, torch.nan)
    right = exact(x[known], y[known])
    share = (1 / counts)[:, None].expand(40, 12)  # a mean over the targets of each example
    wrong = exact(x[known], y[known], weights=share[known])
    return x, y[..., None], known, right, wrong


HOW: dict[str, tuple[dict[str, Any], int]] = {
    "one by one": ({"batch_size": 1}, 1),
    "in batches": ({"batch_size": 8}, 8),
    "accumulated": ({"batch_size": 4, "accumulate": 5}, 20),
    "a loader with a smaller last batch": ({"loader": 15}, 15),
    "accumulated from such a loader": ({"loader": 15, "accumulate": 3}, 45),
    "a stream": ({"batch_size": 8, "num_data": 40, "stream": True}, 8),
}


class Stream(IterableDataset[Any]):
    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __iter__(self) -> Any:
        return iter([self.data[i] for i in range(len(self.data))])


@pytest.mark.parametrize("how", HOW)
def test_uneven_masks(how: str) -> None:
    x, y, known, right, wrong = masked()
    assert np.abs((wrong.mean - right.mean) / right.std).max() > 1.5
    assert (wrong.std / right.std).max() > 2
    options, step = HOW[how]
    options = dict(options)
    data: Any = TensorDataset(x, y)
    if "loader" in options:
        data = DataLoader(data, options.pop("loader"))  # 15, 15 and 10
    if options.pop("stream", False):
        data = Stream(data)
    a = x[known].double().numpy()
    precision = a.T @ a + np.eye(3)

    def distance(at: Exact) -> Any:
        """How far the means of an epoch's gradients are from 0, in standard deviations."""
        found = slopes(put(linear(3), at.mean, 1e-6), data, Gaussian(1.0), epochs=1, **options)
        return np.abs(np.linalg.solve(precision, step * found["weight"]) / right.std).max()

    assert distance(right) < 0.01
    assert distance(wrong) > 1.5
    if how not in ("in batches", "a loader with a smaller last batch"):
        return
    for at, low, high in ((right, 0.0, 0.5), (wrong, 2.0, 99.0)):
        found = slopes(put(linear(3), *at), data, Gaussian(1.0), epochs=40, **options)
        # sigma^2 A_ii - 1; the draws' noise in it is 1 / sqrt(40)
        assert low <= np.abs(2 * step * found["weight_logvar"] / 40).max() < high


def test_learned_noise_of_several_outputs() -> None:
    n = 60
    x = torch.randn(n, 3)
    sigma = torch.tensor([0.5, 2.0])
    y = x @ torch.tensor([[0.8, -0.3], [-0.5, 0.1], [0.2, 1.0]]) + sigma * torch.randn(n, 2)
    # the noise at the optimum is the mean square of the residuals that the draws leave
    theirs, noises = [], []
    for j in range(2):
        noise = 1.0
        for _ in range(200):
            one = exact(x, y[:, j], noise)
            rest = y[:, j].double().numpy() - x.double().numpy() @ one.mean
            noise = math.sqrt(
                ((rest**2).sum() + (one.std**2 * (x.double().numpy() ** 2).sum(0)).sum()) / n
            )
        theirs.append(one)
        noises.append(noise)
    model, likelihood = linear(3, 2), Gaussian("learned")
    fit(model, TensorDataset(x, y), likelihood=likelihood, epochs=250, batch_size=n, lr=0.04,
        logvar_lr=0.08, average=0.3)  # fmt: skip
    [posterior] = bayesify.posteriors(model)
    ours = posterior.mean.detach().double().numpy()
    ours_std = (0.5 * posterior.logvar.detach()).exp().double().numpy()
    for j in range(2):
        assert np.abs((ours[j] - theirs[j].mean) / theirs[j].std).max() < 0.15
        assert np.abs(ours_std[j] / theirs[j].std - 1).max() < 0.15
    assert likelihood.std().detach().tolist() == pytest.approx(noises, rel=0.02)


def test_the_scale_of_the_targets_changes_units_alone() -> None:
    x = torch.randn(50, 2)
    y = 300 + 40 * (x @ torch.tensor([0.5, -0.2]) + 0.3 * torch.randn(50))
    likelihood = Gaussian("learned", location=300.0, scale=40.0)
    model, twin, other = linear(2), linear(2), Gaussian("learned")
    twin.load_state_dict(model.state_dict())
    options: dict[str, Any] = {"epochs": 20, "batch_size": 50, "lr": 0.02}
    fit(model, TensorDataset(x, y), likelihood=likelihood, **options)
    fit(twin, TensorDataset(x, (y - 300) / 40), likelihood=other, **options)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(likelihood.std(), 40 * other.std(), rtol=1e-3, atol=0)
    p = bayesify.predict(model, x, num_samples=3, seed=0, reduce="predictive")
    q = bayesify.predict(twin, x, num_samples=3, seed=0, reduce="predictive")
    torch.testing.assert_close(p.mean, 300 + 40 * q.mean, rtol=1e-3, atol=0.1)


def test_a_weight_of_two_is_a_row_twice() -> None:
    x = torch.randn(30, 2)
    y = (x @ torch.tensor([0.5, -0.5]) + 2 * torch.randn(30))[:, None]
    weights = torch.arange(30).float() % 4
    rows = weights.long()
    right = exact(x.repeat_interleave(rows, 0), y[:, 0].repeat_interleave(rows, 0))
    plain = exact(x, y[:, 0])
    data = TensorDataset(x, y, weights)
    a = x.double().numpy()
    precision = a.T @ (a * weights.double().numpy()[:, None]) + np.eye(2)
    for at, low, high in ((right, 0.0, 0.01), (plain, 0.4, 99.0)):
        found = slopes(put(linear(2), at.mean, 1e-6), data, Gaussian(1.0), epochs=1, batch_size=5)
        off = np.abs(np.linalg.solve(precision, 5 * found["weight"]) / right.std).max()
        assert low <= off < high
    found = slopes(put(linear(2), *right), data, Gaussian(1.0), epochs=200, batch_size=30)
    assert np.abs(2 * 30 * found["weight_logvar"] / 200).max() < 0.3


def test_poisson_counts_against_numerical_integration() -> None:
    x = torch.linspace(-1, 2, 40)[:, None]
    y = torch.poisson((0.6 * x).exp())
    a, b = x[:, 0].double().numpy(), y[:, 0].double().numpy()

    def bound(theta: Any) -> float:  # the ELBO has a closed form here
        mean, var = theta[0], math.exp(theta[1])
        data = (b * a * mean - np.exp(a * mean + a**2 * var / 2)).sum()
        return float(0.5 * (var + mean**2 - 1 - theta[1]) - data)

    best = optimize.minimize(bound, [0.0, 0.0], tol=1e-12).x
    mean, std = float(best[0]), math.exp(best[1] / 2)
    poisson = FromDistribution(lambda f: torch.distributions.Poisson(f.exp()))
    data = TensorDataset(x, y)
    found = slopes(put(linear(1), mean, std), data, poisson, epochs=200, batch_size=40)
    step = 40 / 200
    assert abs(step * found["weight"][0] * std) < 0.3  # in standard deviations
    assert abs(2 * step * found["weight_logvar"][0]) < 0.3

    model = linear(1)
    fit(model, data, likelihood=poisson, epochs=150, batch_size=40, lr=0.05, logvar_lr=0.1,
        average=0.3)  # fmt: skip
    [posterior] = bayesify.posteriors(model)
    peak = float((b * a * mean - np.exp(a * mean)).sum()) - 0.5 * mean**2

    def density(w: float) -> float:
        return math.exp(float((b * a * w - np.exp(a * w)).sum()) - 0.5 * w**2 - peak)

    moments = [integrate.quad(lambda w, k=k: w**k * density(w), -2, 3)[0] for k in range(3)]
    true_mean = moments[1] / moments[0]
    true_std = math.sqrt(moments[2] / moments[0] - true_mean**2)
    assert float(posterior.mean.detach()) == pytest.approx(true_mean, abs=0.3 * true_std)
    assert math.exp(0.5 * float(posterior.logvar.detach())) == pytest.approx(true_std, rel=0.1)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": self.a(x), "b": self.b(x)}


class Rows(Dataset[Any]):
    def __init__(self, x: Tensor, a: Tensor, b: Tensor) -> None:
        self.x, self.a, self.b = x, a, b

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return {"x": self.x[i], "a": self.a[i], "b": self.b[i]}


def test_several_heads_have_one_kl_and_each_its_exact_posterior() -> None:
    x = torch.randn(40, 2)
    a, b = x @ torch.tensor([1.0, 0.0]), x @ torch.tensor([0.0, 1.0])
    a, b = a + 0.5 * torch.randn(40), b + 2 * torch.randn(40)
    model = bayesify.to_bbb(Heads(), estimator="local")
    heads = Several({"a": Gaussian(0.5), "b": Gaussian(2.0)})
    theirs = {"a": exact(x, a, 0.5), "b": exact(x, b, 2.0)}
    for name, one in theirs.items():
        put(model.get_submodule(name), *one)
    found = slopes(model, Rows(x, a, b), heads, inputs="x", epochs=200, batch_size=40)
    for name, one in theirs.items():
        assert np.abs(2 * 40 * found[f"{name}.weight_logvar"] / 200).max() < 0.3
        assert np.abs(40 * found[f"{name}.weight"] * one.std / 200).max() < 0.3
