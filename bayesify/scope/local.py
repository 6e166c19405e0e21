"""What each thread knows of its own: the scope of the call that runs in it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from .drawing import Scope


class _Local(threading.local):
    def __init__(self) -> None:
        self.scope: Scope | None = None
        self.on_checkpoint: Callable[[], None] | None = None
        self.reads: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


LOCAL = _Local()
