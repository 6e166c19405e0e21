"""A small network for rows of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from ..errors import ModelError
from ..numeric import count

MAX_LAYERS = 8


def mlp(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """Linear layers with ReLU between them, ``bayesify:mlp`` by its name.

    Args:
        inputs: Numbers in a row.
        hidden: Units of each hidden layer, 1 to 8 layers.
        outputs: Numbers that it gives.

    Shape:
        (batch, inputs) to (batch, outputs).

    Raises:
        ModelError: A number of them cannot work.

    >>> mlp(4, [50], 1)
    Sequential(
      (0): Linear(in_features=4, out_features=50, bias=True)
      (1): ReLU()
      (2): Linear(in_features=50, out_features=1, bias=True)
    )
    """
    if not isinstance(hidden, list | tuple) or not 1 <= len(hidden) <= MAX_LAYERS:
        raise ModelError(
            f"hidden must be the units of 1 to {MAX_LAYERS} layers, as in [50], not {hidden!r:.60}."
        )
    units = [count("inputs", inputs, kind=ModelError)]
    units += [count("each number of hidden", each, kind=ModelError) for each in hidden]
    layers: list[nn.Module] = []
    for before, after in pairwise(units):
        layers += [nn.Linear(before, after), nn.ReLU()]
    outputs = count("outputs", outputs, kind=ModelError)
    return nn.Sequential(*layers, nn.Linear(units[-1], outputs))
