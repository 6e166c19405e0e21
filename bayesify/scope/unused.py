"""Parameters that a forward left unread, under DistributedDataParallel with find_unused_parameters.

After its forward that wrapper looks for the parameters to which the outputs' graph leads, and takes
the gradients of all others for done when the backward begins. The KL divergence then gives them
one: "Expected to mark a variable ready only once". So the outputs lead to all that it may reach.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import torch_private
from ..posterior import sites
from ..torch_private import pytree


class _Leads(torch.autograd.Function):
    """Tensors whose graph leads to parameters as well, which get no gradient by this way."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.others = len(tensors) - count
        ctx.set_materialize_grads(False)
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *grads, *[None] * ctx.others


# what torch.compile left out of its graphs comes here as it is
@torch.compiler.disable  # type: ignore[untyped-decorator]
def lead_to_posteriors(result: Any) -> Any:
    """What a call gives, leading to every posterior of the wrapper that runs, if one does.

    Not for a call that torch.compile traces: all weights that it draws are its inputs.
    """
    # torch has no public way to ask; torch.compile asks so too
    wrapper: Any = torch_private.active_ddp_module()
    if (
        wrapper is None
        or not wrapper.find_unused_parameters
        or wrapper.static_graph
        or not torch.is_grad_enabled()
    ):
        return result
    parameters = [p for site in sites(wrapper.module) for p in site.tensors if p.requires_grad]
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _exchange(result, note)
    if not found:
        return result
    leading = iter(_Leads.apply(len(found), *found, *parameters))
    return _exchange(result, lambda _: next(leading))


def _exchange(result: Any, by: Callable[[Tensor], Tensor]) -> Any:
    """``result`` with its tensors that have a gradient exchanged, those in dataclasses too."""

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            return by(value) if value.grad_fn is not None else value
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            return value
        same = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(same, field.name, pytree.tree_map(leaf, getattr(value, field.name)))
        return same

    return pytree.tree_map(leaf, result)
