"""What happens around every command: warnings, errors and exit codes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

USAGE = 2
FAILURE = 1
INTERRUPTED = 130


@contextmanager
def guard(debug: bool) -> Iterator[None]:
    """Turn an exception into a red panel on stderr and an exit code: 2 wrong usage, 1 failure."""
    from ..errors import (
        ArgumentError,
        BayesifyError,
        BiasBeforeNormWarning,
        NoMatchWarning,
        SigmaBelowSpacingWarning,
    )
    from . import render

    try:
        with warnings.catch_warnings():
            # commands print a plan's notes
            for kind in (NoMatchWarning, BiasBeforeNormWarning, SigmaBelowSpacingWarning):
                warnings.simplefilter("ignore", kind)
            warnings.showwarning = lambda message, *_args, **_kwargs: render.note(str(message))
            yield
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except KeyboardInterrupt as interrupt:
        render.error(str(interrupt) or "Interrupted. What was being written is not there.")
        raise typer.Exit(INTERRUPTED) from None
    except BayesifyError as error:
        if debug:
            raise
        render.error(_message(error))
        raise typer.Exit(USAGE if isinstance(error, ArgumentError) else FAILURE) from None
    except Exception as error:
        if debug:
            raise
        if type(error).__name__ == "OutOfMemoryError":
            render.error(f"{error}\nLower --batch-size, or compute in bfloat16: --amp.")
            raise typer.Exit(FAILURE) from None
        render.error(f"{type(error).__name__}: {error}\nRun it with --debug to see where.")
        raise typer.Exit(FAILURE) from None


def _message(error: Exception) -> str:
    """What the error says, without the traceback that a worker process of a DataLoader adds."""
    text = str(error).rstrip()
    if not text.startswith("Caught ") or "in DataLoader worker" not in text.partition("\n")[0]:
        return text
    return text.rpartition(f"{type(error).__name__}: ")[2]
