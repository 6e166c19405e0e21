"""benchmarks/corruptions.py: what each corruption does to pixels."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from corruptions import KINDS, SEVERITIES, corrupt
from torch import Tensor


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


@pytest.mark.parametrize("kind", KINDS)
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
    with pytest.raises(ValueError, match="no corruption 'fog'"):
        corrupt(images(), "fog", 1)
    with pytest.raises(ValueError, match="from 1 to 5, not 6"):
        corrupt(images(), "jpeg", 6)
