"""Memory of draws, kept from one scope to the next: fresh pages cost as much as the noise."""

from __future__ import annotations

import itertools
import threading
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..torch_private import storage_use_count

_LOCK = threading.Lock()
_MOST = 4
_handles = itertools.count()
BY_HANDLE: WeakValueDictionary[int, Buffers] = WeakValueDictionary()
"""For operators, which take numbers and tensors alone."""


class Buffers:
    """Storages of one tensor's size that are handed out again once nobody else holds them.

    At most four of a dtype are kept, which is what a training step holds at once: the draw, what
    its backward needs, and two gradients, of which one is written over what the backward needs
    unless the step is compiled. Whoever keeps more gets memory of their own.
    """

    __slots__ = ("__weakref__", "_kept", "_like", "handle")

    def __init__(self) -> None:
        self.handle = next(_handles)
        BY_HANDLE[self.handle] = self
        self._kept: dict[torch.dtype, list[tuple[Tensor, torch.UntypedStorage]]] = {}
        self._like: tuple[int, torch.dtype] | None = None

    def take(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of the shape of ``like`` and a dtype, its own by default, with any content."""
        dtype = like.dtype if dtype is None else dtype
        with _LOCK:
            if self._like != (like.numel(), like.dtype):
                self._kept.clear()
                self._like = like.numel(), like.dtype
            kept = self._kept.setdefault(dtype, [])
            for tensor, storage in kept:
                if storage_use_count(storage._cdata) == 2:  # by this pair alone
                    # .data is a tensor of its own, whose version nobody has seen
                    same = tensor.shape == like.shape
                    return tensor.data if same else tensor.data.view(like.shape)
            with torch.inference_mode(False):  # else it could serve nothing but inference
                tensor = torch.empty(like.shape, dtype=dtype)
            if len(kept) < _MOST:
                kept.append((tensor, tensor.untyped_storage()))
                return tensor.data
            return tensor

    def kept(self) -> list[torch.UntypedStorage]:
        """What is kept at present."""
        return [storage for each in self._kept.values() for _, storage in each]

    def clear(self) -> None:
        """Keep nothing."""
        with _LOCK:
            self._kept.clear()
