"""What watches a run of BYOV: its online probe, collapse and the posterior's travel."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bayesify as bb
from bayesify.errors import ArgumentError
from clusters import clusters
from recipes.byov.runtime.monitors import (
    CollapseLimits,
    collapse_alarms,
    effective_rank,
    embedding_std,
    initial_logvars,
    mean_stats,
    posterior_summary,
)
from recipes.byov.runtime.online_probe import OnlineProbe

# Online probe


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
    model = bb.to_bbb_(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3)), initial_std=math.exp(-5.0))
    began = initial_logvars(model)
    start = posterior_summary(model, initial_logvar=began)
    assert (start.logvar_travel, start.logvar_spread, start.prior_share) == (0.0, 0.0, 0.0)
    logvars = {p.name: p.logvar for p in bb.posteriors(model)}
    with torch.no_grad():
        logvars["0.weight"][0] += 2.0  # 4 of 8 weights
        # No matrix; sigma 1 and 0.61, both above half of the prior's.
        logvars["0.bias"][:] = torch.tensor([0.0, -1.0])
    summary = posterior_summary(model, initial_logvar=began)
    assert summary.logvar_travel == pytest.approx((4 * 2 + 10 + 9) / 19)
    assert summary.logvar_spread == pytest.approx((8 * 1 + 6 * 0) / 14)  # +-1 around the mean
    assert summary.prior_share == pytest.approx(2 / 19)
    assert posterior_summary(model, initial_logvar=began, prior_std=3.0).prior_share == 0.0
    assert summary.layers == bb.posterior_stats(model)
    assert summary.layers["0.bias"]["max_std"] == 1.0


@pytest.mark.parametrize("parameterization", ["exp", "softplus"])
def test_travel_is_from_where_each_tensor_started(parameterization: Any) -> None:
    config = bb.BBBConfig(parameterization=parameterization)
    network = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3))
    model = bb.to_bbb_(network, initial_std=bb.RelativeStd(0.01), config=config)
    began = initial_logvars(model)
    rms = {n: p.square().mean().sqrt().item() for n, p in model.named_parameters() if "_" not in n}
    assert began == pytest.approx({n: 2 * math.log(0.01 * value) for n, value in rms.items()})
    assert len(set(began.values())) == 4
    assert posterior_summary(model, initial_logvar=began).logvar_travel == 0.0
    with torch.no_grad():
        for name, raw in model.named_parameters():
            if name.startswith("1.weight_"):  # sigma is doubled
                std = 2 * math.exp(began["1.weight"] / 2)
                exp = parameterization == "exp"
                raw.fill_(2 * math.log(std) if exp else math.log(math.expm1(std)))
    travel = posterior_summary(model, initial_logvar=began).logvar_travel
    assert travel == pytest.approx(6 * 2 * math.log(2) / 19, rel=1e-4)


def test_statistics_are_averaged_over_steps() -> None:
    one, two = {"w": {"mean_std": 1.0, "max_std": 2.0}}, {"w": {"mean_std": 3.0, "max_std": 3.0}}
    assert mean_stats([one, two]) == {"w": {"mean_std": 2.0, "max_std": 2.5}}
    assert mean_stats([one]) == one
