"""Worker processes that read data: they end when their parent does, or when it says so."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from torch.utils.data import DataLoader
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from .signals import ASKING

_Item = TypeVar("_Item", covariant=True)


class Loader(DataLoader[_Item]):
    """A DataLoader whose workers do not answer to Ctrl-C, SIGTERM and SIGHUP.

    A terminal and torchrun send these to a whole process group, Slurm and systemd to every process
    of a job. A worker that died of one would end the training before it has saved its state. So
    workers go on until their process ends them, by SIGKILL if need be, or has died.
    """

    def __init__(self, dataset: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(dataset, *args, worker_init_fn=_leave_signals_to_parent, **kwargs)

    def __iter__(self) -> Any:
        if self.num_workers == 0:
            return super().__iter__()
        with _blocked():  # a new process has the mask, so that no signal comes too early for it
            batches = super().__iter__()
        for worker in getattr(batches, "_workers", ()):
            worker._popen.terminate = partial(_kill, worker._popen, id(batches))
        return batches


def _kill(worker: Any, batches: int) -> None:
    with suppress(ValueError):  # ValueError: it was shut down in good order
        _remove_worker_pids(batches)  # else torch calls this end a failure
    worker.kill()


def _leave_signals_to_parent(_worker: int) -> None:
    for number in ASKING:
        # a handler, since what is ignored would be so in programs that a data set starts, too
        signal.signal(number, lambda *_: None)
        if hasattr(signal, "siginterrupt"):
            signal.siginterrupt(number, False)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # torch's own watch takes five seconds, and sees no death where a server has forked the worker
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _blocked() -> Iterator[None]:
    """Signals that ask for an end come after the block."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
