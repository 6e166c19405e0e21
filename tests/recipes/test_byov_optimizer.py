"""Which parameter learns how fast, decays and adapts."""

import math
from dataclasses import replace
from typing import Any

import pytest

import bayesify
from bayesify.optim import warmup_cosine
from byov_small import CONFIG
from recipes.byov.model import build_student, convert_
from recipes.byov.optimizer import make_optimizer, set_lr


def rows(**changes: Any) -> tuple[dict[str, dict[str, Any]], Any]:
    """The group of every parameter by its name."""
    config = replace(CONFIG, **changes)
    model = convert_(build_student(config, 2), config)
    optimizer = make_optimizer(model, config)
    group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    return {name: group_of[id(p)] for name, p in model.named_parameters()}, optimizer


def test_log_variances_have_their_own_rate_and_epsilon() -> None:
    found, _ = rows(logvar_lr_ratio=5.0, predictor_lr_ratio=10.0)
    peak = CONFIG.lr * CONFIG.batch_size / 256
    for name, group in found.items():
        head, logvar = name.startswith("predictor."), name.endswith("_logvar")
        assert group["peak_lr"] == pytest.approx(peak * (10 if head else 1) * (5 if logvar else 1))
        assert group["eps"] == (1e-12 if logvar else 1e-8)
        assert group["weight_decay"] == 0.0


@pytest.mark.parametrize("conversion", ["full", "none"])
def test_lars_adapts_matrices_alone(conversion: str) -> None:
    found, _ = rows(optimizer="lars", conversion=conversion)
    for name, group in found.items():
        matrix = name.endswith(("0.weight", "3.weight", "proj.weight", "qkv.weight", "token",
                                "embed", "fc1.weight", "fc2.weight"))  # fmt: skip
        assert group["always_adapt"] == matrix, name


def test_weight_decay_of_byol_leaves_biases_and_norms_out() -> None:
    found, _ = rows(conversion="none", weight_decay=0.3)
    for name, group in found.items():
        small = name.endswith(".bias") or ".norm" in name or ".1." in name
        assert group["weight_decay"] == (0.0 if small else 0.3), name


def test_rates_rise_linearly_and_fall_as_a_cosine() -> None:
    assert [warmup_cosine(s, 4, 10) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    for step in range(4, 10):
        expected = (1 + math.cos(math.pi * (step - 4) / 6)) / 2
        assert warmup_cosine(step, 4, 10) == pytest.approx(expected)
    assert warmup_cosine(0, 0, 10) == 1.0
    found, optimizer = rows(logvar_lr_ratio=5.0)
    set_lr(optimizer, 0.5)
    assert all(group["lr"] == 0.5 * group["peak_lr"] for group in found.values())


def test_posterior_survives_the_optimizer_check() -> None:
    config = replace(CONFIG, optimizer="lars", freeze_patch_embed=True)
    model = convert_(build_student(config, 2), config)
    bayesify.check_optimizer(model, make_optimizer(model, config))
    frozen = model.get_parameter("encoder.patch_embed.proj.weight")
    assert not frozen.requires_grad
    assert "encoder.patch_embed.proj.weight" not in {p.name for p in bayesify.posteriors(model)}
