"""Where a command may write: all that it writes and reads is compared before it works."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path


def check_outputs(
    outputs: Mapping[str, Path | None],
    inputs: Mapping[str, str | Path | Iterable[str] | None],
    *,
    force: bool,
    state: Mapping[str, Path] | None = None,
    in_place: Mapping[str, str] | None = None,
) -> None:
    """Whether each output can be written without the loss of another file of the command.

    Args:
        outputs: By the option that names each; None where nothing is written.
        inputs: What the command reads, by its name on the command line: a file, a data set, or
            several. What is not there as a file or folder is passed over.
        force: Outputs may overwrite a file that exists.
        state: Further outputs, which have rules of their own on files that exist.
        in_place: By output, the input that it may replace under ``force``, being a newer state of
            it. It does so as a whole, in the end.

    Raises:
        ArgumentError: Two outputs are one file, or an output is an input.
        CheckpointError: An output cannot be written.
    """
    from ..errors import ArgumentError
    from ..storage import check_target

    written = {name: path for name, path in outputs.items() if path is not None}
    for path in written.values():
        check_target(path, overwrite=True)
    paths = [*written.items(), *(state or {}).items()]
    for index, (name, path) in enumerate(paths):
        for other, second in paths[:index]:
            if _same(path, second):
                raise ArgumentError(
                    f"{other} and {name} are the same file, {path}: give two names."
                )
        for read, found in _paths(inputs):
            renews = (in_place or {}).get(name) == read
            if os.path.exists(found) and _same(path, found) and not (renews and force):
                advice = ", or --force to replace it in the end" if renews else ""
                raise ArgumentError(
                    f"{name} is {read}, {path}, which would be lost: give another name{advice}."
                )
    for path in written.values():
        check_target(path, overwrite=force)


def check_folder(option: str, folder: Path, inputs: Mapping[str, str | Path | None]) -> None:
    """Whether files can be written into a folder, which need not exist yet.

    Raises:
        ArgumentError: It is a file, or a data set that the command reads.
        CheckpointError: It cannot be made or written into.
    """
    from ..errors import ArgumentError, CheckpointError

    try:
        real = Path(os.path.realpath(folder))
        real.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{option}: {folder} is no name of a folder ({error}).") from error
    for read, found in _paths(inputs):
        if os.path.exists(found) and _same(real, found):
            raise ArgumentError(f"{option} is {read}, {folder}: give a folder of its own.")
    there = next(place for place in (real, *real.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise ArgumentError(f"{option} needs a folder, and {there} is a file: give another name.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise CheckpointError(f"{there} is not writable: choose another folder for {option}.")


def _paths(
    inputs: Mapping[str, str | Path | Iterable[str] | None],
) -> Iterable[tuple[str, Path]]:
    """Each file or folder that is read, with its name on the command line."""
    for name, given in inputs.items():
        several = [given] if isinstance(given, str | Path) else given or ()
        yield from ((name, Path(os.path.expanduser(each))) for each in several)


def _same(first: Path, second: Path) -> bool:
    """Whether two names lead to one file, be it there or not."""
    try:
        return os.path.samefile(first, second)
    except OSError:  # one of them is not there yet
        return os.path.realpath(first) == os.path.realpath(second)
