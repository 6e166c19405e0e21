"""Models of images: segmentation, detection, self-supervision, local features, text and images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .entries import Built, Call, Calls, entry, integers, lib, noise, takes

# -- segmentation_models_pytorch -------------------------------------------------------------


def _smp(name: str, size: int = 64, **options: Any) -> None:
    @entry("segmentation_models_pytorch", name)
    def make() -> Built:
        model = lib("segmentation_models_pytorch").create_model(
            name, **{"encoder_name": "resnet18", "encoder_weights": None, "classes": 2} | options
        )
        return model, takes(3, size, size)


_smp("pan", 128)
for _name in ("deeplabv3plus", "deeplabv3", "upernet", "manet"):
    _smp(_name)
_smp("dpt", encoder_name="tu-vit_tiny_patch16_224", dynamic_img_size=True)

# -- torchvision: in train mode with targets -------------------------------------------------


def _detector(name: str) -> None:
    key = f"torchvision:{name}"

    def prepare(model: nn.Module) -> None:
        lib("zoo_checks")._find_boxes(key, model, 64)

    @entry("torchvision", name, batches=(2,), prepare=prepare)
    def make() -> Built:
        models = lib("zoo_models")
        model = models.build(key)
        return model, lambda b: models.inputs(key, model, b, 64, "cpu")


for _name in ("fasterrcnn_mobilenet_v3_large_fpn", "ssd300_vgg16", "maskrcnn_resnet50_fpn",
              "fcos_resnet50_fpn"):  # fmt: skip
    _detector(_name)

# -- vit-pytorch -----------------------------------------------------------------------------

VIT: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 16, "depth": 2, "heads": 2,
    "mlp_dim": 16, "dim_head": 8,
}  # fmt: skip


def _vit(file: str, name: str, **options: Any) -> None:
    @entry("vit_pytorch", file)
    def make() -> Built:
        model = getattr(lib(f"vit_pytorch.{file}"), name)(**{**VIT, **options})
        return model, takes(3, 32, 32)


_vit("simple_vit_with_sparse_gating", "SimpleViTWithSparseGating")
_vit("xcit", "XCiT", cls_depth=1)
_vit("simple_vit_with_value_residual", "SimpleViT")
_vit("deepvit", "DeepViT")
_vit("simple_vit_attn_residual", "SimpleViTAttnResidual")
_vit("vit_for_small_dataset", "ViT")


@entry("vit_pytorch", "simple_vit_1d")
def _() -> Built:
    options = {k: v for k, v in VIT.items() if k != "image_size"} | {"seq_len": 32}
    return lib("vit_pytorch.simple_vit_1d").SimpleViT(**options), takes(3, 32)


@entry("vit_pytorch", "recorder")
def _() -> Built:
    vit = lib("vit_pytorch.vit").ViT(**VIT)
    return lib("vit_pytorch.recorder").Recorder(vit), takes(3, 32, 32)


@entry("vit_pytorch", "t2t")
def _() -> Built:
    model = lib("vit_pytorch.t2t").T2TViT(
        image_size=32, num_classes=5, dim=16, depth=2, heads=2, mlp_dim=16, dim_head=8,
        t2t_layers=((7, 4), (3, 2)),
    )  # fmt: skip
    return model, takes(3, 32, 32)


@entry("vit_pytorch", "levjepa_nd")
def _() -> Built:
    m = lib("vit_pytorch.levjepa_nd")
    encoder = m.NDTransformer(
        ndim=2, input_shape=(16, 16), patch_size=4, dim=16, depth=2, heads=2, mlp_dim=16,
        dim_head=8,
    )  # fmt: skip
    model = m.LeVJEPAND(
        encoder, input_shape=(16, 16), augment_src=nn.Identity(), augment_tgt=nn.Identity(),
        num_classes_K=8, projection_hidden=8, drop_ratio=0.5,
        sigreg_loss_kwargs={"num_proj": 8, "knots": 5},
    )  # fmt: skip
    return model, takes(3, 16, 16)


@entry("vit_pytorch", "vaat")
def _() -> Built:
    m = lib("vit_pytorch.vaat")
    sizes = {"dim": 16, "depth": 2, "heads": 2, "mlp_dim": 16, "dim_head": 8, "num_classes": 3}
    vit = m.ViT(image_size=32, patch_size=8, **sizes)
    ast = m.AST(patch_size=8, accept_spec=True, spec_n_fft=62, **sizes)
    model = m.VAAT(
        vit, ast, dim=16, depth=2, heads=2, dim_head=8, dim_action=3, mlp_dim=16,
        action_chunk_len=3, self_attn_heads=2, self_attn_dim_head=8,
    )  # fmt: skip
    return model, lambda b: ((noise(b, 1, 3, 32, 32), noise(b, 32, 32)), {})


# -- lightly ---------------------------------------------------------------------------------


def _small_vit() -> Any:
    timm = lib("timm.models.vision_transformer")
    return timm.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0
    )


class WithHead(nn.Module):
    """A backbone and a head of self-supervision."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = head

    def forward(self, x: Tensor, *more: Any) -> Any:
        return self.head(self.backbone(x).flatten(1), *more)


def _head(name: str, *sizes: int) -> None:
    @entry("lightly", name)
    def make() -> Built:
        head = getattr(lib("lightly.models.modules"), name)(*sizes)
        return WithHead(head), takes(3, 8, 8)


_head("BYOLProjectionHead", 8, 16, 4)
_head("SimCLRProjectionHead", 8, 16, 4)


@entry("lightly", "MaskedVisionTransformerTIMM")
def _() -> Built:
    model = lib("lightly.models.modules").MaskedVisionTransformerTIMM(_small_vit())
    masked = torch.tensor([[1, 2, 5], [3, 4, 6], [7, 8, 9]])
    return model, lambda b: ((noise(b, 3, 32, 32),), {"idx_mask": masked[:b]})


@entry("lightly", "IJEPAPredictorTIMM")
def _() -> Built:
    model = lib("lightly.models.modules").IJEPAPredictorTIMM(16, 2, 16, 16, 2)
    kept, asked = torch.tensor([[0, 1, 2, 3]] * 3), torch.tensor([[4, 5, 6]] * 3)
    return model, lambda b: ((noise(b, 4, 16), kept[:b], asked[:b]), {})


@entry("lightly", "DenseCLProjectionHead")
def _() -> Built:
    return lib("lightly.models.modules").DenseCLProjectionHead(8, 16, 4), takes(4, 4, 8)


# -- kornia ----------------------------------------------------------------------------------


def _above_zero(model: Any) -> None:
    """Random weights give no response at all behind its last ReLU."""
    nn.init.constant_(model.last_conv[0].bias, 1.0)


def _kornia(
    name: str, call: Callable[[int], Call], *args: Any, prepare: Any = None, **options: Any
) -> None:
    @entry("kornia", name, prepare=prepare)
    def make() -> Built:
        return getattr(lib("kornia.feature"), name)(*args, **options), call


_kornia("KeyNet", takes(1, 32, 32), prepare=_above_zero, pretrained=False)
_kornia("XFeatModel", takes(1, 64, 64))
_kornia("FilterResponseNorm2d", takes(4, 8, 8), 4, is_eps_leanable=True)


@entry("kornia", "DeDoDe", batches=(1, 2))
def _() -> Built:
    model = lib("kornia.feature").DeDoDe("L", "B", torch.float32)
    return Calls(model, lambda m, x: m(x, n=5)), takes(3, 28, 28)


@entry("kornia", "LocalFeature", batches=(1,))
def _() -> Built:
    f = lib("kornia.feature")
    detector = f.KeyNetDetector(pretrained=False, num_features=4)
    return f.LocalFeature(detector, f.LAFDescriptor(f.HardNet(pretrained=False))), takes(1, 64, 64)


@entry("kornia", "DISK")
def _() -> Built:
    model = lib("kornia.feature").DISK(8)
    return Calls(model, lambda m, x: m.heatmap_and_dense_descriptors(x)), takes(3, 32, 32)


# -- open_clip -------------------------------------------------------------------------------


def _clip(name: str) -> Built:
    factory = lib("open_clip.factory")
    config = copy.deepcopy(factory.get_model_config(name))
    for key in ("hf_model_name", "hf_tokenizer_name", "hf_proj_type"):
        config["text_cfg"].pop(key, None)
    config["embed_dim"] = 16
    vision, text = config["vision_cfg"], config["text_cfg"]
    text |= {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2}
    size = 64
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
        vision["timm_model_name"], size = TIMM_LIKE[name]
    elif isinstance(vision["layers"], list):
        vision |= {"layers": [1, 1, 1, 1], "width": 8}
    else:
        vision |= {"layers": 2, "width": 16, "head_width": 8, "patch_size": 16}
    clip = lib("open_clip")
    kind = clip.CustomTextCLIP if config.pop("custom_text", False) else clip.CLIP
    vision["image_size"] = size
    model = kind(**{k: v for k, v in config.items() if k in CLIP_KEYS})
    return model, lambda b: (
        (noise(b, 3, size, size), integers(60, b, 8, low=3)), {}
    )  # fmt: skip


TIMM_LIKE = {
    "EVA02-L-14": ("eva02_tiny_patch14_224", 224),
    "convnext_base": ("convnext_atto", 64),
    "ViT-B-16-SigLIP2-256": ("vit_tiny_patch16_224", 224),
}
"""A small image tower of the family that the configuration names, and its size of image."""
CLIP_KEYS = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_bias")

for _name in ("ViT-B-32-256", "EVA02-L-14", "convnext_base", "ViT-B-16-SigLIP2-256", "RN101"):
    entry("open_clip", _name)(lambda name=_name: _clip(name))
