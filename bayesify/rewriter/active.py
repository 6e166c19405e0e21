"""The trace that a thread is in, and what holds while it is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from ..torch_private import FakeTensorMode


class Tracer(Protocol):
    """What a trace is for those who meet it: patches of torch, examples, and its own errors."""

    made: dict[int, nn.Module]
    """Modules that the traced method itself has made, by identity."""

    def note_error(self, error: BaseException) -> None:
        """The trace has raised an error."""

    def made_of_data(self, tensor: Tensor) -> Tensor:
        """A tensor was made of data outside of torch."""

    def call_module(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
        call: Callable[..., Any] | None = None,
    ) -> Any:  # fmt: skip
        """A submodule is called; ``call``: of this, not of its own ``__call__``."""

    def call_opaque(
        self, function: Any, run: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """An autograd or scripted function is called."""

    def note_read(self, module: nn.Module, name: str, value: Any) -> None:
        """An attribute was read."""

    def note_absent(self, module: nn.Module, name: str) -> None:
        """An attribute was asked for that is not there."""

    def note_write(self, module: nn.Module, name: str, value: Any) -> None:
        """An attribute was assigned."""


class _Active(threading.local):
    def __init__(self) -> None:
        self.tracer: Tracer | None = None
        self.exchange: Callable[[Any], Any] | None = None
        self.exchanged: frozenset[int] = frozenset()  # modules whose parameters read as draws
        self.fake_mode: FakeTensorMode | None = None
        self.hooked = False
        self.patched = False
        # functions of autograd: of which apply has begun and with which grad mode, and of which
        # a call was recorded
        self.applied: tuple[Any, bool] | None = None
        self.recorded: Any = None


ACTIVE = _Active()
