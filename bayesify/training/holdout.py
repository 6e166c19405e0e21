"""Held-out training examples: how a model does on them, and its best state so far."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..inference import Given, Predictor
from ..posterior import is_bayesian
from ..scope import one_draw
from ..seeds import fold
from .batches import Loss, pair

DRAWS = 10


def held_out_loss(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    device: torch.device,
    amp: bool,
    seed: int,
) -> float:
    """Mean loss per example, in ``eval()``, over the same draws whenever it is asked.

    Of ``F.cross_entropy`` it is the negative log likelihood of the average of the draws'
    probabilities, which is what is predicted; of any other loss the average of the draws' losses.
    """
    bayesian = is_bayesian(model)
    model.eval()
    if bayesian:
        predictor = Predictor(model, num_samples=DRAWS, seed=seed, reduce="probabilities")
    total, count = 0.0, 0
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
        for inputs, targets in map(pair, batches):
            inputs, targets = inputs.to(device), targets.to(device)
            if not bayesian:
                value = loss(model(inputs), targets)
            elif loss is F.cross_entropy:
                drawn = predictor(inputs)
                tiny = torch.finfo(drawn.mean.dtype).tiny
                value = F.nll_loss(drawn.mean.clamp_min(tiny).log(), targets)
            else:
                losses, given = [], Given((inputs,))
                for k in range(DRAWS):
                    with one_draw(model, seed=fold(seed, k)):
                        losses.append(loss(given.call(model), targets))
                value = torch.stack(losses).mean()
            total += float(value) * len(inputs)
            count += len(inputs)
    found = total / count
    return found if math.isfinite(found) else math.inf


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, tied ones once."""
    named = [*nn.Module.named_parameters(model), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def put_back(model: nn.Module, kept: dict[str, Tensor]) -> None:
    """Give parameters and buffers the values of a :func:`snapshot`."""
    named = dict([*nn.Module.named_parameters(model), *model.named_buffers()])
    with torch.no_grad():
        for name, value in kept.items():
            named[name].copy_(value)
