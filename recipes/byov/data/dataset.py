"""A data set that is opened: its images, read one by one or held in memory, brought to one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from bayesify import ArgumentError, DataError
from bayesify.data import InMemory, resize_and_crop
from bayesify.models import InputConfig

from .sources import Images, open_images
from .views import IMAGENET_VIEWS

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


def in_memory(source: Source, split: Literal["train", "test"]) -> InMemory:
    """All images of a split as one tensor."""
    images = source.part(split)
    if isinstance(images, InMemory):
        chunks = [source.square(chunk) for chunk in images.images.split(_CHUNK)]
        return InMemory(torch.cat(chunks), images.labels)
    kept, labels = [], []
    for index in range(len(images)):
        image, label, broken = source.stored(split, index)
        source.broken.update((split, place) for place in broken)
        kept.append(source.square(image))
        labels.append(label)
    return InMemory(torch.stack(kept), torch.tensor(labels))


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
