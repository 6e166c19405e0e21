"""The images of a run, and its micro-batches step by step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from bayesify import ArgumentError, input_config

from ..config import BYOVConfig, RunConfig
from ..model import build_encoder
from ..runtime.distributed import World
from .batches import Views, train_views
from .dataset import Source, open_source
from .views import TwoViews, ViewConfig, WorkerViews, view_configs


def open_images(config: BYOVConfig, run: RunConfig) -> Source:
    """The data, to be normalised as the encoder's other users in bayesify do: as timm says."""
    # on the CPU: what makes numbers in its constructor, as ViTs of timm 1.0.20, has no meta device
    with torch.random.fork_rng(devices=[]):
        encoder = build_encoder(config, None)
    shown = input_config(encoder, img_size=config.image_size, in_chans=config.channels)
    return open_source(
        run.data,
        image_size=config.image_size,
        channels=config.channels,
        mean=shown.mean,
        std=shown.std,
        skip_broken=run.skip_broken,
    )


def steps_of_epoch(source: Source, config: BYOVConfig, run: RunConfig, world: World) -> int:
    parts = world.size * run.accumulate
    if config.batch_size % parts:
        raise ArgumentError(
            f"batch_size ({config.batch_size}) must be a multiple of the {parts} micro-batches: "
            f"{world.size} processes with accumulate={run.accumulate}."
        )
    if config.batch_size == parts and config.head_norm == "batch" and config.objective == "byol":
        raise ArgumentError(
            f"batch_size ({config.batch_size}) over {parts} micro-batches leaves BatchNorm one "
            "image each: take a larger one, or head_norm 'group', 'layer' or 'none'."
        )
    if source.num_images < config.batch_size:
        raise ArgumentError(
            f"batch_size ({config.batch_size}) must be at most the number of training images, "
            f"{source.num_images}."
        )
    return source.num_images // config.batch_size


def configs_of(config: BYOVConfig, source: Source) -> tuple[ViewConfig, ViewConfig]:
    """How a run makes both views of its images."""
    return view_configs(
        config.augmentation, size=config.image_size, mean=source.mean, std=source.std,
        grey=source.grey, min_crop=config.min_crop, strength=config.augmentation_strength,
    )  # fmt: skip


def batches_of(
    source: Source,
    config: BYOVConfig,
    run: RunConfig,
    world: World,
    steps_per_epoch: int,
    start: int,
) -> Iterator[list[Views]]:
    """The micro-batches of this process, step by step from ``start`` on."""
    configs = configs_of(config, source)
    views = WorkerViews(*configs) if run.workers and not source.resident else TwoViews(*configs)
    for epoch in range(start // steps_per_epoch, config.epochs):
        stream = train_views(
            source,
            batch_size=config.batch_size // (world.size * run.accumulate),
            seed=config.seed,
            epoch=epoch,
            views=views,
            start_step=max(0, start - epoch * steps_per_epoch),
            rank=world.rank,
            world_size=world.size,
            micro_batches=run.accumulate,
            device=world.device,
            workers=run.workers,
        )
        while micro := list(itertools.islice(stream, run.accumulate)):
            yield micro
