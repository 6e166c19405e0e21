"""Damaged images through the one opener, and through each door that has it."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bayesify.data import Files, prepare
from bayesify.models import InputConfig
from recipes.byov.data.sources import open_images

from . import mutations
from .section import FAULT, Section, Trial, judged


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    with io.BytesIO() as file:
        image.save(file, kind, **options)
        return file.getvalue()


def _seeds() -> dict[str, bytes]:
    """Whole images of every format and kind of pixel."""
    rng = np.random.default_rng(0)
    smooth = np.linspace(0, 255, 48)[:, None, None] + rng.integers(0, 40, (48, 64, 3))
    colour = Image.fromarray(smooth.clip(0, 255).astype(np.uint8))
    grey, palette = colour.convert("L"), colour.convert("P", palette=Image.Palette.ADAPTIVE)
    alpha = colour.copy()
    alpha.putalpha(grey)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    turned = Image.Exif()
    turned[0x0112] = 6
    turned[0x010F] = "maker"
    return {
        "jpeg": _encoded(colour, "JPEG"),
        "jpeg, turned": _encoded(colour, "JPEG", exif=turned),
        "jpeg, progressive": _encoded(colour, "JPEG", progressive=True),
        "jpeg, grey": _encoded(grey, "JPEG"),
        "jpeg, cmyk": _encoded(colour.convert("CMYK"), "JPEG"),
        "mpo": _encoded(colour, "MPO", save_all=True, append_images=[colour]),
        "png": _encoded(colour, "PNG"),
        "png, turned": _encoded(colour, "PNG", exif=turned),
        "png, alpha": _encoded(alpha, "PNG"),
        "png, palette": _encoded(palette, "PNG", transparency=bytes(range(200))),
        "png, 1 bit": _encoded(grey.convert("1"), "PNG"),
        "png, 16 bits": _encoded(deep, "PNG"),
        "png, animated": _encoded(colour, "PNG", save_all=True, append_images=[colour.rotate(90)]),
        "webp": _encoded(colour, "WEBP"),
        "webp, alpha": _encoded(alpha, "WEBP", lossless=True),
        "webp, animated": _encoded(colour, "WEBP", save_all=True, append_images=[grey]),
        "bmp": _encoded(colour, "BMP"),
        "bmp, palette": _encoded(palette, "BMP"),
        "gif": _encoded(palette, "GIF"),
        "gif, animated": _encoded(palette, "GIF", save_all=True, append_images=[palette.rotate(9)]),
        "tiff": _encoded(colour, "TIFF"),
        "tiff, lzw": _encoded(colour, "TIFF", compression="tiff_lzw"),
        "tiff, jpeg": _encoded(colour, "TIFF", compression="jpeg"),
        "tiff, turned": _encoded(colour, "TIFF", tiffinfo={0x0112: 5}),
        "tiff, float": _encoded(Image.fromarray(np.asarray(grey).astype(np.float32)), "TIFF"),
        "ppm": _encoded(colour, "PPM"),
        "pgm": _encoded(grey, "PPM"),
        "eps": _encoded(colour, "EPS"),
        "large": _encoded(Image.new("1", (9400, 9400)), "PNG"),
        "narrow": _encoded(Image.new("1", (1, 200_000)), "PNG"),
    }


def _prepare(folder: Path) -> Trial:
    seeds = _seeds()
    names = list(seeds)
    config = InputConfig((3, 32, 32), (0.5,) * 3, (0.5,) * 3)
    path = folder / "image.jpg"
    tree = folder / "shards"
    tree.mkdir()

    def alone() -> None:
        prepare(Files([(str(path), 0)]).read(0)[0], config)

    def in_a_shard() -> None:
        with tarfile.open(tree / "train-0.tar", "w") as tar:
            tar.add(path, "0.jpg")
        prepare(open_images(f"wds:{tree}")[0].read(0)[0], config)

    doors: tuple[Callable[[], None], ...] = (alone, alone, alone, in_a_shard)

    def trial(index: int) -> str:
        rng = random.Random(f"image {index}")
        name = names[index % len(names)]
        whole = index < len(names)
        path.write_bytes(seeds[name] if whole else mutations.bytes_(seeds[name], rng))
        outcome = judged(doors[0 if whole else rng.randrange(len(doors))])
        if whole and (outcome == "refused") != (name in _REFUSED):
            return f"{FAULT}: {name}, undamaged, is {outcome}"
        return f"{FAULT}: {name}: {outcome}" if outcome.startswith(FAULT) else outcome

    return trial


_REFUSED = {"png, 16 bits", "tiff, float", "eps", "large", "narrow"}
IMAGES = Section(
    "images",
    "an image of one of 30 kinds, with damaged bytes, is opened as a file or in a shard",
    share=2_000,
    full=10_000,
    prepare=_prepare,
)
