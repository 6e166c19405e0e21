"""The global random states of torch, numpy and Python in a fit: seeded, kept, put back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class RandomState(NamedTuple):
    """All that decides the next random numbers: torch's states, and the others as JSON."""

    tensors: dict[str, Tensor]
    others: dict[str, Any]


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch, numpy and Python in the block, and give back the old states after it."""
    before = current(device)
    try:
        seed_all(seed, device)
        yield
    finally:
        restore(before, device)


def seed_all(seed: int, device: torch.device | None = None) -> None:
    """Seed the global generators of the CPU, and of ``device`` if it is a CUDA device."""
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % (1 << 32))  # noqa: NPY002  # what other people's transforms use


def current(device: torch.device) -> RandomState:
    """The present states."""
    version, numbers, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    key = legacy["state"]["key"].tolist()
    others = {
        "python": [version, list(numbers), gauss],
        "numpy": {**legacy, "state": {"key": key, "pos": int(legacy["state"]["pos"])}},
    }
    return RandomState(torch_state(device), others)


def torch_state(device: torch.device) -> dict[str, Tensor]:
    """Torch's states alone: cheap enough for every step."""
    tensors = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def restore(state: RandomState, device: torch.device) -> None:
    """Put states back that :func:`current` gave."""
    torch.set_rng_state(state.tensors["cpu"])
    if device.type == "cuda" and "cuda" in state.tensors:
        torch.cuda.set_rng_state(state.tensors["cuda"], device)
    version, numbers, gauss = state.others["python"]
    random.setstate((version, tuple(numbers), gauss))
    legacy = state.others["numpy"]
    inner = legacy["state"]
    key = np.array(inner["key"], dtype=np.uint32)
    np.random.set_state({**legacy, "state": {"key": key, "pos": inner["pos"]}})  # noqa: NPY002
