"""What `zoo_others.py` needs of a model: how it is built, and the arguments of one call."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

Call = tuple[tuple[Any, ...], dict[str, Any]]
Built = tuple[nn.Module, Callable[[int], Call]]
"""A model, and from a batch size to the arguments of one call."""


@dataclass(frozen=True)
class Entry:
    """A model that can be checked.

    Attributes:
        library: The table of names that it is from, such as ``zuko`` or ``transformers:CTC``.
        name: Its name there.
        make: Builds it.
        batches: The batch sizes of the check.
        prepare: Called with the perturbed model before it is converted.
    """

    library: str
    name: str
    make: Callable[[], Built]
    batches: tuple[int, ...] = (3,)
    prepare: Callable[[nn.Module], object] | None = None

    @property
    def key(self) -> str:
        return f"{self.library}:{self.name}"


ENTRIES: dict[str, Entry] = {}


def entry(library: str, name: str, **options: Any) -> Callable[[Callable[[], Built]], Any]:
    """Puts a function that builds a model into :data:`ENTRIES`."""

    def put(make: Callable[[], Built]) -> Callable[[], Built]:
        new = Entry(library, name, make, **options)
        if new.key in ENTRIES:
            raise KeyError(f"{new.key} is there twice")
        ENTRIES[new.key] = new
        return make

    return put


def lib(name: str) -> ModuleType:
    """A module of a library that need not be installed."""
    return importlib.import_module(name)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers that depend on the shape and the seed only."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + shape[0]))


def integers(high: int, *shape: int, low: int = 0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + shape[0])
    return torch.randint(low, high, shape, generator=generator)


def takes(*shape: int) -> Callable[[int], Call]:
    """A call with one tensor of normal numbers, (batch, *shape)."""
    return lambda batch: ((noise(batch, *shape),), {})


class Calls(nn.Module):
    """A model whose forward is a method of its own, or a function of it.

    Args:
        inner: The model.
        run: Called with it and with the arguments of the call.
    """

    def __init__(self, inner: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.inner = inner
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.inner, *args, **kwargs)
