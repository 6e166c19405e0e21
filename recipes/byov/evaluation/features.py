"""Features at the posterior means and how good their nearest neighbours are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bayesify import recompute_batchnorm_
from bayesify.data import InMemory
from bayesify.metrics import knn_accuracy

from ..config import BYOVConfig
from ..data.batches import eval_batches, train_views
from ..data.dataset import Source
from ..data.sources import Images
from ..data.training import configs_of
from ..data.views import TwoViews
from ..model import Student

Split = Literal["train", "test"]
_BATCH = 256
_BATCHNORM_IMAGES = 200 * _BATCH


def features_of(model: nn.Module, images: Tensor) -> Tensor:
    """What the encoder makes of images, before any classifier: (B, d)."""
    encoder: Any = model.encoder if isinstance(model, Student) else model
    found: Tensor = encoder.forward_head(encoder.forward_features(images), pre_logits=True)
    return found


@dataclass(frozen=True)
class Reading:
    """How images are read and encoded: on which device, in bfloat16 or not, by how many workers."""

    device: torch.device
    amp: bool = False
    workers: int = 0


@torch.no_grad()
def features(
    model: nn.Module, source: Source, split: Split, reading: Reading
) -> tuple[Tensor, Tensor]:
    """Features of a split at the posterior means, on the CPU, with their labels.

    Returns:
        (N, d) float32 and (N,) int64.
    """

    def encode(images: Tensor) -> Tensor:
        with torch.autocast(reading.device.type, torch.bfloat16, enabled=reading.amp):
            return features_of(model, images)

    training = model.training
    model.eval()
    try:
        return encoded(encode, source, split, reading)
    finally:
        model.train(training)


def encoded(
    encode: Callable[[Tensor], Tensor], source: Source, split: Split, reading: Reading
) -> tuple[Tensor, Tensor]:
    """``encode`` of every image of a split, float32 on the CPU, with the labels."""
    rows, labels = [], []
    for images, targets in _batches(source, split, reading):
        rows.append(encode(images).float().cpu())
        labels.append(torch.zeros(len(images)) if targets is None else targets.cpu())
    return torch.cat(rows), torch.cat(labels)


def subsample(source: Source, most: int) -> Source:
    """The same with at most ``most`` training images, spread over all of them."""
    count = source.num_images
    if count <= most:
        return source
    rows = torch.arange(most) * count // most
    if isinstance(source.train, InMemory):
        here = rows.to(source.train.images.device)
        kept: Any = InMemory(source.train.images[here], source.train.labels[here])
    else:
        kept = Rows(source.train, rows.tolist())
    return replace(source, train=kept)


@dataclass(frozen=True)
class Rows:
    """Some of many images."""

    images: Images
    rows: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> tuple[Tensor, int]:
        return self.images.read(self.rows[index])


def monitor_knn(x: Tensor, y: Tensor, queries: int) -> float:
    """kNN accuracy inside the training images: every k-th is a query, the others are the bank."""
    is_query = torch.zeros(len(x), dtype=torch.bool)
    is_query[:: max(2, len(x) // queries)] = True
    return knn_accuracy(x[~is_query], y[~is_query], x[is_query], y[is_query])


def refresh_batchnorm_(
    model: nn.Module, config: BYOVConfig, source: Source, reading: Reading
) -> None:
    """Gather BatchNorm's statistics of the encoder at the means: those of training saw draws.

    They are those of the views that the encoder is trained on, as BYOL's are, from an epoch of
    their own. The device makes the views, whoever made those of training.
    """
    few = subsample(source, _BATCHNORM_IMAGES)
    batches = train_views(
        few, batch_size=min(_BATCH, few.num_images), seed=config.seed, epoch=config.epochs,
        views=TwoViews(*configs_of(config, source)), device=reading.device, workers=reading.workers,
    )  # fmt: skip
    if isinstance(model, Student):
        both = (view for batch in batches for view in (batch.first, batch.second))
        recompute_batchnorm_(model.encoder, both)
    else:
        recompute_batchnorm_(model, (batch.first for batch in batches))


def _batches(
    source: Source, split: Split, reading: Reading
) -> Iterator[tuple[Tensor, Tensor | None]]:
    return eval_batches(
        source, split, batch_size=_BATCH, device=reading.device, workers=reading.workers
    )
