"""Operations on a batch of images, each image with parameters of its own."""

import torch
from torch import Tensor
from torch.nn import functional

from bayesify import ArgumentError

_LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2 as torchvision rounds it


def crop_and_flip(images: Tensor, crop: Tensor, flip: Tensor, size: int) -> Tensor:
    """Crop each image, resize the crop to a square as PIL does (bicubic, antialiased), mirror some.

    Args:
        images: Floating point.
        crop: Top, left, height and width in pixels.
        flip: Whether left and right are exchanged.
        size: Side of the result in pixels.

    Shape:
        images (B, C, H, W), crop (B, 4), flip (B,), result (B, C, size, size).
    """
    top, left, height, width = crop.to(images.device).unbind(1)
    rows = resize_weights(top, height, images.shape[2], size)
    columns = resize_weights(left, width, images.shape[3], size)
    columns = torch.where(flip.to(images.device)[:, None, None], columns.flip(1), columns)
    return torch.einsum("bsh,bchw,btw->bcst", rows, images, columns).clamp_(0, 1)


def resize_weights(start: Tensor, length: Tensor, source: int, size: int) -> Tensor:
    """Return the matrix that crops one axis and resizes the crop, for each image.

    Weight of pixel j for output i is ``k((j + 1/2 - start - (i + 1/2) r) / max(r, 1))`` with
    ``r = length / size``, inside the crop, divided by its sum; k is the cubic kernel with a = -1/2.

    Args:
        start: First pixel of the crop.
        length: Its pixels.
        source: Pixels of the axis.
        size: Pixels of the result.

    Shape:
        start, length (B,), result (B, size, source).

    Reference:
        Keys 1981; PIL's and torch's antialiased bicubic resize.
    """
    ratio = (length.float() / size)[:, None, None]
    begin, end = start[:, None, None], (start + length)[:, None, None]
    pixel = torch.arange(source, device=start.device)
    centre = begin + (torch.arange(size, device=start.device)[:, None] + 0.5) * ratio
    t = ((pixel + 0.5 - centre) / ratio.clamp(min=1)).abs()
    near = (1.5 * t - 2.5) * t * t + 1
    far = ((2.5 - 0.5 * t) * t - 4) * t + 2
    weights = torch.where(t < 1, near, torch.where(t < 2, far, 0.0))
    weights = weights * ((pixel >= begin) & (pixel < end))
    return weights / weights.sum(dim=2, keepdim=True)


# Colour operations on (B, C, H, W) in [0, 1], each with one number an image, as in torchvision.


def _luma(x: Tensor) -> Tensor:
    red, green, blue = x.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue)[:, None]


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return other.lerp(x, factor[:, None, None, None]).clamp_(0, 1)


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply by the factor (B,)."""
    return (x * factor[:, None, None, None]).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from the mean luma of the image by the factor (B,)."""
    grey = x if x.shape[1] == 1 else _luma(x)
    return _blend(x, grey.mean(dim=(1, 2, 3), keepdim=True), factor)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from the luma of the pixel by the factor (B,)."""
    return _blend(x, _luma(x), factor)


def grayscale(x: Tensor) -> Tensor:
    """Repeat the luma in all channels."""
    return _luma(x).repeat(1, 3, 1, 1)


def solarise(x: Tensor, threshold: float) -> Tensor:
    """Invert what is not below the threshold."""
    return torch.where(x >= threshold, 1 - x, x)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the colour circle by the shift (B,), in turns; value and saturation stay."""
    red, green, blue = x.unbind(1)
    value = x.amax(dim=1)
    chroma = value - x.amin(dim=1)
    safe = torch.where(chroma == 0, 1.0, chroma)
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    turned = sector + 6 * shift[:, None, None]
    away = torch.tensor([5.0, 3.0, 1.0], device=x.device)[:, None, None]
    k = (away + turned[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def blur(images: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Blur each image with a Gaussian of its own width, mirrored at the borders.

    Args:
        images: Floating point.
        sigma: Standard deviation in pixels.
        kernel: Width in pixels, odd; less than twice the image's side.

    Shape:
        images (B, C, H, W), sigma (B,), result as images.
    """
    reach = torch.arange(kernel, device=images.device) - kernel // 2
    weights = torch.exp(-0.5 * (reach / sigma[:, None]) ** 2)
    weights = weights / weights.sum(dim=1, keepdim=True)
    flat = images.flatten(0, 1)[None]  # a channel of its own for each plane and its weights
    weights = weights.repeat_interleave(images.shape[1], dim=0)[:, None, None]
    flat = functional.pad(flat, [kernel // 2] * 4, mode="reflect")
    planes = flat.shape[1]
    flat = functional.conv2d(
        functional.conv2d(flat, weights, groups=planes), weights.mT, groups=planes
    )
    return flat.view_as(images)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return ``(images - mean) / std``, grey images repeated for the channels of ``mean``.

    Raises:
        ArgumentError: If colour images are given for a model of one channel.
    """
    if images.shape[-3] not in (1, len(mean)):
        raise ArgumentError(
            f"Images of {images.shape[-3]} channels cannot be normalised by {len(mean)} means; "
            "give one mean and std for each channel."
        )
    shift, scale = (
        torch.tensor(v, device=images.device, dtype=images.dtype)[:, None, None]
        for v in (mean, std)
    )
    return (images - shift) / scale
