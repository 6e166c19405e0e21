"""What happens around every command: warnings, errors and exit codes.

== ==============================================================================================
0  done
1  failed: a file, the disk, the device, or a number that is not finite
2  wrong usage: an argument, a model or a data set cannot be used as given
3  done, but for inputs that could not be read: their rows say why, all others are there
130 ended by Ctrl-C, SIGTERM or SIGHUP; a fit goes on with --resume
== ==============================================================================================
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

FAILURE = 1
USAGE = 2
PARTIAL = 3
INTERRUPTED = 130


@contextmanager
def guard(debug: bool, *, json: bool = False) -> Iterator[None]:
    """Turn an exception into a message and an exit code, by the rule above.

    Args:
        debug: Show the traceback too.
        json: The message is a JSON document on stdout, ``{"error": {"kind", "message",
            "exit_code"}}``; else a red panel on stderr.
    """
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
    except (Exception, KeyboardInterrupt) as error:
        advice = ""
        code = FAILURE
        if isinstance(error, KeyboardInterrupt):
            code = INTERRUPTED
            message = str(error) or "Interrupted before anything was written. Start again."
        elif isinstance(error, BayesifyError):
            code = USAGE if isinstance(error, ArgumentError) else FAILURE
            message = _message(error)
        elif type(error).__name__ == "OutOfMemoryError":
            message = str(error)
            advice = "\nLower --batch-size, or compute in bfloat16: --amp."
        else:
            message = f"{type(error).__name__}: {error}"
            advice = "\nRun it with --debug to see where."
        if debug:
            render.trace(traceback.format_exc())
        if json:
            name = type(error).__name__
            render.as_json({"error": {"kind": name, "message": message, "exit_code": code}})
        elif not debug:
            render.error(message + advice)
        raise typer.Exit(code) from None


def _message(error: Exception) -> str:
    """What the error says, without the traceback that a worker process of a DataLoader adds."""
    text = str(error).rstrip()
    if not text.startswith("Caught ") or "in DataLoader worker" not in text.partition("\n")[0]:
        return text
    return text.rpartition(f"{type(error).__name__}: ")[2]
