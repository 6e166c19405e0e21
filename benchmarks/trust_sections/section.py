"""What a section of trust.py is."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bayesify import BayesifyError

FAULT = "fault"
"""How the outcome of a trial begins that shows a fault."""
TRACE = "TRUST_TRACE"
"""An environment variable: if it is set, faults show their traceback."""
Trial = Callable[[int], str]
"""Carries out the trial of a number, and says in a few words how it ended. A number always means
the same trial."""


@dataclass(frozen=True)
class Section:
    """One thing that is tried many times.

    Args:
        name: On the command line and in the result file.
        what: What a trial does, for people.
        share: Trials of a run without further arguments.
        full: Trials of the whole.
        prepare: Given an empty folder, makes what the trials need, and gives the trial.
        seconds: After this a trial counts as hanging, and its process is killed.
        slow: Seconds of a processor above which a trial counts as a fault.
        large: MiB of a trial above which it counts as a fault.
        kept: Each trial's outcome and measures are shown, not only their counts.
    """

    name: str
    what: str
    share: int
    full: int
    prepare: Callable[[Path], Trial]
    seconds: float = 60.0
    slow: float = 5.0
    large: float = 1024.0
    kept: bool = False


def judged(call: Callable[[], object]) -> str:
    """How a call ended that opens something damaged: taken, refused, or with a fault."""
    try:
        with nothing_executed() as executed:
            call()
        outcome = "taken"
    except BayesifyError as error:
        if not str(error).strip():
            return f"{FAULT}: {type(error).__name__} without a message"
        outcome = "refused"
    except Exception as error:
        if os.environ.get(TRACE):
            traceback.print_exc()
        text = f"{FAULT}: {type(error).__name__}: {error}"
        outcome = text.splitlines()[0][:300]
    return f"{FAULT}: executed {executed[0]}" if executed else outcome


# What code of a stranger would do first, and what opening a file never does.
_EVENTS = frozenset({
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen",
    "socket.connect", "pickle.find_class", "webbrowser.open",
})  # fmt: skip
_OPEN: list[list[str]] = []
_HOOKED: list[bool] = []


def _look(event: str, arguments: object) -> None:
    if _OPEN and event in _EVENTS:
        _OPEN[-1].append(f"{event} {arguments!r:.200}")


@contextmanager
def nothing_executed() -> Iterator[list[str]]:
    """What Python's audit events say of programs started, sockets and pickles in the block."""
    if not _HOOKED:
        sys.addaudithook(_look)
        _HOOKED.append(True)
    found: list[str] = []
    _OPEN.append(found)
    try:
        yield found
    finally:
        _OPEN.pop()
