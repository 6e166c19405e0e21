"""A data set of labelled images by its name, and batches of it as a model wants them."""

import hashlib
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .errors import DataError
from .images import check_size, to_tensor
from .images import read_image as read_image
from .loading import Loader
from .models import InputConfig
from .numeric import count, seed_number

Split = Literal["train", "test"]

KINDS = (
    "'fashion-sample', a folder of class folders, 'timm:NAME@ROOT' (such as "
    "timm:torch/cifar10@data), or a .safetensors file with images and labels"
)

_FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# Of the images' bytes, then the labels'; benchmarks/make_fashion_sample.py prints them.
_FASHION_SHA256 = {
    "train": "81fddc07a9ce49a95caedd6d5503160e7cbcd2a2ebd7da4fb77727cef2448c01",
    "test": "907173e94b6b61e45300b22d4d81a3599e621ad2d812ba41c38c9caaca13c6b0",
}
# More is a mistake in the labels, and a name for each class would fill the memory.
MAX_CLASSES = 1_000_000


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


def load_dataset(name: str, *, split: Split) -> ImageData:
    """Open a data set by its name.

    ====================== ======================================================================
    ``fashion-sample``     6,000 training and 2,000 test images of Fashion-MNIST, inside bayesify
    a folder               One subfolder of images for each class. Two such trees called ``train``
                           and ``test`` (or ``val``, ``validation``) are the splits, with the
                           classes of ``train``; a single tree has no splits
    ``timm:NAME@ROOT``     What timm.data.create_dataset calls NAME, in the folder ROOT; nothing is
                           downloaded
    a .safetensors file    ``images`` uint8 (N, H, W, C) with C 1 or 3, ``labels`` integer (N,);
                           the splits are these and ``test_images``, ``test_labels``; a file
                           without the latter has no splits
    ====================== ======================================================================

    Args:
        name: As above; a path may start with ``~``.
        split: Which images.

    Raises:
        DataError: If there is no such data set or split, or it cannot be used: unreadable, empty,
            a single class, or labels that are missing, soft or out of range.

    Reference:
        Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747 (Fashion-MNIST).

    >>> load_dataset("fashion-sample", split="test").classes[:2]
    ('T-shirt/top', 'Trouser')
    """
    if split not in ("train", "test"):
        raise DataError(f"split must be 'train' or 'test', not {split!r}.")
    path = Path(os.path.expanduser(name))
    if name == "fashion-sample":
        data = ImageData(name, split, _FASHION_CLASSES, _fashion(split))
    elif name.startswith("timm:"):
        data = _open_timm(name, split)
    elif path.suffix == ".safetensors":
        data = _open_safetensors(name, path, split)
    elif os.path.isdir(path):
        data = _open_folder(name, path, split)
    else:
        raise DataError(f"There is no data set or folder {name!r}. A data set is {KINDS}.")
    if len(data) == 0:
        raise DataError(f"The data set {name!r} has no image in its split {data.split!r}.")
    if len(data.classes) < 2:
        raise DataError(
            f"The data set {name!r} has one class only ({', '.join(data.classes)}); "
            "to classify takes at least two."
        )
    return data


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


def prepare(images: Tensor, model_config: InputConfig) -> Tensor:
    """Turn stored images into a model's input: resize, crop, scale to [0, 1], normalise.

    Images that already have the model's height and width are neither resized nor cropped. Grey is
    repeated for a model of 3 channels, colour averaged for a model of 1.

    Args:
        images: uint8.
        model_config: As :func:`bayesify.models.input_config` returns it.

    Shape:
        images (..., C, H, W), result (..., C', H', W') with C', H', W' of ``model_config.size``.

    Raises:
        DataError: If there is no image, or the channels cannot be made to fit.
    """
    channels, height, width = model_config.size
    if images.dtype != torch.uint8:
        raise DataError(f"Stored images must be uint8 from 0 to 255, not {images.dtype}.")
    if images.numel() == 0:
        raise DataError(f"There is no image in a batch of shape {tuple(images.shape)}.")
    if images.shape[-2:] != (height, width):
        images = resize_and_crop(images, model_config)
    x = images.float() / 255
    if x.shape[-3] != channels:
        if channels == 1:
            x = x.mean(dim=-3, keepdim=True)
        elif x.shape[-3] == 1:
            x = x.expand(*x.shape[:-3], channels, height, width)
        else:
            raise DataError(f"Images of {x.shape[-3]} channels do not fit a model of {channels}.")
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (model_config.mean, model_config.std))
    return (x - mean) / std


def resize_and_crop(images: Tensor, model_config: InputConfig) -> Tensor:
    """Bring stored images to a model's height and width, as timm.data.create_transform does.

    Args:
        images: uint8; channels stay as they are.
        model_config: As :func:`bayesify.models.input_config` returns it.

    Shape:
        images (..., C, H, W), result (..., C, H', W') with H', W' of ``model_config.size``.

    Raises:
        DataError: If an image is too large, or its sides too unlike, as for :func:`read_image`.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    _, height, width = model_config.size
    try:
        check_size(images.shape[-1], images.shape[-2])
    except ValueError as error:
        raise DataError(f"An image cannot be resized: {error}.") from error
    scaled = [math.floor(side / model_config.crop_pct) for side in (height, width)]
    if model_config.crop_mode == "center":
        if scaled[0] == scaled[1]:
            scaled = scaled[:1]  # the shorter side, which torchvision keeps the ratio of
        else:
            factor = max(s / now for s, now in zip(scaled, images.shape[-2:], strict=True))
            scaled = [round(now * factor) for now in images.shape[-2:]]
    interpolation = InterpolationMode(model_config.interpolation)
    images = functional.resize(images, scaled, interpolation=interpolation, antialias=True)
    cropped: Tensor = functional.center_crop(images, [height, width])
    return cropped


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


@dataclass(frozen=True, eq=False)
class _TimmItems:
    """A data set of timm or torchvision, of (PIL image, label)."""

    name: str
    items: Any

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> tuple[Tensor, int]:
        try:
            image, label = self.items[index]
            tensor = to_tensor(image)
        except Exception as error:  # data sets of many libraries
            raise DataError(f"Image {index} of {self.name!r} cannot be read: {error}") from error
        if isinstance(label, Tensor | np.generic):
            label = label.item()
        if isinstance(label, bool) or not isinstance(label, int):
            raise DataError(
                f"Image {index} of {self.name!r} has the label {label!r}; "
                "expected the whole number of a class."
            )
        return tensor, label


def _fashion(split: Split) -> InMemory:
    asset = resources.files("bayesify") / "assets" / "fashion_sample.npz"
    try:
        with asset.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{asset} is missing or damaged ({error}): install bayesify anew."
        ) from error
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    if digest != _FASHION_SHA256[split] or images.shape != (len(labels), 28, 28):
        raise DataError(f"{asset} is damaged, its sha256 is {digest}: install bayesify anew.")
    return InMemory(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long())


def _open_safetensors(name: str, path: Path, split: Split) -> ImageData:
    if not os.path.isfile(path):
        raise DataError(f"There is no file {name!r}. A data set is {KINDS}.")
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            has_splits = bool(keys & {"test_images", "test_labels"})
            prefix = "test_" if has_splits and split == "test" else ""
            for key in ("labels", f"{prefix}labels", f"{prefix}images"):
                if key not in keys:
                    raise DataError(
                        f"{name} has no tensor {key!r}, only {sorted(keys)}. Expected 'images' and "
                        "'labels', and 'test_images' and 'test_labels' where it has a test split."
                    )
            # The classes are those of the training images, of which test labels may lack some.
            known = _class_numbers(name, "labels", file.get_tensor("labels"))
            images = file.get_tensor(f"{prefix}images")
            labels = known
            if prefix:
                labels = _class_numbers(name, "test_labels", file.get_tensor("test_labels"))
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{name} is no readable safetensors file ({error}); it may be cut short."
        ) from error
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise DataError(
            f"{prefix}images in {name} must be uint8 (N, H, W, C) with C 1 or 3, "
            f"not {images.dtype} {tuple(images.shape)}."
        )
    if len(images) != len(labels):
        raise DataError(f"{name} has {len(images)} {prefix}images but {len(labels)} labels.")
    if images.numel() == 0:
        raise DataError(f"{name} has no pixel: {prefix}images is {tuple(images.shape)}.")
    if (known == known[:1]).all():
        raise DataError(f"{name} has images of one class only; to classify takes at least two.")
    classes = int(known.max()) + 1
    if classes > MAX_CLASSES or int(labels.max()) >= classes:
        raise DataError(
            f"Label {int(labels.max())} in {name} is out of range: the labels of its training "
            f"images go from 0 to {min(classes, MAX_CLASSES) - 1}."
        )
    source = InMemory(images.permute(0, 3, 1, 2).contiguous(), labels)
    return ImageData(
        name, split if has_splits else "all", tuple(str(i) for i in range(classes)), source
    )


def _class_numbers(name: str, key: str, labels: Tensor) -> Tensor:
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not whole or labels.ndim != 1:
        raise DataError(
            f"{key} in {name} must be integers (N,), not {labels.dtype} {tuple(labels.shape)}; "
            "soft and one-hot labels are not taken."
        )
    wide = labels.long()  # of unsigned types torch compares few, and uint64 wraps
    wrong = wide < 0
    if wrong.any():
        unsigned = labels.dtype == torch.uint64
        raise DataError(
            f"Label {labels[wrong][0].numpy()} in {name} is out of range: it is "
            f"{'no class number' if unsigned else 'below 0'}."
        )
    return wide


def _open_folder(name: str, root: Path, split: Split) -> ImageData:
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    train = _tree(root, "train")
    test = _tree(root, "test") or _tree(root, "val") or _tree(root, "validation")
    has_splits = train is not None or test is not None
    tree = (train if split == "train" else test) if has_splits else root
    if tree is None:
        raise DataError(f"The folder {name} has splits, but no class folders for {split!r}.")
    classes = _subfolders(train or tree)
    if not classes:
        raise DataError(
            f"The folder {tree} has no subfolders; expected one folder of images for each class."
        )
    unknown = sorted(set(_subfolders(tree)) - set(classes))
    if unknown:
        raise DataError(f"{tree} has classes that the training images have not: {unknown[:5]}.")
    try:
        samples = make_dataset(
            str(tree),
            {folder: number for number, folder in enumerate(classes)},
            extensions=IMG_EXTENSIONS,
            allow_empty=tree == test,  # test images of some classes may be missing
        )
    except FileNotFoundError as error:
        raise DataError(f"The folder {tree} lacks images: {error}") from error
    return ImageData(name, split if has_splits else "all", tuple(classes), Files(samples))


def _tree(root: Path, name: str) -> Path | None:
    """The subfolder if it holds class folders: a class may itself be called train."""
    folder = root / name
    return folder if folder.is_dir() and _subfolders(folder) else None


def _subfolders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _open_timm(name: str, split: Split) -> ImageData:
    from timm.data.dataset_factory import create_dataset

    kind, _, root = name.removeprefix("timm:").partition("@")
    create: Callable[..., Any] = create_dataset
    # timm takes either word for most data sets, and those of Hugging Face only their own.
    words = ("train",) if split == "train" else ("validation", "test")
    failures: list[Exception] = []
    for word in words:
        try:
            items = create(kind, root=os.path.expanduser(root) if root else None, split=word)
            break
        except Exception as error:  # data sets of many libraries
            failures.append(error)
    else:
        reason = f"{type(failures[0]).__name__}: {failures[0]}"
        raise DataError(
            f"timm cannot open the data set {kind!r} in {root or 'no folder'} ({reason}). "
            "bayesify downloads no data: put it there first, and name the folder after an @, "
            "as in timm:torch/cifar10@data."
        ) from failures[0]
    if isinstance(items, IterableDataset):
        raise DataError(
            f"{name!r} is a stream, which cannot be shuffled by a seed; use one with random access."
        )
    numbers = getattr(getattr(items, "reader", None), "class_to_idx", None) or {}
    classes = getattr(items, "classes", None) or sorted(numbers, key=numbers.__getitem__)
    if not classes:
        raise DataError(f"timm's data set {name!r} does not name its classes.")
    # torchvision's ImageNet has a tuple of synonyms for each class.
    names = tuple(", ".join(c) if isinstance(c, tuple) else str(c) for c in classes)
    return ImageData(name, split, names, _TimmItems(name, items))
