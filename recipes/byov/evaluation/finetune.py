"""The whole encoder, trained further on all labels from its means."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from bayesify import fit, to_deterministic

from ..data.batches import eval_batches
from ..model import Student
from .monte_carlo import labels_of, outputs
from .protocol import EvalSettings, row_of
from .runs import Run


def finetune(run: Run, settings: EvalSettings) -> dict[str, Any]:
    """The means as a start, everything trained on all labels; images are not augmented."""
    plain: Any = to_deterministic(run.model) if run.config.bayesian else run.model
    encoder: Any = deepcopy(plain.encoder if isinstance(plain, Student) else plain)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        encoder.reset_classifier(run.source.num_classes)
        encoder.to(run.device).requires_grad_(True)
    fit(
        encoder, _Labelled(run), epochs=settings.finetune_epochs, batch_size=128,
        lr=settings.finetune_lr, seed=settings.seed, device=run.device,
    )  # fmt: skip
    probs = outputs(run, lambda images: encoder(images).double().softmax(-1))
    return {"rows": [row_of("finetuned means", probs, labels_of(run))]}


class _Labelled(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """A split with its labels, for the fit."""

    def __init__(self, run: Run) -> None:
        batches = list(eval_batches(run.source, "train", batch_size=1024, workers=run.workers))
        self.images = torch.cat([images.cpu() for images, _ in batches])
        self.labels = labels_of(run, "train")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])
