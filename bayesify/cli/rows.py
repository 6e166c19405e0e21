"""Rows of predictions, written as they come: to a .csv or .json file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from .render import printable

_FORMULA = ("=", "+", "-", "@")


class Rows(Protocol):
    """Takes one row at a time."""

    def __call__(self, row: Mapping[str, Any]) -> None: ...


@contextmanager
def written_rows(path: Path, *, overwrite: bool) -> Iterator[Rows]:
    """A function that writes a row; the file is there after the block, whole, or not at all.

    In a .csv file the probabilities of the classes have a column each, control characters are
    escaped, and a text that a spreadsheet would run as a formula begins with an apostrophe. A .json
    file has every text as it is.
    """
    from ..storage import replacing

    with (
        replacing(path, overwrite=overwrite) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        if path.suffix == ".csv":
            lines = _CSV(csv.writer(file))
            yield lines
            lines.end()
            return
        file.write("[")
        count = 0

        def add(row: Mapping[str, Any]) -> None:
            nonlocal count
            file.write(",\n" if count else "\n")
            file.write(json.dumps(row))
            count += 1

        yield add
        file.write("\n]\n")


class _CSV:
    """Rows as lines; the columns of the classes are known once an image was read."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._columns: list[str] = []
        self._early: list[Mapping[str, Any]] = []

    def __call__(self, row: Mapping[str, Any]) -> None:
        if not self._columns:
            self._early.append(row)
            if row.get("probabilities", ()) is not None:
                self.end()
            return
        flat = {**row, **_by_class(row)}
        self._writer.writerow(_cell(flat.get(name)) for name in self._columns)

    def end(self) -> None:
        """Write what waits for the columns."""
        if self._early:
            last = self._early[-1]
            self._columns = [*(k for k in last if k != "probabilities"), *_by_class(last)]
            self._writer.writerow(map(_cell, self._columns))
            early, self._early = self._early, []
            for row in early:
                self(row)


def _by_class(row: Mapping[str, Any]) -> dict[str, Any]:
    return {f"p({name})": p for name, p in (row.get("probabilities") or {}).items()}


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = printable(value)
    return "'" + text if text.startswith(_FORMULA) else text
