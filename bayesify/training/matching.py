"""A data set whose labels are the places of its classes among a model's outputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..classes import classes_of, places
from ..data import ImageData, InMemory
from .batches import Data


def by_name(data: Data, model: nn.Module) -> Data:
    """The data set as the model counts classes, where both know their names.

    Args:
        data: A data set; one that is no ``ImageData`` is left as it is.
        model: Whose outputs are named by :func:`bayesify.classes.classes_of`, or not.

    Raises:
        DataError: It has a class that the model has not.
    """
    return images_by_name(data, model) if isinstance(data, ImageData) else data


def images_by_name(data: ImageData, model: nn.Module) -> ImageData:
    """As :func:`by_name`."""
    known = classes_of(model)
    if known is None or known == data.classes:
        return data
    found = places(known, data.classes, data.name)
    if found is None:
        return replace(data, classes=known)
    own = data.source
    if isinstance(own, InMemory) and len(own) and _within(own.labels, len(found)):
        labels = torch.tensor(found, device=own.labels.device)[own.labels]
        return replace(data, classes=known, source=InMemory(own.images, labels))
    return replace(data, classes=known, source=_Relabelled(data, found))


def _within(labels: Tensor, classes: int) -> bool:
    low, high = labels.aminmax()
    return bool(low >= 0) and bool(high < classes)


@dataclass(frozen=True, eq=False)
class _Relabelled:
    """Images of a data set, each label replaced."""

    data: ImageData
    places: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: int) -> tuple[Tensor, int]:
        image, label = self.data.read(index)
        return image, self.places[label]
