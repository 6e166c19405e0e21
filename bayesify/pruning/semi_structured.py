"""Weights with two zeros in every four, packed for the sparse tensor cores of a GPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

from .. import torch_private
from ..convert import to_deterministic
from ..copies import copy_detached
from ..errors import ArgumentError
from ..posterior import is_bayesian
from ..rewriter import caches
from .elements import LAYERS

_CAPABILITY = (8, 0)  # Ampere, the first with sparse tensor cores


@dataclass(frozen=True)
class SemiStructured:
    """What :func:`to_semi_structured` gives.

    Attributes:
        model: The deterministic model, on the GPU and in ``eval()``, for inference alone.
        packed: Names of the weights that are packed.
        dense: Names of the weights of ``Linear`` and convolutions that are not, and why.
    """

    model: nn.Module
    packed: tuple[str, ...]
    dense: dict[str, str]


def to_semi_structured(
    model: nn.Module,
    *,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cuda",
) -> SemiStructured:
    """A deterministic copy whose 2:4 sparse weights are packed as torch's sparse tensor cores read.

    A weight of a ``Linear`` is packed by ``torch.sparse.to_sparse_semi_structured`` if of every
    four neighbours along its input dimension at most two are not 0, as
    :func:`prune_n_of_m_` leaves them, and if its shape is one that torch packs. What is packed
    holds half of the values, and no file: keep the model itself, or its means, and pack them anew
    (``bayesify prune --unit 2:4 --deterministic`` writes an ordinary file that holds the zeros).
    torch calls its packed tensors a prototype, and warns of it once.

    Args:
        model: A converted model, which is taken at its means, or a deterministic one; it is left
            as it is.
        dtype: Of the copy and of its inputs: ``torch.float16`` or ``torch.bfloat16``.
        device: A CUDA device of compute capability 8.0 (Ampere) or above.

    Returns:
        The copy, the names of the packed weights, and why others are not packed.

    Raises:
        ArgumentError: ``dtype`` is another one, no weight can be packed, or there is no such
            device; the message then says how many weights could be packed on one.

    Reference:
        Mishra et al., 2021, arXiv:2104.08378.

    >>> import torch, bayesify
    >>> model = bayesify.prune_n_of_m_(bayesify.to_bbb(torch.nn.Linear(64, 32)))
    >>> to_semi_structured(model).packed  # doctest: +SKIP
    ('weight',)
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise ArgumentError(
            "to_semi_structured: dtype must be torch.float16 or torch.bfloat16, which sparse "
            f"tensor cores multiply two of four in, got {dtype}."
        )
    copied = to_deterministic(model) if is_bayesian(model) else copy_detached(model)
    copied.to(dtype).eval().requires_grad_(False)
    obstacles = _obstacles(copied, dtype)
    packed = tuple(name for name, why in obstacles.items() if why is None)
    dense = {name: why for name, why in obstacles.items() if why is not None}
    if not packed:
        first = "; ".join(f"{name}: {why}" for name, why in list(dense.items())[:3])
        raise ArgumentError(
            f"to_semi_structured finds no weight of {type(model).__name__} to pack "
            f"({first or 'there is no Linear'}). Prune it with bayesify.prune_n_of_m_(model), or "
            "bayesify prune --unit 2:4, first."
        )
    copied.to(_gpu(device, f"{len(packed)} of {len(obstacles)} weights could be packed on one."))
    for name in packed:
        layer = copied.get_submodule(name.rpartition(".")[0])
        weight = copied.get_parameter(name).contiguous()
        packing = torch.sparse.to_sparse_semi_structured(weight)
        layer.weight = nn.Parameter(packing, requires_grad=False)
        layer.register_forward_pre_hook(_contiguous)
    caches.drop(copied)
    return SemiStructured(copied, packed, dense)


def _obstacles(model: nn.Module, dtype: torch.dtype) -> dict[str, str | None]:
    """Why the weight of each ``Linear`` and convolution cannot be packed; None where it can."""
    owners = Counter(
        id(p) for m in model.modules() for p in m._parameters.values() if p is not None
    )
    # in eval() these hand the weights of their parts to one operator of torch
    fused = {
        id(part): type(parent).__name__
        for parent in model.modules()
        if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer)
        for part in parent.children()
    }
    found: dict[str, str | None] = {}
    for path, module in model.named_modules():
        if isinstance(module, LAYERS):
            weight = module._parameters.get("weight")
            name = f"{path}.weight" if path else "weight"
            if not isinstance(module, nn.Linear):
                found[name] = f"torch packs no weight of a {type(module).__name__}"
            elif weight is None:
                found[name] = "it is computed from other parameters"
            elif owners[id(weight)] > 1:
                found[name] = "another module has the same weight"
            elif id(module) in fused:
                found[name] = f"{fused[id(module)]} reads it without calling the layer"
            else:
                found[name] = _misfit(weight, dtype)
    return found


def _misfit(weight: Tensor, dtype: torch.dtype) -> str | None:
    rows, columns = weight.shape
    if columns % 4:
        return f"its {columns} inputs are no multiple of 4"
    kept = (weight != 0).view(rows, -1, 4).sum(dim=-1)
    if full := int((kept > 2).sum()):
        return f"{full:,} of {kept.numel():,} groups of four inputs have more than 2 that are not 0"
    needed = torch_private.semi_structured_constraints(_backend())[dtype]
    of_rows, of_columns = needed.sparse_min_rows, needed.sparse_min_cols
    if not rows or not columns or rows % of_rows or columns % of_columns:
        return f"it is {rows} x {columns}, and torch packs multiples of {of_rows} x {of_columns}"
    return None


def _backend() -> type[SparseSemiStructuredTensor]:
    """The class that torch packs into."""
    if torch_private.packs_by_cutlass():
        return SparseSemiStructuredTensorCUTLASS
    return SparseSemiStructuredTensorCUSPARSELT


def _gpu(device: torch.device | str, could: str) -> torch.device:
    """The device, if it has sparse tensor cores that torch can use."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ArgumentError(f"to_semi_structured: {device!r} is no device of torch.") from error
    if found.type != "cuda":
        raise ArgumentError(f"to_semi_structured needs a CUDA device, got {str(device)!r}. {could}")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (found.index or 0) >= there:
        raise ArgumentError(
            f"to_semi_structured needs a CUDA device, and {str(device)!r} is none of the {there} "
            f"here. {could}"
        )
    capability = torch.cuda.get_device_capability(found)
    if capability < _CAPABILITY:
        raise ArgumentError(
            "to_semi_structured needs a GPU of compute capability 8.0 (Ampere) or above, whose "
            f"tensor cores are sparse; {torch.cuda.get_device_name(found)} has "
            f"{'.'.join(map(str, capability))}. {could}"
        )
    if _backend().BACKEND == "cusparselt" and not torch.backends.cusparselt.is_available():
        raise ArgumentError(
            "to_semi_structured needs cuSPARSELt, which this torch was built without: install one "
            f"of the wheels for CUDA. {could}"
        )
    return found


def _contiguous(_layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    # a packed weight takes a view of its input, which it cannot of a transposed one
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in inputs)
