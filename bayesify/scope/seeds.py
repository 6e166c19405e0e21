"""The seeds of scopes, and what tells the noise of their parameters apart."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..numeric import seed_number
from ..posterior import Site
from ..seeds import fold

_SEED_BOUND = 1 << 62


def new_seed() -> Tensor:
    """A seed from torch's global CPU generator, with the rank folded in when distributed."""
    seed = torch.randint(0, _SEED_BOUND, (), dtype=torch.int64, device="cpu")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # wraps around in int64; the noise mixes all bits of it
        seed = seed + fold(0, torch.distributed.get_rank())
    return seed


def as_seed(seed: int | Tensor | None) -> Tensor:
    """A seed given by a user as the int64 CPU scalar that scopes carry.

    Raises:
        ArgumentError: ``seed`` is neither None, nor an int in [0, 2**63), nor an integer scalar.
    """
    if seed is None:
        return new_seed()
    if isinstance(seed, Tensor):
        if seed.dim() != 0 or seed.dtype.is_floating_point or seed.device.type != "cpu":
            raise ArgumentError(
                "seed must be an int or an integer CPU tensor with no dimension, got a "
                f"{seed.dtype} tensor of shape {tuple(seed.shape)} on {seed.device}."
            )
        return seed.to(torch.int64)
    return torch.tensor(seed_number(seed), dtype=torch.int64, device="cpu")


def distinct_keys(found: list[Site]) -> dict[int, int]:
    """Noise keys for parts that were converted apart and share a name; by slot, usually none."""
    seen: dict[int, int] = {}
    keys: dict[int, int] = {}
    for site in found:
        count = seen[site.slot.key] = seen.get(site.slot.key, -1) + 1
        if count:
            keys[site.slot.uid] = fold(site.slot.key, count)
    return keys
