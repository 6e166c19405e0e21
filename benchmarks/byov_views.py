"""Both views of BYOL for a batch: the recipe on the device, torchvision in workers, and kornia.

    PYTHONPATH=. python benchmarks/byov_views.py [--device cuda] [--workers 0] [--rounds 9]
        1 minute on 2 cores

Images of 32 pixels become views of 32, images of 224 views of 224, with the published probabilities
of CIFAR-10 and ImageNet. Each way makes the views of the same images once a round, and its time is
divided by that of the recipe's `TwoViews` in the same round: medians and quartiles. Kornia takes
part where it is installed; it uses the global generator and has one order of the colour operations
for a batch. Writes `results/byov_views.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from paired import paired
from torch import Tensor

from bayesify.data import InMemory
from bayesify.provenance import machine, provenance
from bayesify.storage import replacing
from recipes.byov.data.batches import train_views
from recipes.byov.data.dataset import Source
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


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    cases = []
    for size, batch, configs in ((32, 128, CIFAR_VIEWS), (224, 32, IMAGENET_VIEWS)):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)
        runs = ways(images.to(options.device), configs, options.workers)
        for run in runs.values():
            run()  # whatever is done at the first call
        found = paired(runs, "TwoViews", options.rounds, options.device)
        cases.append({"size": size, "batch": batch, "ways": found})
        for name, row in found.items():
            print(
                f"{size:4} px  {name:24} {row['median']:6.2f} ({row['low']:.2f} to "
                f"{row['high']:.2f})  {batch / row['seconds']:8.0f} images/s"
            )
    result = {
        **provenance("torch", "torchvision", *(["kornia"] if find_spec("kornia") else [])),
        "machine": machine(options.device),
        "command": f"benchmarks/byov_views.py --device {options.device} --workers "
        f"{options.workers} --rounds {options.rounds}",
        "cases": cases,
    }
    with replacing(RESULT, overwrite=True) as path:
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
