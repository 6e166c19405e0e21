"""The processes of a run: one alone, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from bayesify import BayesifyError, CheckpointError
from bayesify.devices import resolve_device
from bayesify.storage import locked


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
        BayesifyError: Another process has died.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    kind = device.partition(":")[0]
    if size > 1 and (kind == "cuda" or (kind == "auto" and torch.cuda.is_available())):
        device = f"cuda:{local}"
    found = resolve_device(device)
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
    except RuntimeError as error:
        if not _of_connection(error):
            raise
        reason = str(error).splitlines()[0]
        raise BayesifyError(
            f"Process {dist.get_rank()} of {size} has lost another one, which ended before its "
            f"time ({reason}). Look for its own message; the run goes on from the newest "
            "checkpoint with --resume."
        ) from error
    finally:
        dist.destroy_process_group()


@contextmanager
def alone(folder: Path, world: World) -> Iterator[None]:
    """A block in which no other run uses a folder, which is made if need be.

    Raises:
        CheckpointError: Another run does, in every process of this one.
    """
    made = not folder.exists()
    refusal: CheckpointError | None = None
    with ExitStack() as stack:
        if world.first:
            if made:
                stack.callback(_remove_if_empty, folder)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(folder / ".lock", f"The folder {folder}"))
            except OSError as error:
                refusal = CheckpointError(f"The folder {folder} cannot be made ({error}).")
            except CheckpointError as error:
                refusal = error
        if world.any(refusal is not None):
            raise refusal or CheckpointError(f"The folder {folder} is in use by another run.")
        yield


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _of_connection(error: RuntimeError) -> bool:
    """Whether the processes have lost each other; gloo has no error kind of its own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
