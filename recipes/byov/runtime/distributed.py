"""The processes of a run: one alone, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from bayesify import ArgumentError, torch_support


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """The average over all processes."""
        if self.size == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value / self.size

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        if self.size == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value.item())

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, one CUDA device for each; alone without it.

    Raises:
        ArgumentError: There is no such device here.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    try:
        if device == "auto":
            device = str(torch_support.accelerator() or "cpu")
        found = torch.device(device)
        if size > 1 and found.type == "cuda":
            found = torch.device("cuda", local)
        torch.empty(0, device=found)
    except Exception as error:  # an unknown name, no driver, no such index: each another kind
        reason = str(error).splitlines()[0]
        raise ArgumentError(f"device {device!r} cannot be used here: {reason}") from error
    if size == 1:
        yield World(0, 1, found)
        return
    if found.type == "cuda":
        torch.cuda.set_device(found)
    dist.init_process_group(
        "nccl" if found.type == "cuda" else "gloo", timeout=timedelta(minutes=30)
    )
    try:
        yield World(dist.get_rank(), dist.get_world_size(), found)
    finally:
        dist.destroy_process_group()
