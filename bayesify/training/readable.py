"""Images that cannot be read: found before a fit begins, or one by one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data import ImageData, InMemory
from ..errors import DataError
from ..loading import Loader
from ..models import InputConfig
from .batches import Data

_LOOKED_AT = 64  # images that a worker looks at before it says so


class Tried(Dataset[Any]):
    """Images of a data set as a model takes them, or why one cannot be read.

    Each example is (image or None, label, reason or None).

    Args:
        data: The data set.
        model_config: As :func:`bayesify.models.input_config` returns it.
    """

    def __init__(self, data: ImageData, model_config: InputConfig) -> None:
        self._prepared: Any = data.dataset(model_config)

    def __len__(self) -> int:
        return len(self._prepared)

    def __getitem__(self, index: int) -> tuple[Tensor | None, int, str | None]:
        try:
            return *self._prepared[index], None
        except DataError as error:
            return None, -1, str(error)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor | None, int, str | None]]:
        try:  # images in memory are prepared together
            return [(*pair, None) for pair in self._prepared.__getitems__(indices)]
        except DataError:
            return [self[index] for index in indices]


def readable(
    data: Data,
    *,
    workers: int,
    skip: bool,
    known: Sequence[int] | None = None,
    on_look: Callable[[int, int], None] | None = None,
) -> tuple[Any, list[int]]:
    """Read every image of an ``ImageData`` once, and leave out those that cannot be read.

    Args:
        data: Images in memory, what is no ``ImageData``, and what this has returned, are not
            looked at.
        workers: Processes that read.
        skip: Leave them out, with a warning; else one of them is an error.
        known: Those that an earlier look has found: nothing is read.
        on_look: Gets the number of images looked at and of all.

    Returns:
        The data set without them, which is not looked at again, and their indices.

    Raises:
        DataError: An image cannot be read and ``skip`` is off, or none can be read.
    """
    if not isinstance(data, ImageData) or isinstance(data.source, InMemory | _Part):
        return data, []
    total = len(data)
    reasons = dict.fromkeys(known or (), "")
    if known is None:
        looks: Loader[Any] = Loader(
            _Looks(data), _LOOKED_AT, collate_fn=list, num_workers=workers,
            generator=torch.Generator(),
        )  # fmt: skip
        done = 0
        for batch in looks:
            reasons.update((index, reason) for index, reason in batch if reason is not None)
            done += len(batch)
            if on_look is not None:
                on_look(done, total)
    if not reasons:
        return replace(data, source=_Part(data, range(total))), []
    first = next(iter(reasons.values()))
    count = f"{len(reasons):,} of {total:,} images of {data.name!r} cannot be read"
    if len(reasons) == total:
        raise DataError(f"{count}. The first: {first}")
    if not skip:
        raise DataError(
            f"{count}. The first: {first}. Mend or remove them, or leave them out: "
            "skip_unreadable=True (--skip-unreadable)."
        )
    warnings.warn(f"{count} and are left out. {first}".rstrip(), stacklevel=3)
    kept = tuple(index for index in range(total) if index not in reasons)
    return replace(data, source=_Part(data, kept)), list(reasons)


class _Looks(Dataset[Any]):
    """Of each image its index, and why it cannot be read."""

    def __init__(self, data: ImageData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[int, str | None]:
        try:
            self.data.read(index)
        except DataError as error:
            return index, str(error)
        return index, None


@dataclass(frozen=True, eq=False)
class _Part:
    """Some images of a data set."""

    data: ImageData
    kept: Sequence[int]

    def __len__(self) -> int:
        return len(self.kept)

    def read(self, index: int) -> tuple[Tensor, int]:
        return self.data.read(self.kept[index])
