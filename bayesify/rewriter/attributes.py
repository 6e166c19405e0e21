"""Plain attributes that a traced method reads and assigns.

What it reads is noted as a guard: the graph holds for that value. What it assigns, the graph
assigns too, unless it is a cache.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from .. import torch_private
from . import caches
from .guards import (
    INTERNAL,
    MISSING,
    PRIMITIVES,
    Guard,
    copy_plain,
    held,
    holds_tensor,
    plain,
)
from .randomness import has_random_numbers
from .recording import Recording
from .values import StateFound, TracedNumber, TracedParts, TracedSize, TraceFailure
from .writer import Expression, access


class Attributes:
    """Notes what a traced method does with attributes of the owner and of the modules below it.

    Invariant: an attribute has a guard with the value that it had before the trace, or the method
    has assigned it before it read it, or it is a tensor, which the graph reads from the module.

    Args:
        recording: The trace.
        hiding: Of the caches that modules keep outside of their buffers.
    """

    def __init__(self, recording: Recording, hiding: caches.Hiding) -> None:
        self.recording = recording
        self.guards = recording.guards
        self.hiding = hiding
        self._written: set[tuple[tuple[str, ...], str]] = set()
        self._unkept: list[tuple[nn.Module, str, Any]] = []  # objects made of draws

    def read(self, module: nn.Module, name: str, value: Any) -> None:
        """A plain attribute was read."""
        path = self.recording.paths.get(id(module))
        if (id(module), name) in self.hiding.by_train:
            raise TraceFailure(f"it reads {name!r}, which train() makes")
        if path is None or (path, name) in self.guards:
            return
        if name in ("_modules", "_parameters", "_buffers"):
            self.guards[path, name] = Guard(path, name, tuple(value), "keys")
            return
        own = object.__getattribute__(module, "__dict__")
        if name in INTERNAL or (path, name) in self._written:
            return
        if name not in own:
            self._note_of_class(module, path, name, value)
            return
        if (id(module), name) in self.hiding.names:
            self.hiding.read(module, name)
            return
        if isinstance(value, Tensor):
            return
        if type(value) in (TracedSize, TracedParts) or isinstance(value, TracedNumber):
            return
        if has_random_numbers(value):
            raise TraceFailure(f"it takes random numbers of its {type(value).__name__} {name!r}")
        if plain(value):
            copy = value if isinstance(value, PRIMITIVES) else copy_plain(value)
            self.guards[path, name] = Guard(path, name, copy, "equal")
        elif not holds_tensor(value) and not isinstance(value, dict):
            self.guards[path, name] = Guard(path, name, value, "same")

    def _note_of_class(
        self, module: nn.Module, path: tuple[str, ...], name: str, value: Any
    ) -> None:
        """A plain attribute of a module's class was read, which an instance may come to have."""
        if plain(value) and not hasattr(nn.Module, name):
            if inspect.getattr_static(type(module), name, MISSING) is value:  # no property
                copy = value if isinstance(value, PRIMITIVES) else copy_plain(value)
                self.guards[path, name] = Guard(path, name, copy, "class")

    def absent(self, module: nn.Module, name: str) -> None:
        """A plain attribute was asked for that is not there."""
        path = self.recording.paths.get(id(module))
        if (id(module), name) in self.hiding.names:
            self.hiding.read(module, name)
        elif path is not None and (path, name) not in (*self.guards, *self._written):
            found = held(module, name)
            if found is None or found is MISSING:
                self.guards[path, name] = Guard(path, name, found, "equal")

    def assigned(self, module: nn.Module, name: str, value: Any) -> None:
        """An attribute was assigned: the generated code assigns it too, unless it is a cache."""
        recording = self.recording
        path = recording.paths.get(id(module))
        if id(module) in recording.made and not isinstance(value, Tensor | nn.Module):
            return
        if path is None or name in INTERNAL:
            raise TraceFailure(f"it assigns {name!r} of a module that it does not hold")
        if name in module._parameters or name in module._modules:
            raise TraceFailure(f"it replaces {name!r}, a parameter or a module")
        if isinstance(value, nn.Module | nn.Parameter):
            raise TraceFailure(f"it adds {name!r}, a parameter or a module")
        self._written.add((path, name))
        if (id(module), name) in self.hiding.names:
            self.hiding.written(module, name)
            self._check_cache(module, name, value)
            if not isinstance(value, Tensor):
                self._unkept.append((module, name, value))
            return
        target = Expression(access(path))
        with torch_private.DisableTorchFunction():
            if recording.made_of_draws(value):
                if not isinstance(value, Tensor):
                    self._unkept.append((module, name, value))
                return  # a cache: kept, it would outlive its draw
            recording.node("call_function", setattr, (target, name, recording.passed(value)))

    def check_caches(self) -> None:
        """Refuse a cache into which, since it was assigned, something of an argument was put."""
        for module, name, value in self._unkept:
            self._check_cache(module, name, value)

    def _check_cache(self, module: nn.Module, name: str, value: Any) -> None:
        """What is made of an argument is no cache."""
        if self.recording.depends_on_argument(value):
            if (id(module), name) not in self.hiding.names:
                raise TraceFailure(f"it fills its {name!r} with what depends on an argument")
            caches.note_state(module, name)
            raise StateFound(f"its attribute {name!r} carries state from call to call")
