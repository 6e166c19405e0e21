"""A device by its name, as options and arguments give it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import ArgumentError

if TYPE_CHECKING:
    import torch


def resolve_device(name: str) -> torch.device:
    """The device that a user named; ``auto`` is the accelerator that is there, else the CPU.

    Raises:
        ArgumentError: There is no such device here.
    """
    import torch

    from .torch_support import accelerator

    if name == "auto":
        return accelerator() or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # an unknown name, no driver, no such index: each another kind
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArgumentError(
            f"device {name!r} cannot be used here ({reason}): auto takes what there is."
        ) from error
    return device
