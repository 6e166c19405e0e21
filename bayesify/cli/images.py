"""Which images a user means: files, folders, patterns, lists of files, or one data set."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ..data import ImageData

STDIN = "-"


class Wanted(NamedTuple):
    """Images, what each is called, and whether they have labels."""

    data: ImageData
    names: list[str]
    labelled: bool


def wanted_images(inputs: list[str], split: Any) -> Wanted:
    """The images that were named.

    Args:
        inputs: One data set; or image files, folders without class folders (all images in them, at
            any depth), patterns, ``.txt`` files with a path on each line, ``-`` for such lines on
            stdin.
        split: Of the data set.

    Raises:
        DataError: There is no such input, or no image in it.
    """
    from ..data import load_dataset

    if len(inputs) == 1 and _is_data_set(inputs[0]):
        data = load_dataset(inputs[0], split=split)
        return Wanted(data, _names(data), True)
    return _wanted_files([path for given in inputs for path in _files(given)])


def readable_images(data: ImageData, workers: int, skip: bool) -> tuple[ImageData, int]:
    """Look at all images before the work, with a bar.

    Args:
        data: The images.
        workers: Processes that read them.
        skip: Leave out those that cannot be read, with a warning; else one of them is an error.

    Returns:
        Those that can be read, and the number of those that cannot.

    Raises:
        DataError: An image cannot be read, or none can.
    """
    from ..training.readable import readable
    from . import render

    with render.progress("Looking at the images", len(data)) as bar:
        found, left = readable(
            data, workers=workers, skip=skip, on_look=lambda done, _: bar.to(done)
        )
    return found, len(left)


def _wanted_files(paths: list[str]) -> Wanted:
    from ..data import Files, ImageData

    data = ImageData("images", "all", ("",), Files([(path, 0) for path in paths]))
    return Wanted(data, paths, False)


def _is_data_set(given: str) -> bool:
    """Whether an input is the name of a data set rather than of images."""
    path = Path(os.path.expanduser(given))
    if os.path.isdir(path):
        return not any(map(_is_image, path.iterdir())) and any(
            p.is_dir() and not p.name.startswith(".") for p in path.iterdir()
        )
    if os.path.isfile(path):
        return path.suffix == ".safetensors"
    return given != STDIN and not _is_image(path) and not glob.has_magic(given)


def _files(given: str) -> Iterator[str]:
    from ..errors import DataError

    path = Path(os.path.expanduser(given))
    if given == STDIN:
        yield from _lines(sys.stdin.read())
    elif os.path.isdir(path):
        found = sorted(str(p) for p in path.rglob("*") if _is_image(p) and p.is_file())
        if not found:
            raise DataError(f"There is no image in the folder {given!r}.")
        yield from found
    elif os.path.isfile(path):
        yield from _listed(path) if path.suffix == ".txt" else [str(path)]
    elif glob.has_magic(given):
        found = sorted(p for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not found:
            raise DataError(f"No file matches {given!r}.")
        yield from found
    else:
        raise DataError(
            f"There is no image file {given!r}. Give image files, folders or patterns of them, a "
            ".txt file with their paths, - for paths on stdin, or the name of one data set."
        )


def _listed(path: Path) -> list[str]:
    from ..errors import DataError

    try:
        found = _lines(path.read_text("utf-8", "surrogateescape"))
    except OSError as error:
        raise DataError(f"The list {path} cannot be read: {error}.") from error
    return found


def _lines(text: str) -> list[str]:
    from ..errors import DataError

    found = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    if not found:
        raise DataError("The list of images is empty: it must have a path on each line.")
    return found


def _names(data: ImageData) -> list[str]:
    """The path of each image that is a file, else its number."""
    from ..data import Files

    if isinstance(data.source, Files):
        return [path for path, _ in data.source.samples]
    return [str(index) for index in range(len(data))]


def _is_image(path: Path) -> bool:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return path.name.lower().endswith(IMG_EXTENSIONS)
