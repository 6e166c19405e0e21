"""Memory of draws, kept from one scope to the next: fresh pages cost as much as the noise."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

_LOCK = threading.Lock()
_USE_COUNT: Any = torch._C._storage_Use_Count
_MOST = 3


class Buffers:
    """Storages of one size that are handed out again once nobody else holds them.

    At most three are kept, which is what a training step holds at once: the draw, what its
    backward needs, and a gradient. Whoever keeps more gets memory of their own.
    """

    __slots__ = ("_storages",)

    def __init__(self) -> None:
        self._storages: list[torch.UntypedStorage] = []

    def take(self, like: Tensor) -> Tensor:
        """A tensor of the shape and dtype of ``like``, contiguous, with any content."""
        size = like.numel() * like.element_size()
        with _LOCK:
            for storage in self._storages:
                if storage.nbytes() == size and _USE_COUNT(storage._cdata) == 1:
                    # a tensor of its own, whose version nobody has seen
                    return torch.empty(0, dtype=like.dtype).set_(
                        storage, 0, like.shape, _contiguous(like.shape)
                    )
            tensor = torch.empty(like.shape, dtype=like.dtype)
            self._storages = [s for s in self._storages if s.nbytes() == size]
            if len(self._storages) < _MOST:
                self._storages.append(tensor.untyped_storage())
            return tensor

    def clear(self) -> None:
        """Keep nothing."""
        with _LOCK:
            self._storages.clear()


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    strides, step = [], 1
    for side in reversed(shape):
        strides.append(step)
        step *= max(side, 1)
    return tuple(reversed(strides))
