"""A forward whose code runs after the call: a generator reads the draw of the call that made it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bayesify


class Yields(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Iterator[Any]:
        for _ in range(3):
            x = self.layer(x) * self.scale
            yield x


class Expression(Yields):
    def forward(self, x: Tensor) -> Iterator[Any]:
        return (self.layer(x) * self.scale for _ in range(3))


@pytest.mark.parametrize("kind", [Yields, Expression])
def test_a_generator_reads_one_draw_also_after_the_block(kind: type[Yields]) -> None:
    model = bayesify.to_bbb(kind(), initial_std=math.exp(-1.0))
    x = torch.randn(2, 3)
    drawn = bayesify.draws(model, seed=1)
    with bayesify.one_draw(model, seed=1):
        out = model(x)
    y = x
    for found in out:
        y = F.linear(y if kind is Yields else x, drawn["layer.weight"], drawn["layer.bias"])
        y = y * drawn["scale"]
        torch.testing.assert_close(found, y, rtol=0, atol=0)
    first, second = list(model(x)), list(model(x))
    assert not torch.equal(first[1], second[1])
    first[-1].sum().backward()
    assert all(p.grad is not None for p in model.parameters())
