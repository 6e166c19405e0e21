"""What each corruption does to pixels."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from bayesify import ArgumentError, corruptions
from bayesify.corruptions import CIFAR10_C, SEVERITIES


def corrupt(pixels: Tensor, kind: str, severity: int, seed: int = 0) -> Tensor:
    return corruptions.corrupt(pixels, kind, severity, table=CIFAR10_C, seed=seed)


def images(n: int = 6) -> Tensor:
    """Smooth coloured images, with black and white in them."""
    ramp = torch.linspace(0, 255, 32)
    x = torch.stack(
        [ramp.expand(32, 32), ramp[:, None].expand(32, 32), ramp.flip(0).expand(32, 32)]
    )
    shades = torch.linspace(0.2, 1.0, n).view(-1, 1, 1, 1)
    found = (x * shades).to(torch.uint8)
    found[:, :, 0, :4], found[:, :, 1, :4] = 0, 255
    return found


@pytest.mark.parametrize("kind", CIFAR10_C)
def test_a_corruption_grows_with_its_severity(kind: str) -> None:
    x = images()
    before = x.clone()
    found = [corrupt(x, kind, severity) for severity in SEVERITIES]
    assert torch.equal(x, before)
    assert all(y.shape == x.shape and y.dtype == torch.uint8 for y in found)
    errors = [(y.double() - x.double()).square().mean().item() for y in found]
    assert errors == sorted(errors)
    assert 0.0 < errors[0] < 0.9 * errors[-1]
    assert torch.equal(found[2], corrupt(x, kind, 3))


def test_noise_has_the_given_strength_and_seed() -> None:
    grey = torch.full((4, 3, 32, 32), 128, dtype=torch.uint8)
    for severity, std in zip(SEVERITIES, (0.04, 0.06, 0.08, 0.09, 0.10), strict=True):
        noise = corrupt(grey, "gaussian noise", severity).double() / 255 - 128 / 255
        assert noise.std().item() == pytest.approx(std, rel=0.03)
        assert abs(noise.mean().item()) < 0.004  # cut off, not rounded: down by half a level
    other = corrupt(grey, "gaussian noise", 1, seed=1)
    assert not torch.equal(other, corrupt(grey, "gaussian noise", 1))


def test_brightness_raises_the_value_of_hsv() -> None:
    x = images(2)
    found = corrupt(x, "brightness", 4)
    for n, i, j in [(0, 5, 7), (1, 20, 30), (1, 0, 0), (1, 1, 1), (0, 31, 2)]:
        h, s, v = colorsys.rgb_to_hsv(*(x[n, :, i, j].double() / 255).tolist())
        expected = np.array(colorsys.hsv_to_rgb(h, s, min(1.0, v + 0.2))) * 255
        assert np.abs(found[n, :, i, j].numpy() - expected).max() <= 1.0


def test_contrast_shrinks_towards_the_mean_of_each_channel() -> None:
    x = images()
    y = corrupt(x, "contrast", 5).double()
    mean = x.double().mean((2, 3), keepdim=True)
    assert ((y - (mean + 0.15 * (x.double() - mean))).abs() <= 1.0).all()


def test_blur_keeps_a_constant_and_spreads_a_point() -> None:
    flat = torch.full((1, 3, 32, 32), 90, dtype=torch.uint8)
    assert (corrupt(flat, "gaussian blur", 5).int() - 90).abs().max() <= 1
    point = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    point[0, 1, 16, 16] = 255
    y = corrupt(point, "gaussian blur", 5)
    assert y[0, 1, 16, 16].item() == pytest.approx(255 / (2 * np.pi), abs=2)
    assert (y[0, 0] == 0).all()  # channels do not mix


def test_what_there_is_not() -> None:
    with pytest.raises(ArgumentError, match="no corruption 'fog'"):
        corrupt(images(), "fog", 1)
    with pytest.raises(ArgumentError, match="of severity 6: kinds are"):
        corrupt(images(), "jpeg", 6)


# The augmentations of BYOV

PIXELS = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("rotate", lambda x: v2.functional.rotate(
            x, 24.0, interpolation=v2.InterpolationMode.BILINEAR)),
        ("brightness", lambda x: v2.functional.adjust_brightness(x, 1.7)),
        ("contrast", lambda x: v2.functional.adjust_contrast(x, 0.4)),
        ("hue", lambda x: v2.functional.adjust_hue(x, 0.2)),
        ("saturation", lambda x: v2.functional.adjust_saturation(x, 3.0)),
        ("solarise", lambda x: v2.functional.solarize(x, 0.7)),
        ("posterise", lambda x: v2.functional.posterize(_bytes(x), 3).float() / 255),
    ],
)  # fmt: skip
def test_augmentations_are_torchvisions(kind: str, own: Any) -> None:
    found = corruptions.corrupt(PIXELS, kind, 3)
    # rotate turns the other way round than affine
    expected = own(PIXELS) if kind != "rotate" else own(PIXELS.flip(-1)).flip(-1)
    assert torch.allclose(found, expected.clamp(0, 1), atol=1e-5)


def _bytes(pixels: Tensor) -> Tensor:
    return (pixels * 255).round().to(torch.uint8)


def test_jpeg_is_the_codecs_and_coarser_at_low_quality() -> None:
    import io

    from PIL import Image

    flat = torch.full((1, 1, 16, 16), 100 / 255)
    assert torch.allclose(corruptions.corrupt(flat, "jpeg", 5), flat, atol=2 / 255)
    with io.BytesIO() as file:
        image = v2.functional.to_pil_image(PIXELS[1])
        image.save(file, "JPEG", quality=25)
        expected = v2.functional.pil_to_tensor(Image.open(file)).float() / 255
    # to_pil_image rounds down where we round to the nearest
    assert (corruptions.corrupt(PIXELS, "jpeg", 4)[1] - expected).abs().mean() < 0.02


def test_blur_is_scipys() -> None:
    from scipy.ndimage import gaussian_filter

    found = corruptions.corrupt(PIXELS, "blur", 5)
    sigma = 1.4 * 24 / 32
    expected = gaussian_filter(PIXELS.numpy(), (0, 0, sigma, sigma), mode="mirror", truncate=4)
    assert torch.allclose(found, torch.from_numpy(expected), atol=2e-4)


def test_noises_have_their_strength_and_seed() -> None:
    grey = torch.full((8, 3, 64, 64), 0.5)
    noisy = corruptions.corrupt(grey, "gaussian noise", 2, seed=4)
    assert float((noisy - grey).std()) == pytest.approx(0.08, rel=0.02)
    assert torch.equal(noisy, corruptions.corrupt(grey, "gaussian noise", 2, seed=4))
    assert not torch.equal(noisy, corruptions.corrupt(grey, "gaussian noise", 2, seed=5))
    spots = corruptions.corrupt(grey, "salt and pepper", 5, seed=4)
    changed = spots != grey
    assert float(changed.float().mean()) == pytest.approx(0.12, abs=0.01)
    assert set(spots[changed].unique().tolist()) == {0.0, 1.0}
    assert bool((changed.all(1) == changed.any(1)).all())  # all channels of a pixel


def test_translation_moves_by_whole_pixels() -> None:
    found = corruptions.corrupt(PIXELS, "translate", 5)
    assert torch.allclose(found[..., 6:, 6:], PIXELS[..., :-6, :-6], atol=1e-5)
    assert float(found[..., :5, :].abs().max()) == 0


@pytest.mark.parametrize("kind", corruptions.AUGMENTATIONS)
def test_every_severity_changes_more(kind: str) -> None:
    ramp = torch.linspace(0.05, 0.95, 24).repeat(2, 3, 24, 1)
    ramp[:, 1] = ramp[:, 1].mT
    ramp[:, 2] = 0.3
    away = [
        float((corruptions.corrupt(ramp, kind, s) - ramp).abs().mean())
        for s in corruptions.SEVERITIES
    ]
    assert away[0] > 0
    assert away == sorted(away)


def test_unknown_corruptions_are_refused() -> None:
    with pytest.raises(ArgumentError, match="salt and pepper"):
        corruptions.corrupt(PIXELS, "fog", 1)
    with pytest.raises(ArgumentError, match="severities 1 to 5"):
        corruptions.corrupt(PIXELS, "blur", 6)
