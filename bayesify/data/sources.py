"""A data set by its name: bayesify's own sample, a folder, a file, or one of timm's."""

import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import IterableDataset

from .. import requirements
from ..errors import DataError
from ..images import to_tensor
from .dataset import Files, ImageData, InMemory

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
    requirements.check("timm")
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
