"""The two views of an image that BYOL compares: on the device in batch, or one by one in a worker.

Operations and their order are those of BYOL's code: crop and resize, flip, colour jitter,
grayscale, blur, solarise, normalise. Each operation means what it means in torchvision, where
brightness multiplies (in BYOL's code it adds). In batch they take an eleventh of torchvision's time
at 32 pixels and a fifth at 224 on two cores (medians; benchmarks/byov_views.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from bayesify import ArgumentError

from . import image_ops
from .image_ops import normalise

_CROP_TRIES = 10  # as in torchvision, before the centre is taken


@dataclass(frozen=True)
class ViewConfig:
    """How one view is made of an image.

    Args:
        size: Side of the square view in pixels.
        crop_area: Smallest and largest share of the image's area that is cropped, of (0, 1].
        crop_ratio: Smallest and largest width over height of the crop, uniform in its logarithm.
        flip: Probability of a horizontal flip.
        jitter: Probability of the four colour operations, in a random order for each image.
        brightness: Factor from U(1 - b, 1 + b).
        contrast: Factor from U(1 - c, 1 + c).
        saturation: Factor from U(1 - s, 1 + s).
        hue: Shift from U(-h, h), in turns of the colour circle, at most 0.5.
        grayscale: Probability that the image becomes grey.
        blur: Probability of a Gaussian blur of ``blur_kernel`` pixels.
        blur_sigma: Smallest and largest standard deviation of the blur in pixels.
        solarise: Probability that what is bright is inverted.
        solarise_threshold: From here on it is, in [0, 1].
        mean: Subtracted, one number for each channel of the model.
        std: Divides afterwards.
        grey: The images are grey, whatever their channels: what only changes colour is left out.

    Raises:
        ArgumentError: If a value cannot work.

    Reference:
        Grill et al. 2020, arXiv 2006.07733, appendix B; the defaults are those of its first view
        (deepmind-research, byol/utils/augmentations.py and configs/byol.py).
    """

    size: int = 224
    crop_area: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale: float = 0.2
    blur: float = 1.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarise: float = 0.0
    solarise_threshold: float = 0.5
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    grey: bool = False

    def __post_init__(self) -> None:
        wrong = [
            f"{name} must be {expected}, not {getattr(self, name)!r}"
            for name, expected, right in (
                ("size", "a whole number above 0", isinstance(self.size, int) and self.size > 0),
                ("crop_area", "0 < smallest <= largest <= 1", _rising(self.crop_area, 1.0)),
                ("crop_ratio", "0 < smallest <= largest", _rising(self.crop_ratio)),
                ("blur_sigma", "0 < smallest <= largest", _rising(self.blur_sigma)),
                *((p, "a probability", 0 <= getattr(self, p) <= 1) for p in _PROBABILITIES),
                *((f, "finite, 0 or more", 0 <= getattr(self, f) < math.inf) for f in _FACTORS),
                ("hue", "from 0 to 0.5", 0 <= self.hue <= 0.5),
                ("solarise_threshold", "from 0 to 1", 0 <= self.solarise_threshold <= 1),
                ("mean", "1 or 3 finite numbers", _channels(self.mean)),
                ("std", "as long as mean, above 0", len(self.std) == len(self.mean)),
                ("std", "finite numbers above 0", all(0 < s < math.inf for s in self.std)),
            )
            if not right
        ]
        if wrong:
            raise ArgumentError(f"ViewConfig: {'; '.join(wrong)}.")

    @property
    def blur_kernel(self) -> int:
        """Width of the blur in pixels: a tenth of the view, odd (23 of 224)."""
        return 2 * (self.size // 10 // 2) + 1

    def scaled(self, strength: float) -> Self:
        """Return weaker (below 1) or stronger (above 1) augmentation; 0 leaves the flip alone.

        The strengths of the jitter and the probabilities of grayscale, blur and solarise are
        multiplied, the latter up to 1; smallest area and ratios of the crop are raised to this
        power.

        Raises:
            ArgumentError: If ``strength`` is below 0 or not finite.
        """
        if not 0 <= strength < math.inf:
            raise ArgumentError(
                f"augmentation_strength must be finite, 0 or more, not {strength!r}."
            )
        low, high = self.crop_area
        return replace(
            self,
            crop_area=(high * (low / high) ** strength, high) if strength else (1.0, 1.0),
            crop_ratio=(self.crop_ratio[0] ** strength, self.crop_ratio[1] ** strength),
            hue=min(0.5, self.hue * strength),
            **{name: getattr(self, name) * strength for name in _FACTORS},
            **{
                name: min(1.0, getattr(self, name) * strength)
                for name in ("grayscale", "blur", "solarise")
            },
        )


_PROBABILITIES = ("flip", "jitter", "grayscale", "blur", "solarise")
_SHARED = ("size", "solarise_threshold", "mean", "std", "grey")
_FACTORS = ("brightness", "contrast", "saturation")


def _rising(pair: tuple[float, float], most: float = math.inf) -> bool:
    return len(pair) == 2 and 0 < pair[0] <= pair[1] <= most and math.isfinite(pair[1])


def _channels(mean: tuple[float, ...]) -> bool:
    return len(mean) in (1, 3) and all(map(math.isfinite, mean))


IMAGENET_VIEWS = (
    ViewConfig(),
    ViewConfig(blur=0.1, solarise=0.2),
)
"""Grill et al. 2020, arXiv 2006.07733, table 6; deepmind-research byol/configs/byol.py."""

CIFAR_VIEWS = (
    ViewConfig(32, blur=0.0, mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616)),
    ViewConfig(
        32, blur=0.0, solarise=0.2, mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616)
    ),
)
"""solo-learn, scripts/pretrain/cifar/augmentations/asymmetric.yaml: no blur at 32 pixels."""

VIEWS = {"imagenet": IMAGENET_VIEWS, "cifar": CIFAR_VIEWS}


def view_configs(
    name: str,
    *,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    grey: bool = False,
    min_crop: float = 0.08,
    strength: float = 1.0,
) -> tuple[ViewConfig, ViewConfig]:
    """Return the configs of both views for a data set.

    Args:
        name: Of the published pair in ``VIEWS``.
        size: Side of the square view in pixels.
        mean: Of the data set, one number for each channel of the model.
        std: Likewise.
        grey: Its images are grey.
        min_crop: Smallest share of the image that is cropped.
        strength: See :meth:`ViewConfig.scaled`.

    Raises:
        ArgumentError: If a value cannot work.
    """
    if name not in VIEWS:
        raise ArgumentError(f"augmentation must be one of {', '.join(VIEWS)}, not {name!r}.")
    first, second = (
        replace(view, size=size, mean=mean, std=std, grey=grey, crop_area=(min_crop, 1.0)).scaled(
            strength
        )
        for view in VIEWS[name]
    )
    return first, second


@dataclass(frozen=True)
class ViewParameters:
    """What was drawn for one view of a batch, on the CPU.

    Shape:
        crop (B, 4): top, left, height, width in pixels. factors (B, 4): brightness, contrast,
        saturation, hue, and order (B, 4) of these numbers. sigma (B,) in pixels. flip, jitter,
        grayscale, blur, solarise (B,): whether the operation is applied.
    """

    crop: Tensor
    flip: Tensor
    jitter: Tensor
    factors: Tensor
    order: Tensor
    grayscale: Tensor
    blur: Tensor
    sigma: Tensor
    solarise: Tensor


def draw_parameters(
    config: ViewConfig, batch: int, height: int, width: int, generator: torch.Generator
) -> ViewParameters:
    """Draw one view's parameters for a batch of images of ``height`` and ``width`` pixels.

    They are drawn on the CPU, so that a seed gives the same views on every device and the device
    need not be waited for.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=generator)

    def happens(probability: float) -> Tensor:
        return torch.rand(batch, generator=generator) < probability

    spans = [(max(0.0, 1 - f), 1 + f) for f in (getattr(config, name) for name in _FACTORS)]
    spans.append((-config.hue, config.hue))
    return ViewParameters(
        crop=_draw_crop(config, height, width, uniform),
        flip=happens(config.flip),
        jitter=happens(config.jitter),
        factors=torch.stack([uniform(low, high) for low, high in spans], dim=1),
        order=uniform(0.0, 1.0, 4).argsort(dim=1),
        grayscale=happens(config.grayscale),
        blur=happens(config.blur),
        sigma=uniform(*config.blur_sigma),
        solarise=happens(config.solarise),
    )


def _draw_crop(
    config: ViewConfig, height: int, width: int, uniform: Callable[..., Tensor]
) -> Tensor:
    """As torchvision's RandomResizedCrop: the first of ten boxes that fits, else the centre."""
    area = height * width * uniform(*config.crop_area, _CROP_TRIES)
    ratio = uniform(*map(math.log, config.crop_ratio), _CROP_TRIES).exp()
    widths, heights = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (0 < widths) & (widths <= width) & (0 < heights) & (heights <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    sides = torch.cat([heights.gather(1, first), widths.gather(1, first)], dim=1)
    spare = torch.tensor([height, width]) - sides
    corner = (uniform(0.0, 1.0, 2) * (spare + 1)).floor().minimum(spare)
    low, high = config.crop_ratio
    centre_w = min(width, round(height * high))
    centre_h = min(height, round(width / low))
    centre = torch.tensor(
        [(height - centre_h) // 2, (width - centre_w) // 2, centre_h, centre_w], dtype=area.dtype
    )
    return torch.where(fits.any(1, keepdim=True), torch.cat([corner, sides], dim=1), centre).long()


class TwoViews(nn.Module):
    """Make both views of a batch on the device that holds it.

    Each image has parameters of its own, and the four colour operations an order of their own.
    Values are clipped to [0, 1] after each operation that can leave it. Both views go through each
    operation together: small images are bound by its launch.

    Args:
        first: Of the first view.
        second: Of the second.

    Raises:
        ArgumentError: If the views differ in what is no image's own: size, solarise_threshold,
            mean, std or grey.
    """

    def __init__(self, first: ViewConfig, second: ViewConfig) -> None:
        super().__init__()
        apart = [name for name in _SHARED if getattr(first, name) != getattr(second, name)]
        if apart:
            raise ArgumentError(
                f"Both views must have the same {', '.join(_SHARED)}; they differ in "
                f"{', '.join(apart)}."
            )
        self.first, self.second = first, second

    @torch.no_grad()
    def forward(self, images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return the two views, normalised float32.

        Args:
            images: uint8, or floating point in [0, 1].
            seed: Of every random number; torch's global random state is neither used nor changed.

        Shape:
            images (B, C, H, W) with C 1 or 3, results (B, C', size, size) with C' the channels of
            the config's mean: grey is repeated for a model of 3.

        Raises:
            ArgumentError: If the images do not have this form.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
            raise ArgumentError(
                f"images must be (B, C, H, W) with C 1 or 3, not {tuple(images.shape)}."
            )
        generator = torch.Generator().manual_seed(seed)
        batch, _, height, width = images.shape
        unit = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        drawn = [
            draw_parameters(config, batch, height, width, generator)
            for config in (self.first, self.second)
        ]
        with torch.autocast(images.device.type, enabled=False):
            both = apply_view(unit.repeat(2, 1, 1, 1), _joined(*drawn), self.first)
        first, second = both.chunk(2)
        return first, second

    def extra_repr(self) -> str:
        return f"{self.first},\n{self.second}"


def _joined(first: ViewParameters, second: ViewParameters) -> ViewParameters:
    """The parameters of two batches as those of one, the second behind the first."""
    names = [field.name for field in fields(ViewParameters)]
    return ViewParameters(
        **{name: torch.cat([getattr(first, name), getattr(second, name)]) for name in names}
    )


def apply_view(images: Tensor, drawn: ViewParameters, config: ViewConfig) -> Tensor:
    """Make one view of float images in [0, 1] with the parameters that were drawn.

    Shape:
        images (B, C, H, W), result (B, C', size, size).
    """
    x = image_ops.crop_and_flip(images, drawn.crop, drawn.flip, config.size)
    grey = config.grey or x.shape[1] == 1
    operations = [image_ops.brightness, image_ops.contrast, image_ops.saturation, image_ops.hue]
    for turn in drawn.order.unbind(1):
        for number, operation in enumerate(operations[:2] if grey else operations):
            rows = drawn.jitter & (turn == number)
            x = _on_rows(x, rows, operation, drawn.factors[:, number])
    if not grey:
        x = _on_rows(x, drawn.grayscale, image_ops.grayscale)
    x = _on_rows(x, drawn.blur, partial(image_ops.blur, kernel=config.blur_kernel), drawn.sigma)
    solarise = partial(image_ops.solarise, threshold=config.solarise_threshold)
    return normalise(_on_rows(x, drawn.solarise, solarise), config.mean, config.std)


def _on_rows(
    x: Tensor, rows: Tensor, operation: Callable[..., Tensor], *parameters: Tensor
) -> Tensor:
    """Apply an operation to some images of a batch in place; rows and parameters on the CPU."""
    if rows.all():
        return operation(x, *(p.to(x.device) for p in parameters))
    index = rows.nonzero().squeeze(1)
    if len(index) == 0:
        return x
    here = index.to(x.device)
    changed = operation(x[here], *(p[index].to(x.device) for p in parameters))
    return x.index_copy_(0, here, changed)


class WorkerViews:
    """Make both views of one image by torchvision, in a worker process.

    It crops from the image as it is stored, of any size, as the published recipes do.

    Args:
        first: Of the first view.
        second: Of the second.
    """

    def __init__(self, first: ViewConfig, second: ViewConfig) -> None:
        self.first, self.second = first, second
        self._transforms = tuple(_torchvision(config) for config in (first, second))

    def __call__(self, image: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return the two views, normalised float32.

        Args:
            image: uint8.
            seed: Of every random number; torch's global random state is left as it was.

        Shape:
            image (C, H, W) with C 1 or 3, results (C', size, size).
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first, second = (
                normalise(transform(image), config.mean, config.std)
                for transform, config in zip(
                    self._transforms, (self.first, self.second), strict=True
                )
            )
        return first, second


def _torchvision(config: ViewConfig) -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import InterpolationMode, v2

    def applied(probability: float, *operations: Any) -> list[Any]:
        return [v2.RandomApply(list(operations), p=probability)] if probability else []

    on_colour = (0.0, 0.0) if config.grey else (config.saturation, config.hue)
    jitter = v2.ColorJitter(config.brightness, config.contrast, *on_colour)
    kernel, threshold = config.blur_kernel, math.ceil(255 * config.solarise_threshold)
    transform: Callable[[Tensor], Tensor] = v2.Compose(
        [
            v2.RandomResizedCrop(
                config.size,
                scale=config.crop_area,
                ratio=config.crop_ratio,
                interpolation=InterpolationMode.BICUBIC,
                antialias=True,
            ),
            v2.RandomHorizontalFlip(config.flip),
            *applied(config.jitter, jitter),
            *applied(0.0 if config.grey else config.grayscale, v2.Grayscale(len(config.mean))),
            *applied(config.blur, v2.GaussianBlur(kernel, config.blur_sigma)),
            *applied(config.solarise, v2.RandomSolarize(threshold, p=1.0)),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    return transform
