"""Images for self-supervised training: where they are, and the same batches on every run.

Which images a batch holds and how they are augmented is a function of (seed, epoch, step, part),
part being the rank or the micro-batch. So a resumed run sees what an uninterrupted one sees, and
two processes see what one sees that accumulates two micro-batches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Self

from bayesify import ArgumentError, DataError
from bayesify.data import InMemory, resize_and_crop
from bayesify.models import InputConfig

from .image_ops import normalise
from .sources import Images, open_images
from .views import IMAGENET_VIEWS, TwoViews, WorkerViews

_LOOKED_AT = 32  # images that tell whether a data set is grey
_CHUNK = 1024  # images that are resized together


@dataclass(frozen=True, eq=False)
class Source:
    """A data set that is opened.

    Args:
        name: What it was opened by.
        train: Images to train on.
        test: Images to measure on, None where the data set has no second split.
        classes: Name of each class; empty without labels.
        image_size: Side in pixels of the square that images are brought to.
        channels: That images are brought to: 1 or 3.
        mean: Of the pixels scaled to [0, 1], one number a channel.
        std: Likewise.
        grey: The images have no colour, also where 3 channels hold them.
        skip_broken: Take the next image in place of one that cannot be read.
        broken: Split and number of each image that was skipped so far.
    """

    name: str
    train: Images = field(repr=False)
    test: Images | None = field(repr=False)
    classes: tuple[str, ...]
    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    grey: bool = False
    skip_broken: bool = False
    broken: set[tuple[str, int]] = field(default_factory=set, repr=False)

    @property
    def num_images(self) -> int:
        """Images to train on."""
        return len(self.train)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.classes)

    @property
    def resident(self) -> bool:
        """Whether the training images are one tensor."""
        return isinstance(self.train, InMemory)

    def part(self, split: Literal["train", "test"]) -> Images:
        """Return the images of a split.

        Raises:
            DataError: If there is no such split.
        """
        images = self.train if split == "train" else self.test
        if images is None:
            raise DataError(f"The data set {self.name!r} has no split {split!r}.")
        return images

    def to(self, device: torch.device | str) -> Self:
        """Return this data set with the images that are in memory on another device."""

        def moved(images: Images | None) -> Any:
            if not isinstance(images, InMemory):
                return images
            return InMemory(images.images.to(device), images.labels.to(device))

        return replace(self, train=moved(self.train), test=moved(self.test))

    def stored(self, split: Literal["train", "test"], index: int) -> tuple[Tensor, int, list[int]]:
        """Return an image as it is stored, its label, and the broken images that were skipped.

        Raises:
            DataError: If it cannot be read and ``skip_broken`` is off, or none can be read.
        """
        images = self.part(split)
        broken: list[int] = []
        for place in (*range(index, len(images)), *range(index)):
            try:
                return *images.read(place), broken
            except DataError:
                if not self.skip_broken:
                    raise
                broken.append(place)
        raise DataError(f"None of the {len(images)} images of {self.name!r} can be read.")

    def square(self, images: Tensor) -> Tensor:
        """Bring stored images (..., C, H, W) to uint8 (..., channels, image_size, image_size)."""
        images = as_channels(images, self.channels)
        size = (self.channels, self.image_size, self.image_size)
        if images.shape[-2:] == size[1:]:
            return images
        config = InputConfig(size, self.mean, self.std, interpolation="bicubic")
        return resize_and_crop(images, config)


class Views(NamedTuple):
    """Two views (B, C, size, size) of the same images, and their labels (B,) if they have any."""

    first: Tensor
    second: Tensor
    labels: Tensor | None


def open_source(
    spec: str,
    *,
    image_size: int,
    channels: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resident: bool = False,
    skip_broken: bool = False,
) -> Source:
    """Open a data set by its name.

    ====================== ======================================================================
    ``fashion-sample``     Inside bayesify, 28 x 28 grey
    a folder               As :func:`bayesify.data.load_dataset` has it, with one folder of images
                           for each class; or images without labels, at any depth, in it or in its
                           ``train``
    ``timm:NAME@ROOT``     What timm.data.create_dataset calls NAME, in the folder ROOT
    .safetensors, .npz     ``images`` uint8 (N, H, W, C), ``labels`` integer (N,), ``test_images``
                           and ``test_labels``; in an .npz all but the first may be missing
    ``wds:FOLDER``         Shards of WebDataset: the .tar files in FOLDER, those whose names begin
                           with test or val for the test; ``.cls`` holds a label
    ====================== ======================================================================

    Args:
        spec: As above; a path may start with ``~``.
        image_size: Side in pixels of the square that images are brought to (shorter side, then
            central crop) for augmentation on the device and for measurements.
        channels: Of an image, 1 or 3; None takes 1 if 32 images spread over the data set are grey.
        mean: Of the pixels in [0, 1], one number a channel; None measures it if the images are in
            memory, and takes ImageNet's else.
        std: Likewise.
        resident: Decode all images once and keep them in memory, as those of a tensor file are.
        skip_broken: Take the next image in place of one that cannot be read, and count it in
            ``Source.broken``; else such an image is an error.

    Raises:
        ArgumentError: If ``image_size``, ``channels``, ``mean`` or ``std`` cannot work.
        DataError: If there is no such data set or it cannot be used.
    """
    if image_size < 1 or channels not in (None, 1, 3) or (mean is None) != (std is None):
        raise ArgumentError(
            "image_size must be above 0, channels 1 or 3 or None, and mean and std given both or "
            f"neither; not {image_size}, {channels}, {mean} and {std}."
        )
    train, test, classes = open_images(spec)
    source = Source(
        spec, train, test, classes, image_size, 3, *_imagenet(3), skip_broken=skip_broken
    )
    found = _channels_of(source)
    count = channels or found
    usual_mean, usual_std = _imagenet(count)
    grey = min(found, count) == 1
    source = replace(source, channels=count, mean=usual_mean, std=usual_std, grey=grey)
    if resident or isinstance(train, InMemory):
        source = replace(source, train=in_memory(source, "train"))
        if test is not None:
            source = replace(source, test=in_memory(source, "test"))
    if mean is None and isinstance(source.train, InMemory):
        mean, std = mean_and_std(source.train.images)
    if mean is not None and std is not None:
        if not len(mean) == len(std) == count:
            raise ArgumentError(
                f"mean and std need one number for each of the {count} channels of {spec!r}, "
                f"not {list(mean)} and {list(std)}."
            )
        source = replace(source, mean=tuple(mean), std=tuple(std))
    return source


def mean_and_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of uint8 (N, C, H, W), scaled to [0, 1].

    They come from the counts of the 256 values, without rounding on the way. A channel that never
    changes gets the standard deviation 1.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        counts = torch.bincount(channel.flatten(), minlength=256).double().cpu()
        share = counts / counts.sum()
        mean = float(share @ levels)
        means.append(mean)
        stds.append(float(share @ (levels - mean) ** 2) ** 0.5 or 1.0)
    return tuple(means), tuple(stds)


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
    generator = torch.Generator().manual_seed(_derived(seed, epoch))
    order = torch.randperm(source.num_images, generator=generator)
    parts = world_size * micro_batches
    order = order[: steps * parts * batch_size].view(steps, micro_batches, world_size, batch_size)
    todo = [
        _Batch(order[step, micro, rank], _derived(seed, epoch, step, micro * world_size + rank))
        for step in range(start_step, steps)
        for micro in range(micro_batches)
    ]
    if isinstance(views, WorkerViews):
        return _worker_views(source, todo, views, _derived(seed, epoch), device, workers)
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


def _derived(*numbers: int) -> int:
    """A seed from several numbers; a neighbour in any of them gives an unrelated one."""
    try:
        return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
    except ValueError as error:
        raise ArgumentError(f"seed and epoch must be 0 or more, not {numbers}.") from error


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
    loader: DataLoader[Any] = DataLoader(
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
        return *self.views(image, _derived(self.seed, index)), label, broken


def as_channels(images: Tensor, channels: int) -> Tensor:
    """Repeat grey, or average colour, of uint8 (..., C, H, W) with C and ``channels`` 1 or 3."""
    if images.shape[-3] == channels:
        return images
    if channels == 3:
        return images.expand(*images.shape[:-3], 3, *images.shape[-2:])
    return images.float().mean(dim=-3, keepdim=True).round().to(images.dtype)


def _imagenet(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, std = IMAGENET_VIEWS[0].mean, IMAGENET_VIEWS[0].std
    return (mean, std) if channels == 3 else ((sum(mean) / 3,), (sum(std) / 3,))


def _channels_of(source: Source) -> int:
    if isinstance(source.train, InMemory):
        return int(source.train.images.shape[1])
    places = range(0, source.num_images, -(-source.num_images // _LOOKED_AT))
    return max(source.stored("train", place)[0].shape[0] for place in places)


def in_memory(source: Source, split: Literal["train", "test"]) -> InMemory:
    """All images of a split as one tensor."""
    images = source.part(split)
    if isinstance(images, InMemory):
        chunks = [source.square(chunk) for chunk in images.images.split(_CHUNK)]
        return InMemory(torch.cat(chunks), images.labels)
    items = _Stored(source, split)
    kept, labels = [], []
    for index in range(len(images)):
        image, label, broken = items[index]
        source.broken.update((split, place) for place in broken)
        kept.append(image)
        labels.append(label)
    return InMemory(torch.stack(kept), torch.tensor(labels))
