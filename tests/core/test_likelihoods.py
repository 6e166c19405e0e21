"""Densities of targets, and what many draws predict, against scipy and loops."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor, nn
from torch.nn import functional as F

from bayesify import ArgumentError
from bayesify.likelihoods import (
    Bernoulli,
    Categorical,
    FromDistribution,
    Gaussian,
    Heads,
    Likelihood,
    as_likelihood,
    likelihood_of,
    set_likelihood_,
)


def poisson() -> FromDistribution:
    return FromDistribution(lambda f: torch.distributions.Poisson(f.exp()))


# -- densities -----------------------------------------------------------------------------------


def test_gaussian_densities_are_those_of_scipy() -> None:
    f, y = torch.randn(5, 3), 10 + 4 * torch.randn(5, 3)
    likelihood = Gaussian(location=torch.tensor([9.0, 10.0, 11.0]), scale=2.0, outputs=3)
    assert likelihood.log_noise is not None
    with torch.no_grad():
        likelihood.log_noise.copy_(torch.tensor([0.5, -1.0, 0.0]))
    sigma = 2 * np.exp([0.5, -1.0, 0.0])
    mean = np.array([9.0, 10.0, 11.0]) + 2 * f.numpy()
    expected = stats.norm.logpdf(y.numpy(), mean, sigma).sum(1)
    assert likelihood.log_prob(f, y).detach().numpy() == pytest.approx(expected, rel=1e-5)
    assert likelihood.std().detach().numpy() == pytest.approx(sigma)

    fixed = Gaussian(0.7)
    expected = stats.norm.logpdf(y.numpy(), f.numpy(), 0.7).sum(1)
    assert fixed.log_prob(f, y).numpy() == pytest.approx(expected, rel=1e-5)


def test_predicted_noise_is_the_second_half_of_the_outputs() -> None:
    f, y = torch.randn(4, 6, 2, 3), torch.randn(4, 3, 2, 3)
    found = Gaussian("predicted", dim=1, scale=3.0).log_prob(f, y)
    sigma = 3 * (np.log1p(np.exp(f[:, 3:].numpy())) + 1e-6)
    expected = stats.norm.logpdf(y.numpy(), 3 * f[:, :3].numpy(), sigma).sum((1, 2, 3))
    assert found.numpy() == pytest.approx(expected, rel=1e-5)


def test_learned_noise_takes_its_shape_from_the_first_output() -> None:
    likelihood = Gaussian(dim=1)
    with pytest.raises(ArgumentError, match="no shape before it has seen an output"):
        likelihood.std()
    found = likelihood.log_prob(torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4))
    assert [p.shape for p in likelihood.parameters()] == [(3,)]
    assert found.tolist() == pytest.approx([48 * stats.norm.logpdf(1)] * 2)
    found.sum().backward()
    assert likelihood.log_noise is not None
    assert likelihood.log_noise.grad is not None
    # d log N / d log sigma = z^2 - 1 = 0 at z = 1
    assert likelihood.log_noise.grad.tolist() == pytest.approx([0.0] * 3, abs=1e-5)
    with pytest.raises(ArgumentError, match="learned noise is of 3 outputs, and the model gives 2"):
        likelihood.log_prob(torch.zeros(2, 2, 4, 4), torch.ones(2, 2, 4, 4))


@pytest.mark.parametrize("dim", [1, -2])
def test_categorical_densities_equal_a_loop(dim: int) -> None:
    logits, labels = torch.randn(3, 5, 4), torch.randint(5, (3, 4))
    labels[0, 1] = labels[2] = -7
    probs = logits.double().softmax(1)
    expected = [
        sum(math.log(probs[i, labels[i, j], j]) for j in range(4) if labels[i, j] != -7)
        for i in range(3)
    ]
    likelihood = Categorical(dim, ignore_index=-7)
    assert likelihood.log_prob(logits, labels).tolist() == pytest.approx(expected, rel=1e-5)
    assert likelihood.counts(labels).tolist() == [3, 4, 0]
    assert likelihood.log_prob(logits, labels)[2] == 0


def test_bernoulli_densities_are_those_of_scipy() -> None:
    f, y = torch.randn(6, 3), torch.randint(2, (6, 3))
    expected = stats.bernoulli.logpmf(y.numpy(), f.double().sigmoid().numpy()).sum(1)
    for target in (y, y.float(), y.bool()):
        assert Bernoulli().log_prob(f, target).numpy() == pytest.approx(expected, rel=1e-5)
    single = Bernoulli(dim=-1).log_prob(f[:, :1], y[:, 0])
    expected = stats.bernoulli.logpmf(y[:, 0].numpy(), f[:, 0].double().sigmoid().numpy())
    assert single.numpy() == pytest.approx(expected, rel=1e-5)


def test_any_distribution_of_torch() -> None:
    f, y = torch.randn(4, 3), torch.randint(5, (4, 3))
    expected = stats.poisson.logpmf(y.numpy(), f.double().exp().numpy()).sum(1)
    assert poisson().log_prob(f, y).numpy() == pytest.approx(expected, rel=1e-5)
    student = FromDistribution(lambda f: torch.distributions.StudentT(4.0, f[:, 0], f[:, 1].exp()))
    expected = stats.t.logpdf(y[:, 0].numpy(), 4.0, f[:, 0].numpy(), f[:, 1].exp().numpy())
    assert student.log_prob(f, y[:, 0].float()).numpy() == pytest.approx(expected, rel=1e-5)


KINDS: dict[str, Callable[[], tuple[Likelihood, Tensor, Tensor]]] = {
    "learned": lambda: (Gaussian(outputs=3), torch.randn(4, 3), torch.randn(4, 3)),
    "predicted": lambda: (Gaussian("predicted"), torch.randn(4, 6), torch.randn(4, 3)),
    "bernoulli": lambda: (Bernoulli(), torch.randn(4, 3), torch.randint(2, (4, 3)).float()),
    "categorical": lambda: (Categorical(1), torch.randn(4, 5, 3), torch.randint(5, (4, 3))),
    "poisson": lambda: (poisson(), torch.randn(4, 3), torch.randint(5, (4, 3)).float()),
    "beta": lambda: (
        FromDistribution(lambda f: torch.distributions.Beta(f.exp(), f.exp() / 2)),
        torch.randn(4, 3),
        torch.rand(4, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_target_adds_nothing_and_gets_no_gradient(kind: str) -> None:
    likelihood, f, y = KINDS[kind]()
    mask = torch.rand(4, 3) < 0.5
    mask[1], mask[0, 0], mask[0, 1] = False, False, True
    f.requires_grad_(True)

    def each(i: int, j: int) -> float:
        one = torch.zeros(4, 3, dtype=torch.bool)
        one[i, j] = True
        return float(likelihood.log_prob(f, (y, one)).detach()[i])

    found = likelihood.log_prob(f, (y, mask))
    expected = [sum(each(i, j) for j in range(3) if mask[i, j]) for i in range(4)]
    assert found.detach().tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert found[1] == 0
    [grad] = torch.autograd.grad(found.sum(), f)
    assert grad.isfinite().all()
    assert (grad[1] == 0).all()
    assert (grad[0] != 0).any()
    if kind != "categorical":  # NaN says the same
        unknown = y.masked_fill(~mask, torch.nan)
        assert torch.equal(likelihood.log_prob(f, unknown), found)
        assert likelihood.counts(unknown).tolist() == mask.sum(1).tolist()
    assert likelihood.counts((y, mask)).tolist() == mask.sum(1).tolist()
    assert likelihood.counts(y).tolist() == [3] * 4


def test_what_changes_the_training_alone() -> None:
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, -100, 1])
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0])
    likelihood = Categorical(weight=weight, label_smoothing=0.1)
    expected = F.cross_entropy(
        logits, labels, weight, reduction="none", label_smoothing=0.1, ignore_index=-100
    )
    torch.testing.assert_close(likelihood.objective(logits, labels), -expected)
    plain = Categorical()
    assert torch.equal(likelihood.log_prob(logits, labels), plain.log_prob(logits, labels))
    assert torch.equal(plain.objective(logits, labels), plain.log_prob(logits, labels))

    f, y = torch.randn(5, 2), torch.randint(2, (5, 2))
    rare = Bernoulli(pos_weight=torch.tensor([3.0, 1.0]))
    expected = F.binary_cross_entropy_with_logits(
        f, y.float(), pos_weight=torch.tensor([3.0, 1.0]), reduction="none"
    ).sum(1)
    torch.testing.assert_close(rare.objective(f, y), -expected)
    assert torch.equal(rare.log_prob(f, y), Bernoulli().log_prob(f, y))


def test_a_temperature_divides_the_logits() -> None:
    logits, labels = torch.randn(6, 4), torch.randint(4, (6,))
    torch.testing.assert_close(
        Categorical(temperature=2.5).log_prob(logits, labels),
        Categorical().log_prob(logits / 2.5, labels),
    )
    y = torch.randint(2, (6, 4))
    torch.testing.assert_close(
        Bernoulli(temperature=2.5).log_prob(logits, y), Bernoulli().log_prob(logits / 2.5, y)
    )
    f, t = torch.randn(6, 1), torch.randn(6)
    torch.testing.assert_close(
        Gaussian(0.5, noise_scale=3.0).log_prob(f, t), Gaussian(1.5).log_prob(f, t)
    )


def test_location_and_scale_of_the_targets() -> None:
    y = torch.tensor([[1.0, 10.0], [3.0, torch.nan], [5.0, 20.0]])
    likelihood = Gaussian().standardise_(y)
    assert likelihood.location.tolist() == pytest.approx([3.0, 15.0])
    assert likelihood.scale.tolist() == pytest.approx([math.sqrt(8 / 3), 5.0])
    images = Gaussian(dim=1).standardise_(torch.randn(4, 3, 5, 5))
    assert images.location.shape == (3,)
    assert Gaussian().standardise_(torch.tensor([0.0, 2.0])).scale.tolist() == [1.0]
    with pytest.raises(ArgumentError, match="all equal"):
        Gaussian().standardise_(torch.ones(3, 2))


# -- the curvature -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fixed", "learned", "predicted", "bernoulli", "categorical"])
def test_the_curvature_is_the_mean_hessian_over_targets(kind: str) -> None:
    likelihood, f, y = (
        (Gaussian(0.6, scale=2.0), torch.randn(4, 3), torch.randn(4, 3))
        if kind == "fixed"
        else KINDS[kind]()
    )
    mask = torch.ones(y.shape, dtype=torch.bool)
    mask[:, 1] = False
    total = torch.zeros(4, f[0].numel(), f[0].numel())
    for vector in likelihood.curvature(f, (y, mask)):
        assert vector.shape == f.shape
        v = vector.detach().flatten(1)
        total += v[:, :, None] * v[:, None, :]
    # the Fisher information as the mean of squared scores over many targets of the model's own
    generator = torch.Generator().manual_seed(0)
    mean = torch.zeros_like(total)
    number = 1000
    g = f.clone().requires_grad_(True)
    for _ in range(number):
        drawn = likelihood.sample(f, (y, mask), generator)
        [score] = torch.autograd.grad(likelihood.log_prob(g, drawn).sum(), g)
        s = score.flatten(1)
        mean += s[:, :, None] * s[:, None, :] / number
    bound = 6 * float(total.max()) * math.sqrt(3 / number)
    assert (total - mean).abs().max() < bound
    assert total.max() > 3 * bound


def test_a_curvature_without_a_closed_form_is_refused() -> None:
    with pytest.raises(ArgumentError, match="fisher='mc'"):
        list(poisson().curvature(torch.zeros(1, 1), torch.zeros(1, 1)))


# -- predictive distributions --------------------------------------------------------------------


def mixture() -> tuple[Any, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    outputs = 2 * torch.randn(7, 5, 4)
    found = Gaussian("predicted", scale=1.5).predictive(outputs)
    means = 1.5 * outputs[..., :2].double().numpy()
    stds = 1.5 * (np.log1p(np.exp(outputs[..., 2:].double().numpy())) + 1e-6)
    return found, means, stds


def test_moments_of_a_gaussian_mixture() -> None:
    found, means, stds = mixture()
    assert found.mean.numpy() == pytest.approx(means.mean(0), rel=1e-5)
    assert found.epistemic_std.numpy() == pytest.approx(means.std(0), rel=1e-5)
    assert found.aleatoric_std.numpy() == pytest.approx(np.sqrt((stds**2).mean(0)), rel=1e-5)
    second = (stds**2 + means**2).mean(0) - means.mean(0) ** 2
    assert found.std.numpy() == pytest.approx(np.sqrt(second), rel=1e-5)
    assert found.num_samples == 7


def test_densities_and_entropy_of_a_gaussian_mixture() -> None:
    found, means, stds = mixture()
    y = torch.randn(5, 2)
    expected = np.log(stats.norm.pdf(y.numpy(), means, stds).mean(0))
    assert found.log_prob(y).numpy() == pytest.approx(expected, rel=1e-4)

    def density(t: float, i: int, j: int) -> float:
        return float(stats.norm.pdf(t, means[:, i, j], stds[:, i, j]).mean())

    for i, j in ((0, 0), (3, 1)):
        points = sorted(means[:, i, j])
        entropy, _ = integrate.quad(
            lambda t, i=i, j=j: -density(t, i, j) * math.log(density(t, i, j) + 1e-300),
            points[0] - 40, points[-1] + 40, points=points, limit=500,
        )  # fmt: skip
        assert float(found.entropy()[i, j]) == pytest.approx(entropy, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("level", [1e-6, 0.05, 0.5, 0.9, 0.999])
def test_quantiles_of_a_gaussian_mixture(level: float) -> None:
    found, means, stds = mixture()
    quantile = found.quantile(level).double().numpy()
    assert stats.norm.cdf(quantile, means, stds).mean(0) == pytest.approx(level, rel=2e-4)
    assert found.cdf(found.quantile(level)).numpy() == pytest.approx(level, rel=2e-4)


def test_quantiles_where_components_are_far_apart_and_narrow() -> None:
    outputs = torch.tensor([[[0.0]], [[1000.0]]])
    found = Gaussian(1e-3).predictive(outputs)
    assert float(found.quantile(0.25)) == pytest.approx(0.0, abs=1e-6)
    assert float(found.quantile(0.75)) == pytest.approx(1000.0)
    assert float(found.quantile(0.4)) == pytest.approx(1e-3 * stats.norm.ppf(0.8), rel=1e-4)


def test_an_interval_of_one_draw_is_the_gaussian_one() -> None:
    low, high = Gaussian(2.0).predictive(torch.ones(1, 3, 1)).interval(0.9)
    assert low.flatten().tolist() == pytest.approx([1 + 2 * stats.norm.ppf(0.05)] * 3)
    assert high.flatten().tolist() == pytest.approx([1 + 2 * stats.norm.ppf(0.95)] * 3)


def test_classes_and_yes_or_no_of_many_draws() -> None:
    logits, labels = torch.randn(6, 4, 5, 3), torch.randint(5, (4, 3))
    labels[0, 0] = -100
    found = Categorical(1).predictive(logits)
    probs = logits.double().softmax(2)
    torch.testing.assert_close(found.mean.double(), probs.mean(0), rtol=1e-5, atol=1e-6)
    aleatoric = (probs * (1 - probs)).mean(0).sqrt()
    torch.testing.assert_close(found.aleatoric_std.double(), aleatoric, rtol=1e-5, atol=1e-6)
    epistemic = probs.std(0, correction=0)
    torch.testing.assert_close(found.epistemic_std.double(), epistemic, rtol=1e-4, atol=1e-6)
    picked = probs.mean(0).gather(1, labels.clamp_min(0)[:, None])[:, 0].log()
    picked[0, 0] = 0
    torch.testing.assert_close(found.log_prob(labels).double(), picked, rtol=1e-5, atol=1e-6)
    entropy = -(probs.mean(0) * probs.mean(0).log()).sum(1)
    torch.testing.assert_close(found.entropy().double(), entropy, rtol=1e-5, atol=1e-6)
    with pytest.raises(ArgumentError, match="no order"):
        found.interval(0.9)

    coins, y = torch.randn(6, 4, 3), torch.randint(2, (4, 3))
    found = Bernoulli().predictive(coins)
    p = coins.double().sigmoid().mean(0)
    torch.testing.assert_close(found.mean.double(), p, rtol=1e-5, atol=1e-6)
    expected = torch.where(y == 1, p, 1 - p).log()
    torch.testing.assert_close(found.log_prob(y).double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.quantile(0.3), (0.3 > 1 - found.mean).float())
    torch.testing.assert_close(
        found.entropy().double(), -(p * p.log() + (1 - p) * (1 - p).log()), rtol=1e-5, atol=1e-6
    )


def test_a_mixture_of_poissons() -> None:
    outputs = torch.randn(5, 3, 2)
    found = poisson().predictive(outputs)
    rates = outputs.double().exp().numpy()
    assert found.mean.numpy() == pytest.approx(rates.mean(0), rel=1e-5)
    assert found.aleatoric_std.numpy() == pytest.approx(np.sqrt(rates.mean(0)), rel=1e-5)
    assert found.epistemic_std.numpy() == pytest.approx(rates.std(0), rel=1e-5)
    y = torch.randint(4, (3, 2))
    expected = np.log(stats.poisson.pmf(y.numpy(), rates).mean(0))
    assert found.log_prob(y).numpy() == pytest.approx(expected, rel=1e-4)
    quantile = found.quantile(0.8).numpy()
    above = stats.poisson.cdf(quantile, rates).mean(0)
    below = stats.poisson.cdf(quantile - 1, rates).mean(0)
    slack = 4 * math.sqrt(0.8 * 0.2 / 8192)
    assert (above > 0.8 - slack).all()
    assert (below < 0.8 + slack).all()
    assert torch.equal(found.quantile(0.8), found.quantile(0.8))


def test_samples_of_a_mixture() -> None:
    found, means, _ = mixture()
    state = torch.get_rng_state()
    drawn = found.sample(7_000).double().numpy()
    assert torch.equal(state, torch.get_rng_state())
    assert drawn.shape == (7_000, 5, 2)
    std = found.std.numpy()
    assert np.abs(drawn.mean(0) - means.mean(0)).max() < 5 * (std / math.sqrt(7_000)).max()
    share = (drawn < found.quantile(0.3).numpy()).mean(0)
    assert share == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 7_000))
    other = found.sample(10, torch.Generator().manual_seed(1))
    assert not np.allclose(drawn[:10], other.numpy())


def test_outputs_too_large_to_keep_leave_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = torch.randn(6, 4, 8)
    whole = Gaussian(0.5).predictive(outputs)
    monkeypatch.setattr("bayesify.likelihoods.predictive.KEPT_BYTES", 4 * outputs[0].nbytes)
    found = Gaussian(0.5).predictive(outputs)
    for name in ("mean", "aleatoric_std", "epistemic_std", "std"):
        assert torch.equal(getattr(found, name), getattr(whole, name))
    for call in (lambda: found.interval(0.9), lambda: found.sample(), lambda: found.entropy()):
        with pytest.raises(ArgumentError, match="too large to be kept"):
            call()


# -- several heads -------------------------------------------------------------------------------


def test_heads_add_up() -> None:
    depth, kind = Gaussian(0.5, dim=1), Categorical(1)
    heads = as_likelihood({"depth": depth, "kind": kind})
    f = {"depth": torch.randn(3, 1, 4), "kind": torch.randn(3, 5, 4), "other": torch.zeros(3)}
    y = {"depth": torch.randn(3, 4), "kind": torch.randint(5, (3, 4))}
    expected = depth.log_prob(f["depth"], y["depth"]) + kind.log_prob(f["kind"], y["kind"])
    torch.testing.assert_close(heads.log_prob(f, y), expected)
    assert heads.counts(y).tolist() == [8] * 3
    places = Heads({0: depth, 1: kind})
    pair = (f["depth"], f["kind"]), (y["depth"], y["kind"])
    torch.testing.assert_close(places.log_prob(*pair), expected)
    found: Any = heads.predictive([f, f])
    assert found["kind"].mean.shape == (3, 5, 4)
    with pytest.raises(ArgumentError, match="names the output 'kind', and there is: the outputs d"):
        heads.log_prob({"depth": f["depth"]}, y)
    with pytest.raises(ArgumentError, match="names the target 'kind'"):
        heads.log_prob(f, {"depth": y["depth"]})
    with pytest.raises(ArgumentError, match="a likelihood for each"):
        as_likelihood({"depth": nn.MSELoss()})


# -- bad input -----------------------------------------------------------------------------------

Z, L = torch.zeros, torch.zeros(4).long()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Gaussian(0.0), "noise must be 'learned', 'predicted' or a finite standard dev"),
        (lambda: Gaussian(-1.0), "noise must be"),
        (lambda: Gaussian("known"), "noise must be"),  # type: ignore[arg-type]
        (lambda: Gaussian(scale=0.0), "scale must be finite numbers above 0"),
        (lambda: Gaussian(scale=torch.tensor([1.0, -1.0])), "scale must be"),
        (lambda: Gaussian(location=math.nan), "location must be finite"),
        (lambda: Gaussian(dim=0), "dim must not be 0"),
        (lambda: Gaussian(dim=1.5), "dim must be the number of an axis"),  # type: ignore[arg-type]
        (lambda: Gaussian(1.0, outputs=2), "outputs is for noise='learned'"),
        (lambda: Gaussian().log_prob(Z(4, 2), Z(4, 3)), r"targets of the shape \(4, 3\) do not"),
        (lambda: Gaussian().log_prob(Z(4, 1), Z(3)), "do not fit"),
        (lambda: Gaussian().log_prob(Z(4), Z(4, 1)), "do not fit"),
        (lambda: Gaussian("predicted").log_prob(Z(4, 3), Z(4, 1)), "two outputs for each target"),
        (lambda: Gaussian(dim=2).log_prob(Z(4, 1), Z(4, 1)), "has the axes 1 to 1"),
        (lambda: Gaussian().log_prob(Z(4, 1), torch.full((4, 1), math.inf)), "is infinite"),
        (lambda: Gaussian().log_prob("x", Z(4)), "output is a str"),
        (lambda: Gaussian().log_prob(L[:, None], Z(4)), "real numbers"),
        (lambda: Gaussian().log_prob(Z(4, 1), (Z(4), Z(4))), "must be torch.bool of the target's"),
        (lambda: Gaussian().log_prob(Z(4, 1), [1.0] * 4), "a pair"),
        (lambda: Categorical().log_prob(Z(4, 3), Z(4)), "one whole class number .* float targets"),
        (lambda: Categorical().log_prob(Z(4, 3), Z(4, 3)), "soft or one-hot labels"),
        (lambda: Categorical().log_prob(Z(4, 3), L + 3), "Label 3 is out of range.*0 to 2"),
        (lambda: Categorical().log_prob(Z(4, 3), L - 1), "Label -1 is out of range"),
        (lambda: Categorical().log_prob(Z(4, 1), L), "at least 2 classes on that axis"),
        (lambda: Categorical().log_prob(Z(4), L), "at least 2 classes"),
        (lambda: Categorical(dim=1).log_prob(Z(4, 3, 5), L), r"of the shape \(4, 5\)"),
        (lambda: Categorical(temperature=0.0), "temperature must be"),
        (lambda: Categorical(label_smoothing=1.0), "label_smoothing must be"),
        (lambda: Categorical(weight=torch.tensor([-1.0])), "weight must have"),
        (lambda: Categorical(weight=torch.ones(2)).objective(Z(4, 3), L), "weight has 2 numbers"),
        (lambda: Bernoulli().log_prob(Z(4, 1), Z(4)), "do not fit"),
        (lambda: Bernoulli().log_prob(Z(4), L + 2), "0 or 1, and one is 2"),
        (lambda: Bernoulli().log_prob(Z(4), Z(4) + 0.5), "0 or 1, and one is 0.5"),
        (lambda: Bernoulli(dim=-1).log_prob(Z(4, 2), Z(4, 2)), "has 2 elements on that axis"),
        (lambda: Bernoulli(pos_weight=-1.0), "pos_weight must be"),
        (lambda: FromDistribution(3), "needs a function"),  # type: ignore[arg-type]
        (lambda: FromDistribution(lambda f: f).log_prob(Z(4), Z(4)), "gave no distr"),  # type: ignore[arg-type, return-value]
        (
            lambda: FromDistribution(lambda f: torch.distributions.Normal(f, f)).distribution(Z(4)),
            "makes no distribution",
        ),
        (lambda: poisson().log_prob(Z(4), Z(4) - 1), "a target is -1, which Poisson cannot give"),
        (lambda: poisson().log_prob(Z(4, 2), Z(4)), "do not fit"),
        (lambda: Gaussian().predictive([]), "one draw at least"),
        (lambda: Gaussian().predictive([Z(4, 1), Z(5, 1)]), "another of"),
        (lambda: Gaussian(1.0).predictive([Z(4, 1)]).interval(1.0), "level must be between 0 and"),
        (lambda: as_likelihood(Gaussian), "the class Gaussian, without"),
        (lambda: as_likelihood("Gaussian"), "A likelihood is needed"),
    ],
)  # fmt: skip
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()


def test_labels_out_of_range_are_nan_where_nobody_looks() -> None:
    found = Categorical().log_densities(torch.zeros(3, 4), torch.tensor([0, 4, -100]))
    assert found.isnan().tolist() == [False, True, False]


def test_half_precision_outputs_have_densities_in_float32() -> None:
    f = torch.randn(4, 3, dtype=torch.bfloat16)
    for likelihood, y in ((Gaussian(1.0), torch.randn(4, 3)), (Categorical(), L)):
        found = likelihood.log_prob(f, y)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, likelihood.log_prob(f.float(), y))
    assert Gaussian(1.0).log_prob(f.double(), torch.randn(4, 3)).dtype == torch.float64


# -- beside the model ----------------------------------------------------------------------------


def test_a_model_keeps_its_likelihood_beside_its_modules() -> None:
    model = nn.Linear(2, 1)
    keys, modules = list(model.state_dict()), list(model.modules())
    likelihood = Gaussian(outputs=1)
    assert set_likelihood_(model, likelihood) is model
    assert likelihood_of(model) is likelihood
    assert list(model.state_dict()) == keys
    assert list(model.modules()) == modules
    assert len(list(model.parameters())) == 2
    wrapped = torch.compile(model)
    assert likelihood_of(wrapped) is likelihood  # type: ignore[arg-type]
    assert likelihood_of(set_likelihood_(model, None)) is None


def test_parameters_are_checked_where_torch_checks_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a torch.compile, which switches the checks of torch.distributions off."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    likelihood = FromDistribution(lambda f: torch.distributions.Normal(0.0, f))
    with pytest.raises(ArgumentError, match="makes no distribution: Normal: scale must be"):
        likelihood.log_prob(Z(4), Z(4))
    ones = torch.ones(4)
    assert torch.equal(
        likelihood.log_prob(ones, ones), torch.distributions.Normal(0.0, ones).log_prob(ones)
    )
