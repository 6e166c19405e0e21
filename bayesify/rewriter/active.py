"""The trace that a thread is in, and what holds while it is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..torch_private import FakeTensorMode
    from .tracer import MethodTracer


class _Active(threading.local):
    def __init__(self) -> None:
        self.tracer: MethodTracer | None = None
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
