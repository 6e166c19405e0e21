"""One opener for image files: which formats, how large, which way up, as which numbers."""

from __future__ import annotations

import contextlib
import os
from typing import IO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What is opened, by content and not by name: Pillow hands other formats to other programs."""
MAX_PIXELS = 1 << 26
"""In one image: 8,192 squared, which takes 0.7 GB to decode."""
MAX_ASPECT = 50
"""Longer side over shorter side: a resize of the shorter one to 224 makes the longer one this."""

_ORIENTATION = 0x0112  # the tag of EXIF 2.3, section 4.6.4
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(file: str | os.PathLike[str] | IO[bytes], name: str) -> Tensor:
    """Read an image file of one of :data:`FORMATS`, the way up that its EXIF data says.

    Of an animation it is the first frame; transparency is left out, as timm and torchvision do.

    Args:
        file: Its path, or its bytes as an open file.
        name: Where it is, for the message.

    Shape:
        Result (C, H, W) of uint8; C is 1 for grey, 3 for all else.

    Raises:
        DataError: It is no such file, damaged, cut short, has more than 8 bits a channel, more
            than :data:`MAX_PIXELS` pixels, or sides too unlike (:data:`MAX_ASPECT`). Size is looked
            at before anything is decoded.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            check_size(*image.size)
            return to_tensor(image)
    except UnidentifiedImageError as error:
        raise DataError(
            f"The image {name} cannot be read: it is none of {', '.join(FORMATS)}, or damaged."
        ) from error
    except Exception as error:  # a damaged file raises nearly anything
        reason = str(error) or type(error).__name__
        raise DataError(f"The image {name} cannot be read: {reason}") from error


def check_size(width: int, height: int) -> None:
    """Refuse an image that would take much memory to decode or to resize.

    Raises:
        ValueError: It has too many pixels, or its sides are too unlike.
    """
    short, long = sorted((width, height))
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"its {width:,} x {height:,} pixels are more than {MAX_PIXELS:,}; make it smaller first"
        )
    if long > MAX_ASPECT * short:
        raise ValueError(
            f"its sides {width:,} x {height:,} are more unlike than 1 to {MAX_ASPECT}; cut it first"
        )


def to_tensor(image: Image.Image) -> Tensor:
    """Decode into uint8 (C, H, W), the way up that its EXIF data says.

    Grey stays 1 channel, all else becomes red, green, blue.

    Raises:
        ValueError: A pixel has more than 8 bits a channel.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its mode {image.mode} is no 8-bit image; convert it to 8 bits first")
    grey = image.mode in ("1", "L", "LA", "La")
    image.load()
    # After load: a PNG may say it behind its pixels, and a TIFF is turned by Pillow itself.
    turn = _turn(image)
    image.info.pop("transparency", None)  # Pillow warns of some that it leaves out
    image = image.convert("L" if grey else "RGB")
    if turn is not None:
        image = image.transpose(turn)
    pixels = np.array(image)
    return torch.from_numpy(pixels[None] if grey else np.moveaxis(pixels, 2, 0).copy())


def _turn(image: Image.Image) -> Image.Transpose | None:
    with contextlib.suppress(Exception):  # damaged EXIF data does no harm to the pixels
        return _TURNS.get(image.getexif()[_ORIENTATION])
    return None
