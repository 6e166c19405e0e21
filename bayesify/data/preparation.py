"""From a stored image to a model's input: resize, crop, scale, normalise."""

import math

import torch
from torch import Tensor

from .. import requirements
from ..errors import DataError
from ..images import check_size
from ..models import InputConfig


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
    requirements.check("torchvision")
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
