"""Both views of BYOL for a batch: the recipe on the device, torchvision in workers, and kornia.

    python benchmarks/byov_views.py [--device cuda] [--workers 0] [--size 32] [--batch 256]
        [--rounds 10] [--out FILE]

Images of `--size` pixels become views of 32 pixels if they have 32, else of 224, with the published
probabilities. Each way makes the views of the same number of images once a round, and its time is
divided by that of the recipe's `TwoViews` in the same round. Kornia takes part where it is
installed; it uses the global generator and has one order of the colour operations for a batch.
Writes `results/byov_views.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from provenance import machine, provenance
from torch import Tensor

from bayesify.data import InMemory
from bayesify.storage import replacing
from recipes.byov.data.batches import Source, train_views
from recipes.byov.data.views import CIFAR_VIEWS, IMAGENET_VIEWS, TwoViews, ViewConfig, WorkerViews

RESULT = Path(__file__).parent / "results" / "byov_views.json"


def kornia_view(config: ViewConfig) -> Callable[[Tensor], Tensor]:
    """One view by kornia, as its documentation builds it."""
    import kornia.augmentation as K

    threshold = config.solarise_threshold
    jitter = (config.brightness, config.contrast, config.saturation, config.hue)
    operations = [
        K.RandomResizedCrop(
            (config.size, config.size),
            scale=config.crop_area,
            ratio=config.crop_ratio,
            resample="BICUBIC",
            cropping_mode="resample",
        ),
        K.RandomHorizontalFlip(config.flip),
        K.ColorJitter(*jitter, p=config.jitter),
        K.RandomGrayscale(p=config.grayscale),
    ]
    if config.blur:
        kernel = (config.blur_kernel, config.blur_kernel)
        operations.append(K.RandomGaussianBlur(kernel, config.blur_sigma, p=config.blur))
    if config.solarise:
        both = (threshold, threshold)
        operations.append(K.RandomSolarize(both, (0.0, 0.0), p=config.solarise))
    mean, std = torch.tensor(config.mean), torch.tensor(config.std)
    view: Callable[[Tensor], Tensor] = K.AugmentationSequential(
        *operations, K.Normalize(mean, std), same_on_batch=False
    )
    return view


def ways(
    images: Tensor, configs: tuple[ViewConfig, ViewConfig], workers: int
) -> dict[str, Callable[[], Any]]:
    """What each way does in a round."""
    batch, device, size = len(images), images.device, images.shape[-1]
    two, worker = TwoViews(*configs), WorkerViews(*configs)
    stored = InMemory(images.cpu(), torch.full((batch,), -1))
    mean, std = configs[0].mean, configs[0].std
    source = Source("noise", stored, None, (), size, 3, mean, std)

    def by_workers() -> None:
        options: dict[str, Any] = {"batch_size": batch, "seed": 0, "epoch": 0, "views": worker}
        for _ in train_views(source, workers=workers, device=device, **options):
            pass

    found: dict[str, Callable[[], Any]] = {
        "TwoViews": lambda: two(images, 0),
        f"torchvision, {workers} workers": by_workers,
    }
    if find_spec("kornia"):
        first, second = map(kornia_view, configs)
        found["kornia"] = lambda: (first(images.float() / 255), second(images.float() / 255))
    return found


def seconds(way: Callable[[], Any], device: torch.device) -> float:
    """Time of one round, to the end of what the device was given."""
    start = time.perf_counter()
    way()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    device: torch.device = options.device

    side = (options.batch, 3, options.size, options.size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, side, dtype=torch.uint8, generator=generator).to(device)
    configs = CIFAR_VIEWS if options.size == 32 else IMAGENET_VIEWS
    methods = ways(images, configs, options.workers)
    for way in methods.values():
        seconds(way, device)  # whatever is done at the first call
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(options.rounds):
        for name, way in methods.items():
            times[name].append(seconds(way, device))

    rows = {}
    for name, own in times.items():
        ratios = [t / base for t, base in zip(own, times["TwoViews"], strict=True)]
        rows[name] = {
            "images_per_second": round(options.batch / statistics.median(own)),
            "time_over_two_views": round(statistics.median(ratios), 2),
        }
        print(f"{name:24} {rows[name]}")
    packages = ["torch", "torchvision", *(["kornia"] if find_spec("kornia") else [])]
    setting = {name: str(value) for name, value in vars(options).items() if name != "out"}
    setting["threads"] = str(torch.get_num_threads())
    result = {**provenance(*packages), "machine": machine(), "setting": setting, "ways": rows}
    with replacing(options.out, overwrite=True) as path:
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
