"""Held-out training examples: how a model does on them, and its best state so far."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..inference import Given, Predictor
from ..likelihoods import Likelihood, likelihood_of
from ..posterior import is_bayesian
from ..scope import one_draw
from ..seeds import fold
from ..storage.layout import LIKELIHOOD
from .batches import Loss
from .examples import Inputs, moved, read_batch

DRAWS = 10


def held_out_loss(
    model: nn.Module,
    batches: Iterable[Any],
    measure: Likelihood | Loss,
    device: torch.device,
    amp: bool,
    seed: int,
    inputs: Inputs | None = None,
) -> float:
    """Mean loss, in ``eval()``, over the same draws whenever it is asked.

    By a likelihood it is the negative log density of a target, in the mixture of the draws, which
    is what is predicted; of any other loss, per example, the average of the draws' losses.
    """
    bayesian = is_bayesian(model)
    model.eval()
    predictor = None
    if bayesian and isinstance(measure, Likelihood):
        predictor = Predictor(
            model, num_samples=DRAWS, seed=seed, reduce="predictive", likelihood=measure
        )
    total, count = 0.0, 0
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
        for batch in batches:
            read = read_batch(batch, inputs)
            args, kwargs = read.arguments(device)
            targets = moved(read.targets, device)
            if isinstance(measure, Likelihood):
                found = (
                    measure.predictive([model(*args, **kwargs)]) if predictor is None
                    else predictor(*args, **kwargs)
                )  # fmt: skip
                total -= float(found.log_prob(targets).double().sum())
                count += int(measure.counts(read.targets).sum())
                continue
            losses, given = [], Given(args, kwargs)
            for k in range(DRAWS if bayesian else 1):
                with one_draw(model, seed=fold(seed, k)) if bayesian else nullcontext():
                    losses.append(measure(given.call(model), targets))
            total += float(torch.stack(losses).mean()) * read.size
            count += read.size
    if count == 0:
        raise ArgumentError(
            "Every held-out target is masked, so that none can tell how good a fit is."
        )
    found_loss = total / count
    return found_loss if math.isfinite(found_loss) else math.inf


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of a model and of its likelihood, tied ones once."""
    named = dict([*nn.Module.named_parameters(model), *model.named_buffers()])
    return named | {LIKELIHOOD + name: tensor for name, tensor in likelihood_tensors(model).items()}


def likelihood_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the likelihood of a model."""
    likelihood = likelihood_of(model)
    return {} if likelihood is None else dict(likelihood.state_dict(keep_vars=True))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, tied ones once."""
    return {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}


def put_back(model: nn.Module, kept: dict[str, Tensor]) -> None:
    """Give parameters and buffers the values of a :func:`snapshot`."""
    named = named_tensors(model)
    with torch.no_grad():
        for name, value in kept.items():
            named[name].copy_(value)
