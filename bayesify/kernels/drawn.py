"""One tensor to draw, and what its draw keeps for the backward; the ways to draw share both."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .buffers import Buffers


class Item(NamedTuple):
    """One tensor to draw: N(mean, exp(logvar)), noise key, memory, and the dtype of the draw.

    With ``held`` the KL divergence leaves out weights whose log variance is below ``HELD``.
    """

    mean: nn.Parameter
    logvar: nn.Parameter
    key: int
    buffers: Buffers
    dtype: torch.dtype | None = None  # of the mean
    held: bool = False


class Draw:
    """What the backward of one draw needs, and whether a KL divergence hangs on it."""

    def __init__(self, item: Item, half: Tensor | None, seed: Tensor) -> None:
        self.item, self.seed = item, seed
        self.half = half  # None where the backward makes the noise again
        self.repeatable = half is None
        self.prior: tuple[Tensor | float, Tensor | float] | None = None
        self.versions = (item.mean._version, item.logvar._version)

    def may_carry(self, mean: Tensor, logvar: Tensor) -> bool:
        """Whether a KL divergence of these tensors, which must be its own, can hang here.

        Not after a backward that used up the draw, nor after a change of its tensors.
        """
        return (
            not self.spent()
            and mean is self.item.mean
            and logvar is self.item.logvar
            and mean.dtype == logvar.dtype
            and self.unchanged()
        )

    def spent(self) -> bool:
        """Whether a backward has used up what was kept for it, so that no other can run."""
        return self.half is None and not self.repeatable

    def unchanged(self) -> bool:
        """Whether nothing has written into the tensors since the draw."""
        return self.versions == (self.item.mean._version, self.item.logvar._version)
