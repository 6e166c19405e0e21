"""The mean of a fit's last iterates, which the model gets in the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim.swa_utils import get_swa_multi_avg_fn

from .. import torch_private


class TailAverage:
    """The plain mean of each parameter over the steps after ``first``.

    Args:
        parameters: Those that are averaged, as the optimizer moves them.
        first: Steps that are left out, from 0; as many as there are, or more, leave out all.
    """

    def __init__(self, parameters: Sequence[Tensor], first: int) -> None:
        self.parameters = list(parameters)
        self.first = first
        self.mean: list[Tensor] = []
        """Empty until a step counts."""
        self._add = get_swa_multi_avg_fn()

    def look(self, step: int) -> None:
        """Take the parameters into the mean, ``step`` steps having been made."""
        if step <= self.first:
            return
        if not self.mean:
            self.mean = [p.detach().clone() for p in self.parameters]
            return
        now = [p.detach() for p in self.parameters]
        with torch.no_grad():
            self._add(self.mean, now, step - self.first - 1)

    def put(self) -> None:
        """Give the parameters their mean, if there is one."""
        if self.mean:
            with torch.no_grad():
                torch_private.foreach_copy_(self.parameters, self.mean)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """In the block the parameters have their mean; afterwards they are as before."""
        if not self.mean:
            yield
            return
        before = [p.detach().clone() for p in self.parameters]
        self.put()
        try:
            yield
        finally:
            with torch.no_grad():
                torch_private.foreach_copy_(self.parameters, before)
