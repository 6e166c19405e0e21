"""Where a number that is not finite came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def not_finite_in(
    model: nn.Module, inputs: Iterable[Tensor], run: Callable[[], None]
) -> str | None:
    """Say where NaN or infinity comes from: the data, a parameter, a layer, or a gradient.

    Args:
        model: The model, with the gradients of the step that failed.
        inputs: What it was given in that step.
        run: Does the forward passes of that step again, with the same random numbers.

    Returns:
        Part of a sentence; None if all of it is finite, so that the loss itself is to blame.
    """
    if not all(map(_finite, inputs)):
        return "the batch itself holds NaN or infinity"
    for name, parameter in model.named_parameters():
        if not _finite(parameter.detach()):
            return f"the parameter {name!r} holds NaN or infinity"
    found: list[str] = []
    names = {id(module): name for name, module in model.named_modules()}

    def look(module: nn.Module, _: Any, output: Any) -> None:
        leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        if not found and not all(map(_finite, leaves)):
            found.append(f"{names[id(module)] or 'the model'!r} ({type(module).__name__})")

    hooks = [module.register_forward_hook(look) for module in model.modules()]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return f"the first layer whose output is not finite is {found[0]}"
    # backward goes from the last layer to the first: the last named is where it began
    broken = [n for n, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
    if broken:
        return f"the outputs are finite, the gradient of {broken[-1]!r} is not"
    return None


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
