"""A run of seconds, for the tests of the BYOV recipe."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from recipes.byov.config import BYOVConfig, RunConfig
from recipes.byov.train import train
from recipes.byov.train_log import Progress, Watcher

CONFIG = BYOVConfig(
    encoder="vit_tiny_patch16_224",
    encoder_args={"patch_size": 14, "embed_dim": 16, "depth": 1, "num_heads": 2},
    image_size=28,
    channels=1,
    augmentation="cifar",
    projector_hidden=16,
    projector_out=8,
    batch_size=16,
    epochs=3,
    warmup_epochs=1.0,
    lr=1e-2,
    logvar_lr_ratio=5.0,
    tau_base=0.9,
)


def small_data(folder: Path, images: int = 48) -> Path:
    """Images of two classes, dark and bright."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % 2
    pixels = torch.randint(0, 120, (images, 28, 28, 1), generator=generator)
    pixels = (pixels + 130 * labels[:, None, None, None]).to(torch.uint8)
    path = folder / "small.safetensors"
    tensors = {"images": pixels, "labels": labels}
    save_file(
        {**tensors, "test_images": pixels[:16].clone(), "test_labels": labels[:16].clone()}, path
    )
    return path


def small_run(folder: Path, **changes: Any) -> RunConfig:
    """Where it runs: on the CPU, in ``folder``."""
    run = RunConfig(
        data=str(small_data(folder)),
        out=folder / "run",
        device="cpu",
        log_every=1,
        monitor_images=8,
        stop_on_collapse=False,
    )
    return replace(run, **changes)


def started(
    config: BYOVConfig, run: RunConfig, environment: Mapping[str, str]
) -> ForkServerProcess:
    """A process that trains, going on from a checkpoint if there is one.

    It comes out of a server that has imported torch and timm, which take seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["recipes.byov.train", "timm"])
    process = context.Process(target=_train, args=(config, run, dict(environment)))
    process.start()
    return process


def _train(config: BYOVConfig, run: RunConfig, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    train(config, run, resume=True)


def stop_at(step: int) -> Watcher:
    """Sends this process the signal that a scheduler sends."""

    def on_step(progress: Progress) -> None:
        if progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return Watcher(on_step=on_step)
