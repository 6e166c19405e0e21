"""Corrupted images at five severities, by two tables of operations and strengths.

The strengths of both follow Hendrycks and Dietterich (2019, arXiv:1903.12261) where they have the
kind. The images are made here: numbers on them are none on ImageNet-C or CIFAR-10-C.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import ArgumentError

SEVERITIES = (1, 2, 3, 4, 5)
COLOUR_ONLY = ("hue", "saturation")
"""These leave a grey image as it is."""
_REFERENCE_SIDE = 32  # pixels; blurs grow with the image


class Corruption(NamedTuple):
    """An operation on pixels in [0, 1] with a strength and a seed; its strength at each severity.

    What leaves [0, 1] is cut off afterwards.
    """

    change: Callable[[Tensor, float, int], Tensor]
    strengths: tuple[float, float, float, float, float]


def kinds(*, grey: bool) -> tuple[str, ...]:
    """The augmentations that change an image."""
    return tuple(kind for kind in AUGMENTATIONS if not (grey and kind in COLOUR_ONLY))


def corrupt(
    pixels: Tensor,
    kind: str,
    severity: int,
    *,
    table: Mapping[str, Corruption] | None = None,
    seed: int = 0,
) -> Tensor:
    """Change images as one kind of corruption does.

    Args:
        pixels: In [0, 1], or uint8; those come back as uint8, cut off and not rounded, as in
            CIFAR-10-C.
        kind: A key of the table.
        severity: From 1 to 5.
        table: :data:`AUGMENTATIONS`, which None takes, or :data:`CIFAR10_C`.
        seed: Of the noise; it is the same at every severity.

    Shape:
        pixels (B, C, H, W) with C 1 or 3, result the same.

    Raises:
        ArgumentError: There is no such kind or severity.
    """
    table = AUGMENTATIONS if table is None else table
    if kind not in table or severity not in SEVERITIES:
        raise ArgumentError(
            f"There is no corruption {kind!r} of severity {severity!r}: kinds are "
            f"{', '.join(table)}, severities 1 to 5."
        )
    change, strengths = table[kind]
    strength = strengths[severity - 1]
    if pixels.dtype != torch.uint8:
        return change(pixels, strength, seed).clamp(0, 1)
    if change is _jpeg:  # its pixels are whole already
        return _encoded(pixels, strength)
    return (change(pixels.double() / 255, strength, seed).clamp(0, 1) * 255).to(torch.uint8)


def gaussian_noise(pixels: Tensor, std: float, seed: int) -> Tensor:
    """Add noise of a standard deviation; not clamped."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(pixels.shape, generator=generator)
    return pixels + std * noise.to(pixels.device)


def _numpy_noise(pixels: Tensor, std: float, seed: int) -> Tensor:
    """The same from numpy's generator: the numbers of docs/posterior.md are of it."""
    noise = np.random.default_rng(seed).normal(size=tuple(pixels.shape))
    return pixels + std * torch.from_numpy(noise)


def _salt_and_pepper(pixels: Tensor, share: float, seed: int) -> Tensor:
    """White or black, half each, in all channels of a share of the pixels."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(pixels), 1, *pixels.shape[2:])
    chance = torch.rand(shape, generator=generator).to(pixels.device)
    return torch.where(chance < share / 2, 0.0, torch.where(chance > 1 - share / 2, 1.0, pixels))


def _affine(
    pixels: Tensor, *, angle: float = 0.0, shift: float = 0.0, shear: float = 0.0
) -> Tensor:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    moved = [round(shift * side) for side in (pixels.shape[-1], pixels.shape[-2])]
    changed: Tensor = functional.affine(
        pixels, angle, moved, 1.0, [shear, 0.0], interpolation=InterpolationMode.BILINEAR
    )
    return changed


def _blur(pixels: Tensor, sigma: float, _seed: int) -> Tensor:
    from torchvision.transforms.v2 import functional

    sigma = sigma * pixels.shape[-1] / _REFERENCE_SIDE
    reach = min(round(4 * sigma), min(pixels.shape[-2:]) - 1)
    changed: Tensor = functional.gaussian_blur(pixels, [2 * max(1, reach) + 1] * 2, [sigma, sigma])
    return changed


def _scipy_blur(pixels: Tensor, sigma: float, _seed: int) -> Tensor:
    """As CIFAR-10-C: in pixels of any image, its border repeated."""
    from scipy.ndimage import gaussian_filter

    return torch.from_numpy(gaussian_filter(pixels.numpy(), (0, 0, sigma, sigma), mode="nearest"))


def _by_torchvision(name: str) -> Callable[[Tensor, float, int], Tensor]:
    """A function of torchvision that takes images and one number."""

    def apply(pixels: Tensor, strength: float, _seed: int) -> Tensor:
        from torchvision.transforms.v2 import functional

        changed: Tensor = getattr(functional, name)(pixels, strength)
        return changed

    return apply


def _channel_contrast(pixels: Tensor, factor: float, _seed: int) -> Tensor:
    """Around the mean of each channel; torchvision's is around that of the luma."""
    mean = pixels.mean((2, 3), keepdim=True)
    return (pixels - mean) * factor + mean


def _hsv_brightness(pixels: Tensor, added: float, _seed: int) -> Tensor:
    """Raise the value of HSV; hue and saturation stay, black becomes grey."""
    value = pixels.amax(1, keepdim=True)
    raised = (value + added).clamp(max=1)
    return torch.where(value > 0, pixels * raised / value.clamp_min(1e-12), raised)


def _posterise(pixels: Tensor, bits: float, _seed: int) -> Tensor:
    from torchvision.transforms.v2 import functional

    changed: Tensor = functional.posterize((pixels * 255).round().to(torch.uint8), int(bits))
    return changed.float() / 255


def _jpeg(pixels: Tensor, quality: float, _seed: int) -> Tensor:
    return _encoded((pixels * 255).round().to(torch.uint8), quality).float() / 255


def _encoded(images: Tensor, quality: float) -> Tensor:
    """uint8 images written as JPEG and read again by Pillow: torchvision gives up its encoder."""
    from PIL import Image

    decoded = []
    for image in images.cpu():
        with io.BytesIO() as file:
            array = image[0].numpy() if len(image) == 1 else image.movedim(0, -1).numpy()
            Image.fromarray(array).save(file, "JPEG", quality=int(quality))
            back = torch.from_numpy(np.array(Image.open(file)))
        decoded.append(back[None] if back.ndim == 2 else back.movedim(-1, 0))
    return torch.stack(decoded).to(images.device)


def _shear(pixels: Tensor, angle: float, _seed: int) -> Tensor:
    return _affine(pixels, shear=angle)


def _rotate(pixels: Tensor, angle: float, _seed: int) -> Tensor:
    return _affine(pixels, angle=angle)


def _translate(pixels: Tensor, share: float, _seed: int) -> Tensor:
    return _affine(pixels, shift=share)


AUGMENTATIONS: Mapping[str, Corruption] = MappingProxyType(
    {
        "shear": Corruption(_shear, (6, 12, 18, 24, 30)),  # degrees, along x
        "rotate": Corruption(_rotate, (8, 16, 24, 32, 40)),  # degrees
        "translate": Corruption(_translate, (0.05, 0.10, 0.15, 0.20, 0.25)),  # share of the side
        "gaussian noise": Corruption(gaussian_noise, (0.04, 0.08, 0.12, 0.18, 0.26)),  # std
        "salt and pepper": Corruption(_salt_and_pepper, (0.01, 0.02, 0.04, 0.07, 0.12)),  # share
        "blur": Corruption(_blur, (0.4, 0.6, 0.8, 1.0, 1.4)),  # std, pixels of an image of 32
        "brightness": Corruption(_by_torchvision("adjust_brightness"), (1.2, 1.4, 1.7, 2.0, 2.5)),
        "contrast": Corruption(_by_torchvision("adjust_contrast"), (0.75, 0.5, 0.4, 0.3, 0.15)),
        "hue": Corruption(_by_torchvision("adjust_hue"), (0.05, 0.1, 0.2, 0.3, 0.5)),  # turns
        "saturation": Corruption(_by_torchvision("adjust_saturation"), (1.5, 2.0, 3.0, 5.0, 8.0)),
        "solarise": Corruption(_by_torchvision("solarize"), (0.9, 0.8, 0.7, 0.6, 0.5)),  # from here
        "posterise": Corruption(_posterise, (5, 4, 3, 2, 1)),  # bits that are kept
        "jpeg": Corruption(_jpeg, (80, 60, 40, 25, 10)),  # quality
    }
)
"""The augmentations of BYOV's figure 4 (arXiv:2312.03213), by torchvision where it has one.

The paper names shear, Gaussian and salt-and-pepper noise, and no strengths.
"""

CIFAR10_C: Mapping[str, Corruption] = MappingProxyType(
    {
        "gaussian noise": Corruption(_numpy_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
        "gaussian blur": Corruption(_scipy_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
        "contrast": Corruption(_channel_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
        "brightness": Corruption(_hsv_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
        "jpeg": Corruption(_jpeg, (80, 65, 58, 50, 40)),
    }
)
"""Five kinds with the strengths of CIFAR-10-C, for colour images of 32 x 32 pixels on the CPU."""
