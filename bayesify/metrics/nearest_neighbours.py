"""Weighted nearest neighbours on frozen features: what they are worth, without training."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ArgumentError


@torch.no_grad()
def knn_scores(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> Tensor:
    """Return the vote of the k nearest training features for each class.

    ``score[c] = sum over the k nearest i of exp(cos(x, x_i) / temperature) [y_i = c]``, divided by
    its sum over the classes.

    Args:
        train_x: Features to look among.
        train_y: Their classes.
        test_x: Features to classify.
        num_classes: Number of classes.
        k: Neighbours; 20 and 200 are usual.
        temperature: 0.07 in the reference, 0.1 in lightly's benchmarks.
        chunk: Test features compared at a time, for memory.

    Shape:
        train_x (N, D), train_y (N,), test_x (M, D), result (M, num_classes) of float32.

    Raises:
        ArgumentError: If ``k``, ``temperature`` or a shape cannot work, or a feature is not finite.

    Reference:
        Wu, Xiong, Yu, Lin 2018, arXiv 1805.01978, section 3.4.
    """
    if train_x.ndim != 2 or test_x.shape[1:] != train_x.shape[1:] or len(train_x) != len(train_y):
        raise ArgumentError(
            "Expected train_x (N, D), train_y (N,) and test_x (M, D), not "
            f"{tuple(train_x.shape)}, {tuple(train_y.shape)} and {tuple(test_x.shape)}."
        )
    if not 1 <= k <= len(train_x) or temperature <= 0:
        raise ArgumentError(
            f"k must be from 1 to the {len(train_x)} training features and temperature above 0, "
            f"not {k} and {temperature}."
        )
    bank, queries = (functional.normalize(x.float(), dim=1) for x in (train_x, test_x))
    if not (bank.isfinite().all() and queries.isfinite().all()):
        raise ArgumentError("A feature is NaN or infinite: the encoder diverged.")
    scores = torch.zeros(len(queries), num_classes, device=queries.device)
    for part, out in zip(queries.split(chunk), scores.split(chunk), strict=True):
        near, index = (part @ bank.T).topk(k)
        # From the nearest on, so that a low temperature cannot overflow.
        weights = ((near - near[:, :1]) / temperature).exp()
        out.scatter_add_(1, train_y[index], weights)
    return scores / scores.sum(dim=1, keepdim=True)


def knn_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> float:
    """Return the share of test features, in [0, 1], whose class :func:`knn_scores` puts first."""
    classes = int(train_y.max()) + 1
    scores = knn_scores(
        train_x,
        train_y,
        test_x,
        num_classes=classes,
        k=k,
        temperature=temperature,
        chunk=chunk,
    )
    return (scores.argmax(dim=1) == test_y).float().mean().item()
