"""Worker processes that read data: they end when their parent does, or when it says so."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from .signals import ASKING
from .torch_private import forget_workers

_Item = TypeVar("_Item", covariant=True)


class Loader(DataLoader[_Item]):
    """A DataLoader whose workers do not answer to Ctrl-C, SIGTERM and SIGHUP.

    A terminal and torchrun send these to a whole process group, Slurm and systemd to every process
    of a job. A worker that died of one would end the training before it has saved its state. So
    workers go on until their process ends them, by SIGKILL if need be, or has died.
    """

    def __init__(self, dataset: Any, batch_size: int | None = 1, **options: Any) -> None:
        start = _leave_signals_to_parent
        super().__init__(dataset, batch_size, worker_init_fn=start, **options)

    def __iter__(self) -> Any:
        if self.num_workers == 0:
            return super().__iter__()
        with _blocked():  # a new process has the mask, so that no signal comes too early for it
            batches = super().__iter__()
        for worker in getattr(batches, "_workers", ()):
            worker._popen.terminate = partial(_kill, worker._popen, weakref.ref(batches))
        return batches


def _kill(worker: Any, reference: weakref.ref[Any]) -> None:
    batches = reference()
    if batches is not None and batches._worker_pids_set:  # else torch calls this end a failure
        forget_workers(id(batches))
        batches._worker_pids_set = False
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
