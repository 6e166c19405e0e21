"""FSDP2: weights, gradients and moments in parts over the processes of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from bayesify import ArgumentError, CheckpointError
from bayesify.posterior import full_tensor
from bayesify.storage.state import ADAM, check_moments

from .distributed import World


def shard_(roots: Iterable[nn.Module], world: World) -> None:
    """Shard modules over all processes; one block after the other is whole while it is used.

    Units are the members of every ``nn.Sequential`` and ``nn.ModuleList`` that have modules inside
    (the blocks of a ViT, the bottlenecks of a ResNet), then what is left of each root.

    Args:
        roots: Modules that are called from outside. Their parameters become DTensors.
        world: More than one process.

    Raises:
        ArgumentError: There is one process only.
    """
    if world.size == 1:
        raise ArgumentError("shard needs several processes: start them with torchrun.")
    mesh = init_device_mesh(world.device.type, (world.size,))
    for root in roots:
        for unit in [*blocks(root), root]:
            if any(True for _ in unit.parameters()):
                # roots too: between calls every parameter is the sharded one
                fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The units below ``model``, inner ones first, each once."""
    found: dict[int, nn.Module] = {}
    for parent in reversed(list(model.modules())):
        if isinstance(parent, nn.Sequential | nn.ModuleList):
            for child in parent:
                if any(True for _ in child.children()):
                    found.setdefault(id(child), child)
    return list(found.values())


def gathered_state(value: Any, *, keep: bool) -> Any:
    """Nested dicts and lists with every sharded tensor whole, on the CPU.

    Args:
        value: Dicts, lists, tensors and all else, of the same shape in every process.
        keep: Whether this process wants the tensors; one that does not gets None for each.
    """
    if hasattr(value, "full_tensor"):
        full = full_tensor(value.detach())
        return full.cpu() if keep else None
    if isinstance(value, Mapping):
        return {k: gathered_state(v, keep=keep) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [gathered_state(v, keep=keep) for v in value]
    return value


def placed_like(full: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has, sharded as ``like`` is."""
    if not isinstance(like, DTensor):
        return full
    # every process has read it, so that nothing is sent
    return distribute_tensor(
        full.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def placed_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A saved state of the optimizer, each moment sharded as its parameter is.

    The options of its groups are its own: nothing of them changes from step to step but the rate.

    Raises:
        CheckpointError: The state is not one that this optimizer keeps of its parameters.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    adam = isinstance(optimizer, torch.optim.AdamW)
    placed = {}
    try:
        for index, moments in state["state"].items():
            if moments or adam:  # LARS keeps nothing without momentum
                check_moments(params[index], moments, ADAM if adam else {"momentum_buffer"})
            placed[index] = {
                key: value if key == "step" else placed_like(value, params[index])
                for key, value in moments.items()
            }
    except Exception as error:  # a damaged file raises nearly anything
        raise CheckpointError(
            f"The optimizer's state of a checkpoint does not fit: {error}."
        ) from error
    return {"state": placed, "param_groups": optimizer.state_dict()["param_groups"]}
