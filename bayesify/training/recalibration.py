"""One number on held-out data: how wide a likelihood's predictions should be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..errors import ArgumentError
from ..inference import Given, Predictor
from ..inference.running import evaluating
from ..likelihoods import Heads, Likelihood, likelihood_of, picked
from ..models import InputConfig
from ..numeric import count, seed_number
from ..posterior import is_bayesian
from .batches import Data, batches_in_order, check_data, config_for, device_of
from .examples import Inputs, moved, read_batch
from .matching import by_name

_WIDEST = math.log(100.0)


def recalibrate_(
    model: nn.Module,
    data: Data | DataLoader[Any],
    *,
    num_samples: int = 20,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    model_config: InputConfig | None = None,
    workers: int = 0,
    inputs: Inputs | None = None,
) -> float | dict[Any, float]:
    r"""Fit the one scale of a model's likelihood to held-out data, and keep their scores.

    Of :class:`Categorical` and :class:`Bernoulli` it is the temperature T that divides the logits
    of **each draw**, before the probabilities are averaged; of :class:`Gaussian` the factor on the
    noise of each draw. It is the one of the least negative log likelihood of the mixture of the
    draws, from 1/100 to 100. The posterior stays as it is. ``predict``, ``evaluate``, ``ensemble``
    and the file apply it.

    The scores of the same data, ``|y - mean| / std`` or one less the probability of what was
    observed, are what ``predictive.conformal(level)`` makes sets and intervals of, which hold a new
    target with at least that probability if it and the data are exchangeable.

    Args:
        model: Converted or not, with a likelihood.
        data: As in :func:`fit`: examples that the model was **not** trained on.
        num_samples: Draws K of the mixture.
        seed: Of the draws.
        batch_size: Examples in a batch. The outputs of all draws are kept.
        device: Where the model is moved to; None leaves it where it is.
        model_config: As in :func:`fit`.
        workers: Processes that read the data.
        inputs: As in :func:`fit`.

    Returns:
        The number; of several heads those by name.

    Raises:
        ArgumentError: The model has no likelihood or one without a scale, or ``data`` have no
            target.

    Reference:
        Guo, Pleiss, Sun, Weinberger 2017, arXiv:1706.04599, section 4.2 (the temperature); Vovk,
        Gammerman, Shafer 2005, Algorithmic Learning in a Random World (conformal prediction).

    >>> import torch, bayesify
    >>> from bayesify.likelihoods import Gaussian
    >>> model = bayesify.set_likelihood_(torch.nn.Linear(2, 1), Gaussian(1.0))
    >>> x = torch.randn(400, 2)
    >>> held_out = torch.utils.data.TensorDataset(x, model(x).detach() + 3 * torch.randn(400, 1))
    >>> 2.5 < bayesify.recalibrate_(model, held_out) < 3.5
    True
    """
    likelihood = likelihood_of(model)
    if likelihood is None:
        raise ArgumentError(
            "recalibrate_ needs a likelihood: bayesify.set_likelihood_(model, Categorical()), say."
        )
    num_samples, seed = count("num_samples", num_samples), seed_number(seed)
    target = device_of(model) if device is None else torch.device(device)
    model.to(target)
    likelihood.to(target)
    if not isinstance(data, DataLoader):
        check_data(data)
        data = by_name(data, model)
        data = batches_in_order(
            data, batch_size=batch_size, model_config=config_for(data, model, model_config),
            workers=workers,
        )  # fmt: skip
    heads: dict[Any, Likelihood] = (
        dict(likelihood.items()) if isinstance(likelihood, Heads) else {None: likelihood}
    )
    for head in heads.values():
        _ = head.scale_name
    kept = list(_outputs(model, data, num_samples, seed, target, inputs))
    found: dict[Any, float] = {}
    for name, head in heads.items():
        pairs = kept
        if name is not None:
            pairs = [
                ([picked(f, name, "output") for f in drawn], picked(y, name, "target"))
                for drawn, y in kept
            ]
        found[name] = _fit(head, pairs)
    return found if isinstance(likelihood, Heads) else found[None]


def _outputs(
    model: nn.Module,
    batches: DataLoader[Any],
    num_samples: int,
    seed: int,
    device: torch.device,
    inputs: Inputs | None,
) -> Iterator[tuple[list[Any], Any]]:
    """The outputs of all draws and the targets, batch by batch."""
    predictor = None
    if is_bayesian(model):
        predictor = Predictor(model, num_samples=num_samples, seed=seed)
    for batch in batches:
        read = read_batch(batch, inputs)
        args, kwargs = read.arguments(device)
        targets = moved(read.targets, device)
        with torch.no_grad(), evaluating(model):
            if predictor is None:
                yield [Given(args, kwargs).call(model)], targets
                continue
            drawn = list(predictor.draws.outputs(args, kwargs))
        yield drawn, targets


def _fit(likelihood: Likelihood, pairs: list[tuple[list[Any], Any]]) -> float:
    """Set the scale of the least negative log likelihood, and the scores."""
    name = likelihood.scale_name
    before = getattr(likelihood, name)
    with torch.no_grad():
        for drawn, y in pairs:
            likelihood.check(drawn[0], y)
        if sum(int(likelihood.counts(y).sum()) for _, y in pairs) == 0:
            raise ArgumentError("recalibrate_: the data have no target, or all are masked.")

        def loss(exponent: float) -> float:
            setattr(likelihood, name, math.exp(exponent))
            found = [likelihood.predictive(drawn).log_prob(y) for drawn, y in pairs]
            return -sum(float(f.double().sum()) for f in found)

        try:
            best = _least(loss)
        except BaseException:
            setattr(likelihood, name, before)
            raise
        setattr(likelihood, name, math.exp(best))
        scores = [likelihood.scores_of(likelihood.predictive(drawn), y) for drawn, y in pairs]
        likelihood.scores = torch.cat(scores).float().sort().values
    return math.exp(best)


def _least(loss: Callable[[float], float]) -> float:
    """Where a function with one valley is least, by golden sections of what a grid has found."""
    grid = torch.linspace(-_WIDEST, _WIDEST, 25).tolist()
    values = [loss(x) for x in grid]
    at = values.index(min(values))
    low, high = grid[max(0, at - 1)], grid[min(len(grid) - 1, at + 1)]
    ratio = (math.sqrt(5.0) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    of_a, of_b = loss(a), loss(b)
    while high - low > 1e-4:
        if of_a < of_b:
            high, b, of_b = b, a, of_a
            a = high - ratio * (high - low)
            of_a = loss(a)
        else:
            low, a, of_a = a, b, of_b
            b = low + ratio * (high - low)
            of_b = loss(b)
    middle: float = (low + high) / 2
    return middle
