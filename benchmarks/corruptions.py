"""Corrupted images in the style of CIFAR-10-C: five kinds, five severities, 32 x 32 pixels.

The strengths are those of Hendrycks and Dietterich (2019, arXiv:1903.12261) for CIFAR-10-C; the
images are made here, so that numbers on them are not numbers on CIFAR-10-C.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SEVERITIES = (1, 2, 3, 4, 5)

_NOISE = (0.04, 0.06, 0.08, 0.09, 0.10)
_BLUR = (0.4, 0.6, 0.7, 0.8, 1.0)
_CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)
_BRIGHTNESS = (0.05, 0.1, 0.15, 0.2, 0.3)
_QUALITY = (80, 65, 58, 50, 40)


def corrupt(images: Tensor, kind: str, severity: int, *, seed: int = 0) -> Tensor:
    """Corrupt images (N, C, H, W) of uint8; the result has the same shape and type.

    Args:
        images: The images.
        kind: One of :data:`KINDS`.
        severity: From 1 to 5.
        seed: Of the noise, which is the same at every severity.
    """
    if kind not in KINDS:
        raise ValueError(f"There is no corruption {kind!r}, only {', '.join(KINDS)}.")
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be from 1 to 5, not {severity!r}.")
    if kind == "jpeg":
        return torch.stack([_jpeg(image, _QUALITY[severity - 1]) for image in images])
    values = _PIXELS[kind](images.double() / 255, severity - 1, seed)
    return (values.clamp(0, 1) * 255).to(torch.uint8)  # cut off as in the original, not rounded


def _gaussian_noise(x: Tensor, level: int, seed: int) -> Tensor:
    noise = np.random.default_rng(seed).normal(size=tuple(x.shape))
    return x + _NOISE[level] * torch.from_numpy(noise)


def _gaussian_blur(x: Tensor, level: int, _seed: int) -> Tensor:
    from scipy.ndimage import gaussian_filter

    sigma = (0, 0, _BLUR[level], _BLUR[level])
    return torch.from_numpy(gaussian_filter(x.numpy(), sigma, mode="nearest"))


def _contrast(x: Tensor, level: int, _seed: int) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)  # of each channel
    return (x - mean) * _CONTRAST[level] + mean


def _brightness(x: Tensor, level: int, _seed: int) -> Tensor:
    """Raise the value of HSV; hue and saturation stay, black becomes grey."""
    value = x.amax(1, keepdim=True)
    raised = (value + _BRIGHTNESS[level]).clamp(max=1)
    return torch.where(value > 0, x * raised / value.clamp_min(1e-12), raised)


def _jpeg(image: Tensor, quality: int) -> Tensor:
    pixels = image.movedim(0, -1).numpy()
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        decoded = np.array(Image.open(file))
    return torch.from_numpy(decoded).movedim(-1, 0)


_PIXELS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "gaussian noise": _gaussian_noise,
    "gaussian blur": _gaussian_blur,
    "contrast": _contrast,
    "brightness": _brightness,
}
KINDS = (*_PIXELS, "jpeg")
