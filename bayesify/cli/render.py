"""What the commands print. Tables go to stdout; notes, progress and errors to stderr."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.syntax import Syntax
from rich.table import Table

from ..json_numbers import finite

Cell = str | int | float | None


_PIPED_WIDTH = 120
"""Width where there is no terminal and the environment variable COLUMNS is not set."""


def _out() -> Console:
    return _console(stderr=False)


def _err() -> Console:
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPED_WIDTH
    return console


def text(message: str) -> None:
    """Print a plain line."""
    _out().print(message, markup=False, soft_wrap=True)


def as_json(value: Any) -> None:
    """Print one JSON document; a number that is not finite, which JSON lacks, becomes null."""
    print(json.dumps(finite(value), indent=2, allow_nan=False))


def note(message: str) -> None:
    """Print what the user should know, in yellow."""
    _err().print(f"[yellow]note:[/] {escape(message)}", style="yellow", soft_wrap=True)


def error(message: str) -> None:
    """Print why it failed, in a red panel."""
    _err().print(Panel(escape(message), title="error", title_align="left", border_style="red"))


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """Print a table; numbers are aligned to the right, names are folded and never cut off."""
    shown = [list(row) for row in rows]
    grid = Table(header_style="bold", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, column in enumerate(columns):
        numbers = all(isinstance(row[index], int | float | None) for row in shown)
        grid.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in shown:
        grid.add_row(*(escape(cell_text(cell)) for cell in row))
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
    out = _out()
    out.print(f"[bold]{escape(title)}[/]")
    if out.is_terminal:
        out.print(Syntax(source, language, background_color="default", word_wrap=True))
    else:
        text(source)


@contextmanager
def status(message: str) -> Iterator[None]:
    """Show on a terminal that something is going on."""
    with _err().status(escape(message)):
        yield


class Bar:
    """A progress bar."""

    def __init__(self, progress: Progress, message: str, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task(message, total=total)

    def to(self, completed: int, total: int | None = None, message: str | None = None) -> None:
        """Move the bar to ``completed``."""
        self._progress.update(
            self._task, completed=completed, total=total, description=message or None
        )

    def say(self, message: str) -> None:
        """Print a line above the bar, which stays."""
        self._progress.console.print(message, markup=False)


@contextmanager
def progress(message: str, total: int | None = None) -> Iterator[Bar]:
    """A progress bar on stderr; without a terminal only what it is told to say is printed."""
    console = _err()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as shown:
        yield Bar(shown, escape(message), total)
