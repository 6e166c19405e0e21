"""Processes for trials that end badly: forks of one that has imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WRITES = frozenset({
    "open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate",
})  # fmt: skip
"""Audit events of Python that change what is in a folder; ``open`` only if it is to write."""
_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def preload() -> None:
    """Import what the commands import, so that a fork need not; one thread, which forks keep."""
    import importlib

    import torch

    torch.set_num_threads(1)
    for name in (
        "timm", "torchvision.transforms.v2", "torchvision.datasets.folder", "torch.export",
        "torch.utils.flop_counter", "torch._dynamo", "torch.distributed.fsdp", "rich.progress",
        "matplotlib.backends.backend_agg", "jinja2", "bayesify.training", "bayesify.report",
        "bayesify.export", "bayesify.cli.app", "bayesify.cli.render", "recipes.byov.cli",
        "recipes.byov.train",
    ):  # fmt: skip
        importlib.import_module(name)


class Child:
    """A fork with a group of its own.

    Args:
        work: What it does; its exit code is what this returns.
        log: Where its stdout and stderr go.
    """

    def __init__(self, work: Callable[[], int], log: Path) -> None:
        self.log = log
        self._process = multiprocessing.get_context("fork").Process(target=_begin, args=(work, log))
        self._process.start()
        self.pid: int = self._process.pid or 0

    def send(self, number: int, *, group: bool = False) -> None:
        """A signal to the process or to its group; nothing if it has ended."""
        try:
            (os.killpg if group else os.kill)(self.pid, number)
        except ProcessLookupError:
            if group:  # it has not made its group yet
                self.send(number)

    def wait(self, seconds: float = 180.0) -> int | None:
        """The exit code, or minus the signal that ended it; None if it still runs, and it is
        killed then."""
        self._process.join(seconds)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            self._process.join()
        return code

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def said(self) -> str:
        """What it has printed, in one line and without frames."""
        text = self.log.read_text("utf-8", "replace") if self.log.exists() else ""
        return " ".join(re.sub("[─│╭╮╰╯]", " ", text).split())

    def left(self) -> list[int]:
        """Processes of its group that still run."""
        return [pid for pid, group in _running() if group == self.pid]


def _begin(work: Callable[[], int], log: Path) -> None:
    import torch

    try:
        os.setpgid(0, 0)
        # renews torch's pool of threads, which two threads of a fork may do at once, and abort
        torch.set_num_threads(1)
        multiprocessing.set_start_method("fork", force=True)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for number in (1, 2):
            os.dup2(handle, number)
        sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
        code = work()
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 99
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            pass
    os._exit(code)


def _running() -> list[tuple[int, int]]:
    """(process, group) of each process of this machine that is no zombie."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, _, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if state != "Z":
                found.append((int(folder.name), int(group)))
    return found


def command(arguments: Sequence[object]) -> int:
    """Run ``bayesify`` with these arguments in this process; its exit code."""
    from bayesify.cli import app

    os.environ |= {"COLUMNS": "4000", "NO_COLOR": "1", "TERM": "dumb"}
    sys.argv = ["bayesify", *map(str, arguments)]
    try:
        app.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def broken_rule(code: int | None, child: Child) -> str | None:
    """In what a command has broken the rule of exit codes and errors, if it has.

    0, 1, 2, 3 or 130; an error is shown once, of a kind of bayesify's, and without a traceback.
    """
    text = child.log.read_text("utf-8", "replace") if child.log.exists() else ""
    if code is None:
        return f"it hangs: {child.said()[-300:]}"
    if code not in (0, 1, 2, 3, 130):
        return f"exit code {code}: {child.said()[-300:]}"
    if "Traceback" in text:
        return f"a traceback: {child.said()[-400:]}"
    if "Run it with --debug" in text:
        return f"a foreign error: {child.said()[-400:]}"
    errors = len(re.findall(r"^╭─+ [eE]rror ─", text, re.MULTILINE))
    errors += len(re.findall(r'^  "error": \{$', text, re.MULTILINE))
    if errors != (code in (1, 2, 130)):
        return f"exit code {code} with {errors} errors: {child.said()[-400:]}"
    return None


class Writes:
    """Counts in this process what changes a folder, and may kill it right before one of these.

    Args:
        folder: The folder.
        kill_at: The number of the event before which SIGKILL comes, from 0; None: never.
        number: The signal.
    """

    def __init__(
        self, folder: Path, kill_at: int | None = None, number: int = signal.SIGKILL
    ) -> None:
        self._folder, self._kill_at, self._number = str(folder), kill_at, number
        self._process = os.getpid()
        self.count = 0
        sys.addaudithook(self._look)

    def _look(self, event: str, arguments: Any) -> None:
        if event not in WRITES or os.getpid() != self._process:
            return
        if event == "open" and not (arguments[2] or 0) & _TO_WRITE:
            return
        if not str(arguments[0]).startswith(self._folder):
            return
        if self.count == self._kill_at:
            os.kill(self._process, self._number)
        self.count += 1


def wait_for(condition: Callable[[], Any], seconds: float) -> bool:
    """Whether a condition becomes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True
