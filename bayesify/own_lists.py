"""Posteriors that a model's own ``state_dict`` or ``parameters`` leaves out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .posterior import Site, raw_name, sites


def _memory(tensor: Any) -> Any:
    """What two tensors have in common if one is the other, detached."""
    if hasattr(tensor, "_local_tensor"):  # of FSDP2
        tensor = tensor._local_tensor
    if type(tensor) not in (Tensor, nn.Parameter):
        return id(tensor)
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape


def _raw_key(site: Site) -> str:
    return site.name.removesuffix(site.attribute) + raw_name(site.attribute, site.slot)


def left_out_of_state(model: nn.Module) -> list[str]:
    """Trained spreads that are not in ``model.state_dict()``, under whatever key."""
    try:
        state = model.state_dict()
        values = list(state.values())
    except Exception:  # it needs arguments, or a state that the model is not in
        return []
    kept = {_memory(value) for value in values if isinstance(value, Tensor)}
    return [
        _raw_key(site)
        for site in sites(model)
        if _raw_key(site) not in state and _memory(site.raw) not in kept
    ]


def left_out_of_parameters(model: nn.Module) -> list[str]:
    """Trained spreads that a module's own ``parameters()`` leaves out while it lists the mean."""
    found: dict[str, None] = {}
    for path, module in model.named_modules():
        kind = type(module)
        if (
            kind.parameters is nn.Module.parameters
            and kind.named_parameters is nn.Module.named_parameters
        ):
            continue
        try:
            listed = {id(p) for p in module.parameters()}
        except Exception:  # it needs arguments
            continue
        for site in sites(module):
            if id(site.mean) in listed and id(site.raw) not in listed:
                found[f"{path}.{_raw_key(site)}" if path else _raw_key(site)] = None
    return list(found)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What of ``model.parameters()`` requires a gradient, and the trained spread of each mean."""
    found = {id(p): p for p in model.parameters()}
    for site in sites(model):
        if id(site.mean) in found:
            found.setdefault(id(site.raw), site.raw)
    return [p for p in found.values() if p.requires_grad]


def listed(names: Iterable[str]) -> str:
    """``3 log variances (a, b, c)``, the names cut off where they are many."""
    names = list(names)
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} log variance{'s' if len(names) > 1 else ''} ({shown})"
