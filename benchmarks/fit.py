"""The throughput of ``bayesify.fit``, beside that of a deterministic fine-tune of the same loader.

    python benchmarks/fit.py [--rounds 9]     3 minutes on 2 cores

Every run is an epoch of few batches over the same images in the same order, with the augmentation,
AdamW, warm-up, cosine and gradient clipping of ``fit``: by a loop as one writes it in torch, by
``bayesify.fit`` of the original model, and by ``bayesify.fit`` of the converted one. What counts is
the time from the end of the first step to that of the last, since an epoch of real data has many
steps; what a call takes beyond its steps is noted beside it. Every round makes each run once, in an
order that turns; the result is the median of the ratios of a round, with quartiles. Images and
weights are random. BatchNorm is frozen, as in the fine-tuning of ``posterior.py``: otherwise a
Bayesian fit ends with one more forward pass over the images, whatever the number of epochs. Writes
`results/fit.json` and `docs/speed.md` anew.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import speed_table
import timm
import torch
from cifar_resnet20 import resnet20
from paired import by_round, keep_memory, spread
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

import bayesify
from bayesify.data import ImageData, InMemory
from bayesify.models import input_config
from bayesify.optim import warmup_cosine
from bayesify.provenance import machine, provenance
from bayesify.storage import replacing
from bayesify.training.batches import shuffled_batches

RESULTS = Path(__file__).parent / "results"
LR = 1e-4
SEED = 0
LOOP, ORIGINAL, CONVERTED = "deterministic, loop in torch", "deterministic, fit", "Bayesian, fit"


def vit_tiny() -> nn.Module:
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], int, int, Any]] = {
    "resnet20, 32 px, batch 128": (resnet20, 128, 8, "none"),
    "resnet20, 32 px, batch 128, rand-augment": (resnet20, 128, 8, "rand-augment"),
    "vit_tiny, 224 px, batch 16": (vit_tiny, 16, 4, "none"),
}
"""Model, images in a batch, batches in the epoch, augmentation."""


def random_images(model: nn.Module, count: int) -> ImageData:
    """Images in memory of the size that the model takes, of ten classes in turn."""
    images = torch.randint(0, 256, (count, *input_config(model).size), dtype=torch.uint8)
    classes = tuple(str(i) for i in range(10))
    return ImageData("random", "train", classes, InMemory(images, torch.arange(count) % 10))


def fitted(model: nn.Module, data: ImageData, batch: int, augment: Any) -> list[float]:
    """When it starts, when each step ends, and when it ends."""
    times = [time.perf_counter()]
    bayesify.fit(
        model, data, epochs=1, batch_size=batch, lr=LR, augment=augment, freeze_batchnorm=True,
        seed=SEED, on_step=lambda _: times.append(time.perf_counter()),
    )  # fmt: skip
    return [*times, time.perf_counter()]


def looped(model: nn.Module, data: ImageData, batch: int, augment: Any) -> list[float]:
    """What ``fit`` does to a deterministic model, and nothing that it looks after beside it."""
    times = [time.perf_counter()]
    batches, _ = shuffled_batches(
        data, range(len(data)), batch_size=batch, accumulate=1, augment=augment,
        model_config=input_config(model), workers=0, seed=SEED, pin=False,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    rising = max(1, round(0.05 * len(batches)))
    schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, rising, len(batches)))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        times.append(time.perf_counter())
    model.eval()
    return [*times, time.perf_counter()]


METHODS: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[..., list[float]]]] = {
    LOOP: (lambda model: model, looped),
    ORIGINAL: (lambda model: model, fitted),
    CONVERTED: (bayesify.to_bbb_, fitted),
}


def measure(case: str, rounds: int) -> dict[str, Any]:
    """Images a second of each method, over those of the deterministic ones, and what comes once."""
    make, batch, batches, augment = CASES[case]
    runs: dict[str, Callable[[], list[float]]] = {}
    for method, (prepare, run) in METHODS.items():
        torch.manual_seed(SEED)
        model = make()
        data = random_images(model, batch * batches)
        runs[method] = functools.partial(run, prepare(model), data, batch, augment)
        runs[method]()  # the first one also traces the model
    ends = by_round(runs, rounds)
    steps = {method: [(t[-2] - t[1]) / (batches - 1) for t in ends[method]] for method in ends}
    found: dict[str, Any] = {}
    for method, own in steps.items():
        once = [t[-1] - t[0] - batches * s for t, s in zip(ends[method], own, strict=True)]
        found[method] = {
            "images_per_second": spread([batch / s for s in own]), "once_seconds": spread(once),
        }  # fmt: skip
        for name, base in (("over_loop", LOOP), ("over_fit", ORIGINAL)):
            shares = [b / s for b, s in zip(steps[base], own, strict=True)]
            found[method][name] = spread(shares)
    return found


def main() -> None:
    keep_memory()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=CASES, help="only this one; nothing is written")
    options = parser.parse_args()
    results = {}
    for case in [options.only] if options.only else CASES:
        results[case] = measure(case, options.rounds)
        for method, row in results[case].items():
            said = [f"{n} {s['median']:.3f}" for n, s in row.items()]
            print(f"{case:42}{method:30}", ", ".join(said), flush=True)
    if options.only:
        return
    record = {
        "command": f"benchmarks/fit.py --rounds {options.rounds}",
        "rounds": options.rounds, "seed": SEED, "threads": torch.get_num_threads(),
        "machine": machine(), **provenance("torch", "torchvision", "timm"),
        "cases": results,
    }  # fmt: skip
    with replacing(RESULTS / "fit.json", overwrite=True) as path:
        path.write_text(json.dumps(record, indent=1) + "\n")
    speed_table.write()


if __name__ == "__main__":
    main()
