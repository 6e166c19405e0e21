"""The running statistics of a model's norms: kept during a fit, gathered anew after it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim.swa_utils import update_bn

from ..inference import gather_batchnorm_
from ..torch_private import NormBase, foreach_copy_

Call = tuple[tuple[Any, ...], dict[str, Any]]


class RunningStatistics:
    """Running statistics and a copy of them.

    Args:
        model: Whose norms have them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.norms = [
            m for m in model.modules() if isinstance(m, NormBase) and m.running_mean is not None
        ]
        # of one dtype each, so that a copy of many small tensors is one kernel
        buffers = [b for norm in self.norms for b in norm.buffers(recurse=False)]
        self.pairs = [
            (own := [b for b in buffers if b.dtype == dtype], [b.clone() for b in own])
            for dtype in {b.dtype for b in buffers}
        ]

    def freeze(self) -> None:
        """Let the norms use what they have, as in ``eval()``."""
        for norm in self.norms:
            norm.eval()

    def keep(self) -> None:
        """Take the copy."""
        for own, kept in self.pairs:
            foreach_copy_(kept, own)

    def put_back(self) -> None:
        """Give the norms what the copy has."""
        for own, kept in self.pairs:
            foreach_copy_(own, kept)

    def gather(self, calls: Iterable[Call], *, bayesian: bool, averaged: bool) -> None:
        """Gather them anew: at the posterior means, or at averaged weights.

        Without either they are those of the training. Augmented images have others than plain ones,
        so that the calls are those of the batches that trained.
        """
        if bayesian:
            gather_batchnorm_(self.model, calls)
        elif averaged:
            update_bn(({"call": call} for call in calls), _Called(self.model))


class _Called(nn.Module):
    """A model whose calls are given whole, for what gives a model one argument."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, given: dict[str, Any]) -> Any:
        args, kwargs = given["call"]
        return self.model(*args, **kwargs)
