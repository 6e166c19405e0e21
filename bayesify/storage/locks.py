"""Files that one process holds at a time; the system frees them when it dies."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]

_held: set[int] = set()


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file ``path`` in the block; it is removed afterwards.

    Where the file system has no locks the block is an ordinary one.

    Args:
        path: The lock file.
        what: What it protects, for the message.

    Raises:
        CheckpointError: Another process, or another block of this one, holds it; or it cannot be
            made.
    """
    try:
        handle = acquire(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error}).") from error
    if handle is None:
        owner = path.read_text("utf-8", "replace").strip() if path.exists() else ""
        raise CheckpointError(
            f"{what} is in use by {owner or 'another process'}: wait until it has ended, or take "
            "another name."
        )
    try:
        yield
    finally:
        release(handle, path)


def acquire(path: Path) -> int | None:
    """Take a lock file, made if need be; None if somebody has it.

    Raises:
        OSError: The file cannot be made.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not _lock(handle):
            os.close(handle)
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                break
        os.close(handle)  # its owner has removed it just now
    if not _held:
        _register()
    _held.add(handle)
    with suppress(OSError):
        os.truncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {platform.node()}\n".encode())
    return handle


def release(handle: int, path: Path) -> None:
    """Give up a lock file and remove it."""
    _held.discard(handle)
    path.unlink(missing_ok=True)
    os.close(handle)


def _lock(handle: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _register() -> None:
    global _registered
    if not _registered and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget)
        _registered = True


_registered = False


def _forget() -> None:
    """A child would hold the locks of its parent beyond the parent's death."""
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()
