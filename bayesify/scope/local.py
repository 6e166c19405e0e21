"""What each thread knows of its own: the open scope and the modes of the blocks around it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from .drawing import Scope


class Mode:
    """An entry of the stack that ``sampled``, ``at_mean`` and ``one_draw`` push."""

    __slots__ = ("drawing", "modules", "scope")

    def __init__(self, modules: frozenset[int], drawing: bool, scope: Scope | None) -> None:
        self.modules = modules
        self.drawing = drawing
        self.scope = scope


class _Local(threading.local):
    def __init__(self) -> None:
        self.scope: Scope | None = None
        self.modes: tuple[Mode, ...] = ()
        self.on_checkpoint: Callable[[], None] | None = None
        self.reads: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


LOCAL = _Local()
