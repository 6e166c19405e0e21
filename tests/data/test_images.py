"""images.py: what is opened, how large, which way up, and as which numbers."""

from __future__ import annotations

import io
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bayesify import DataError, images
from bayesify.data import Files, load_dataset, prepare, read_image
from bayesify.models import InputConfig
from recipes.byov.data.sources import open_images

Pixels = NDArray[np.uint8]
CONFIG = InputConfig((3, 8, 8), (0.5,) * 3, (0.5,) * 3)
ORIENTATION = 0x0112


def noise(*shape: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def pixels_of(tensor: Tensor) -> Pixels:
    found: Pixels = tensor.movedim(0, -1).numpy()
    return found


# By the table of EXIF 2.3, section 4.6.4: where the stored row 0 and column 0 are shown.
UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_are_the_way_up_that_exif_says(kind: str, orientation: int) -> None:
    image = Image.fromarray(noise(6, 9, 3))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    stored = np.array(Image.open(encoded(image, kind, **options)))
    if kind == "TIFF":
        options["tiffinfo"] = {ORIENTATION: orientation}
    else:
        options["exif"] = exif
    found = read_image(encoded(image, kind, **options), "it")
    np.testing.assert_array_equal(pixels_of(found), UPRIGHT[orientation](stored))


def test_every_door_turns_images(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    stored = noise(6, 9, 3)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "0.png"
        path.write_bytes(encoded(Image.fromarray(stored), "PNG", exif=exif).getvalue())
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        tar.add(path, "0.png")
    flat = tmp_path / "a"
    expected = np.rot90(stored, -1)
    doors = [
        Files([(str(path), 0)]).read(0),  # of `bayesify predict`
        load_dataset(str(tmp_path), split="train").read(0),
        load_dataset(f"timm:torch/folder@{tmp_path}", split="train").read(0),
        open_images(f"wds:{tmp_path}")[0].read(0),
        open_images(str(flat))[0].read(0),
    ]
    for found, _ in doors:
        np.testing.assert_array_equal(pixels_of(found), expected)


def test_damaged_exif_data_does_no_harm() -> None:
    data = encoded(Image.fromarray(noise(5, 7, 3)), "PNG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")
    assert read_image(data, "it").shape == (3, 5, 7)


def test_postscript_called_a_photo_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(Image.fromarray(noise(5, 7, 3)), "EPS").getvalue())
    started: list[Any] = []
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a))
    with pytest.raises(DataError, match=r"photo\.jpg cannot be read: it is none of JPEG, PNG"):
        Files([(str(path), 0)]).read(0)
    assert not started


@pytest.mark.parametrize("kind", ["ICO", "PCX", "TGA", "SGI", "DDS", "JPEG2000"])
def test_other_formats_are_refused(kind: str) -> None:
    try:
        data = encoded(Image.fromarray(noise(16, 16, 3)), kind)
    except (OSError, KeyError):  # this Pillow does not write it
        data = io.BytesIO(b"\0" * 64)
    with pytest.raises(DataError, match="none of JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM"):
        read_image(data, "it")


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (9400, 9400, "9,400 x 9,400 pixels are more than 67,108,864"),
        (1, 200_000, "sides 1 x 200,000 are more unlike than 1 to 50"),
        (102, 2, "sides 102 x 2 are more unlike"),
        (30_000, 30_000, "cannot be read"),  # Pillow refuses it itself
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_size_is_looked_at_before_anything_is_decoded(
    width: int, height: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = io.BytesIO(b"P4\n%d %d\n" % (width, height))  # a header alone: there is nothing behind
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it is decoded"))
    with pytest.raises(DataError, match=message):
        read_image(data, "it")


def test_narrow_images_in_memory_are_not_blown_up() -> None:
    with pytest.raises(DataError, match="cannot be resized: its sides 1 x 200,000"):
        prepare(torch.zeros(1, 3, 200_000, 1, dtype=torch.uint8), CONFIG)
    assert prepare(torch.zeros(1, 3, 100, 2, dtype=torch.uint8), CONFIG).shape == (1, 3, 8, 8)


def test_an_image_cut_short_is_named() -> None:
    data = encoded(Image.fromarray(noise(40, 40, 3)), "JPEG").getvalue()
    with pytest.raises(DataError, match=r"The image photo cannot be read: .*truncated"):
        read_image(io.BytesIO(data[: len(data) // 2]), "photo")


def png(depth: int, colour: int, rows: NDArray[np.uint16]) -> io.BytesIO:
    """A PNG of 16 bits by hand (RFC 2083): Pillow writes none in colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    height, width = rows.shape[:2]
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + parts)


def test_sixteen_bits() -> None:
    colour = np.random.default_rng(0).integers(0, 1 << 16, (4, 5, 3), dtype=np.uint16)
    found = read_image(png(16, 2, colour), "it")
    np.testing.assert_array_equal(pixels_of(found), (colour >> 8).astype(np.uint8))
    with pytest.raises(DataError, match="no 8-bit image; convert it"):
        read_image(png(16, 0, colour[..., :1]), "it")
    with pytest.raises(DataError, match="no 8-bit image; convert it"):
        read_image(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "it")


def test_pixels_of_other_kinds() -> None:
    colour = Image.fromarray(noise(6, 9, 3))
    palette = colour.convert("P", palette=Image.Palette.ADAPTIVE)
    table = np.array(palette.getpalette()).reshape(-1, 3)
    for transparency in (3, bytes(range(0, 250, 5))):  # as one colour, and as an alpha of each
        found = read_image(encoded(palette, "PNG", transparency=transparency), "it")
        np.testing.assert_array_equal(pixels_of(found), table[np.array(palette)])

    ink = noise(4, 5, 4)
    found = read_image(encoded(Image.fromarray(ink, "CMYK"), "TIFF"), "it")
    expected = (255.0 - ink[..., :3]) * (255.0 - ink[..., 3:]) / 255.0
    np.testing.assert_allclose(pixels_of(found), expected, atol=1.0)

    alpha = colour.copy()
    alpha.putalpha(0)
    np.testing.assert_array_equal(
        pixels_of(read_image(encoded(alpha, "PNG"), "it")), noise(6, 9, 3)
    )

    both = encoded(palette, "GIF", save_all=True, append_images=[palette.rotate(180)])
    np.testing.assert_array_equal(pixels_of(read_image(both, "it")), table[np.array(palette)])


def test_the_photos_of_cameras_that_hold_two_pictures() -> None:
    first = Image.fromarray(noise(6, 9, 3))
    data = encoded(first, "MPO", save_all=True, append_images=[first.rotate(180)])
    stored = np.array(Image.open(encoded(first, "JPEG")))
    np.testing.assert_array_equal(pixels_of(read_image(data, "it")), stored)


def test_what_is_refused_is_an_image_that_could_be_opened_otherwise() -> None:
    assert images.MAX_PIXELS == 8192**2
    images.check_size(8192, 8192)
    images.check_size(50, 1)
    with pytest.raises(ValueError, match="more than"):
        images.check_size(8193, 8192)
    with pytest.raises(ValueError, match="unlike"):
        images.check_size(51, 1)
