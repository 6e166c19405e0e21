"""Where images are: what :func:`bayesify.data.load_dataset` knows, and what has no labels."""

import os
import zipfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bayesify import DataError
from bayesify.data import MAX_CLASSES, Files, InMemory, load_dataset

from .webdataset import index_shards

# Of what an .npz file unpacks to, where it is far larger than the file.
_MAX_BYTES, _MAX_RATIO = 1 << 28, 100


class Images(Protocol):
    """Images that can be read in any order."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Tensor, int]:
        """Image (C, H, W) of uint8 with C 1 or 3, and its label, -1 if it has none."""


def open_images(spec: str) -> tuple[Images, Images | None, tuple[str, ...]]:
    """Return training images, test images and class names of a data set by its name.

    Raises:
        DataError: If there is no such data set or it cannot be used.
    """
    path = Path(os.path.expanduser(spec))
    if spec.startswith("wds:"):
        return _open_shards(spec)
    if path.suffix == ".npz":
        return _open_npz(spec, path)
    if os.path.isdir(path) and (unlabelled := _without_labels(path)):
        return Files([(str(file), -1) for file in unlabelled]), None, ()
    train = load_dataset(spec, split="train")
    if train.split == "all":
        return _unwrapped(train), None, train.classes
    return _unwrapped(train), _unwrapped(load_dataset(spec, split="test")), train.classes


def _unwrapped(data: Any) -> Images:
    """Tensors as such; all else through ImageData, which checks its labels."""
    images: Images = data.source if isinstance(data.source, InMemory) else data
    return images


def _without_labels(root: Path) -> list[Path]:
    """The images of a folder that has not two folders of images, its classes."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    tree = root / "train" if (root / "train").is_dir() else root
    folders = [p for p in tree.iterdir() if p.is_dir() and not p.name.startswith(".")]
    if len(folders) > 1:
        return []
    found = sorted(p for p in tree.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
    if not found:
        raise DataError(
            f"There is no image in the folder {tree}; expected names that end in one of "
            f"{', '.join(IMG_EXTENSIONS)}."
        )
    return found


def _open_shards(spec: str) -> tuple[Images, Images | None, tuple[str, ...]]:
    folder = Path(os.path.expanduser(spec.removeprefix("wds:")))
    tars = sorted(folder.glob("*.tar"))
    held_out = [path for path in tars if path.name.startswith(("test", "val"))]
    train_tars = [path for path in tars if path not in held_out]
    if not train_tars:
        raise DataError(
            f"There is no .tar file to train on in {folder}; expected shards of WebDataset such "
            "as train-000000.tar."
        )
    train = index_shards(train_tars)
    test = index_shards(held_out) if held_out else None
    count = int(train.labels.max()) + 1
    if test is not None and not (test.labels < count).all():
        raise DataError(f"Test images in {folder} have labels that no training image has.")
    return train, test, tuple(map(str, range(count)))


def _open_npz(spec: str, path: Path) -> tuple[Images, Images | None, tuple[str, ...]]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > _MAX_BYTES and size > _MAX_RATIO * path.stat().st_size:
            raise DataError(
                f"{spec} says that it unpacks to {size:,} bytes, {_MAX_RATIO} times its own and "
                "more: images do not pack like that."
            )
        with np.load(path, allow_pickle=False) as file:
            members = {key: file[key] for key in file.files}
        # what is no .npy comes as bytes
        arrays = {key: value for key, value in members.items() if isinstance(value, np.ndarray)}
    except DataError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        raise DataError(f"{spec} is no readable .npz file of plain arrays ({error}).") from error
    train = _arrays(spec, arrays, "")
    test = _arrays(spec, arrays, "test_") if "test_images" in arrays else None
    count = int(train.labels.max()) + 1
    if test is not None and not ((test.labels < count) & ((test.labels >= 0) == (count > 0))).all():
        raise DataError(f"Test images in {spec} have labels that no training image has, or none.")
    return train, test, tuple(map(str, range(count)))


def _arrays(spec: str, arrays: dict[str, Any], prefix: str) -> InMemory:
    images = arrays.get(f"{prefix}images")
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.size == 0:
        what = "no such array" if images is None else f"{images.dtype} {images.shape}"
        raise DataError(f"{prefix}images in {spec} must be uint8 (N, H, W, C), not {what}.")
    labels = arrays.get(f"{prefix}labels", np.full(len(images), -1))
    known = f"{prefix}labels" in arrays
    if (
        images.shape[3] not in (1, 3)
        or labels.shape != images.shape[:1]
        or labels.dtype.kind not in "iu"
        or (known and not 0 <= labels.min() <= labels.max() < MAX_CLASSES)
    ):
        raise DataError(
            f"{spec} must have 1 or 3 channels and one label from 0 for each image, below "
            f"{MAX_CLASSES:,}; its {prefix}images are {images.shape}, its {prefix}labels "
            f"{labels.dtype} {labels.shape}."
        )
    pixels = torch.from_numpy(np.moveaxis(images, 3, 1).copy())
    return InMemory(pixels, torch.from_numpy(labels.astype(np.int64)))
