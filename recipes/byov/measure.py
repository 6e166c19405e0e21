"""Features at the posterior means and how good their nearest neighbours are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bayesify import recompute_batchnorm_

from .data import Source, eval_batches
from .knn import knn_accuracy
from .model import Student

Split = Literal["train", "test"]
_BATCH = 256
_BATCHNORM_BATCHES = 200


def features_of(model: nn.Module, images: Tensor) -> Tensor:
    """What the encoder makes of images, before any classifier: (B, d)."""
    encoder: Any = model.encoder if isinstance(model, Student) else model
    found: Tensor = encoder.forward_head(encoder.forward_features(images), pre_logits=True)
    return found


@torch.no_grad()
def features(
    model: nn.Module, source: Source, split: Split, device: torch.device, *, amp: bool = False
) -> tuple[Tensor, Tensor]:
    """Features of a split at the posterior means, on the CPU, with their labels.

    Returns:
        (N, d) float32 and (N,) int64.
    """

    def encode(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            return features_of(model, images)

    training = model.training
    model.eval()
    try:
        return encoded(encode, source, split, device)
    finally:
        model.train(training)


def encoded(
    encode: Callable[[Tensor], Tensor], source: Source, split: Split, device: torch.device
) -> tuple[Tensor, Tensor]:
    """``encode`` of every image of a split, float32 on the CPU, with the labels."""
    rows, labels = [], []
    for images, targets in eval_batches(source, split, batch_size=_BATCH, device=device):
        rows.append(encode(images).float().cpu())
        labels.append(torch.zeros(len(images)) if targets is None else targets.cpu())
    return torch.cat(rows), torch.cat(labels)


def monitor_knn(x: Tensor, y: Tensor, queries: int) -> float:
    """kNN accuracy inside the training images: every k-th is a query, the others are the bank."""
    is_query = torch.zeros(len(x), dtype=torch.bool)
    is_query[:: max(2, len(x) // queries)] = True
    return knn_accuracy(x[~is_query], y[~is_query], x[is_query], y[is_query])


def refresh_batchnorm_(model: nn.Module, source: Source, device: torch.device) -> None:
    """Gather BatchNorm's statistics of the encoder at the means: those of training saw draws."""

    def batches() -> Iterator[Tensor]:
        for count, (images, _) in enumerate(
            eval_batches(source, "train", batch_size=_BATCH, device=device)
        ):
            if count == _BATCHNORM_BATCHES:
                return
            yield images

    encoder = model.encoder if isinstance(model, Student) else model
    recompute_batchnorm_(encoder, batches())
