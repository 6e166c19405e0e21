"""What stands in a dataclass of settings, and nowhere else: each field's type, range and text.

The annotation says what a value may be, the default is that of Python and of the command line, and
the text under ``Args`` of the docstring is what ``help()`` shows. The command line shows its first
paragraph.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin
from typing import get_type_hints as _hints

from ..errors import ArgumentError
from ..numeric import real, whole

Function = TypeVar("Function", bound=Callable[..., Any])
Kind = TypeVar("Kind")
MISSING = dataclasses.MISSING


@dataclasses.dataclass(frozen=True)
class Within:
    """The range of a number, for :data:`typing.Annotated`.

    Args:
        least: The smallest.
        above: What it is above.
        most: The largest.
        below: What it is below.
        finite: Infinity is none.
        words: The range in words, for messages alone: a limit that nobody needs to know of.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    finite: bool = True
    words: str = ""

    def holds(self, value: float) -> bool:
        return (
            not math.isnan(value)
            and (math.isfinite(value) or not self.finite)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        low, high = self.least, self.most
        if self.words:
            return self.words
        if low is not None and high is not None:
            return f"from {low:g} to {high:g}"
        if low is not None and self.below is not None:
            return f"from {low:g} to below {self.below:g}"
        if self.above is not None and self.below is not None:
            return f"between {self.above:g} and {self.below:g}"
        ends = (("at least", low), ("above", self.above), ("at most", high), ("below", self.below))
        return ", ".join(f"{word} {end:g}" for word, end in ends if end is not None)


@dataclasses.dataclass(frozen=True)
class Shown:
    """How the command line shows a field, for :data:`typing.Annotated`.

    Args:
        panel: The heading that it stands under.
        option: Its name on the command line, where that is another one.
        letter: A short name, such as ``-b``.
        metavar: What stands for the value.
        argument: It is given by its place, not by its name.
        hidden: ``--help`` leaves it out.
        text: What it is, where several classes have it; else its docstring says so.
    """

    panel: str | None = None
    option: str | None = None
    letter: str | None = None
    metavar: str | None = None
    argument: bool = False
    hidden: bool = False
    text: str = ""


Count = Annotated[int, Within(least=1)]
Whole = Annotated[int, Within(least=0)]
Seed = Annotated[int, Within(least=0, below=1 << 63, words="from 0 to below 2**63")]
Positive = Annotated[float, Within(above=0)]
NotNegative = Annotated[float, Within(least=0)]
Share = Annotated[float, Within(least=0, most=1)]
PartShare = Annotated[float, Within(least=0, below=1)]
SkipUnreadable = Annotated[
    bool,
    Shown(
        text="Leave out images that cannot be read, with a warning; else they are an error.\n\n"
        "It is for an ``ImageData``, whose images are all read once before the work."
    ),
]

_KINDS: dict[Any, str] = {
    Any: "anything", bool: "True or False", str: "a text", Path: "a path",
    Callable: "a callable", Mapping: "a mapping that JSON can hold",
}  # fmt: skip


class Setting(NamedTuple):
    """One field of a dataclass of settings: ``text`` has its range, ``hint`` is its whole type."""

    name: str
    hint: Any
    default: Any
    shown: Shown
    text: str


def settings_of(cls: type) -> dict[str, Setting]:
    """The fields of a dataclass by name."""
    return _settings_of(cls)


@cache
def _settings_of(cls: Any) -> dict[str, Setting]:
    hints, texts = _hints(cls, include_extras=True), described(cls)
    found = {}
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        found[field.name] = setting(
            field.name, hints[field.name], default, texts.get(field.name, "")
        )
    return found


def setting(name: str, hint: Any, default: Any, text: str = "") -> Setting:
    """One setting: its text is the one given, or that of :class:`Shown`."""
    shown = next((s for s in parts_of(hint)[1] if isinstance(s, Shown)), Shown())
    first, rest = (text or shown.text).partition("\n\n")[::2]
    if limits := _limits(hint):
        sentence, stop, more = first.partition(". ")
        end = "." if not stop and sentence.endswith(".") else ""
        first = f"{sentence.removesuffix('.')} ({limits}){stop or end}{more}"
    return Setting(name, hint, default, shown, "\n\n".join(filter(None, (first, rest))))


def described(cls: type) -> dict[str, str]:
    """The text of every field in the ``Args`` of a dataclass, or of what it inherits from."""
    rows: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        # Python 3.13 takes the indentation off by itself
        body = inspect.cleandoc(each.__doc__ or "").partition("Args:\n")[2]
        name, gap = "", " "
        for line in body.splitlines():
            start = re.match(r" {4}(\w+): (.*)", line)
            if line and not line.startswith(" "):
                break
            if start:
                name, rows[start[1]] = start[1], start[2]
            elif name and line.strip():
                rows[name] += gap + line.strip()
            gap = " " if line.strip() else "\n\n"
    return rows


def documented(*classes: type) -> Callable[[Function], Function]:
    """Put the texts of the fields into the ``Args`` of the function whose arguments they are."""

    def fill(function: Function) -> Function:
        text = inspect.cleandoc(function.__doc__ or "")
        head, args, rest = text.partition("Args:\n")
        own = re.split(r"\n\n(?=\S)", rest, maxsplit=1)
        rows = {name: setting.text for cls in classes for name, setting in settings_of(cls).items()}
        lines = [own[0], *(_entry(name, row) for name, row in rows.items())]
        if args:
            function.__doc__ = "\n\n".join([head + args + "\n".join(lines), *own[1:]])
        return function

    return fill


def _entry(name: str, text: str) -> str:
    """A field's text as it stands in a docstring."""
    first, *others = text.split("\n\n")
    parts = [textwrap.fill(f"{name}: {first}", 100, initial_indent=" " * 4,
                           subsequent_indent=" " * 8)]  # fmt: skip
    parts += [textwrap.indent(textwrap.fill(other, 92), " " * 8) for other in others]
    return "\n\n".join(parts)


def taken(cls: type[Kind], given: Mapping[str, Any]) -> Kind:
    """The dataclass of what a function was given: of all its arguments, those that are fields."""
    return cls(**{name: given[name] for name in settings_of(cls)})


def checked(settings: Any) -> list[str]:
    """Give each field its value in the type that its annotation says.

    Returns:
        What is wrong, one text for each field.
    """
    problems = []
    for name, setting in settings_of(type(settings)).items():
        try:
            value = accept(name, setting.hint, getattr(settings, name))
        except ArgumentError as error:
            problems.append(str(error))
        else:
            object.__setattr__(settings, name, value)
    return problems


def refuse(what: str, problems: Iterable[str]) -> None:
    """Raise one error for all that is wrong, if anything is.

    Raises:
        ArgumentError: With all of it.
    """
    found = list(problems)
    if found:
        raise ArgumentError(what + (": " if len(found) == 1 else ":\n  ") + "\n  ".join(found))


def plain(settings: Any) -> dict[str, Any]:
    """The values of the fields, as JSON and TOML can hold them; a function is ``"callable"``."""
    return {name: _plain(getattr(settings, name)) for name in settings_of(type(settings))}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [*map(_plain, value)]
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if callable(value):
        return "callable"
    return str(value) if isinstance(value, Path) else value


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like another."""
    return difflib.get_close_matches(name, [*known], n=1, cutoff=0.0)[0]


def accept(what: str, hint: Any, value: Any, wanted: str = "") -> Any:
    """``value`` as its annotation wants it.

    Args:
        what: Its name in the message.
        hint: The annotation, with or without :class:`Within`.
        value: What was given.
        wanted: What it must be, in words; by default those of ``hint``.

    Raises:
        ArgumentError: It is not such a value.
    """
    wanted = wanted or expected(hint)
    hint, said = parts_of(hint)
    within = next((s for s in said if isinstance(s, Within)), Within())
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        if value is None and NoneType in parts:
            return None
        *others, last = (part for part in parts if part is not NoneType)
        for part in others:
            try:
                return accept(what, part, value, wanted)
            except ArgumentError:
                continue
        return accept(what, last, value, wanted)
    if hint is Any:
        return value
    if hint is int:
        least = 0 if within.least is None else int(within.least)
        return whole(what, value, wanted, least=least, below=within.below or math.inf)
    if hint is float:
        return real(what, value, wanted, within.holds)
    if kind is tuple and isinstance(value, tuple | list):
        kinds = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
        if len(kinds) == len(value):
            return tuple(accept(what, k, v, wanted) for k, v in zip(kinds, value, strict=True))
    if kind is Mapping and isinstance(value, Mapping):
        try:
            return json.loads(json.dumps(dict(value), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"{what} must be {wanted}, got {value!r} ({error}).") from error
    if hint is Path and isinstance(value, str | os.PathLike):
        return Path(value)
    if (
        (kind is Literal and any(type(value) is type(p) and value == p for p in parts))
        or (hint in (str, bool) and type(value) is hint)
        or (kind is Callable and callable(value))
    ):
        return value
    raise ArgumentError(f"{what} must be {wanted}, got {value!r}.")


def expected(hint: Any) -> str:
    """What a value must be, in words."""
    hint, said = parts_of(hint)
    within = next((s for s in said if isinstance(s, Within)), None)
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        shown = ", or ".join(expected(part) for part in parts if part is not NoneType)
        return f"None or {shown}" if NoneType in parts else shown
    if kind is Literal:
        words = [repr(part) for part in parts]
        return " or ".join(words) if len(words) < 3 else f"one of {', '.join(words)}"
    if kind is tuple:
        if parts[-1] is Ellipsis:
            return "a list of texts" if parts[0] is str else f"a list, each {expected(parts[0])}"
        return f"{len(parts)} numbers, each {expected(parts[0])}"
    if hint is int:
        limits = "above 0" if within and within.least == 1 else _of(within)
        return f"a whole number {limits}".strip()
    if hint is float:
        if within is None:
            return "a finite number"
        open_above = within.most is None and within.below is None and within.finite
        return f"{within} and finite" if open_above else str(within)
    return _KINDS[kind or hint]


def _of(within: Within | None) -> str:
    return "" if within is None else str(within).replace("at least", "of at least")


def _limits(hint: Any) -> str:
    """The range of a number in an annotation, if it is worth saying."""
    hint, said = parts_of(hint)
    own = [str(s) for s in said if isinstance(s, Within) and not s.words]
    inside = [_limits(part) for part in get_args(hint) if get_origin(hint) is not Literal]
    limits = next(filter(None, (*own, *inside)), "")
    return "" if hint is int and limits == "at least 0" else limits


def parts_of(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """The type in an annotation, and what is said of it."""
    if get_origin(hint) is Annotated:
        first, *said = get_args(hint)
        return first, tuple(said)
    return hint, ()
