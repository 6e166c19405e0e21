"""Linear classifiers on frozen features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ArgumentError


@dataclass(frozen=True)
class ProbeResult:
    """A linear classifier trained on frozen features.

    Args:
        classifier: Of the features as they are.
        accuracy: Share of test features, in [0, 1], that it classifies right.
        top5: Share whose class is among its first five.
        lr: The learning rate that the held-out features chose.
        held_out: Their accuracy by learning rate.
    """

    classifier: nn.Linear
    accuracy: float
    top5: float
    lr: float
    held_out: dict[float, float]


def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    num_classes: int,
    epochs: int = 80,
    batch_size: int = 1024,
    learning_rates: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 1.0),
    held_out: float = 0.1,
    seed: int = 0,
) -> ProbeResult:
    """Train a linear classifier on frozen features, with a learning rate that no test image chose.

    A part of the training features is held out to choose the learning rate; then all of them are
    trained on. Nesterov SGD with momentum 0.9, cosine to 0, no weight decay, a fixed number of
    epochs. Each dimension is standardised by the training features; the classifier that is returned
    takes features as they are.

    Args:
        train_x: Features to train on.
        train_y: Their classes.
        test_x: Features to measure on; nothing is chosen by them.
        test_y: Their classes.
        num_classes: Number of classes.
        epochs: Passes over the features.
        batch_size: Features in a step.
        learning_rates: To choose among, each for 256 features in a batch.
        held_out: Share of the training features that chooses, in (0, 1).
        seed: Of the orders and of what is held out; torch's global random state is not used.

    Shape:
        train_x (N, D), train_y (N,), test_x (M, D), test_y (M,).

    Raises:
        ArgumentError: If a value cannot work or a feature is not finite.

    Reference:
        Grill et al. 2020, arXiv 2006.07733, appendix D.1.
    """
    count = round(len(train_x) * held_out)
    if not (0 < held_out < 1 and 0 < count < len(train_x) and epochs > 0 and batch_size > 0):
        raise ArgumentError(
            f"held_out = {held_out} of {len(train_x)} features must leave some on either side, and "
            f"epochs and batch_size be above 0, not {epochs} and {batch_size}."
        )
    if not learning_rates or min(learning_rates) <= 0:
        raise ArgumentError(f"learning_rates must be above 0, not {list(learning_rates)}.")
    if not (train_x.isfinite().all() and test_x.isfinite().all()):
        raise ArgumentError("A feature is NaN or infinite: the encoder diverged.")
    train_x, test_x = train_x.detach().float(), test_x.detach().float()
    mean, std = train_x.mean(dim=0), train_x.std(dim=0)
    std = torch.where(std == 0, 1.0, std)
    x = (train_x - mean) / std
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator).to(x.device)
    chosen, rest = order[:count], order[count:]

    def fit(rows: Tensor, rates: Sequence[float]) -> list[nn.Linear]:
        return _train(x[rows], train_y[rows], num_classes, rates, epochs, batch_size, generator)

    with torch.no_grad():
        accuracies = {
            rate: _share_right(classifier(x[chosen]), train_y[chosen], 1)
            for rate, classifier in zip(learning_rates, fit(rest, learning_rates), strict=True)
        }
        best = max(accuracies, key=accuracies.__getitem__)
        [classifier] = fit(order, [best])
        classifier.weight.div_(std)
        classifier.bias.sub_(classifier.weight @ mean)
        logits = classifier(test_x)
    return ProbeResult(
        classifier,
        accuracy=_share_right(logits, test_y, 1),
        top5=_share_right(logits, test_y, min(5, num_classes)),
        lr=best,
        held_out=accuracies,
    )


def _zeros(features: int, num_classes: int, device: torch.device | str) -> nn.Linear:
    """A linear layer of zeros; nothing is drawn from the global generator."""
    linear: nn.Linear = nn.utils.skip_init(nn.Linear, features, num_classes, device=device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _share_right(logits: Tensor, labels: Tensor, first: int) -> float:
    right = (logits.topk(first).indices == labels[:, None]).any(dim=1)
    return right.float().mean().item()


@torch.enable_grad()
def _train(
    x: Tensor,
    y: Tensor,
    num_classes: int,
    rates: Sequence[float],
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
) -> list[nn.Linear]:
    """One classifier for each learning rate, all on the same batches."""
    classifiers = [_zeros(x.shape[1], num_classes, x.device) for _ in rates]
    scale = min(batch_size, len(x)) / 256
    optimizer = torch.optim.SGD(
        [
            {"params": list(classifier.parameters()), "lr": rate * scale}
            for classifier, rate in zip(classifiers, rates, strict=True)
        ],
        momentum=0.9,
        nesterov=True,
    )
    steps = epochs * math.ceil(len(x) / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for rows in order.split(batch_size):
            batch, labels = x[rows], y[rows]
            losses = [functional.cross_entropy(c(batch), labels) for c in classifiers]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()  # each reaches its own classifier alone
            optimizer.step()
            schedule.step()
    return classifiers
