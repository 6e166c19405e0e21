"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import CheckpointError


def check_target(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Whether a file can be written to ``path``, asked before long work.

    Returns:
        The path, with links resolved.

    Raises:
        CheckpointError: It exists, is a folder, or its folder is missing or not writable.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise CheckpointError(f"{path} is a folder: give the name of a file in it.")
    if not target.parent.is_dir():
        raise CheckpointError(f"There is no folder {target.parent} to write {target.name} into.")
    if target.exists() and not overwrite:
        raise CheckpointError(
            f"{path} exists: give another name, or overwrite it (overwrite=True, --force)."
        )
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"{target.parent} is not writable: choose another folder for {target.name}."
        )
    return target


@contextmanager
def replacing(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary file that takes the place of ``path`` if the block ends without an error.

    Raises:
        CheckpointError: As :func:`check_target`; or the disk or safetensors refuses to write.
    """
    target = check_target(path, overwrite=overwrite)
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as empty:
            mode = stat.S_IMODE(os.fstat(empty.fileno()).st_mode)
        yield temporary
        os.chmod(temporary, mode)  # safetensors makes files that only their owner can read
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be written ({error}). Nothing is left of it."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Make a file or the entries of a folder outlast a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
