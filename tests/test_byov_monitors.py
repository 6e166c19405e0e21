"""What watches a run of BYOV: kNN, linear probes, collapse and the posterior's travel."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize
from scipy.special import log_softmax
from torch import Tensor, nn

import bayesify as bb
from bayesify.errors import ArgumentError
from recipes.byov.evaluation.knn import knn_accuracy, knn_scores
from recipes.byov.evaluation.probe import linear_probe
from recipes.byov.runtime.monitors import (
    CollapseLimits,
    collapse_alarms,
    effective_rank,
    embedding_std,
    initial_logvars,
    mean_stats,
    posterior_health,
)
from recipes.byov.runtime.online_probe import OnlineProbe


def clusters(count: int, classes: int = 4, width: int = 8, noise: float = 1.0) -> tuple[Any, Any]:
    """Features around one point a class; the points are the same on every call."""
    points = 2 * torch.randn(classes, width, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(count) % classes
    return points[labels] + noise * torch.randn(count, width), labels


# kNN


def brute_force_scores(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, classes: int, k: int, temperature: float
) -> Any:
    """The definition, one test feature and one neighbour at a time, in float64."""
    bank, queries = train_x.double().numpy(), test_x.double().numpy()
    scores = np.zeros((len(queries), classes))
    for row, query in enumerate(queries):
        cosine = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        for i in np.argsort(-cosine)[:k]:
            scores[row, train_y[i]] += math.exp(cosine[i] / temperature)
    return scores / scores.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (50, 0.5), (200, 0.1)])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_knn_is_its_definition(k: int, temperature: float, chunk: int) -> None:
    (x, y), (z, t) = clusters(200, noise=3), clusters(30, noise=3)
    options: dict[str, Any] = {"k": k, "temperature": temperature, "chunk": chunk}
    found = knn_scores(x, y, z, num_classes=5, **options)
    expected = brute_force_scores(x, y, z, 5, k, temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    share = (expected.argmax(1) == t.numpy()).mean()
    assert knn_accuracy(x, y, z, t, **options) == pytest.approx(share)


def test_a_low_temperature_does_not_overflow() -> None:
    (x, y), (z, _) = clusters(50), clusters(5)
    scores = knn_scores(x, y, z, num_classes=4, k=5, temperature=1e-3)
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(5))


def test_knn_that_cannot_work_is_refused() -> None:
    x, y = clusters(10)
    with pytest.raises(ArgumentError, match="k must be from 1 to the 10"):
        knn_accuracy(x, y, x, y, k=11)
    with pytest.raises(ArgumentError, match="temperature above 0"):
        knn_accuracy(x, y, x, y, k=1, temperature=0)
    with pytest.raises(ArgumentError, match="Expected train_x"):
        knn_accuracy(x, y[:5], x, y, k=1)
    x[0, 0] = math.nan
    with pytest.raises(ArgumentError, match="NaN or infinite"):
        knn_accuracy(x, y, x, y, k=1)


# Probes


def test_the_online_probe_learns_and_leaves_the_encoder_alone(tmp_path: Path) -> None:
    x, y = clusters(400)
    x.requires_grad_()
    probe = OnlineProbe(8, 4, lr=0.01)
    first, accuracy = probe.step(x, y)
    assert first.item() == pytest.approx(math.log(4), rel=1e-5)  # zeros guess evenly
    for _ in range(50):
        loss, accuracy = probe.step(x, y)
    assert loss < first / 2
    test_x, test_y = clusters(200)
    assert accuracy > 0.8
    assert probe.accuracy(test_x, test_y) > 0.8
    assert x.grad is None


def test_the_online_probe_continues_bit_for_bit(tmp_path: Path) -> None:
    x, y = clusters(64)
    whole, half = OnlineProbe(8, 4), OnlineProbe(8, 4)
    for _ in range(6):
        whole.step(x, y)
    for _ in range(3):
        half.step(x, y)
    save_file(half.state_dict(), tmp_path / "probe.safetensors")
    resumed = OnlineProbe(8, 4)
    resumed.load_state_dict(load_file(tmp_path / "probe.safetensors"))
    for _ in range(3):
        resumed.step(x, y)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    fresh = OnlineProbe(8, 4)
    fresh.load_state_dict(OnlineProbe(8, 4).state_dict())  # before the first step
    assert set(fresh.state_dict()) == {"weight", "bias"}


def test_the_online_probe_steps_inside_autocast_and_no_grad() -> None:
    x, y = clusters(64)
    plain, inside = OnlineProbe(8, 4), OnlineProbe(8, 4)
    plain.step(x, y)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        inside.step(x, y)
    assert torch.equal(plain.linear.weight, inside.linear.weight)
    with pytest.raises(ArgumentError, match="2 classes or more"):
        OnlineProbe(8, 1)


def test_a_linear_probe_reaches_the_optimum_of_its_loss() -> None:
    """Standardised features and a softmax: a convex problem that scipy solves as well."""
    (x, y), (z, t) = clusters(600, classes=3, width=4, noise=2), clusters(300, 3, 4, noise=2)
    options: dict[str, Any] = {"epochs": 100, "batch_size": 64, "learning_rates": (0.03, 0.1)}
    result = linear_probe(x, y, z, t, num_classes=3, **options)

    def loss(theta: Any) -> float:
        weight, bias = theta[:12].reshape(3, 4), theta[12:]
        scores = log_softmax(x.numpy() @ weight.T + bias, axis=1)
        return float(-scores[np.arange(len(y)), y.numpy()].mean())

    best = minimize(loss, np.zeros(15)).fun
    with torch.no_grad():
        found = nn.functional.cross_entropy(result.classifier(x), y).item()
        logits = result.classifier(z)
    assert best <= found + 1e-4
    assert found < best + 0.005
    assert result.accuracy == pytest.approx((logits.argmax(1) == t).float().mean().item())
    assert result.top5 == 1.0  # of three classes
    assert result.held_out[result.lr] == max(result.held_out.values())


def test_nothing_is_chosen_by_the_test_features() -> None:
    (x, y), (z, t) = clusters(200), clusters(50)
    options: dict[str, Any] = {"num_classes": 4, "epochs": 3, "learning_rates": (0.01, 1.0)}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = linear_probe(x, y, z, t, **options)
    assert torch.equal(torch.get_rng_state(), state)
    other = linear_probe(x, y, -z, t, **options)
    assert torch.equal(one.classifier.weight, other.classifier.weight)
    assert one.accuracy > 0.8 > other.accuracy


def test_a_rate_that_diverges_is_not_chosen() -> None:
    (x, y), (z, t) = clusters(400, noise=2), clusters(100, noise=2)
    options: dict[str, Any] = {"num_classes": 4, "epochs": 5, "learning_rates": (1e30, 0.1)}
    result = linear_probe(x, y, z, t, **options)
    assert result.lr == 0.1
    assert result.accuracy > 0.8


def test_a_probe_that_cannot_work_is_refused() -> None:
    x, y = clusters(20)
    for options in ({"held_out": 0.0}, {"held_out": 0.99}, {"epochs": 0}):
        with pytest.raises(ArgumentError, match="held_out = "):
            linear_probe(x, y, x, y, num_classes=4, **options)
    with pytest.raises(ArgumentError, match="learning_rates must be above 0"):
        linear_probe(x, y, x, y, num_classes=4, learning_rates=(0.1, 0.0))
    with pytest.raises(ArgumentError, match="NaN or infinite"):
        linear_probe(x / 0, y, x, y, num_classes=4)


# Collapse


def test_effective_rank_of_known_singular_values() -> None:
    q, _ = torch.linalg.qr(torch.randn(50, 8, dtype=torch.float64))
    assert effective_rank(q) == pytest.approx(8, rel=1e-4)  # all alike
    assert effective_rank(q[:, :1] @ torch.randn(1, 8).double()) == pytest.approx(1, abs=1e-3)
    values = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    shares = values / 8
    expected = math.exp(-(shares * shares.log()).sum())
    assert effective_rank(q[:, :4] * values) == pytest.approx(expected, rel=1e-4)
    assert effective_rank(torch.zeros(5, 3)) == pytest.approx(1, abs=1e-3)


def test_effective_rank_is_rankme_as_published() -> None:
    """Centring or normalising, which the paper does not, would change it."""
    z = torch.randn(60, 8) * torch.linspace(0.1, 2, 8) + 3
    s = np.linalg.svd(z.double().numpy(), compute_uv=False)
    p = s / s.sum() + 1e-7
    assert effective_rank(z) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)


def test_embedding_std_is_one_on_the_sphere_and_zero_at_a_point() -> None:
    count, width = 4000, 64
    uniform = torch.randn(count, width) * torch.rand(count, 1).add(0.1)  # lengths do not matter
    assert embedding_std(uniform) == pytest.approx(1, abs=5 / math.sqrt(2 * count))
    assert embedding_std(torch.ones(10, 4)) == 0
    line = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]])
    assert embedding_std(line) == pytest.approx(math.sqrt(2) / 4 * 2)


def test_alarms() -> None:
    assert collapse_alarms(std=0.9, rank=40.0, knn=0.5, num_classes=10) == []
    assert collapse_alarms() == []
    [std] = collapse_alarms(std=0.1, rank=40.0)
    assert "spread is 0.1, below 0.2" in std
    [rank] = collapse_alarms(std=0.9, rank=1.2)
    assert "effective rank is 1.2" in rank
    [knn] = collapse_alarms(knn=0.11, num_classes=10)
    assert "kNN accuracy 11.0% is near chance (10.0%)" in knn
    assert collapse_alarms(std=0.1, limits=CollapseLimits(std=0.05)) == []
    assert len(collapse_alarms(std=math.nan, rank=math.nan)) == 2


# The posterior


def test_travel_and_spread_of_known_log_variances() -> None:
    model = bb.to_bbb_(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3)), logvar=-10.0)
    began = initial_logvars(model)
    start = posterior_health(model, initial_logvar=began)
    assert (start.logvar_travel, start.logvar_spread, start.prior_share) == (0.0, 0.0, 0.0)
    logvars = {p.name: p.logvar for p in bb.posteriors(model)}
    with torch.no_grad():
        logvars["0.weight"][0] += 2.0  # 4 of 8 weights
        # No matrix; sigma 1 and 0.61, both above half of the prior's.
        logvars["0.bias"][:] = torch.tensor([0.0, -1.0])
    health = posterior_health(model, initial_logvar=began)
    assert health.logvar_travel == pytest.approx((4 * 2 + 10 + 9) / 19)
    assert health.logvar_spread == pytest.approx((8 * 1 + 6 * 0) / 14)  # +-1 around the mean
    assert health.prior_share == pytest.approx(2 / 19)
    assert posterior_health(model, initial_logvar=began, prior_std=3.0).prior_share == 0.0
    assert health.layers == bb.posterior_stats(model)
    assert health.layers["0.bias"]["max_std"] == 1.0


@pytest.mark.parametrize("parameterization", ["exp", "softplus"])
def test_travel_is_from_where_each_tensor_started(parameterization: Any) -> None:
    config = bb.BBBConfig(relative_std=0.01, parameterization=parameterization)
    model = bb.to_bbb_(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3)), config=config)
    began = initial_logvars(model)
    rms = {n: p.square().mean().sqrt().item() for n, p in model.named_parameters() if "_" not in n}
    assert began == pytest.approx({n: 2 * math.log(0.01 * value) for n, value in rms.items()})
    assert len(set(began.values())) == 4
    assert posterior_health(model, initial_logvar=began).logvar_travel == 0.0
    with torch.no_grad():
        for name, raw in model.named_parameters():
            if name.startswith("1.weight_"):  # sigma is doubled
                std = 2 * math.exp(began["1.weight"] / 2)
                exp = parameterization == "exp"
                raw.fill_(2 * math.log(std) if exp else math.log(math.expm1(std)))
    travel = posterior_health(model, initial_logvar=began).logvar_travel
    assert travel == pytest.approx(6 * 2 * math.log(2) / 19, rel=1e-4)


def test_statistics_are_averaged_over_steps() -> None:
    one, two = {"w": {"mean_std": 1.0, "max_std": 2.0}}, {"w": {"mean_std": 3.0, "max_std": 3.0}}
    assert mean_stats([one, two]) == {"w": {"mean_std": 2.0, "max_std": 2.5}}
    assert mean_stats([one]) == one
