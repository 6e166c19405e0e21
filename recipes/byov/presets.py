"""Named settings of a run: what ``--preset`` of the command line takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from .config import BYOVConfig, RunConfig


@dataclass(frozen=True)
class Preset:
    """A named pair of settings, and what it is for."""

    doc: str
    config: BYOVConfig
    run: RunConfig


_CIFAR = BYOVConfig(
    image_size=32,
    augmentation="cifar",
    batch_size=512,
    epochs=100,
    lr=5e-4,
    logvar_lr_ratio=10.0,
    projector_hidden=1024,
    clip_norm=3.0,
    encoder="vit_tiny_patch16_224",
    encoder_args={"patch_size": 4},
)
_CUDA = RunConfig(device="cuda", amp=True, compile=True, log_every=50, eval_every=5)

PRESETS: dict[str, Preset] = {
    "demo": Preset(
        "6,000 grey images that are inside bayesify, on two CPU cores, for minutes.",
        BYOVConfig(
            encoder="vit_tiny_patch16_224",
            encoder_args={
                "patch_size": 7,
                "embed_dim": 64,
                "depth": 2,
                "num_heads": 2,
                "global_pool": "avg",
            },
            init_std=0.1,
            image_size=28,
            channels=1,
            augmentation="cifar",
            min_crop=0.4,
            projector_hidden=256,
            projector_out=64,
            predictor_lr_ratio=10.0,
            batch_size=64,
            epochs=20,
            warmup_epochs=1.0,
            lr=4e-3,
            logvar_lr_ratio=5.0,
            clip_norm=3.0,
            tau_base=0.98,
        ),
        RunConfig(out=Path("byov-demo"), device="cpu", eval_every=4, baselines=True),
    ),
    "cifar10-vit-tiny": Preset(
        "ViT-Tiny/4 on CIFAR-10, 100 epochs on one GPU.",
        _CIFAR,
        replace(_CUDA, data="timm:torch/cifar10@data", out=Path("byov-cifar10-vit-tiny")),
    ),
    "cifar10-resnet18": Preset(
        "ResNet-18 with a stem for 32 pixels on CIFAR-10, LARS as in BYOL.",
        replace(
            _CIFAR,
            encoder=f"{__package__}.resnet:cifar_resnet18",
            encoder_args={},
            optimizer="lars",
            lr=1.0,
            trust_coefficient=0.02,
            logvar_lr_ratio=300.0,
            clip_norm=0.0,
            epochs=200,
        ),
        replace(_CUDA, data="timm:torch/cifar10@data", out=Path("byov-cifar10-resnet18")),
    ),
    "imagenette-vit-small": Preset(
        "ViT-Small/16 on Imagenette at 160 pixels, 300 epochs on one GPU.",
        BYOVConfig(
            encoder="vit_small_patch16_224",
            image_size=160,
            batch_size=512,
            epochs=300,
            lr=5e-4,
            logvar_lr_ratio=5.0,
            projector_hidden=4096,
            clip_norm=3.0,
        ),
        replace(_CUDA, data="imagenette2-160", out=Path("byov-imagenette"), workers=8),
    ),
    "imagenet-vit-b16": Preset(
        "The paper's profile: ViT-B/16 on ImageNet-1k, batch 8192, for 8 GPUs or more.",
        BYOVConfig(batch_size=8192, tau_base=0.99, tau_batch=4096, warmup_epochs=40.0),
        replace(_CUDA, data="imagenet", out=Path("byov-imagenet"), workers=12),
    ),
}
