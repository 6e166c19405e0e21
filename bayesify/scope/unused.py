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
from ..errors import UnsupportedModuleError
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
    if wrapper is None:
        return result
    _check_complete(wrapper)
    if not wrapper.find_unused_parameters or wrapper.static_graph or not torch.is_grad_enabled():
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


_EXTENSIONS: list[int] = [0]


def note_extension() -> None:
    """Say that posteriors have been added to a model, which a wrapper around it may not know."""
    _EXTENSIONS[0] += 1


def _check_complete(wrapper: Any) -> None:
    """Refuse a wrapper that was made before some of its posteriors: it would not average theirs.

    Raises:
        UnsupportedModuleError: There are such; the processes would drift apart.
    """
    if wrapper.__dict__.get("_bayesify_extensions") == _EXTENSIONS[0]:
        return
    known = set(map(id, wrapper._module_parameters))
    late = [
        site.name
        for site in sites(wrapper.module)
        if any(p.requires_grad and id(p) not in known for p in site.tensors)
    ]
    if late:
        raise UnsupportedModuleError(
            f"{len(late)} posteriors were added after the model was wrapped, so that "
            f"DistributedDataParallel does not average their gradients: {', '.join(late[:3])}"
            f"{', ...' if len(late) > 3 else ''}. Call extend_ before DistributedDataParallel, or "
            "wrap the model anew."
        )
    wrapper.__dict__["_bayesify_extensions"] = _EXTENSIONS[0]


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
