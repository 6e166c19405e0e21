"""Biases that no loss sees, so that the KL alone moves their posterior."""

from __future__ import annotations

import itertools
from collections.abc import Collection

from torch import nn

from .torch_private import BatchNormBase, ConvBase

_LISTED = 3


def before_batchnorm(model: nn.Module) -> list[str]:
    """The biases that a BatchNorm takes off again in training, by their qualified names.

    They belong to a Linear layer or convolution with a BatchNorm of as many channels defined right
    after it. What a forward does between the two is not looked at.

    >>> before_batchnorm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    ['0.bias']
    """
    found = []
    for path, module in model.named_modules(remove_duplicate=False):
        for (name, layer), (_, norm) in itertools.pairwise(module._modules.items()):
            outputs = getattr(layer, "out_features", getattr(layer, "out_channels", None))
            if (
                isinstance(layer, nn.Linear | ConvBase)
                and isinstance(norm, BatchNormBase)
                and norm.num_features == outputs
                and layer._parameters.get("bias") is not None
            ):
                found.append(f"{path}.{name}.bias".removeprefix("."))
    return found


def hints(model: nn.Module, bayesian: Collection[str]) -> tuple[str, ...]:
    """What to tell of such biases among the parameters that get a posterior; nothing of none."""
    unseen = [name for name in before_batchnorm(model) if name in bayesian]
    if not unseen:
        return ()
    more = f" and {len(unseen) - _LISTED} more" if len(unseen) > _LISTED else ""
    return (
        "Right before a BatchNorm, which takes a bias off again in training: "
        f"{', '.join(unseen[:_LISTED])}{more}. No loss depends on such a bias: the KL alone moves "
        "its posterior, to the prior, and its draws shift predictions. Leave it out by skipping "
        "@before-batchnorm.",
    )
