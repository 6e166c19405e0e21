"""Images in the tar files of WebDataset, read at random places.

A stream with a shuffle buffer cannot give the same batches to a run that was interrupted, so the
headers are read once, and each image is then read at its offset. It takes local files and no
further package.
"""

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bayesify import DataError
from bayesify.data import MAX_CLASSES, read_image

_IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "ppm"})
_MAX_BYTES = 1 << 28
_MAX_DIGITS = 32


@dataclass(frozen=True, eq=False)
class Shards:
    """Images in tar files, each with a label, or -1.

    Shape:
        places (N, 3): shard, offset and bytes of each image. labels (N,).
    """

    paths: tuple[Path, ...]
    places: NDArray[np.int64]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Tensor, int]:
        """Return the image as it is stored, uint8 (C, H, W), and its label.

        Raises:
            DataError: If it cannot be read.
        """
        shard, offset, size = self.places[index].tolist()
        place = f"at byte {offset} of {self.paths[shard]}"
        try:
            with self.paths[shard].open("rb") as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as error:
            raise DataError(f"The image {place} cannot be read: {error}") from error
        return read_image(io.BytesIO(content), place), int(self.labels[index])


def index_shards(paths: list[Path]) -> Shards:
    """Find the images in tar files, and the labels that ``.cls`` files beside them hold.

    Args:
        paths: The tar files, uncompressed.

    Raises:
        DataError: If a file is no such tar file, a label is no class number, some images have a
            label and others have none, or there is no image.
    """
    places: list[tuple[int, int, int]] = []
    labels: list[int] = []
    for number, path in enumerate(paths):
        found: dict[str, tuple[int, int, int]] = {}
        classes: dict[str, int] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    key, _, extension = name.partition(".")
                    key = f"{folder}/{key}"
                    if not member.isfile():
                        continue
                    if extension.lower() in _IMAGES:
                        if member.size > _MAX_BYTES:
                            raise DataError(
                                f"{member.name} in {path} has {member.size:,} bytes, which no "
                                "image has."
                            )
                        found[key] = (number, member.offset_data, member.size)
                    elif extension == "cls" and (text := tar.extractfile(member)) is not None:
                        classes[key] = _class_number(text.read(_MAX_DIGITS), path)
        except DataError:
            raise
        except Exception as error:  # a damaged file raises nearly anything
            raise DataError(
                f"{path} is no uncompressed tar file ({error}); it may be cut short."
            ) from error
        places.extend(found.values())
        labels.extend(classes.get(key, -1) for key in found)
    if not places:
        raise DataError(
            f"There is no image in {', '.join(map(str, paths[:3]))}{', ...' * (len(paths) > 3)}; "
            f"expected names that end in one of {', '.join(sorted(_IMAGES))}."
        )
    if -1 in labels and max(labels) >= 0:
        raise DataError(
            f"{labels.count(-1)} of {len(labels)} images in {paths[0].parent} have no label; "
            "expected a .cls file with a class number for each image, or none at all."
        )
    return Shards(tuple(paths), np.array(places, np.int64), np.array(labels, np.int64))


def _class_number(text: bytes, path: Path) -> int:
    """The number in a ``.cls`` file of a tar file.

    Raises:
        DataError: It is none, or that of no class.
    """
    try:
        number = int(text)
    except ValueError as error:
        raise DataError(
            f"A .cls file in {path} holds no whole number of a class: {error}."
        ) from error
    if not 0 <= number < MAX_CLASSES:
        raise DataError(
            f"A .cls file in {path} holds {number}; expected a class from 0 to {MAX_CLASSES - 1:,}."
        )
    return number
