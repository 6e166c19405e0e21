"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import platform
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ..errors import CheckpointError
from .locks import acquire, release

_HOST = re.sub(r"[^A-Za-z0-9.-]", "_", platform.node())[:64]
_LOCK = "lock"


def check_target(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Whether a file can be written to ``path``, asked before long work.

    Returns:
        The path, with links resolved.

    Raises:
        CheckpointError: It exists; is a folder, a device or anything else that is no file; or its
            folder is missing or not writable.
    """
    try:
        target = Path(os.path.realpath(path))
        found = target.lstat()
    except (FileNotFoundError, NotADirectoryError):
        found = None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no name of a file ({error}).") from error
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise CheckpointError(f"{path} is a folder: give the name of a file in it.")
    if found is not None and not stat.S_ISREG(found.st_mode):
        raise CheckpointError(
            f"{path} is {_kind(found.st_mode)}, which a file would replace: give another name."
        )
    if not target.parent.is_dir():
        raise CheckpointError(f"There is no folder {target.parent} to write {target.name} into.")
    if found is not None and not overwrite:
        raise _exists(path)
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"{target.parent} is not writable: choose another folder for {target.name}."
        )
    return target


@contextmanager
def replacing(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary file that takes the place of ``path`` if the block ends without an error.

    It lies in a folder of its own beside ``path``, where others cannot read it. A file that is
    overwritten hands on its mode, and its owner where that is allowed. What writers that were
    killed have left in the folder is removed.

    Raises:
        CheckpointError: As :func:`check_target`; or the disk or safetensors refuses to write; or
            without ``overwrite`` somebody else has written ``path`` meanwhile.
    """
    target = check_target(path, overwrite=overwrite)
    _remove_strays(target.parent)
    try:
        with _own_folder(target.parent) as folder:
            temporary = folder / target.name
            with open(temporary, "xb") as empty:
                mode = stat.S_IMODE(os.fstat(empty.fileno()).st_mode)
            yield temporary
            os.chmod(temporary, mode)  # safetensors makes files that only their owner can read
            _sync(temporary)
            if overwrite:
                _take_after(temporary, target)
                os.replace(temporary, target)
            else:
                _move_to_free(temporary, target)
            _sync(target.parent)
    except FileExistsError as error:
        raise _exists(path) from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be written ({error}). Nothing is left of it."
        ) from error


@contextmanager
def _own_folder(parent: Path) -> Iterator[Path]:
    """A folder that is removed after the block, and by others once this process has died."""
    while True:
        folder = parent / f".{_HOST}.{os.getpid()}.{secrets.token_hex(8)}.tmp"
        folder.mkdir(mode=0o700)
        try:
            handle = acquire(folder / _LOCK)
        except FileNotFoundError:  # another process took it for a stray before it was locked
            continue
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if handle is not None:
            break
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        release(handle, folder / _LOCK)


def _remove_strays(parent: Path) -> None:
    """Remove the folders of processes of this machine that have died: nobody holds their lock."""
    named = re.compile(rf"\.{re.escape(_HOST)}\.\d+\.[0-9a-f]{{16}}\.tmp")
    for folder in [parent / e.name for e in os.scandir(parent) if named.fullmatch(e.name)]:
        with suppress(OSError):
            if not (folder / _LOCK).exists():
                folder.rmdir()
                continue
            handle = acquire(folder / _LOCK)
            if handle is not None:
                shutil.rmtree(folder, ignore_errors=True)
                release(handle, folder / _LOCK)


def _take_after(temporary: Path, target: Path) -> None:
    """Give a file the mode and, where that is allowed, the owner of the one that it replaces."""
    with suppress(FileNotFoundError):
        old = target.stat()
        with suppress(PermissionError):
            os.chown(temporary, old.st_uid, old.st_gid)
        os.chmod(temporary, stat.S_IMODE(old.st_mode))


def _move_to_free(temporary: Path, target: Path) -> None:
    """Move a file to a name that nobody has, or raise FileExistsError."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: an empty file holds the name
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(temporary, target)


def _exists(path: str | os.PathLike[str]) -> CheckpointError:
    return CheckpointError(
        f"{path} exists: give another name, or overwrite it (overwrite=True, --force)."
    )


def _kind(mode: int) -> str:
    kinds = {stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFIFO: "a pipe (FIFO)",
             stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a link that leads nowhere"}  # fmt: skip
    return kinds.get(stat.S_IFMT(mode), "no ordinary file")


def _sync(path: Path) -> None:
    """Make a file or the entries of a folder outlast a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
