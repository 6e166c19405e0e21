"""Pruning of whole units: output channels and attention heads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..posterior import Site, sites
from ..selection import Pattern
from ..settings.fields import documented, taken
from ..settings.pruning import SCORE, UnitSettings
from .elements import (
    LAYERS,
    Scope,
    Score,
    apply_masks,
    check_share,
    chosen,
    lowest,
    random_scores,
    scores_of,
)

Unit = Literal["channels", "heads"]

# by name, as timm takes seconds to import; the second before timm 1.0.16
_TIMM = {
    ("timm.layers.attention", "Attention"),
    ("timm.models.vision_transformer", "Attention"),
}


@dataclass(frozen=True)
class Part:
    """One tensor of a layer: reshaped to ``split``, dimension ``dim`` counts the units."""

    site: Site
    split: tuple[int, ...]
    dim: int

    def by_unit(self, values: Tensor) -> Tensor:
        """Values of the weights, one row for each unit."""
        return values.reshape(self.split).movedim(self.dim, 0).flatten(1)

    def spread(self, units: Tensor) -> Tensor:
        """A value of each unit, at each of its weights."""
        shape = [-1 if i == self.dim else 1 for i in range(len(self.split))]
        return units.view(shape).expand(self.split).reshape(self.site.mean.shape)


@dataclass(frozen=True)
class Layer:
    """The units of one layer: ``parts`` are scored, ``biases`` follow."""

    parts: tuple[Part, ...]
    biases: tuple[Part, ...]

    @property
    def count(self) -> int:
        return self.parts[0].split[self.parts[0].dim]


@documented(UnitSettings)
def prune_units_(  # noqa: D417 - the others are fields of UnitSettings
    model: nn.Module,
    sparsity: float,
    *,
    unit: Unit = "channels",
    score: Score = SCORE,
    scope: Scope = UnitSettings.scope,
    only: Pattern | Sequence[Pattern] = UnitSettings.only,
    skip: Pattern | Sequence[Pattern] = UnitSettings.skip,
    seed: int = UnitSettings.seed,
) -> nn.Module:
    """Prune whole units: those whose weights have the lowest mean score.

    All weights of a unit become 0, and its bias where that is Bayesian; no tensor changes its
    shape. At least one unit of each layer stays.

    Args:
        model: A converted model, changed in place. Upon an error it is as it was.
        sparsity: Share of the units that are pruned afterwards, in [0, 1), rounded to whole ones.
        unit: ``"channels"``: the outputs of ``Linear`` and of convolutions, but never the classes
            (the pattern ``@last-layer``); ``"heads"``: of ``nn.MultiheadAttention`` and timm's
            ``Attention``, that is their queries, keys and values and the columns of the output
            projection that read them.
        score: As in :func:`prune_`; of a unit it is the mean over its weights that are not pruned.

    Returns:
        ``model``.

    Raises:
        ArgumentError: As :func:`prune_`; or the model has no such unit with a posterior.
        NoMatchError: A pattern matches nothing.
        UnsupportedModuleError: ``model`` has no posterior.

    Reference:
        Li et al., 2017, arXiv:1608.08710 (filters); Michel et al., 2019, arXiv:1905.10650 (heads).

    >>> import torch, bayesify
    >>> mlp = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> model = prune_units_(bayesify.to_bbb(mlp), 0.5)
    >>> int((model[0].weight == 0).all(dim=1).sum()), int((model[2].weight == 0).sum())
    (4, 0)
    """
    settings = taken(UnitSettings, locals())
    sparsity = check_share(sparsity)
    if unit not in ("channels", "heads"):
        raise ArgumentError(f"unit must be 'channels' or 'heads', got {unit!r}.")
    tensors = chosen(model, settings)
    if unit == "channels":
        layers = list(channels(model, chosen(model, settings, further=("@last-layer",))))
    else:
        layers = list(heads(model, {site.slot.uid for site in tensors}))
    if not layers:
        raise ArgumentError(
            f"{type(model).__name__} has no {unit} to prune among its {len(tensors)} chosen "
            "tensors."
        )
    with torch.no_grad():
        scores = [_unit_scores(layer, score, settings.seed) for layer in layers]
        units = lowest(scores, sparsity, settings.scope)
        # several layers may write the same tensor: no tensor has two units of different layers
        found, masks = [], []
        for layer, pruned, values in zip(layers, units, scores, strict=True):
            if bool(pruned.all()):
                pruned = pruned.clone()
                pruned[values.argmax()] = False
            for part in (*layer.parts, *layer.biases):
                found.append(part.site)
                masks.append(part.spread(pruned))
        apply_masks(model, found, masks)
    return model


def _unit_scores(layer: Layer, score: Score, seed: int) -> Tensor:
    rows = [part.by_unit(scores_of(part.site, score, seed)) for part in layer.parts]
    values = torch.cat(rows, dim=1)
    kept = values != -math.inf
    mean = values.masked_fill(~kept, 0.0).sum(1) / kept.sum(1)
    if score == "random":  # a mean of many random numbers would favour small units
        mean = random_scores(layer.parts[0].site, (layer.count,), seed)
    return mean.masked_fill(~kept.any(1), -math.inf)


def channels(model: nn.Module, taken: list[Site]) -> Iterator[Layer]:
    """The output channels of the layers whose weights are in ``taken``."""
    biases = {id(site.module): site for site in sites(model) if site.attribute == "bias"}
    for site in taken:
        if isinstance(site.module, LAYERS) and site.attribute == "weight":
            bias = biases.get(id(site.module))
            yield Layer(
                (Part(site, tuple(site.mean.shape), 0),),
                () if bias is None else (Part(bias, tuple(bias.mean.shape), 0),),
            )


def heads(model: nn.Module, taken: set[int] | None = None) -> Iterator[Layer]:
    """The heads of attention modules whose projections are Bayesian, and in ``taken``."""
    for module in model.modules():
        layer = heads_of(model, module)
        if layer is not None and (
            taken is None or all(part.site.slot.uid in taken for part in layer.parts)
        ):
            yield layer


def heads_of(model: nn.Module, module: nn.Module) -> Layer | None:
    """The heads of one module, or None if it has none that can be told apart and pruned."""
    found: Any = module
    if isinstance(module, nn.MultiheadAttention):
        if not module._qkv_same_embed_dim:
            return None
        places = [(found, "in_proj_weight"), (found.out_proj, "weight"), (found, "in_proj_bias")]
    elif any((c.__module__, c.__name__) in _TIMM for c in type(module).__mro__):
        places = [(found.qkv, "weight"), (found.proj, "weight"), (found.qkv, "bias")]
    else:
        return None
    count, width = found.num_heads, found.head_dim
    by_place = {(id(s.module), s.attribute): s for s in sites(model)}
    inputs, outputs, bias = (by_place.get((id(m), attribute)) for m, attribute in places)
    if inputs is None or outputs is None:
        return None
    return Layer(
        (
            Part(inputs, (3, count, width, inputs.mean.shape[1]), 1),
            Part(outputs, (outputs.mean.shape[0], count, width), 1),
        ),
        () if bias is None else (Part(bias, (3, count, width), 1),),
    )
