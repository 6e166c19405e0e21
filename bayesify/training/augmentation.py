"""Random changes of training images, by torchvision's transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .. import requirements
from ..data import ImageData, prepare, resize_and_crop
from ..errors import ArgumentError, DataError
from ..models import InputConfig
from ..settings.training import Augment as Augment
from ..settings.training import AugmentName
from .randomness import current, restore, seed_all

Transform = Callable[[Tensor], Tensor]

_CPU = torch.device("cpu")


def augmentation(choice: Augment, model_config: InputConfig) -> Transform:
    """The transform of stored images, (C, H, W) of uint8, that a choice stands for.

    ``flip-crop``: the image in the model's size, mirrored half of the time, moved by up to an
    eighth of it on black. ``resized-crop``: a random part of the stored image, mirrored half of the
    time. ``rand-augment``: ``flip-crop`` and two random operations.

    Raises:
        ArgumentError: There is no such choice.

    Reference:
        He et al., 2016, arXiv:1512.03385, section 4.2 (flip-crop); Szegedy et al., 2015,
        arXiv:1409.4842, section 6 (resized-crop); Cubuk et al., 2020, arXiv:1909.13719.
    """
    if callable(choice):
        return choice
    if choice not in get_args(AugmentName):
        raise ArgumentError(
            f"augment must be one of {', '.join(map(repr, get_args(AugmentName)))}, or a callable "
            f"from a uint8 image (C, H, W) to another, got {choice!r}."
        )
    requirements.check("torchvision")
    from torchvision.transforms import v2

    transform: Transform
    _, height, width = model_config.size
    flip = v2.RandomHorizontalFlip()
    if choice == "resized-crop":
        transform = v2.Compose([v2.RandomResizedCrop((height, width), antialias=True), flip])
        return transform
    shift = v2.RandomCrop((height, width), padding=(width // 8, height // 8))
    steps = [_InSize(model_config), flip, shift]
    transform = v2.Compose([*steps, v2.RandAugment()] if choice == "rand-augment" else steps)
    return transform


class _InSize(nn.Module):
    """Brings an image to the model's size as it is brought there without augmentation."""

    def __init__(self, model_config: InputConfig) -> None:
        super().__init__()
        self.model_config = model_config

    def forward(self, image: Tensor) -> Tensor:
        if image.shape[-2:] == self.model_config.size[1:]:
            return image
        return resize_and_crop(image, self.model_config)


class Augmented(Dataset[tuple[Tensor, int]]):
    """Images changed at random and prepared, by ``(index, seed)``: the seed alone decides how.

    So neither the number of workers nor an interruption changes an image.
    """

    def __init__(self, data: ImageData, model_config: InputConfig, transform: Transform) -> None:
        self.data = data
        self.model_config = model_config
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, wanted: tuple[int, int]) -> tuple[Tensor, int]:
        return self.__getitems__([wanted])[0]

    def __getitems__(self, wanted: Sequence[tuple[int, int]]) -> list[tuple[Tensor, int]]:
        images, labels = [], []
        before = current(_CPU)
        try:
            for index, seed in wanted:
                image, label = self.data.read(index)
                seed_all(seed)
                images.append(_checked(self.transform(image)))
                labels.append(label)
        finally:
            restore(before, _CPU)
        if len({image.shape for image in images}) == 1:
            ready = list(prepare(torch.stack(images), self.model_config))
        else:
            ready = [prepare(image, self.model_config) for image in images]
        return list(zip(ready, labels, strict=True))


def _checked(image: Any) -> Tensor:
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.dim() == 3:
        return image
    what = (
        f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
    )
    raise DataError(
        f"The augmentation gave {what}, expected uint8 (C, H, W): it stands before the scaling and "
        "the normalisation, which fit does."
    )
