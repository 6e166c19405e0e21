"""Where a number that is not finite came from, and what the data have no say in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ArgumentError
from ..inference.running import evaluating
from ..posterior import bayesian_sites
from ..scope import sampled
from ..torch_private import pytree
from .batches import Loss, device_of, pair


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


def without_gradient(
    model: nn.Module, batches: Iterable[Sequence[Tensor]], *, loss: Loss = F.cross_entropy
) -> dict[str, Tensor]:
    """Find the weights that no loss of these batches depends on: the KL alone moves them.

    Rows of an embedding that no example has, what a mask multiplies by 0, what is behind a
    ``detach()`` or read by nothing, dead units: given all the data, these are no finding of the
    fit but the prior, and their draws are noise wherever they are read after all.
    :func:`bayesify.fix_` takes the result, or that part of it which shall be fixed.

    Each batch costs a forward and a backward, in ``eval()`` at a fresh draw of the weights.

    Args:
        model: A converted model; it is left as it is, in the mode that it was in.
        batches: Batches of (inputs, targets), such as a DataLoader gives: the whole training set,
            or as many as can be afforded.
        loss: Of a batch, from the model's output and the targets.

    Returns:
        By the names of Bayesian parameters with such weights, of their shapes: True where the
        gradient of the mean was exactly 0 on every batch. Weights that are pruned, fixed or frozen
        are not among them.

    Raises:
        ArgumentError: There is no batch, or it is not made of two tensors.
        UnsupportedModuleError: ``model`` has no posterior.

    >>> import torch, bayesify
    >>> model = bayesify.to_bbb(torch.nn.Embedding(5, 2))
    >>> batches = [(torch.tensor([0, 3]), torch.tensor([0, 1]))]
    >>> bayesify.without_gradient(model, batches)["weight"].all(dim=1)
    tensor([False,  True,  True, False,  True])
    """
    found = [site for site in bayesian_sites(model) if site.mean.requires_grad]
    means = [site.mean for site in found]
    unseen = [torch.ones_like(mean, dtype=torch.bool) for mean in means]
    device, any_batch = device_of(model), False
    with evaluating(model), sampled(model), torch.enable_grad():
        for batch in batches:
            any_batch = True
            inputs, targets = pair(batch)
            value = loss(model(inputs.to(device)), targets.to(device))
            for mask, grad in zip(
                unseen, torch.autograd.grad(value, means, allow_unused=True), strict=True
            ):
                if grad is not None:
                    mask &= (grad.to_dense() if grad.is_sparse else grad) == 0
    if not any_batch:
        raise ArgumentError("without_gradient needs at least one batch.")
    result = {}
    for site, mask in zip(found, unseen, strict=True):
        if site.held is not None:
            mask &= ~site.held
        if bool(mask.any()):
            result[site.name] = mask
    return result


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
