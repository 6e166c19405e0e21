"""What draws of the weights predict: one draw for all images, many draws, their moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bayesify import ArgumentError, one_draw
from bayesify.welford import Welford

from ..data.batches import eval_batches
from ..data.image_ops import normalise
from ..runtime.seeds import Stream, seed_of
from .features import Split, features_of
from .runs import Run

Change = Callable[[Tensor, int], Tensor]
"""Of pixels (B, C, H, W) in [0, 1], and the number of their batch: what a corruption does."""

_BATCH = 256


@torch.no_grad()
def outputs(
    run: Run,
    read: Callable[[Tensor], Tensor],
    split: Split = "test",
    *,
    change: Change | None = None,
    draw: int | None = None,
) -> Tensor:
    """What ``read`` makes of every image of a split, (N, ...) of float32 on the CPU.

    Args:
        run: The run.
        read: From normalised images (B, C, H, W) to (B, ...).
        split: Which images.
        change: Done to the pixels in [0, 1] before they are normalised.
        draw: Seed of the draw of the weights, the same for all images; None is the means.
    """
    source = run.source
    mean, std = (
        torch.tensor(v, device=run.device)[:, None, None] for v in (source.mean, source.std)
    )
    drawn = nullcontext() if draw is None else one_draw(run.model, draw)
    rows = []
    with drawn:
        batches = eval_batches(
            source, split, batch_size=_BATCH, device=run.device, workers=run.workers
        )
        for number, (images, _) in enumerate(batches):
            if change is not None:
                pixels = change((images * std + mean).clamp(0, 1), number)
                images = normalise(pixels, source.mean, source.std)
            rows.append(read(images).float().cpu())
    return torch.cat(rows)


def labels_of(run: Run, split: Split = "test") -> Tensor:
    """The classes of a split, (N,), on the CPU."""
    part: Any = run.source.part(split)
    if hasattr(part, "labels"):
        return torch.as_tensor(part.labels).cpu()
    samples = getattr(getattr(part, "source", None), "samples", None)
    if samples is not None:  # files, which need not be read for it
        return torch.tensor([label for _, label in samples])
    batches = eval_batches(run.source, split, batch_size=_BATCH, workers=run.workers)
    return torch.cat([y for _, y in batches if y is not None])


def classify(run: Run, head: nn.Module) -> Callable[[Tensor], Tensor]:
    """Class probabilities (B, classes) of images, by the run's features and a classifier."""

    def read(images: Tensor) -> Tensor:
        probs: Tensor = head(features_of(run.model, images).float()).double().softmax(dim=-1)
        return probs

    return read


def drawn_probs(
    run: Run,
    head: nn.Module,
    num_samples: int,
    *,
    seed: int = 0,
    split: Split = "test",
    change: Change | None = None,
) -> Iterator[Tensor]:
    """Class probabilities (N, classes) of all images by each of K draws of the encoder."""
    if num_samples < 1:
        raise ArgumentError(f"The number of draws must be 1 or more, not {num_samples}.")
    if not run.config.bayesian:
        raise ArgumentError(f"{run.folder} has no posterior to draw from: it is {run.config}.")
    for draw in range(num_samples):
        drawn = seed_of(Stream.MEASURED, seed, draw)
        yield outputs(run, classify(run, head), split, change=change, draw=drawn)


def moments(draws: Iterable[Tensor]) -> Welford:
    """Mean and spread over all draws, which are one or more."""
    draws = iter(draws)
    first = next(draws)
    found = Welford(first)
    found.add(first)
    for value in draws:
        found.add(value)
    return found
