"""The tensor of a model's output that a density is of."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import ArgumentError


def main_output(output: Any) -> Tensor:
    """The output itself, or the logits of a Hugging Face output."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise ArgumentError(
            f"The model's output is a {type(output).__name__}, expected a tensor or an object with "
            ".logits. Wrap the model in a module that returns the tensor."
        )
    return found
