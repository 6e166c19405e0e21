"""Predict with many draws of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from ..errors import ArgumentError
from ..likelihoods import Likelihood, as_likelihood, likelihood_of, temperature_of
from ..scope import as_seed
from ..unconverted import warn_of_unconverted
from .running import Draws, check_batch, check_samples, evaluating
from .summaries import Collector, Mixed, Probabilities, RunningMoments, Stack

Reduce = Literal["probabilities", "moments", "predictive"]


def predict(
    model: nn.Module,
    *inputs: Any,
    num_samples: int,
    seed: int | None = None,
    reduce: Reduce | None = None,
    **kwargs: Any,
) -> Any:
    """Run ``model`` with ``num_samples`` draws of its weights.

    The model runs in ``eval()`` mode, whatever its present one, which it has again afterwards:
    dropout is off, BatchNorm uses its running statistics. No gradient is recorded. Where several
    draws at once are faster (small networks or CUDA, small batches, no hooks), the model is called
    once for all of them, which agrees with a loop of ``one_draw`` within rounding.

    With the estimators ``local`` and ``flipout`` each example of a batch has weights of its own in
    each of the K draws: the answers for one example are distributed as with ``weight``, or nearly
    so with ``local`` where a layer sees several positions; those for two examples do not vary
    together.

    Args:
        model: A converted model, or a module that holds one.
        *inputs: Positional arguments of the model.
        num_samples: Number K of draws, at least 1.
        seed: The K draws are a function of it: calls with one seed use the same K weights for
            every batch, those of an estimator by the place in the batch. None takes a new one
            from torch's global generator.
        reduce: None stacks the outputs. ``"probabilities"`` takes them for logits, divided by the
            temperature of the model's likelihood if it has one, and gives a
            :class:`ProbabilitySummary`, ``"moments"`` gives :class:`Moments`; both in the memory
            of a few outputs, however many draws. ``"predictive"`` gives what the likelihood of the
            model makes of them, a :class:`bayesify.likelihoods.Predictive`: mean, the parts of the
            standard deviation, intervals, densities.
        **kwargs: Keyword arguments of the model.

    Shape:
        Each output tensor (batch, ...) becomes (K, batch, ...); the logits are (batch, classes).

    Returns:
        What the model returns (tensor, tuple, dict, Hugging Face output), each tensor in it
        stacked over the draws, or a summary. A cache of keys and values in it is None, as
        with ``use_cache=False`` of transformers: it belongs to one draw.

    Raises:
        ArgumentError: An argument has a value that cannot work, the batch is empty, an input is a
            cache of keys and values, the output cannot be summarised so, or the model has no
            likelihood (:func:`bayesify.set_likelihood_`).
        UnsupportedModuleError: ``model`` has no posterior.

    Reference:
        Blundell et al., 2015, arXiv:1505.05424, section 3.1; Houlsby et al., 2011,
        arXiv:1112.5745, equation 2 (mutual information).

    >>> import torch, bayesify
    >>> model = bayesify.to_bbb(torch.nn.Linear(2, 3))
    >>> predict(model, torch.ones(5, 2), num_samples=4).shape
    torch.Size([4, 5, 3])
    >>> predict(model, torch.ones(5, 2), num_samples=4, reduce="probabilities").mean.shape
    torch.Size([5, 3])
    """
    predictor = Predictor(model, num_samples=num_samples, seed=seed, reduce=reduce, keep=False)
    return predictor(*inputs, **kwargs)


class Predictor:
    """:func:`predict` with the same K draws for every batch; the arguments are those of it.

    Where they are small enough, the draws are made once for all batches. The model must not change
    in between.

    Args:
        model: A converted model, or a module that holds one.
        num_samples: Number K of draws, at least 1.
        seed: The K draws are a function of it; None takes a new one.
        reduce: As :func:`predict`.
        likelihood: For ``"predictive"``, instead of that of the model.
        keep: Keep small draws from one batch to the next.

    Raises:
        ArgumentError: An argument has a value that cannot work.
        UnsupportedModuleError: ``model`` has no posterior.

    >>> import torch, bayesify
    >>> model = bayesify.to_bbb(torch.nn.Linear(2, 3))
    >>> predictor = Predictor(model, num_samples=4, seed=0, reduce="probabilities")
    >>> [predictor(torch.ones(size, 2)).mean.shape[0] for size in (5, 3)]
    [5, 3]
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_samples: int,
        seed: int | None = None,
        reduce: Reduce | None = None,
        likelihood: Likelihood | Mapping[Any, Likelihood] | None = None,
        keep: bool = True,
    ) -> None:
        if reduce is not None and reduce not in get_args(Reduce):
            raise ArgumentError(
                "predict: reduce must be None, 'probabilities', 'moments' or 'predictive', got "
                f"{reduce!r}."
            )
        num_samples = check_samples("predict", num_samples)
        warn_of_unconverted(model, once=True)
        self.model = model
        self.collector: Callable[[int], Collector]
        if reduce == "predictive":
            self.collector = partial(Mixed, likelihood=_known(model, likelihood))
        elif reduce == "probabilities":
            self.collector = partial(Probabilities, temperature=temperature_of(model))
        else:
            self.collector = RunningMoments if reduce == "moments" else Stack
        self.draws = Draws(model, num_samples, int(as_seed(seed)), keep)

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """What :func:`predict` gives for one batch."""
        check_batch("predict", (inputs, kwargs))
        collector = self.collector(self.draws.num_samples)
        with torch.no_grad(), evaluating(self.model):
            for output in self.draws.outputs(inputs, kwargs):
                collector.add(output)
        return collector.result()


def _known(model: nn.Module, given: Any) -> Likelihood:
    """What the outputs mean.

    Raises:
        ArgumentError: Nothing says it.
    """
    found = likelihood_of(model) if given is None else as_likelihood(given)
    if found is None:
        raise ArgumentError(
            "predict: reduce='predictive' needs to know what the outputs mean: "
            "bayesify.set_likelihood_(model, Gaussian()), say, or a model that was fitted with a "
            "likelihood. bayesify.likelihoods has them."
        )
    return found
