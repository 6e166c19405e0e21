"""Labelled images, wherever they are stored, and batches of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from ..images import read_image
from ..loading import Loader
from ..models import InputConfig
from ..numeric import count, seed_number
from .preparation import prepare


class _Source(Protocol):
    """Where the images are."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Tensor, int]:
        """Image (C, H, W) of uint8 with C 1 or 3, and its label."""


@dataclass(frozen=True)
class ImageData:
    """One split of a data set of labelled images.

    Args:
        name: The name that it was loaded by.
        split: ``train`` or ``test``, or ``all`` where the source has no splits: training and
            testing on the same name then means testing on the training images.
        classes: Name of each class, in the order of the labels.
        source: Where the images are.
    """

    name: str
    split: Literal["train", "test", "all"]
    classes: tuple[str, ...]
    source: _Source = field(repr=False)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> tuple[Tensor, int]:
        """Return the image as it is stored, (C, H, W) of uint8 with C 1 or 3, and its label.

        Raises:
            DataError: If the image cannot be read or its label is none of the classes.
        """
        image, label = self.source.read(index)
        if not 0 <= label < len(self.classes):
            raise DataError(
                f"Label {label} of image {index} in {self.name!r} is out of range: there are "
                f"{len(self.classes)} classes, so labels go from 0 to {len(self.classes) - 1}."
            )
        return image, label

    def dataset(self, model_config: InputConfig) -> Dataset[tuple[Tensor, int]]:
        """Return a torch Dataset of (float32 image (C, H, W), label), prepared for a model.

        Args:
            model_config: As :func:`bayesify.models.input_config` returns it.
        """
        return _Prepared(self, model_config)


def loader(
    data: ImageData,
    batch_size: int,
    *,
    model_config: InputConfig,
    shuffle: bool = False,
    seed: int = 0,
    workers: int = 0,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Give batches of float32 images (N, C, H, W) and int64 labels (N,), the last one smaller.

    Torch's global random state is not touched.

    Args:
        data: What :func:`load_dataset` returned.
        batch_size: Images in a batch, at least 1.
        model_config: As :func:`bayesify.models.input_config` returns it.
        shuffle: A new order on every pass.
        seed: Of the orders: two loaders with one seed give the same first, second, ... pass.
        workers: Processes that read images; 0 reads them here, the faster way for data in memory.

    Raises:
        DataError: If ``batch_size`` or ``workers`` cannot work; on iteration, if an image cannot
            be read.
    """
    batch_size = count("batch_size", batch_size, kind=DataError)
    workers = count("workers", workers, least=0, kind=DataError)
    seed = seed_number(seed)
    dataset: Any = data.dataset(model_config)  # of single images, the loader gives batches
    return Loader(
        dataset,
        batch_size,
        shuffle=shuffle,
        # Without one of its own, a DataLoader takes a number from the global generator per pass.
        generator=torch.Generator().manual_seed(seed),
        num_workers=workers,
        persistent_workers=workers > 0,
    )


class _Prepared(Dataset[tuple[Tensor, int]]):
    """A data set as a model wants to see it."""

    def __init__(self, data: ImageData, model_config: InputConfig) -> None:
        self.data = data
        self.model_config = model_config

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.data.read(index)
        return prepare(image, self.model_config), label

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """The batch, which DataLoader asks for: images in memory are prepared together."""
        source = self.data.source
        if isinstance(source, InMemory):
            images = prepare(source.images[indices], self.model_config)
            return list(zip(images, source.labels[indices].tolist(), strict=True))
        return [self[index] for index in indices]


@dataclass(frozen=True, eq=False)
class InMemory:
    """Images (N, C, H, W) of uint8 and labels (N,) of int64, checked when opened."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


@dataclass(frozen=True, eq=False)
class Files:
    """Image files with their labels."""

    samples: list[tuple[str, int]]

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return read_image(path, path), label
