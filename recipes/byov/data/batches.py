"""Batches of images for self-supervised training, the same on every run.

Which images a batch holds and how they are augmented is a function of (seed, epoch, step, part),
part being the rank or the micro-batch. So a resumed run sees what an uninterrupted one sees, and
two processes see what one sees that accumulates two micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bayesify import ArgumentError, DataError
from bayesify.data import InMemory
from bayesify.loading import Loader
from bayesify.seeds import fold

from ..runtime.seeds import Stream, seed_of
from .dataset import Source, as_channels
from .image_ops import normalise
from .views import TwoViews, WorkerViews


class Views(NamedTuple):
    """Two views (B, C, size, size) of the same images, and their labels (B,) if they have any."""

    first: Tensor
    second: Tensor
    labels: Tensor | None


def steps_per_epoch(
    source: Source, *, batch_size: int, world_size: int = 1, micro_batches: int = 1
) -> int:
    """Return how many optimizer steps :func:`train_views` has batches for.

    Raises:
        ArgumentError: If a number is below 1.
        DataError: If the data set has not images enough for one step.
    """
    sizes = {"batch_size": batch_size, "world_size": world_size, "micro_batches": micro_batches}
    wrong = [f"{name} = {value}" for name, value in sizes.items() if value < 1]
    if wrong:
        raise ArgumentError(f"{', '.join(wrong)}: expected 1 or more.")
    images = batch_size * world_size * micro_batches
    if source.num_images < images:
        raise DataError(
            f"{source.name!r} has {source.num_images} training images, fewer than one step takes: "
            f"{images} ({', '.join(f'{name} {value}' for name, value in sizes.items())})."
        )
    return source.num_images // images


def train_views(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    views: TwoViews | WorkerViews,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    micro_batches: int = 1,
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> Iterator[Views]:
    """Give the batches of one epoch in which each image comes once, in an order from the seed.

    The images of a step are cut into ``world_size * micro_batches`` parts; part
    ``m * world_size + rank`` is micro-batch m of this rank. Images that fill no step are left out.
    Torch's global random state is neither used nor changed.

    Args:
        source: What :func:`open_source` returned.
        batch_size: Images of one micro-batch on one rank.
        seed: Of the orders and the views.
        epoch: From 0.
        views: :class:`TwoViews` for batches on the device, or :class:`WorkerViews`.
        start_step: First optimizer step, where a run was interrupted.
        rank: Of this process.
        world_size: Number of processes.
        micro_batches: Batches that this process accumulates for one optimizer step.
        device: Where the views go.
        workers: Processes that read, and with WorkerViews augment; images in memory that
            TwoViews augments need none.

    Yields:
        ``micro_batches`` batches for each optimizer step.

    Raises:
        ArgumentError: If a number cannot work.
        DataError: If there are not images enough for one step; on iteration, if an image cannot be
            read.
    """
    steps = steps_per_epoch(
        source, batch_size=batch_size, world_size=world_size, micro_batches=micro_batches
    )
    if not (0 <= rank < world_size and 0 <= start_step <= steps):
        raise ArgumentError(
            f"rank must be from 0 to {world_size - 1} and start_step from 0 to {steps}, "
            f"not {rank} and {start_step}."
        )
    if workers < 0:
        raise ArgumentError(f"workers must be 0 or more, not {workers}.")
    generator = torch.Generator().manual_seed(seed_of(Stream.ORDER, seed, epoch))
    order = torch.randperm(source.num_images, generator=generator)
    parts = world_size * micro_batches
    order = order[: steps * parts * batch_size].view(steps, micro_batches, world_size, batch_size)
    todo = [
        _Batch(
            order[step, micro, rank],
            seed_of(Stream.VIEWS, seed, epoch, step, micro * world_size + rank),
        )
        for step in range(start_step, steps)
        for micro in range(micro_batches)
    ]
    if isinstance(views, WorkerViews):
        epoch_seed = seed_of(Stream.VIEWS, seed, epoch)
        return _worker_views(source, todo, views, epoch_seed, device, workers)
    return _device_views(source, todo, views, device, workers)


def eval_batches(
    source: Source,
    split: Literal["train", "test"],
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Give all images of a split in their order, normalised and not augmented, and the labels.

    Shape:
        images (B, channels, image_size, image_size) of float32, labels (B,) or None; the last
        batch is smaller.

    Raises:
        DataError: If there is no such split; on iteration, if an image cannot be read.
    """
    rows = torch.arange(len(source.part(split)))
    batches = [_Batch(part, 0) for part in rows.split(batch_size)]
    for images, labels in _images(source, split, batches, device, workers):
        yield normalise(images.float() / 255, source.mean, source.std), labels


class _Batch(NamedTuple):
    """Rows of one batch, and the seed of its views."""

    rows: Tensor
    seed: int


def _device_views(
    source: Source,
    batches: list[_Batch],
    views: TwoViews,
    device: torch.device | str,
    workers: int,
) -> Iterator[Views]:
    for batch, (images, labels) in zip(
        batches, _images(source, "train", batches, device, workers), strict=True
    ):
        first, second = views(images, batch.seed)
        yield Views(first, second, labels)


def _worker_views(
    source: Source,
    batches: list[_Batch],
    views: WorkerViews,
    seed: int,
    device: torch.device | str,
    workers: int,
) -> Iterator[Views]:
    items = _Viewed(source, views, seed)
    for first, second, labels in _load(source, "train", items, batches, device, workers):
        yield Views(first, second, labels if source.classes else None)


def _images(
    source: Source,
    split: Literal["train", "test"],
    batches: list[_Batch],
    device: torch.device | str,
    workers: int,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Square uint8 images on the device, and their labels."""
    part = source.part(split)
    if isinstance(part, InMemory):
        for rows, _ in batches:
            here = rows.to(part.images.device)
            labels = part.labels[here].to(device) if source.classes else None
            yield part.images[here].to(device), labels
        return
    items = _Stored(source, split)
    for images, labels in _load(source, split, items, batches, device, workers):
        yield images, labels if source.classes else None


def _load(
    source: Source,
    split: str,
    items: Dataset[Any],
    batches: list[_Batch],
    device: torch.device | str,
    workers: int,
) -> Iterator[list[Tensor]]:
    """Tensors of each batch on the device; broken images are noted in the source."""
    loader: Loader[Any] = Loader(
        items,
        batch_sampler=[rows.tolist() for rows, _ in batches],
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.device(device).type == "cuda",
        # Without one of its own, a DataLoader takes a number from the global generator.
        generator=torch.Generator(),
    )
    for tensors, broken in loader:
        source.broken.update((split, place) for place in broken)
        yield [tensor.to(device, non_blocking=True) for tensor in tensors]


def _collate(items: list[tuple[Any, ...]]) -> tuple[list[Tensor], list[int]]:
    *columns, broken = zip(*items, strict=True)
    tensors = [
        torch.stack(column) if isinstance(column[0], Tensor) else torch.tensor(column)
        for column in columns
    ]
    return tensors, [place for places in broken for place in places]


@dataclass(frozen=True)
class _Stored(Dataset[Any]):
    """Images brought to one size."""

    source: Source
    split: Literal["train", "test"]

    def __getitem__(self, index: int) -> tuple[Tensor, int, list[int]]:
        image, label, broken = self.source.stored(self.split, index)
        return self.source.square(image), label, broken


@dataclass(frozen=True)
class _Viewed(Dataset[Any]):
    """Both views of each image."""

    source: Source
    views: WorkerViews
    seed: int

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int, list[int]]:
        image, label, broken = self.source.stored("train", index)
        image = as_channels(image, self.source.channels)
        return *self.views(image, fold(self.seed, index)), label, broken
