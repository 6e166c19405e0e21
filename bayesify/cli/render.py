"""What the commands print. Tables go to stdout; notes, progress and errors to stderr.

Names come out of files of strangers: markup and emoji codes in a text are never interpreted, and
characters that steer a terminal are shown as escapes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from ..json_numbers import finite

Cell = str | int | float | None


_PIPED_WIDTH = 120
"""Width where there is no terminal and the environment variable COLUMNS is not set."""


def _out() -> Console:
    return _console(stderr=False)


def _err() -> Console:
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPED_WIDTH
    return console


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# Controls but for tab and newline, those that reverse the writing, what no encoding can hold.
_STEERING = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(message: str) -> str:
    """A text in which what steers a terminal is escaped as in Python: ESC is ``\\x1b``."""
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], message)


def text(message: str) -> None:
    """Print a plain line."""
    _out().print(printable(message), soft_wrap=True)


def as_json(value: Any) -> None:
    """Print one JSON document; a number that is not finite, which JSON lacks, becomes null."""
    print(json.dumps(finite(value), indent=2, allow_nan=False))


def note(message: str) -> None:
    """Print what the user should know, in yellow."""
    _err().print(f"note: {_plain(message)}", style="yellow", soft_wrap=True)


def error(message: str) -> None:
    """Print why it failed, in a red panel."""
    shown = Text(_plain(message))
    _err().print(Panel(shown, title="error", title_align="left", border_style="red"))


def trace(message: str) -> None:
    """Print a traceback."""
    _err().print(_plain(message), soft_wrap=True)


def _plain(message: str) -> str:
    """A message without the colours that libraries give theirs."""
    return printable(_COLOURS.sub("", message))


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """Print a table; numbers are aligned to the right, names are folded and never cut off."""
    shown = [list(row) for row in rows]
    grid = Table(header_style="bold", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, column in enumerate(columns):
        numbers = all(isinstance(row[index], int | float | None) for row in shown)
        grid.add_column(
            Text(printable(column)), justify="right" if numbers else "left", overflow="fold"
        )
    for row in shown:
        grid.add_row(*(Text(printable(cell_text(cell))) for cell in row))
    _out().print(grid)


def cell_text(cell: Cell) -> str:
    """A number in a form that people read: 1,234 and 0.0123."""
    if cell is None:
        return ""
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:.3g}" if isinstance(cell, float) else cell


def code(source: str, *, title: str, language: str = "python") -> None:
    """Print source code, coloured where there are colours."""
    out, source = _out(), printable(source)
    out.print(printable(title), style="bold")
    if out.is_terminal:
        out.print(Syntax(source, language, background_color="default", word_wrap=True))
    else:
        text(source)


@contextmanager
def status(message: str) -> Iterator[None]:
    """Show on a terminal that something is going on."""
    with _err().status(Text(printable(message))):
        yield


class Bar:
    """A progress bar."""

    def __init__(self, progress: Progress, message: str, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task(printable(message), total=total)

    def to(self, completed: int, total: int | None = None, message: str | None = None) -> None:
        """Move the bar to ``completed``."""
        shown = printable(message) if message else None
        self._progress.update(self._task, completed=completed, total=total, description=shown)

    def say(self, message: str) -> None:
        """Print a line above the bar, which stays."""
        self._progress.console.print(printable(message))


@contextmanager
def progress(message: str, total: int | None = None) -> Iterator[Bar]:
    """A progress bar on stderr; without a terminal only what it is told to say is printed."""
    console = _err()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as shown:
        yield Bar(shown, message, total)
