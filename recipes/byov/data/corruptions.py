"""The augmentations of BYOV's figure 4, each at five severities, on pixels in [0, 1].

torchvision's own functions where it has one. The paper names shear, Gaussian and salt-and-pepper
noise and no strengths: those here follow Hendrycks and Dietterich (2019, arXiv:1903.12261) where
they have the kind, and are chosen where they have not. Numbers on them are none on ImageNet-C.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from bayesify import ArgumentError

SEVERITIES = (1, 2, 3, 4, 5)
_REFERENCE_SIDE = 32  # pixels; blurs grow with the image

Levels = tuple[float, float, float, float, float]
STRENGTHS: Mapping[str, Levels] = MappingProxyType(
    {
        "shear": (6.0, 12.0, 18.0, 24.0, 30.0),  # degrees, along x
        "rotate": (8.0, 16.0, 24.0, 32.0, 40.0),  # degrees
        "translate": (0.05, 0.10, 0.15, 0.20, 0.25),  # share of the side, along x and y
        "gaussian noise": (0.04, 0.08, 0.12, 0.18, 0.26),  # standard deviation
        "salt and pepper": (0.01, 0.02, 0.04, 0.07, 0.12),  # share of the pixels
        "blur": (0.4, 0.6, 0.8, 1.0, 1.4),  # standard deviation in pixels of an image of 32
        "brightness": (1.2, 1.4, 1.7, 2.0, 2.5),  # factor
        "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # factor
        "hue": (0.05, 0.1, 0.2, 0.3, 0.5),  # turns of the colour circle
        "saturation": (1.5, 2.0, 3.0, 5.0, 8.0),  # factor
        "solarise": (0.9, 0.8, 0.7, 0.6, 0.5),  # what is not below it is inverted
        "posterise": (5.0, 4.0, 3.0, 2.0, 1.0),  # bits that are kept
        "jpeg": (80.0, 60.0, 40.0, 25.0, 10.0),  # quality
    }
)
COLOUR_ONLY = ("hue", "saturation")
"""These leave a grey image as it is."""


def kinds(*, grey: bool) -> tuple[str, ...]:
    """The kinds that change an image."""
    return tuple(kind for kind in STRENGTHS if not (grey and kind in COLOUR_ONLY))


def corrupt(pixels: Tensor, kind: str, severity: int, *, seed: int = 0) -> Tensor:
    """Change images as one kind of augmentation does.

    Args:
        pixels: In [0, 1].
        kind: A key of :data:`STRENGTHS`.
        severity: From 1 to 5.
        seed: Of the noise; it is the same at every severity.

    Shape:
        pixels (B, C, H, W) with C 1 or 3, result the same, in [0, 1].

    Raises:
        ArgumentError: There is no such kind or severity.
    """
    if kind not in STRENGTHS or severity not in SEVERITIES:
        raise ArgumentError(
            f"There is no corruption {kind!r} of severity {severity!r}: kinds are "
            f"{', '.join(STRENGTHS)}, severities 1 to 5."
        )
    strength = STRENGTHS[kind][severity - 1]
    if kind in _NOISES:
        return _NOISES[kind](pixels, strength, seed).clamp(0, 1)
    return _SHAPES[kind](pixels, strength).clamp(0, 1)


def gaussian_noise(pixels: Tensor, std: float, seed: int) -> Tensor:
    """Add noise of a standard deviation; not clamped."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(pixels.shape, generator=generator)
    return pixels + std * noise.to(pixels.device)


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


def _blur(pixels: Tensor, sigma: float) -> Tensor:
    from torchvision.transforms.v2 import functional

    sigma = sigma * pixels.shape[-1] / _REFERENCE_SIDE
    reach = min(round(4 * sigma), min(pixels.shape[-2:]) - 1)
    changed: Tensor = functional.gaussian_blur(pixels, [2 * max(1, reach) + 1] * 2, [sigma, sigma])
    return changed


def _functional(name: str) -> Callable[..., Tensor]:
    """A function of torchvision that takes images and one number."""

    def apply(pixels: Tensor, strength: float) -> Tensor:
        from torchvision.transforms.v2 import functional

        changed: Tensor = getattr(functional, name)(pixels, strength)
        return changed

    return apply


def _posterise(pixels: Tensor, bits: float) -> Tensor:
    from torchvision.transforms.v2 import functional

    changed: Tensor = functional.posterize((pixels * 255).round().to(torch.uint8), int(bits))
    return changed.float() / 255


def _jpeg(pixels: Tensor, quality: float) -> Tensor:
    """By Pillow: torchvision gives up its own encoder."""
    from PIL import Image

    stored = (pixels * 255).round().to(torch.uint8).cpu()
    decoded = []
    for image in stored:
        with io.BytesIO() as file:
            array = image[0].numpy() if len(image) == 1 else image.movedim(0, -1).numpy()
            Image.fromarray(array).save(file, "JPEG", quality=int(quality))
            back = torch.from_numpy(np.array(Image.open(file)))
        decoded.append(back[None] if back.ndim == 2 else back.movedim(-1, 0))
    return torch.stack(decoded).to(pixels.device).float() / 255


_NOISES: dict[str, Callable[[Tensor, float, int], Tensor]] = {
    "gaussian noise": gaussian_noise,
    "salt and pepper": _salt_and_pepper,
}
_SHAPES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "shear": lambda pixels, angle: _affine(pixels, shear=angle),
    "rotate": lambda pixels, angle: _affine(pixels, angle=angle),
    "translate": lambda pixels, share: _affine(pixels, shift=share),
    "blur": _blur,
    "brightness": _functional("adjust_brightness"),
    "contrast": _functional("adjust_contrast"),
    "hue": _functional("adjust_hue"),
    "saturation": _functional("adjust_saturation"),
    "solarise": _functional("solarize"),
    "posterise": _posterise,
    "jpeg": _jpeg,
}
