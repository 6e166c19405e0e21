"""Heads, initial weights and what becomes Bayesian."""

import contextlib
import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers.evo_norm import EvoNorm2dB0
from torch import nn

import bayesify
from byov_small import CONFIG
from recipes.byov.config import UNSEEN_SHIFTS
from recipes.byov.model import (
    MLP,
    StandardisedLinear,
    Student,
    batch_optimal,
    build_student,
    convert_,
)


def test_standardised_weights_have_mean_0_and_keep_the_variance() -> None:
    layer = StandardisedLinear(400, 3, bias=False)
    with torch.no_grad():
        layer.weight.mul_(7.0).add_(2.0)
    used = layer(torch.eye(400)).T
    torch.testing.assert_close(used.mean(dim=1), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(used.var(dim=1, correction=0), torch.full((3,), 1 / 400))


def test_batch_optimal_predictor_is_ridge_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40, 6, generator=generator, requires_grad=True)
    t = torch.randn(40, 6, generator=generator)
    predicted = batch_optimal(z, t)
    a, b = z.detach().double().numpy(), t.double().numpy()
    b = b / np.linalg.norm(b, axis=1, keepdims=True)
    ridge = 1e-3 * np.mean(np.diag(a.T @ a))
    stacked = np.vstack([a, np.sqrt(ridge) * np.eye(6)])
    weight, *_ = np.linalg.lstsq(stacked, np.vstack([b, np.zeros((6, 6))]), rcond=None)
    np.testing.assert_allclose(predicted.detach().numpy(), a @ weight, atol=1e-5)
    predicted.sum().backward()
    assert z.grad is not None
    np.testing.assert_allclose(z.grad.numpy(), np.tile(weight.sum(axis=1), (40, 1)), atol=1e-5)


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        ("batch", nn.BatchNorm1d),
        ("group", nn.GroupNorm),
        ("layer", nn.LayerNorm),
        ("none", nn.Identity),
    ],
)
def test_heads_are_those_of_byol(norm: Any, kind: type[nn.Module]) -> None:
    head = MLP(12, 64, 8, norm, 0.02)
    assert [type(layer) for layer in head][1:3] == [kind, nn.ReLU]
    assert head(torch.randn(5, 12)).shape == (5, 8)


def test_means_start_as_the_paper_says() -> None:
    config = replace(
        CONFIG, encoder_args={"patch_size": 14, "embed_dim": 64, "depth": 2, "num_heads": 2}
    )
    model = build_student(config, 2)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and parameter.numel() > 1000:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
        elif name.endswith("bias"):
            assert parameter.eq(0).all(), name
        elif parameter.ndim == 1:
            assert parameter.eq(1).all(), name
    for posterior in bayesify.posteriors(convert_(model, config)):
        assert posterior.logvar.eq(-10).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"parameterization": "softplus", "logvar_init": -6.0},
        {"relative_std": 0.01},
        {"parameterization": "softplus", "relative_std": 0.01},
    ],
)
def test_sigmas_start_as_the_config_says(changes: dict[str, Any]) -> None:
    config = replace(CONFIG, **changes)
    model = convert_(build_student(config, 2), config)
    raws = {n: p for n, p in model.named_parameters() if n.endswith(("_rho", "_logvar"))}
    softplus = "parameterization" in changes
    assert {n.rpartition("_")[2] for n in raws} == {"rho" if softplus else "logvar"}
    for name, raw in raws.items():
        std = raw.detach().double().numpy()
        std = np.log1p(np.exp(std)) if softplus else np.exp(std / 2)
        owner = name.rpartition("_")[0]
        scale = model.get_parameter(owner).detach()
        if not scale.any():  # a bias of zeros has the scale of the weight beside it
            scale = model.get_parameter(owner.removesuffix("bias") + "weight").detach()
        rms = scale.double().square().mean().sqrt().item()
        expected = 0.01 * rms if "relative_std" in changes else math.exp(-3)
        np.testing.assert_allclose(std, expected, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("conversion", "left_out"),
    [("full", ()), ("no-conv", ("patch_embed",)), ("no-layernorm", ("norm",)),
     ("linear-only", ("patch_embed", "norm", "token", "pos_embed", "or.1."))],
)  # fmt: skip
def test_presets_of_table_1(conversion: Any, left_out: tuple[str, ...]) -> None:
    config = replace(CONFIG, conversion=conversion)
    model = build_student(config, 2)
    names = [name for name, _ in model.named_parameters()]
    bayesian = {p.name for p in bayesify.posteriors(convert_(model, config))}
    assert bayesian == {n for n in names if not any(part in n for part in left_out)}


def test_skip_leaves_out_more_than_the_conversion() -> None:
    config = replace(CONFIG, conversion="no-conv", skip=("encoder.norm.bias", "projector"))
    model = build_student(config, 2)
    names = [name for name, _ in model.named_parameters()]
    bayesian = {p.name for p in bayesify.posteriors(convert_(model, config))}
    left_out = ("patch_embed", "encoder.norm.bias", "projector")
    assert bayesian == {n for n in names if not any(part in n for part in left_out)}


def test_a_skip_that_matches_nothing_is_refused() -> None:
    config = replace(CONFIG, skip=("encoder.fc_norm.bais",))
    model = build_student(config, 2)
    with pytest.raises(bayesify.ArgumentError, match=r"fc_norm\.bais"):
        convert_(model, config)
    assert not list(bayesify.posterior.sites(model))


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_no_loss_sees_the_unseen_shifts(pool: str) -> None:
    config = replace(CONFIG, skip=UNSEEN_SHIFTS)
    config = replace(config, encoder_args={**config.encoder_args, "global_pool": pool})
    model = build_student(config, 2)
    names = {name for name, _ in model.named_parameters()}
    images = torch.randn(8, config.channels, config.image_size, config.image_size)

    def predictions() -> list[torch.Tensor]:
        with torch.no_grad():
            return [branch.prediction for branch in model.train()(images, images.flip(-1))]

    converted = convert_(copy.deepcopy(model), config)
    shifts = sorted(names - {p.name for p in bayesify.posteriors(converted)})
    assert len(shifts) == 2
    before = predictions()
    with torch.no_grad():
        for name in shifts:
            model.get_parameter(name).add_(torch.randn_like(model.get_parameter(name)))
    torch.testing.assert_close(predictions(), before, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # another bias is seen
        model.get_parameter("predictor.3.bias").add_(1.0)
    assert not torch.allclose(predictions()[0], before[0], atol=0.1)


def test_one_draw_serves_both_views_and_each_call_draws_anew() -> None:
    config = replace(CONFIG, head_norm="none", logvar_init=-4.0)
    model = convert_(build_student(config, 2), config).train()
    assert isinstance(model, Student)
    view = torch.randn(4, 1, 28, 28)
    first, second = model(view, view)
    assert torch.equal(first.prediction, second.prediction)
    assert not torch.equal(first.prediction, model(view, view)[0].prediction)


@pytest.mark.parametrize("encoder", ["resnet18", "recipes.byov.resnet:cifar_resnet18"])
def test_resnets_are_encoders_too(encoder: str) -> None:
    config = replace(CONFIG, encoder=encoder, encoder_args={}, image_size=32)
    with torch.device("meta"):
        model = convert_(build_student(config, 2), config)
        first, _ = model(torch.zeros(2, 1, 32, 32), torch.zeros(2, 1, 32, 32))
        assert first.features.shape == (2, 512)


@pytest.mark.parametrize(
    ("norm", "apart"),
    [
        (nn.BatchNorm2d(4), True),
        (nn.BatchNorm2d(4, track_running_stats=False), True),
        (nn.SyncBatchNorm(4), True),
        (EvoNorm2dB0(4), True),
        (nn.GroupNorm(2, 4), False),
        (nn.LayerNorm(4), False),
    ],
)
def test_what_ties_the_images_of_a_batch(norm: nn.Module, apart: bool) -> None:
    encoder = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(norm))
    assert Student(encoder, nn.Identity(), nn.Identity()).apart == apart


@pytest.mark.parametrize("conversion", ["full", "none"])
@pytest.mark.parametrize(
    ("encoder", "calls"), [("vit_tiny_patch16_224", 1), ("recipes.byov.resnet:cifar_resnet18", 2)]
)
def test_views_share_a_batch_where_no_batchnorm_ties_them(
    encoder: str, calls: int, conversion: Any
) -> None:
    """Also in one batch each view's features, heads and gradients are those it has alone."""
    args = CONFIG.encoder_args if calls == 1 else {"channels": [4, 4, 8, 8]}
    config = replace(
        CONFIG, encoder=encoder, encoder_args=args, conversion=conversion, logvar_init=-6.0
    )
    together = convert_(build_student(config, 2), config).train()
    assert isinstance(together, Student)
    alone = copy.deepcopy(together)
    sizes: list[int] = []
    together.encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    views = torch.randn(2, 5, 1, 28, 28)

    def draw(model: nn.Module) -> Any:
        return bayesify.one_draw(model, 3) if conversion == "full" else contextlib.nullcontext()

    with draw(together):
        found = together(*views)
    with draw(alone):
        expected = [alone.branch(alone.encoder(view)) for view in views]
    for a, b in zip(found, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    for branches in (found, expected):
        torch.stack([branch.prediction for branch in branches]).square().sum().backward()
    for (name, p), (_, q) in zip(
        together.named_parameters(), alone.named_parameters(), strict=True
    ):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, msg=name)
    for (name, x), (_, y) in zip(together.named_buffers(), alone.named_buffers(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, msg=name)
    assert sizes == [10 // calls] * calls
