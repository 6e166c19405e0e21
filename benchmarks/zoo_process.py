"""One check of one model in a process of its own, with a time limit."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def _work(check: Callable[..., Row], args: tuple[Any, ...], out: Connection) -> None:
    """Run one check and send what it found; an error is a finding too."""
    import gc
    import warnings

    import torch

    gc.disable()  # one model, then the process ends
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    try:
        found = check(*args)
    except BaseException as error:  # also what a trace raises, which a model must not catch
        found = {"problems": [said(error)]}
    out.send(found | {"seconds": round(time.perf_counter() - start, 1)})
    out.close()


def said(error: BaseException) -> str:
    """The kind of an error, where it was raised, and its first line."""
    first = (str(error).strip().splitlines() or [""])[0][:200]
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(at.filename).name}:{at.lineno}: {first}"


class Job:
    """A check of one model that runs in its own process.

    Args:
        name: The model.
        check: A function of a module; what it returns is the finding.
        args: Its arguments.
        limit_s: After so many seconds the process is ended.
    """

    def __init__(
        self, name: str, check: Callable[..., Row], args: tuple[Any, ...], limit_s: int
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        self.name, self.limit_s = name, limit_s
        self.pipe, there = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(check, args, there))
        self.process.start()
        there.close()
        self.deadline = time.monotonic() + limit_s

    def result(self) -> Row | None:
        """What it found, or None while it runs."""
        if self.pipe.poll():
            try:
                found: Row = self.pipe.recv()
            except EOFError:
                self.process.join()
                found = {"problems": [f"the process ended with {self.process.exitcode}"]}
        elif time.monotonic() > self.deadline:
            self.process.kill()
            found = {"problems": [f"not done after {self.limit_s} s"]}
        else:
            return None
        self.process.join()
        self.pipe.close()
        return found
