"""Statistics of BatchNorm at the posterior means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..posterior import bayesian_sites
from ..scope import at_mean
from ..torch_private import BatchNormBase
from .running import evaluating


def recompute_batchnorm_(
    model: nn.Module, loader: Iterable[Any], device: torch.device | str | None = None
) -> nn.Module:
    """Gather the running statistics of every BatchNorm anew, at the posterior means.

    Statistics gathered in training belong to drawn weights; ``eval()`` uses the means. Give the
    batches that trained, with their augmentation: the layers behind a BatchNorm have learnt from
    these, and images as they are have other statistics. Each statistic becomes the plain average
    over the batches. All else runs as in ``eval()``. A model without BatchNorm is left alone and
    ``loader`` is not read.

    Args:
        model: A converted model.
        loader: Batches: an input tensor, a sequence that begins with it, or a mapping of keyword
            arguments. Each batch counts alike, so that they should be of one size.
        device: Where the inputs are moved to; None: the device of the first parameter.

    Returns:
        ``model``.

    Raises:
        ArgumentError: ``loader`` gives no batch. Upon any error the old statistics are back.
        UnsupportedModuleError: ``model`` has no posterior.

    Reference:
        Izmailov et al., 2018, arXiv:1803.05407, section 3.2.

    >>> import torch, bayesify
    >>> model = bayesify.to_bbb(torch.nn.Sequential(torch.nn.BatchNorm1d(1)))
    >>> _ = recompute_batchnorm_(model, [torch.tensor([[1.0], [3.0]])])
    >>> model[0].running_mean.item(), model[0].running_var.item()
    (2.0, 2.0)
    """
    first = bayesian_sites(model)[0].mean
    target = first.device if device is None else torch.device(device)
    return gather_batchnorm_(model, (_arguments(batch, target) for batch in loader))


def gather_batchnorm_(
    model: nn.Module, calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]]
) -> nn.Module:
    """:func:`recompute_batchnorm_` from the arguments, positional and by keyword, of each call."""
    norms = [
        m for m in model.modules() if isinstance(m, BatchNormBase) and m.running_mean is not None
    ]
    if not norms:
        return model
    kept = [
        (n, n.momentum, {k: b.clone() for k, b in n.named_buffers(recurse=False)}) for n in norms
    ]
    empty = True
    try:
        with torch.no_grad(), evaluating(model), at_mean(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.training = True
            for args, kwargs in calls:
                model(*args, **kwargs)
                empty = False
        if empty:
            raise ArgumentError(
                "recompute_batchnorm_: loader gave no batch. Is it a generator that was used up?"
            )
    except BaseException:
        with torch.no_grad():
            for norm, _, buffers in kept:
                for name, value in buffers.items():
                    norm.get_buffer(name).copy_(value)
        raise
    finally:
        for norm, momentum, _ in kept:
            norm.momentum = momentum
    return model


def _arguments(batch: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    first = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(first, Tensor):
        raise ArgumentError(
            "recompute_batchnorm_: a batch must be a tensor, a sequence that begins with one, or "
            f"a mapping, got {type(batch).__name__}."
        )
    return (first.to(device),), {}
