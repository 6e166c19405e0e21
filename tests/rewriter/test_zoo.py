"""Models of timm and torchvision, and plain ones: invariants 1-5 on each.

Random weights and small images: what is checked is the rewriting, which no pixel changes. The fast
half have one of all equal layers and are narrow where their arguments allow it. The slow half are
the other models on which peers were compared, whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from zoo_checks import leave_out_layers

import bayesify
from bayesify import one_draw, sampled
from bayesify.posterior import sites
from reference import Report, check, functional_call, outputs, same

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Entry(NamedTuple):
    """A model by name, its options, the size of its images, and whether all layers stay."""

    options: dict[str, Any]
    size: int = 64
    whole: bool = False


SMALL = Entry({})
RESIZED = Entry({"img_size": 64})
FAST: dict[str, Entry] = {
    "timm:resnet18": Entry({"channels": (16, 32, 64, 128)}),
    "timm:convnext_atto": SMALL,
    "timm:edgenext_xx_small": Entry({}, whole=True),  # its splits are of several widths
    "timm:test_efficientnet": SMALL,
    "timm:eva02_tiny_patch14_224": Entry({"img_size": 56}, 56),  # reads its children's weights
    # keeps a function of a parameter in eval mode
    "timm:levit_128s": Entry({"img_size": 64, "embed_dim": (32, 48, 64)}),
    "timm:mobilenetv3_small_050": SMALL,
    "timm:test_nfnet": SMALL,  # computes its weights
    "timm:pvt_v2_b0": SMALL,
    "timm:regnety_002": SMALL,
    "timm:tiny_vit_5m_224": Entry({"embed_dims": (16, 32, 40, 80)}, 224),
    "timm:vit_tiny_patch16_224": RESIZED,
    "tv:shufflenet_v2_x0_5": SMALL,
    "tv:squeezenet1_0": SMALL,
    "tv:swin_t": SMALL,
}
SLOW: dict[str, Entry] = {
    "timm:beit_base_patch16_224": RESIZED,
    "timm:cait_xxs24_224": RESIZED,
    "timm:coatnet_nano_rw_224": RESIZED,
    "timm:convnext_tiny": SMALL,
    "timm:crossvit_tiny_240": Entry({}, 240),
    "timm:davit_tiny": SMALL,
    "timm:deit3_small_patch16_224": RESIZED,
    "timm:densenet121": SMALL,
    "timm:efficientformer_l1": Entry({}, 224),
    "timm:efficientnet_b0": SMALL,
    "timm:fastvit_t8": SMALL,
    "timm:ghostnet_100": SMALL,
    "timm:gmlp_s16_224": RESIZED,
    "timm:hiera_tiny_224": RESIZED,
    "timm:hrnet_w18_small": SMALL,
    "timm:inception_v3": Entry({"aux_logits": True}, 299),
    "timm:mambaout_femto": SMALL,
    "timm:maxvit_nano_rw_256": RESIZED,
    "timm:mixer_s16_224": RESIZED,
    "timm:mobilevit_s": SMALL,
    "timm:nfnet_f0": SMALL,
    "timm:poolformer_s12": SMALL,
    "timm:repvgg_a0": SMALL,
    "timm:resnet50": Entry({}, 224),
    "timm:swin_tiny_patch4_window7_224": RESIZED,
    "timm:vgg11": SMALL,
    "timm:volo_d1_224": RESIZED,
    "timm:xcit_nano_12_p16_224": RESIZED,
    "tv:convnext_tiny": SMALL,
    "tv:fcn_resnet50": Entry({"weights_backbone": None}),
    "tv:googlenet": Entry({"aux_logits": True, "init_weights": False}),
    "tv:mobilenet_v3_small": SMALL,
    "tv:resnet18": SMALL,
    "tv:vit_b_16": Entry({"image_size": 32}, 32),
}


def build(name: str) -> nn.Module:
    library, _, model = name.partition(":")
    options = {**FAST, **SLOW}[name].options
    torch.manual_seed(0)
    built: nn.Module = (
        timm.create_model(model, **options) if library == "timm"
        else torchvision.models.get_model(model, weights=None, **options)
    )  # fmt: skip
    if name in FAST and not FAST[name].whole:
        leave_out_layers(built, 1, settings=True)
    return built


def images(size: int) -> Callable[[int], Call]:
    def make(batch: int) -> Call:
        generator = torch.Generator().manual_seed(batch)
        return (torch.randn(batch, 3, size, size, generator=generator),), {}

    return make


# -- models that peers' tables call plain ----------------------------------------------------


class Encoder(nn.Module):
    """nn.TransformerEncoder behind an embedding with positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.positions = nn.Parameter(torch.randn(1, 16, 32) * 0.02)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.1)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x) + self.positions[:, : x.shape[1]]
        y: Tensor = self.head(self.encoder(h).mean(1))
        return y


class UserAttention(nn.Module):
    """A model of one's own around nn.MultiheadAttention, with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, 32)
        self.token = nn.Parameter(torch.zeros(1, 1, 32))
        self.norm = nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.scale = nn.Parameter(torch.full((32,), 0.1))
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embedding(x)
        h = torch.cat([self.token.expand(h.shape[0], -1, -1), h], dim=1)
        n = self.norm(h)
        a, weights = self.attention(n, n, n)
        return self.head((h + self.scale * a)[:, 0]), weights


class Classifier(nn.Module):
    """An LSTM over embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16, padding_idx=0)
        self.lstm = nn.LSTM(16, 24, 2, batch_first=True, bidirectional=True, dropout=0.1)
        self.head = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, _) = self.lstm(self.embedding(x))
        y: Tensor = self.head(torch.cat([h[-2], h[-1]], -1))
        return y


def words(batch: int) -> Call:
    generator = torch.Generator().manual_seed(batch)
    return (torch.randint(0, 50, (batch, 7), generator=generator),), {}


def features(batch: int) -> Call:
    return (torch.randn(batch, 6, 8, generator=torch.Generator().manual_seed(batch)),), {}


PLAIN: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Call]]] = {
    "nn_transformer_encoder": (Encoder, words),
    "nn_mha_user_model": (UserAttention, features),
    "nn_lstm_classifier": (Classifier, words),
}

# -- the checks ------------------------------------------------------------------------------

REPORTS: dict[str, Report] = {}


def by_speed(names: list[str]) -> list[Any]:
    return [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in names]


@pytest.mark.parametrize("name", by_speed([*FAST, *SLOW]))
def test_model(name: str) -> None:
    size = {**FAST, **SLOW}[name].size
    REPORTS[name] = check(build(name), images(size), batches=(2,))
    assert REPORTS[name].problems == []


@pytest.mark.parametrize("name", PLAIN)
def test_plain_model(name: str) -> None:
    builder, make = PLAIN[name]
    REPORTS[name] = check(builder(), make)
    assert REPORTS[name].problems == []


def counts(name: str) -> tuple[int, int, list[str]]:
    """Owners of parameters, those of them on an fx rung, and who takes the fallback."""
    if name not in REPORTS:
        if name in PLAIN:
            builder, make = PLAIN[name]
            REPORTS[name] = check(builder(), make, gradients=False, batches=(2,))
        else:
            model = bayesify.to_bbb_(build(name))
            (x,), _ = images({**FAST, **SLOW}[name].size)(2)
            with sampled(model):
                model.train()(x)
                model.eval()(x)
            taken: dict[str, bool] = {}
            report = Report()
            for rung in bayesify.rungs(model):
                if rung.own_parameters:
                    taken[rung.owner] = taken.get(rung.owner, True) and rung.rung != "swap"
                if rung.rung == "swap":
                    report.swapped.append(f"{rung.owner} {rung.type}: {rung.reason}")
            report.owners, report.fx_owners = len(taken), sum(taken.values())
            REPORTS[name] = report
    report = REPORTS[name]
    return report.owners, report.fx_owners, report.swapped


def assert_nearly_all_are_graphs(names: list[str]) -> None:
    owners = graphs = 0
    for name in names:
        here, on_fx, swapped = counts(name)
        owners, graphs = owners + here, graphs + on_fx
        for line in dict.fromkeys(swapped):
            print(f"fallback in {name}: {line}")
    print(f"{graphs} of {owners} owners of parameters took an fx rung")
    assert owners > 20 * len(names)
    assert graphs >= 0.995 * owners


def test_nearly_all_owners_become_graphs() -> None:
    assert_nearly_all_are_graphs([*FAST, *PLAIN])


@pytest.mark.slow
def test_nearly_all_owners_of_all_models_become_graphs() -> None:
    assert_nearly_all_are_graphs([*FAST, *SLOW, *PLAIN])


# -- other sizes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("edgenext_xx_small", {}),
        ("convnext_atto", {}),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
        ("tf_mobilenetv3_small_minimal_100", {}),  # its padding is computed of the size
    ],
)
@torch.no_grad()
def test_other_resolutions(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    original = timm.create_model(name, **options).eval()
    converted = bayesify.to_bbb(original, initial_std=math.exp(-4.0))
    for seed, shape in enumerate([(2, 64, 64), (1, 96, 96), (3, 64, 112), (2, 64, 64)]):
        x = torch.randn(shape[0], 3, *shape[1:])
        drawn = bayesify.draws(converted, seed=seed)
        with one_draw(converted, seed=seed):
            found = converted(x)
        assert torch.equal(found, functional_call(original, drawn, (x,), {})), shape
        assert torch.equal(converted(x), original(x)), shape


# -- more than forward -----------------------------------------------------------------------


def test_methods_of_timm() -> None:
    model: Any = bayesify.to_bbb(build("timm:vit_tiny_patch16_224"), initial_std=math.exp(-4.0))
    original: Any = build("timm:vit_tiny_patch16_224")
    x = images(64)(2)[0][0]
    drawn = bayesify.draws(model, seed=1)
    original.load_state_dict({**original.state_dict(), **drawn})
    model.eval(), original.eval()
    with one_draw(model, seed=1), torch.no_grad():
        assert torch.equal(model.forward_features(x), original.forward_features(x))
        tokens = original.forward_features(x)
        assert torch.equal(
            model.forward_head(tokens, pre_logits=True),
            original.forward_head(tokens, pre_logits=True),
        )
        found = model.forward_intermediates(x, indices=1, intermediates_only=True)
        expected = original.forward_intermediates(x, indices=1, intermediates_only=True)
        assert same(found, expected)
        assert len(found) == 1
    groups = model.group_matcher()
    assert groups == original.group_matcher()
    assert type(model.get_classifier()).__name__ == "Linear"


# -- detection -------------------------------------------------------------------------------


def scenes(batch: int) -> Call:
    """Images of several sizes, with boxes."""
    generator = torch.Generator().manual_seed(batch)
    pictures = [torch.rand(3, 64, 64 + 8 * k, generator=generator) for k in range(batch)]
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0], [10.0, 20.0, 60.0, 60.0]])
    return (pictures, [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in pictures]), {}


def detector() -> nn.Module:
    torch.manual_seed(0)
    build = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    model: nn.Module = build(
        weights=None, weights_backbone=None, num_classes=4, min_size=64, max_size=96,
        box_score_thresh=0.0, rpn_pre_nms_top_n_test=50, rpn_post_nms_top_n_test=20,
    )  # fmt: skip
    return model


def test_detection() -> None:
    """Boxes in eval, four losses in train; the fallback's rung is allowed to wrappers only."""
    model = detector()
    assert len(outputs(model.eval()(*scenes(2)[0]))[0]) > 0  # boxes to compare there are
    report = check(model, scenes, batches=(2,))
    assert report.problems == []
    assert report.fx_owners == report.owners
    assert all("GeneralizedRCNN" in s or "RegionProposal" in s or "RoIHeads" in s
               or "FeaturePyramid" in s or "FPN" in s or "FasterRCNN" in s
               for s in report.swapped), report.swapped  # fmt: skip


def test_detection_losses_draw() -> None:
    model = bayesify.to_bbb(detector(), initial_std=math.exp(-4.0)).train()
    args, _ = scenes(2)
    losses = model(*args)
    assert sorted(losses) == [
        "loss_box_reg", "loss_classifier", "loss_objectness", "loss_rpn_box_reg",
    ]  # fmt: skip
    sum(losses.values()).backward()
    missing = [s.name for s in sites(model) if s.mean.grad is None or s.raw.grad is None]
    assert missing == []
