"""What a model wants to see: size and normalisation of its images."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from ..errors import ModelError
from ..numeric import positive, real, whole

Interpolation = Literal["nearest", "bilinear", "bicubic"]
CropMode = Literal["center", "squash"]

_MAX_INPUT = 1 << 26
"""Numbers of one input, 0.3 GB in float32: more is a mistake, or a file that asks for memory."""


@dataclass(frozen=True)
class InputConfig:
    """What a model wants to see: how an image becomes the tensor it is given.

    Args:
        size: Channels, height, width; their product is at most 2**26.
        mean: Subtracted from the image, which is scaled to [0, 1]; one number a channel.
        std: Divides afterwards; one number a channel, above 0.
        interpolation: Of the resize; antialiased.
        crop_pct: Side of the central crop over the side that the image is resized to, in
            [0.05, 20]; a crop larger than the image (above 1) is filled up with black, as in timm.
        crop_mode: ``center`` keeps the aspect ratio and cuts what is over, ``squash`` keeps all.

    Raises:
        ModelError: If a value cannot work.
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation = "bilinear"
    crop_pct: float = 1.0
    crop_mode: CropMode = "center"

    def __post_init__(self) -> None:
        expected = "(channels, height, width), each a whole number above 0"
        if len(self.size) != 3:
            raise ModelError(f"size must be {expected}, not {self.size!r}.")
        size = tuple(whole("size", side, expected, kind=ModelError) for side in self.size)
        object.__setattr__(self, "size", size)
        if math.prod(size) > _MAX_INPUT:
            raise ModelError(
                f"size must have at most {_MAX_INPUT:,} numbers (channels x height x width), "
                f"not {size}."
            )
        if not len(self.mean) == len(self.std) == self.size[0]:
            raise ModelError(
                f"mean and std need one number for each of the {self.size[0]} channels, "
                f"not {len(self.mean)} and {len(self.std)}."
            )
        mean = tuple(_each("mean", self.mean, "finite", math.isfinite))
        object.__setattr__(self, "mean", mean)
        std = tuple(_each("std", self.std, "finite and above 0", positive))
        object.__setattr__(self, "std", std)
        if self.interpolation not in get_args(Interpolation):
            raise ModelError(
                f"interpolation must be one of {get_args(Interpolation)}, "
                f"not {self.interpolation!r}."
            )
        if self.crop_mode not in get_args(CropMode):
            raise ModelError(
                f"crop_mode must be one of {get_args(CropMode)}, not {self.crop_mode!r}."
            )
        expected = "a number from 0.05 to 20"
        crop_pct = real(
            "crop_pct", self.crop_pct, expected, lambda v: 0.05 <= v <= 20.0, kind=ModelError
        )
        object.__setattr__(self, "crop_pct", crop_pct)


def input_config(
    model: nn.Module,
    *,
    img_size: int | None = None,
    in_chans: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> InputConfig:
    """Say how images are prepared for a model; what is given here overrides what the model says.

    timm's models say it themselves. torchvision's get 224 pixels and ImageNet's mean and standard
    deviation. A model from elsewhere may say it as timm's do, by an attribute ``pretrained_cfg``: a
    dict of ``input_size``, ``mean``, ``std``, ``interpolation`` and ``crop_pct``. Without one it
    needs ``img_size`` and gets mean and standard deviation 0.5.

    Args:
        model: The model, converted or not.
        img_size: Side of the square input in pixels: give the one that the model was built with.
        in_chans: Channels of the input: give the number that the model was built with.
        mean: One number a channel. By default the model's own; with other than its usual channels,
            the average of its own in each channel.
        std: As ``mean``.

    Raises:
        ModelError: If the model does not say its input size and ``img_size`` is not given.
    """
    pretrained_cfg = getattr(model, "pretrained_cfg", None)
    if isinstance(pretrained_cfg, dict):
        from timm.data.config import resolve_model_data_config

        known = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        # timm's "border" pads, which six models of 1,300 use; cutting the centre is the nearest.
        crop_mode: CropMode = "squash" if known["crop_mode"] == "squash" else "center"
    elif type(model).__module__.startswith("torchvision."):
        side = getattr(model, "image_size", 224)  # VisionTransformer accepts only this size
        known = {
            "input_size": (3, side, side),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "interpolation": "bilinear",
            "crop_pct": 0.875,
        }
        crop_mode = "center"
    elif img_size is not None:
        known = {
            "input_size": (3, img_size, img_size),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
        }
        crop_mode = "center"
    else:
        raise ModelError(
            f"{type(model).__name__} does not say what size of image it takes. "
            "Give img_size (and in_chans, when it is not 3)."
        )
    channels, height, width = known["input_size"]
    if img_size is not None:
        height = width = img_size
    if in_chans is not None:
        channels = in_chans
    return InputConfig(
        size=(channels, height, width),
        mean=mean or _per_channel(known["mean"], channels),
        std=std or _per_channel(known["std"], channels),
        interpolation=known["interpolation"],
        crop_pct=known["crop_pct"],
        crop_mode=crop_mode,
    )


def _per_channel(values: Iterable[float], channels: int) -> tuple[float, ...]:
    values = tuple(values)
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def _each(
    what: str, values: Iterable[Any], expected: str, fits: Callable[[float], bool]
) -> Iterable[float]:
    return (real(f"each number of {what}", v, expected, fits, kind=ModelError) for v in values)
