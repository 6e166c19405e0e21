"""Signals that ask for an end: Ctrl-C, SIGTERM, and SIGHUP of a terminal that was closed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ASKING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class Signals:
    """Whether a signal has asked for an end."""

    requested = False

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        # A scheduler and torchrun may each send SIGTERM, so that several of them ask for one end.
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def waiting_signals(wanted: bool = True) -> Iterator[Signals]:
    """In the block, Ctrl-C, SIGTERM and SIGHUP only set a flag, so that a step is never cut in two.

    Ctrl-C after one of them is not waited for: it raises ``KeyboardInterrupt``. A signal that is
    ignored, as under nohup, stays so. Where signals cannot be caught, outside the main thread, they
    do what they always do.

    Args:
        wanted: Without it the block is an ordinary one.
    """
    signals = Signals()
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {
        number: signal.signal(number, signals._ask)
        for number in ASKING
        if signal.getsignal(number) not in (signal.SIG_IGN, None)
    }
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
