"""recipes.byov.data.views: against torchvision with the same parameters, and their chances."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from scipy.stats import chisquare, ks_2samp, kstest
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as reference

from bayesify.errors import ArgumentError
from recipes.byov.data import image_ops
from recipes.byov.data.views import (
    CIFAR_VIEWS,
    IMAGENET_VIEWS,
    TwoViews,
    ViewConfig,
    ViewParameters,
    WorkerViews,
    apply_view,
    draw_parameters,
    view_configs,
)

# Everything happens often, so that a small batch sees each operation and each order of them.
BUSY = ViewConfig(size=32, grayscale=0.3, blur=0.5, solarise=0.5)
UNLIKELY = 1e-6  # least probability that a chance of 5 standard errors leaves


def some_images(batch: int, height: int = 40, width: int = 56, channels: int = 3) -> Tensor:
    """Smooth colour fields with a little noise, in [0, 1], some pixels grey, black or white."""
    coarse = torch.rand(batch, channels, 6, 6)
    x = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    x = (x + 0.05 * torch.randn_like(x)).clamp(0, 1)
    x[:, :, :4] = x[:, :1, :4]
    x[:, :, 4:6] = 0
    x[:, :, 6:8] = 1
    return x


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# One operation at a time


@pytest.mark.parametrize(
    ("height", "width", "size"), [(40, 56, 32), (32, 32, 32), (20, 12, 32), (97, 41, 8), (5, 7, 1)]
)
def test_crops_are_those_of_torchvision(height: int, width: int, size: int) -> None:
    images = some_images(32, height, width)
    drawn = draw_parameters(replace(BUSY, size=size), 32, height, width, generator())
    assert (drawn.crop[:, 0] + drawn.crop[:, 2] <= height).all()
    assert (drawn.crop[:, 1] + drawn.crop[:, 3] <= width).all()
    found = image_ops.crop_and_flip(images, drawn.crop, drawn.flip, size)
    for image, box, flip, view in zip(images, drawn.crop, drawn.flip, found, strict=True):
        bicubic = InterpolationMode.BICUBIC
        expected = reference.resized_crop(image, *box.tolist(), [size, size], bicubic, True)
        expected = expected.flip(2) if flip else expected
        torch.testing.assert_close(view, expected.clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high"),
    [
        (image_ops.brightness, reference.adjust_brightness, 0.0, 2.0),
        (image_ops.contrast, reference.adjust_contrast, 0.0, 2.0),
        (image_ops.saturation, reference.adjust_saturation, 0.0, 2.0),
        (image_ops.hue, reference.adjust_hue, -0.5, 0.5),
    ],
)
def test_colour_operations_are_those_of_torchvision(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], low: float, high: float
) -> None:
    images = some_images(16)
    factors = torch.linspace(low, high, 16)
    for view, image, factor in zip(ours(images, factors), images, factors.tolist(), strict=True):
        torch.testing.assert_close(view, theirs(image, factor), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", [1, 3, 23])
def test_blur_is_that_of_torchvision(kernel: int) -> None:
    images, sigma = some_images(8), torch.linspace(0.1, 2, 8)
    for view, image, s in zip(image_ops.blur(images, sigma, kernel), images, sigma, strict=True):
        expected = reference.gaussian_blur(image, [kernel, kernel], [float(s), float(s)])
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-5)


def test_solarise_and_grayscale_are_those_of_torchvision() -> None:
    images = some_images(4)
    images[0, 0, 0, 0] = 0.3  # on the threshold
    assert torch.equal(image_ops.solarise(images, 0.3), reference.solarize(images, 0.3))
    expected = reference.rgb_to_grayscale(images, num_output_channels=3)
    torch.testing.assert_close(image_ops.grayscale(images), expected)


# All of them


def one_by_one(image: Tensor, drawn: ViewParameters, row: int, config: ViewConfig) -> Tensor:
    """One view by torchvision's functions, with the parameters of one row."""
    size = [config.size, config.size]
    box = drawn.crop[row].tolist()
    x = reference.resized_crop(image, *box, size, InterpolationMode.BICUBIC, True).clamp(0, 1)
    x = reference.horizontal_flip(x) if drawn.flip[row] else x
    adjust: list[Any] = [
        reference.adjust_brightness,
        reference.adjust_contrast,
        reference.adjust_saturation,
        reference.adjust_hue,
    ]
    for number in drawn.order[row].tolist() if drawn.jitter[row] else ():
        x = adjust[number](x, float(drawn.factors[row, number]))
    x = reference.rgb_to_grayscale(x, 3) if drawn.grayscale[row] else x
    if drawn.blur[row]:
        sigma = float(drawn.sigma[row])
        x = reference.gaussian_blur(x, [config.blur_kernel] * 2, [sigma, sigma])
    x = reference.solarize(x, config.solarise_threshold) if drawn.solarise[row] else x
    normalised: Tensor = reference.normalize(x, list(config.mean), list(config.std))
    return normalised


def test_a_view_is_what_torchvision_makes_one_by_one() -> None:
    images = some_images(64)
    drawn = draw_parameters(BUSY, 64, 40, 56, generator())
    for view, row in zip(apply_view(images, drawn, BUSY), range(64), strict=True):
        expected = one_by_one(images[row], drawn, row, BUSY)
        # A value on either side of the solarise threshold, by rounding, jumps: very few do.
        wrong = (view - expected).abs() > 1e-3
        assert wrong.float().mean() < 0.002, row


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_none_and_all_of_a_batch_can_be_changed(probability: float, batch: int) -> None:
    p = probability
    config = replace(BUSY, flip=p, jitter=p, grayscale=p, blur=p, solarise=p)
    images = some_images(batch)
    before = images.clone()
    drawn = draw_parameters(config, batch, 40, 56, generator())
    for row, view in enumerate(apply_view(images, drawn, config)):
        close = (view - one_by_one(images[row], drawn, row, config)).abs() <= 1e-3
        assert close.float().mean() > 0.998
    assert torch.equal(images, before)


def test_pixels_and_fractions_give_the_same_views() -> None:
    images = (some_images(4) * 255).round().byte()
    views = TwoViews(BUSY, BUSY)
    for a, b in zip(views(images, 3), views(images.double() / 255, 3), strict=True):
        torch.testing.assert_close(a, b)


# Chances


def test_each_operation_happens_as_often_as_it_should() -> None:
    count = 20_000
    for config in (*IMAGENET_VIEWS, *CIFAR_VIEWS):
        drawn = draw_parameters(config, count, 64, 64, generator())
        for name in ("flip", "jitter", "grayscale", "blur", "solarise"):
            chance = getattr(config, name)
            error = math.sqrt(chance * (1 - chance) / count)
            share = getattr(drawn, name).double().mean().item()
            assert abs(share - chance) <= 5 * error, name


def test_factors_are_uniform_and_orders_equally_likely() -> None:
    count = 20_000
    drawn = draw_parameters(ViewConfig(), count, 64, 64, generator())
    spans = [(0.6, 0.8), (0.6, 0.8), (0.8, 0.4), (-0.1, 0.2)]
    for column, span in zip(drawn.factors.T, spans, strict=True):
        assert kstest(column.numpy(), "uniform", span).pvalue > UNLIKELY
    assert kstest(drawn.sigma.numpy(), "uniform", (0.1, 1.9)).pvalue > UNLIKELY
    seen = [tuple(order) for order in drawn.order.tolist()]
    orders = list(permutations(range(4)))
    assert chisquare([seen.count(order) for order in orders]).pvalue > UNLIKELY


@pytest.mark.parametrize(("height", "width"), [(32, 32), (30, 90), (90, 20)])
def test_crops_have_the_distribution_of_torchvision(height: int, width: int) -> None:
    theirs = v2.RandomResizedCrop(32, scale=(0.08, 1.0), antialias=True)
    image = torch.zeros(3, height, width)
    boxes = [theirs.make_params([image]) for _ in range(2_000)]
    expected = torch.tensor([[b["top"], b["left"], b["height"], b["width"]] for b in boxes])
    found = draw_parameters(ViewConfig(), 2_000, height, width, generator()).crop
    for a, b in zip(found.T, expected.T, strict=True):
        assert ks_2samp(a.numpy(), b.numpy()).pvalue > UNLIKELY


def roughness(images: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Mean step from one pixel to the next."""
    return images.diff(dim=2).abs().mean(dim=dim)


def slope(images: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Mean of the right column over that of the left, which flips exchange."""
    return (images[:, :, -1] - images[:, :, 0]).mean(dim=1)


def test_batches_and_workers_make_views_of_one_distribution() -> None:
    configs = (replace(BUSY, size=16), replace(BUSY, size=16, solarise=0.0))
    ramp = torch.linspace(0, 255, 56)
    image = (some_images(1)[0] * 127 + ramp / 2).round().byte()
    count = 600
    ours = TwoViews(*configs)(image.expand(count, -1, -1, -1), seed=0)
    worker = WorkerViews(*configs)
    theirs = zip(*(worker(image, seed) for seed in range(count)), strict=True)
    for a, b in zip(ours, map(torch.stack, theirs), strict=True):
        for channel in range(3):
            for summary in (Tensor.mean, Tensor.std, roughness, slope):
                x, y = (summary(v[:, channel], dim=(1, 2)).numpy() for v in (a, b))
                assert ks_2samp(x, y).pvalue > UNLIKELY, (channel, summary)


def test_both_views_together_are_each_by_itself() -> None:
    configs = (replace(BUSY, size=24), replace(BUSY, size=24, blur=0.0, hue=0.4))
    images = some_images(5)
    height, width = images.shape[2:]
    generator = torch.Generator().manual_seed(3)
    alone = [
        apply_view(images, draw_parameters(config, 5, height, width, generator), config)
        for config in configs
    ]
    torch.testing.assert_close(list(TwoViews(*configs)(images, 3)), alone)


def test_two_views_must_share_what_is_no_images_own() -> None:
    with pytest.raises(ArgumentError, match=r"same size.*differ in size, grey\."):
        TwoViews(BUSY, replace(BUSY, size=16, grey=True, hue=0.0))


# Seeds


def make_both(seed: int) -> list[Tensor]:
    images = (some_images(3) * 255).round().byte()
    return [*TwoViews(*CIFAR_VIEWS)(images, seed), *WorkerViews(*CIFAR_VIEWS)(images[0], seed)]


def test_a_seed_fixes_the_views_and_nothing_else_does() -> None:
    torch.manual_seed(5)
    first = make_both(seed=1)
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(first, make_both(seed=1), strict=True))
    torch.manual_seed(5)
    assert not any(torch.equal(a, b) for a, b in zip(first, make_both(seed=2), strict=True))
    assert not torch.equal(first[0], first[1])  # the views of one image


def test_the_global_random_state_is_neither_used_nor_changed() -> None:
    images = (some_images(3) * 255).round().byte()
    two, worker = TwoViews(*CIFAR_VIEWS), WorkerViews(*CIFAR_VIEWS)
    results = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        results.append([*two(images, 7), *worker(images[0], 7)])
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_does_not_make_views_coarse() -> None:
    images = some_images(2)
    views = TwoViews(BUSY, BUSY)
    with torch.autocast("cpu", torch.bfloat16):
        inside = views(images, 0)
    assert inside[0].dtype == torch.float32
    assert torch.equal(inside[0], views(images, 0)[0])


@pytest.mark.gpu
def test_the_device_does_not_change_the_views() -> None:
    images = (some_images(32) * 255).round().byte()
    views = TwoViews(BUSY, BUSY)
    for a, b in zip(views(images, 0), views(images.cuda(), 0), strict=True):
        assert ((a - b.cpu()).abs() > 1e-3).float().mean() < 0.002


# Grey


def test_grey_views_leave_out_what_only_changes_colour() -> None:
    grey = ViewConfig(size=32, blur=0.5, mean=(0.3,), std=(0.4,))
    wide = replace(grey, grey=True, mean=(0.3,) * 3, std=(0.4,) * 3)
    images = some_images(16, channels=1)
    alone = TwoViews(grey, grey)(images, 0)
    repeated = TwoViews(wide, wide)(images.expand(-1, 3, -1, -1), 0)
    for a, b in zip(alone, repeated, strict=True):
        assert a.shape == (16, 1, 32, 32)
        torch.testing.assert_close(a.expand_as(b), b, rtol=0, atol=2e-3)  # luma sums to .9999
    for image in WorkerViews(grey, grey)((images[0] * 255).byte(), 0):
        assert image.shape == (1, 32, 32)


def test_grey_images_fill_the_channels_of_a_colour_model() -> None:
    for view in (
        *TwoViews(BUSY, BUSY)(some_images(4, channels=1), 0),
        *(v[None] for v in WorkerViews(BUSY, BUSY)(torch.zeros(1, 9, 9).byte(), 0)),
    ):
        assert view.shape[1:] == (3, 32, 32)
        std = torch.tensor(BUSY.std)[:, None, None]
        mean = torch.tensor(BUSY.mean)[:, None, None]
        plain = view * std + mean
        torch.testing.assert_close(plain[:, :1].expand_as(plain), plain, rtol=0, atol=1e-5)


# Settings


def test_the_published_probabilities() -> None:
    first, second = IMAGENET_VIEWS
    assert (first.blur, first.solarise, second.blur, second.solarise) == (1.0, 0.0, 0.1, 0.2)
    assert (first.blur_kernel, first.blur_sigma) == (23, (0.1, 2.0))
    for view in (*IMAGENET_VIEWS, *CIFAR_VIEWS):
        assert (view.flip, view.jitter, view.grayscale, view.crop_area[0]) == (0.5, 0.8, 0.2, 0.08)
        jitter = (view.brightness, view.contrast, view.saturation, view.hue)
        assert jitter == (0.4, 0.4, 0.2, 0.1)
    assert [(v.size, v.blur, v.solarise) for v in CIFAR_VIEWS] == [(32, 0, 0), (32, 0, 0.2)]


def test_strength_scales_from_the_flip_alone_to_more_than_published() -> None:
    images = some_images(32, 32, 32)
    config = replace(BUSY, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert config.scaled(1.0) == config
    view = apply_view(
        images, draw_parameters(config.scaled(0), 32, 32, 32, generator()), config.scaled(0)
    )
    unchanged = [
        torch.allclose(v, x, atol=1e-5) or torch.allclose(v, x.flip(2), atol=1e-5)
        for v, x in zip(view, images, strict=True)
    ]
    assert all(unchanged)
    strong = config.scaled(10)
    assert (strong.blur, strong.hue, strong.jitter) == (1.0, 0.5, config.jitter)
    assert strong.brightness == 4.0
    assert 0 < strong.crop_area[0] < config.crop_area[0]
    with pytest.raises(ArgumentError, match="augmentation_strength"):
        config.scaled(-1)


def test_configs_of_a_data_set() -> None:
    mean, std = (0.5,), (0.2,)
    first, second = view_configs("cifar", size=28, mean=mean, std=std, grey=True, min_crop=0.2)
    assert first == ViewConfig(28, (0.2, 1.0), blur=0.0, mean=mean, std=std, grey=True)
    assert second == replace(first, solarise=0.2)
    weaker = view_configs("imagenet", size=28, mean=mean, std=std, strength=0.5)
    assert weaker[0].blur == 0.5
    with pytest.raises(ArgumentError, match="augmentation must be one of imagenet, cifar"):
        view_configs("mnist", size=28, mean=mean, std=std)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 0),
        ("crop_area", (0.0, 1.0)),
        ("crop_area", (0.5, 1.1)),
        ("crop_ratio", (2.0, 1.0)),
        ("flip", 1.5),
        ("solarise", -0.1),
        ("hue", 0.6),
        ("brightness", math.inf),
        ("contrast", -1.0),
        ("blur_sigma", (0.0, 2.0)),
        ("solarise_threshold", 2.0),
        ("mean", (0.5, 0.5)),
        ("std", (0.5,)),
        ("std", (0.5, 0.5, 0.0)),
    ],
)
def test_a_setting_that_cannot_work_is_named(field: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"ViewConfig: {field} must be"):
        ViewConfig(**{field: value})


def test_images_that_cannot_be_viewed_are_refused() -> None:
    views = TwoViews(*CIFAR_VIEWS)
    for shape in [(3, 8, 8), (2, 4, 8, 8), (0, 3, 8, 8)]:
        with pytest.raises(ArgumentError, match=r"images must be \(B, C, H, W\)"):
            views(torch.zeros(shape), 0)
    grey = replace(CIFAR_VIEWS[0], mean=(0.5,), std=(0.5,))
    with pytest.raises(ArgumentError, match="3 channels cannot be normalised by 1 means"):
        TwoViews(grey, grey)(some_images(2), 0)
