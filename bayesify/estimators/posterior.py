"""What an estimator sees of one weight or bias: its posterior, and noise of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import gaussian
from ..posterior import STATE, Slot
from ..scope import LOCAL, Scope


class Posterior:
    r"""The posterior :math:`N(\mu, \sigma^2)` of one weight or bias, in the present draw scope.

    Attributes:
        mean: :math:`\mu`, of the shape of the parameter.
        spread: What is trained of :math:`\sigma`, of the same shape: the log variance, or
            softplus's argument. It is float32 whatever the mean is.
    """

    def __init__(
        self, module: nn.Module, attribute: str, slot: Slot, tensors: tuple[Tensor, Tensor]
    ) -> None:
        self._place = module, attribute, slot
        self.mean, self.spread = tensors

    @property
    def std(self) -> Tensor:
        r""":math:`\sigma`, of the shape and dtype of ``spread``."""
        return self.std_of(self.spread)

    @property
    def var(self) -> Tensor:
        r""":math:`\sigma^2`, of the shape and dtype of ``spread``."""
        return gaussian.var_from_raw(self.spread, self._place[2].parameterization)

    def std_of(self, spread: Tensor) -> Tensor:
        r""":math:`\sigma` of some elements of ``spread``, such as the rows that are looked up."""
        return gaussian.std_from_raw(spread, self._place[2].parameterization)

    def draw(self) -> Tensor:
        """The draw of the whole, :math:`w`, one for each draw scope: what all other reads get."""
        module, attribute, slot = self._place
        return scope_of(module).read(module, attribute, slot)

    def deviation(self) -> Tensor:
        r"""The draw less the mean, :math:`\sigma \epsilon`, of the shape of the parameter."""
        module, attribute, slot = self._place
        return scope_of(module).deviation(module, attribute, slot)

    def noise(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, stream: int = 1
    ) -> Tensor:
        """Standard normal noise, a function of the scope's seed and of this parameter.

        So a call that is repeated in one scope, or recomputed by activation checkpointing, has the
        same noise; in the next scope it has another.

        Args:
            shape: Of the noise.
            dtype: Of the noise.
            device: Of the noise.
            stream: A number from 1 on; noise of two streams is independent. 0 is that of the draw.
        """
        module, _, slot = self._place
        return scope_of(module).noise(slot, shape, dtype, device, stream)


def scope_of(module: nn.Module) -> Scope:
    """The draw scope in which a module is called."""
    assert LOCAL.scope is not None
    return LOCAL.scope.of(module)


def slot_of(module: Any, attribute: str) -> Slot:
    """The slot of a Bayesian parameter."""
    slot: Slot = module.__dict__[STATE].slots[attribute]
    return slot
