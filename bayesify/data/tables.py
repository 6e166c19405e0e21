"""Tables: rows of a CSV or Parquet file as numbers, coded as the training rows were."""

from __future__ import annotations

import csv
import difflib
import math
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ArgumentError, CheckpointError, DataError

SUFFIXES = (".csv", ".tsv", ".parquet")
MAX_CATEGORIES = 100
"""Different texts in a column; more are names of the rows, which say nothing of others."""
FEW = 10
"""A whole-number target with so many values at most is taken for classes."""

TargetKind = Literal["number", "class"]

_MISSING = frozenset({"", "na", "n/a", "nan", "null", "?"})
_LISTED = 5
_LARGEST = 1e30
"""Size of a number: squares of larger ones are infinite in float32."""


def is_table(name: str | os.PathLike[str]) -> bool:
    """Whether a name is that of a table."""
    return Path(name).suffix.lower() in SUFFIXES


@dataclass(frozen=True)
class Table:
    """A table as it is stored.

    Args:
        name: Its file.
        columns: The texts in each column, from top to bottom; all of one length, above 0.
    """

    name: str
    columns: Mapping[str, Sequence[str]] = field(repr=False)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def column(self, name: str, what: str = "column") -> Sequence[str]:
        """The texts in a column.

        Raises:
            DataError: There is no such column.
        """
        if name not in self.columns:
            nearest = difflib.get_close_matches(name, self.columns, n=1, cutoff=0.0)[0]
            raise DataError(
                f"{self.name} has no {what} {name!r}. Its columns are {_some(self.columns)}; the "
                f"nearest is {nearest!r}."
            )
        return self.columns[name]


def read_table(path: str | os.PathLike[str]) -> Table:
    """Read a table whose first line has the names of the columns.

    Args:
        path: A .csv or .tsv file in UTF-8, with commas, semicolons or tabs between the cells; or a
            .parquet file, which pyarrow reads.

    Raises:
        DataError: There is no such file, it cannot be read, or it is no table with rows.
        ArgumentError: pyarrow is not installed.
    """
    path = Path(os.path.expanduser(path))
    if not os.path.isfile(path):
        raise DataError(f"There is no table {str(path)!r}. Give a .csv, .tsv or .parquet file.")
    parquet = path.suffix.lower() == ".parquet"
    names, columns = _parquet(path) if parquet else _separated(path)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or "" in names:
        what = f"two columns {twice[0]!r}" if twice else f"no name for column {names.index('') + 1}"
        raise DataError(f"{path} has {what}: its first line must name each column, once.")
    if not columns or not columns[0]:
        raise DataError(f"{path} has no rows below its first line, the names of the columns.")
    return Table(str(path), dict(zip(names, columns, strict=True)))


def _separated(path: Path) -> tuple[list[str], list[Sequence[str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            separator = max(",;\t", key=first.count)
            reader = csv.reader(file, delimiter=separator, strict=True)
            names = [cell.strip() for cell in next(reader, [])]
            rows = []
            for row in reader:
                if len(row) == len(names):
                    rows.append([cell.strip() for cell in row])
                elif row:  # else an empty line
                    raise DataError(
                        f"{path}, line {reader.line_num}: there are {len(row)} cells, and "
                        f"{len(names)} columns in the first line. Put texts with {separator!r} in "
                        'them between quotes, "...".'
                    )
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8 ({error}): save it as CSV in UTF-8.") from error
    except (csv.Error, OSError) as error:
        raise DataError(f"{path} cannot be read as a table: {error}.") from error
    return names, [*zip(*rows, strict=True)]


def _parquet(path: Path) -> tuple[list[str], list[Sequence[str]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ArgumentError(
            f"Parquet ({path}) needs pyarrow: pip install 'bayesify[tables]', or save the table as "
            "CSV."
        ) from error
    try:
        found = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}.") from error
    columns: list[Sequence[str]] = []
    for name, column in zip(found.column_names, found.columns, strict=True):
        kind = pyarrow.types
        if kind.is_nested(column.type) or kind.is_binary(column.type):
            raise DataError(f"{path}: column {name!r} is of {column.type}, no numbers or texts.")
        columns.append(["" if v is None else str(v).strip() for v in column.to_pylist()])
    return [name.strip() for name in found.column_names], columns


@dataclass(frozen=True)
class Numbers:
    """A column of numbers, which are standardised: (x - mean) / std."""

    name: str
    mean: float
    std: float

    width = 1

    def encode(self, table: Table) -> Tensor:
        found = (numbers(table, self.name) - self.mean) / self.std
        if float(found.abs().max()) > _LARGEST:
            raise DataError(
                f"{table.name}: column {self.name!r} is more than {_LARGEST:g} standard deviations "
                f"from the mean of the training table, {self.mean:g}. Is it in another unit?"
            )
        return found[:, None]


@dataclass(frozen=True)
class Categories:
    """A column of texts, each of which becomes 1 in a column of its own."""

    name: str
    categories: tuple[str, ...]

    @property
    def width(self) -> int:
        return len(self.categories)

    def encode(self, table: Table) -> Tensor:
        labels = class_numbers(table, self.name, self.categories)
        return torch.nn.functional.one_hot(labels, self.width).double()


@dataclass(frozen=True)
class Coding:
    """How a table becomes numbers: what the training rows say of each column.

    Args:
        target: Column of the target.
        classes: The names of the classes; None where the target is a number.
        columns: All other columns that are used.
    """

    target: str
    classes: tuple[str, ...] | None
    columns: tuple[Numbers | Categories, ...]

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return sum(column.width for column in self.columns)

    def inputs(self, table: Table) -> Tensor:
        """The rows as float32 (rows, width).

        Raises:
            DataError: A column is missing, or a cell is not of the kind that it was in training.
        """
        missing = [c.name for c in self.columns if c.name not in table.columns]
        if missing:
            raise DataError(
                f"{table.name} lacks {_some(missing)}, which the model was trained on. Its columns "
                f"are {_some(table.columns)}: give a table with the columns of the training table."
            )
        return torch.cat([column.encode(table) for column in self.columns], 1).float()

    def targets(self, table: Table) -> Tensor:
        """The targets: float32 (rows, 1), or class numbers (rows,).

        Raises:
            DataError: The column is missing, or a target is none that the model knows.
        """
        table.column(self.target, "target")
        if self.classes is None:
            return numbers(table, self.target).float()[:, None]
        return class_numbers(table, self.target, self.classes)

    def to_json(self) -> dict[str, Any]:
        """Plain values that :meth:`from_json` reads."""
        columns: list[dict[str, Any]] = [
            {"name": c.name, "mean": c.mean, "std": c.std} if isinstance(c, Numbers)
            else {"name": c.name, "categories": [*c.categories]}
            for c in self.columns
        ]  # fmt: skip
        classes = None if self.classes is None else [*self.classes]
        return {"target": self.target, "classes": classes, "columns": columns}

    @classmethod
    def from_json(cls, data: Any) -> Coding:
        """The coding that :meth:`to_json` gave.

        Raises:
            CheckpointError: It is none.
        """
        try:
            classes = None if data["classes"] is None else _texts(data["classes"])
            columns = tuple(_column(each) for each in data["columns"])
            (target,) = _texts([data["target"]])
            names = [target, *(column.name for column in columns)]
            if not columns or len(set(names)) < len(names):
                raise ValueError("its columns are none, or stand there twice")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"What the file says of its table is damaged ({type(error).__name__}: {error}). "
                "Fetch the file or fit the table anew."
            ) from error
        return cls(target, classes, columns)


def _column(data: Any) -> Numbers | Categories:
    (name,) = _texts([data["name"]])
    if "categories" in data:
        return Categories(name, _texts(data["categories"]))
    mean, std = float(data["mean"]), float(data["std"])
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ValueError(f"the column {name!r:.60} has mean {mean} and std {std}")
    return Numbers(name, mean, std)


def _texts(found: Any) -> tuple[str, ...]:
    texts = tuple(found)
    if not all(isinstance(t, str) for t in texts) or not texts or len(set(texts)) < len(texts):
        raise TypeError(f"{found!r:.60} are no different texts")
    return texts


def coding_of(
    table: Table,
    target: str,
    *,
    kind: TargetKind | None = None,
    ignore: Collection[str] = (),
    categorical: Collection[str] = (),
) -> tuple[Coding, list[str]]:
    """Say how a training table becomes numbers.

    Args:
        table: The training rows.
        target: Column of the target.
        kind: Of the target. None takes texts, and whole numbers with at most ten different values,
            for classes.
        ignore: Columns that are left out.
        categorical: Columns of numbers that are names of categories.

    Returns:
        The coding, and what the user should know of it.

    Raises:
        DataError: A column is not there or cannot be used.

    >>> table = Table("t.csv", {"a": ["1", "3"], "b": ["x", "y"], "y": ["0.5", "7"]})
    >>> coding_of(table, "y")[0].inputs(table)
    tensor([[-1.,  1.,  0.],
            [ 1.,  0.,  1.]])
    """
    values, notes = table.column(target, "target"), []
    for name in (*ignore, *categorical):
        table.column(name)
    if target in ignore:
        raise DataError(f"{target!r} is the target and cannot be ignored.")
    _check_missing(table, target, "remove these rows")
    if kind is None:
        kind = _kind(values)
    known: tuple[str, ...] | None = None
    if kind == "class":
        known = _categories(table, target, "choose another target")
        if len(known) < 2:
            raise DataError(f"{table.name}: the target {target!r} is {known[0]!r} in all rows.")
    elif float((found := numbers(table, target)).std(correction=0)) == 0.0:
        raise DataError(f"{table.name}: the target {target!r} is {float(found[0]):g} in all rows.")
    columns: list[Numbers | Categories] = []
    for name in table.columns:
        if name == target or name in ignore:
            continue
        column = _coded(table, name, name in categorical)
        if column is None:
            notes.append(f"Column {name!r} has one value in all rows and is left out.")
        else:
            columns.append(column)
    if not columns:
        raise DataError(f"{table.name} has no column to predict {target!r} from.")
    return Coding(target, known, tuple(columns)), notes


def _kind(values: Sequence[str]) -> TargetKind:
    """What a target is; a few wrong cells among numbers make no classes."""
    different = {_plain(value) for value in values}
    few = len(different) <= FEW and 2 * len(different) <= len(values)
    texts = sum(_number(value) is None for value in values)
    if texts:
        return "class" if few or 2 * texts > len(values) else "number"
    return "class" if few and all(map(_whole, different)) else "number"


def _coded(table: Table, name: str, categorical: bool) -> Numbers | Categories | None:
    """How one column is coded; None where it has one value alone."""
    values = table.columns[name]
    _check_missing(
        table, name, f"fill them in, remove these rows, or leave the column out: --ignore {name!r}"
    )
    if len(set(values)) == 1:
        return None
    texts = sum(_number(value) is None for value in values)
    if categorical or 2 * texts > len(values):
        categories = _categories(table, name, f"leave it out: --ignore {name!r}")
        return Categories(name, categories)
    try:
        found = numbers(table, name)
    except DataError as error:
        raise DataError(
            f"{error} Or say that its cells are names of categories: --categorical {name!r}"
        ) from None
    std = float(found.std(correction=0))
    return Numbers(name, float(found.mean()), std) if std > 0 else None


def _categories(table: Table, name: str, advice: str) -> tuple[str, ...]:
    once = {_plain(text): text for text in reversed(table.columns[name])}  # 1 and 1.0 are one
    found = sorted(once.values(), key=_order)
    if len(found) > MAX_CATEGORIES:
        raise DataError(
            f"{table.name}: column {name!r} has {len(found):,} different texts ({_some(found)}), "
            f"and {MAX_CATEGORIES} are the most for categories: join rare ones, or {advice}."
        )
    return tuple(found)


def numbers(table: Table, name: str) -> Tensor:
    """A column as float64 (rows,).

    Raises:
        DataError: The column or a number is missing, or a cell is no finite number.
    """
    values = table.column(name)
    _check_missing(table, name, "fill them in, or remove these rows")
    found = [_number(value) for value in values]
    for row, (number, value) in enumerate(zip(found, values, strict=True), 1):
        if number is None or not abs(number) <= _LARGEST:
            raise DataError(
                f"{table.name}: column {name!r} has {value!r:.40} in row {row:,}, and a number is "
                "wanted (1234.5, without a unit). Correct it, or remove the row."
            )
    return torch.tensor(found, dtype=torch.float64)


def class_numbers(table: Table, name: str, known: Sequence[str]) -> Tensor:
    """A column of texts as the places of these among known ones, int64 (rows,).

    Numbers are compared as such: 1.0 is 1.

    Raises:
        DataError: The column or a text is missing, or a text is none of the known ones.
    """
    values = table.column(name)
    _check_missing(table, name, "fill them in, or remove these rows")
    places = {_plain(text): place for place, text in enumerate(known)}
    found = [places.get(_plain(value)) for value in values]
    if None in found:
        row = found.index(None)
        raise DataError(
            f"{table.name}: column {name!r} has {values[row]!r:.40} in row {row + 1:,}, which the "
            f"training table had not: there it is {_some(known)}. Correct it, or remove the row."
        )
    return torch.tensor(found, dtype=torch.int64)


def _check_missing(table: Table, name: str, advice: str) -> None:
    values = table.columns[name]
    rows = [row for row, value in enumerate(values, 1) if value.lower() in _MISSING]
    if rows:
        raise DataError(
            f"{table.name}: column {name!r} has no value in {len(rows):,} of {len(values):,} rows "
            f"(the first is row {rows[0]:,}, {values[rows[0] - 1]!r}): {advice}."
        )


def _number(text: str) -> float | None:
    try:
        return float(text) if "_" not in text else None
    except ValueError:
        return None


def _whole(value: str | float) -> bool:
    return isinstance(value, float) and value.is_integer()


def _plain(text: str) -> str | float:
    number = _number(text)
    return text if number is None else number


def _order(text: str) -> tuple[bool, float, str]:
    """Numbers by their size, then texts."""
    number = _number(text)
    return number is None, number or 0.0, text


def _some(names: Collection[str]) -> str:
    shown = ", ".join(f"{name!r:.40}" for name in [*names][:_LISTED])
    return f"{shown} and {len(names) - _LISTED:,} more" if len(names) > _LISTED else shown
