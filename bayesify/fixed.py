"""Fixed weights: no draw and no KL, since nothing but the KL would move their posterior."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ArgumentError
from .posterior import FIXED_RAW, bayesian_sites


def fix_(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Fix single weights at their means: they are not drawn, and the KL leaves them out.

    It is for weights that no loss depends on (:func:`bayesify.without_gradient` finds them): the
    KL alone would move their posterior, to the prior. :func:`bayesify.to_bbb` fixes the row of
    ``padding_idx`` of an ``nn.Embedding`` or ``nn.EmbeddingBag`` that nothing else reads, and what
    a mask of ``torch.nn.utils.prune`` sets to 0. It cannot know of others: rows that no input has,
    what a mask of your own multiplies by 0, slices whose gradient a hook sets to 0.

    A mean is trained further by whatever gradient it gets. Pruning passes fixed weights over. As
    the mask of pruned weights, that of fixed ones is in the log variances: it is copied and saved
    with them.

    Args:
        model: A converted model; changed in place. Upon an error it is as it was.
        masks: By the names of Bayesian parameters, what is fixed: tensors of bool, of the
            parameter's shape or such as broadcast to it.

    Returns:
        ``model``.

    Raises:
        ArgumentError: A name is not that of a Bayesian parameter, or a mask does not fit.
        UnsupportedModuleError: ``model`` has no posterior.

    >>> import torch, bayesify
    >>> model = bayesify.to_bbb(torch.nn.Embedding(5, 2))
    >>> _ = fix_(model, {"weight": torch.tensor([True, False, False, False, True])[:, None]})
    >>> bayesify.stddev(model)["weight"].bool().any(dim=1)
    tensor([False,  True,  True,  True, False])
    """
    found = {site.name: site for site in bayesian_sites(model)}
    for name, mask in masks.items():
        if name not in found:
            raise ArgumentError(
                f"fix_: {name!r} is not the name of a Bayesian parameter of "
                f"{type(model).__name__}. posteriors(model) lists them."
            )
        shape = tuple(found[name].mean.shape)
        given = f"{type(mask).__name__}"
        if isinstance(mask, Tensor):
            given = f"{mask.dtype} of the shape {tuple(mask.shape)}"
            try:
                fits = mask.dtype == torch.bool and mask.expand(shape).shape == shape
            except RuntimeError:
                fits = False
            if fits:
                continue
        raise ArgumentError(
            f"fix_: the mask of {name!r} must be a tensor of torch.bool that fits the shape "
            f"{shape}, got {given}."
        )
    with torch.no_grad():
        for name, mask in masks.items():
            site = found[name]
            site.raw.masked_fill_(mask.to(site.raw.device), FIXED_RAW)
            site.slot.has_held = True
    return model


@dataclass(frozen=True)
class Masked:
    """Weights of one parameter that modules keep from the data: they get no gradient.

    ``index`` is a row or a mask; ``readers`` are the names of the parameter in places without that
    rule, where it gets one.
    """

    index: Any
    elements: int
    what: str
    readers: tuple[str, ...]

    def sentence(self, name: str) -> str:
        """What the conversion does with it."""
        if self.readers:
            return (
                f"{name}: {self.what} gets no gradient there, but {', '.join(self.readers)} is the "
                "same tensor: it is drawn, as all of it."
            )
        return f"{name}: {self.what} gets no gradient and is fixed: no draw, no KL."


def masked(model: nn.Module) -> dict[int, Masked]:
    """What modules mask of their own parameters, by the parameter's id."""
    places: dict[int, list[tuple[str, Masked | None]]] = defaultdict(list)
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                places[id(parameter)].append((name, _masked_in(module, attribute, parameter)))
    found = {}
    for key, each in places.items():
        first = next((rule for _, rule in each if rule is not None), None)
        if first is not None:
            readers = tuple(n for n, rule in each if rule is None or rule.what != first.what)
            found[key] = Masked(first.index, first.elements, first.what, readers)
    return found


def _masked_in(module: nn.Module, attribute: str, parameter: Tensor) -> Masked | None:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and attribute == "weight":
        if module.padding_idx is None or parameter.dim() != 2:
            return None
        row = int(module.padding_idx) % len(parameter)
        return Masked(row, parameter.shape[1], f"row {row} (padding_idx)", ())
    if attribute.endswith("_orig"):  # torch.nn.utils.prune
        name = attribute.removesuffix("_orig") + "_mask"
        mask = module._buffers.get(name)
        if mask is not None and mask.shape == parameter.shape and mask.device.type != "meta":
            index = mask == 0
            count = int(index.sum())
            if count:
                return Masked(index, count, f"{count:,} elements ({name})", ())
    return None
