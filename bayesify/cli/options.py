"""Commands made of functions: an option for each argument, and for each field of a dataclass.

A function says what it takes, :func:`command` makes typer's options of it. An argument may be a
dataclass of :mod:`bayesify.settings`: its fields become options, with the type, range, default and
text that they have there, and the function gets the dataclass.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from types import GenericAlias, NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import typer

from ..devices import resolve_device as resolve_device
from ..errors import ArgumentError
from ..settings import Shown
from ..settings.fields import MISSING, Setting, parts_of, setting, settings_of
from ..settings.files import assignments, changed, check_names, names_in, read_config
from .guard import guard

File = Annotated[
    Path, Shown(argument=True, metavar="FILE", text="A file that bayesify has written.")
]
_DATA = Shown(
    argument=True,
    metavar="DATA",
    text="fashion-sample, a folder with one folder of images for each class, timm:NAME@ROOT, "
    "or a safetensors file with images and labels.",
)
Data = Annotated[str, _DATA]
DataOrNone = Annotated[str | None, _DATA]
Measured = Annotated[
    str, replace(_DATA, text=_DATA.text + " Of a table's model, a table with the same columns.")
]
ModelName = Annotated[
    str | None,
    Shown(
        metavar="NAME",
        text="The function package.module:factory that builds the model, if the file is of one: "
        "a file does not choose which code runs.",
    ),
]
ModelArgs = Annotated[
    str | None, Shown(metavar="JSON", text="What that function is called with, if any.")
]
Split = Annotated[Literal["train", "test"], Shown(text="Which part of the data set.")]
Device = Annotated[str, Shown(text="cpu, cuda, cuda:1, mps; auto takes what there is.")]
Force = Annotated[bool, Shown(letter="-f", text="Overwrite the file of --out.")]
Json = Annotated[bool, Shown(text="Print JSON on stdout, and nothing else.")]
Quiet = Annotated[bool, Shown(letter="-q", text="Print warnings and errors only.")]
Debug = Annotated[bool, Shown(text="Show the traceback of an error.")]

_CONFIG = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="Settings in TOML, as each run writes them; options win."
    ),
]
_SET = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="TABLE.NAME=VALUE", help="Change one setting of --config. Repeatable."
    ),
]


class Given(NamedTuple):
    """What a config file said. A command that asks for it takes ``--config`` and ``--set``.

    Args:
        file: The config file, if there is one.
        by_file: Settings that have their value, or a part of it, from the file.
    """

    file: Path | None
    by_file: frozenset[str]


@dataclass(frozen=True)
class By:
    """Another option says which dataclass an argument has: ``Annotated[A | B, By("kind", ...)]``.

    Args:
        option: The name of that option.
        classes: The dataclass by its value.
    """

    option: str
    classes: Mapping[str, type]


def command(
    function: Callable[..., None],
    *,
    base: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> Callable[..., None]:
    """``function`` as typer takes it; errors become messages and exit codes (:func:`guard`).

    Args:
        function: Its arguments are dataclasses of settings, :class:`Given`, what typer knows, or
            have a :class:`bayesify.settings.Shown` with their text. ``--debug`` is added.
        base: Gives the dataclasses that the options change, by the arguments that are none. By
            default that is what their fields say.
    """
    hints = get_type_hints(function, include_extras=True)
    arguments = inspect.signature(function).parameters
    groups = {name: found for name in arguments if (found := _group(hints[name])) is not None}
    config = Given in hints.values()
    made = {"context": _parameter("context", typer.Context, inspect.Parameter.empty)}
    for name, argument in arguments.items():
        hint = hints[name]
        if name in groups:
            for each in groups[name].options():
                made[each.name] = _option(each, config=config, based=base is not None)
        elif hint is Given:
            made["config"] = _parameter("config", _CONFIG, None)
            made["changes"] = _parameter("changes", _SET, None)
        elif any(isinstance(said, Shown) for said in parts_of(hint)[1]):
            default = MISSING if argument.default is argument.empty else argument.default
            made[name] = _option(setting(name, hint, default))
        else:
            made[name] = _parameter(name, hint, argument.default)
    made["debug"] = _option(setting("debug", Debug, False))

    def run(context: typer.Context, *, debug: bool, **values: Any) -> None:
        with guard(debug, json=values.get("json", False)):
            asked = _Asked(groups, context, values)
            plain = {n: values[n] for n in arguments if n in values and n not in groups}
            built = asked.dataclasses(plain, {} if base is None else base(plain))
            given = {name: asked.given() for name in arguments if hints[name] is Given}
            function(**plain, **built, **given)

    run.__doc__, run.__name__ = function.__doc__, function.__name__
    run.__signature__ = inspect.Signature([*made.values()])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in made.values()}
    return run


@dataclass(frozen=True)
class _Group:
    """An argument of a command whose fields are options."""

    classes: Mapping[str, type]  # by the value of by.option; without it there is one
    by: By | None = None

    def options(self) -> list[Setting]:
        """One for each name in the classes; where they differ, the text says how."""
        found: dict[str, Setting] = {}
        for value, cls in self.classes.items():
            only = f"with --{self.by.option} {value}" if self.by and found else ""
            for name, new in settings_of(cls).items():
                old = found.get(name)
                if old is not None:
                    found[name] = _either(old, new, only)
                    continue
                panel = new.shown.panel or (f"W{only[1:]}" if only else None)
                found[name] = new._replace(shown=replace(new.shown, panel=panel))
        return [*found.values()]

    def chosen(self, values: Mapping[str, Any]) -> type:
        """The dataclass that the function gets."""
        return self.classes[values[self.by.option] if self.by else ""]

    def check(self, table: str, cls: type, values: Mapping[str, Any], asked: _Asked) -> None:
        """Refuse what only another class has: it would do nothing."""
        others = {name for each in self.classes.values() for name in settings_of(each)}
        others -= set(settings_of(cls))
        wrong = [_dashed(name) for name in asked.options if name in others]
        wrong += [f"{t}.{name}" for t, name in asked.in_file if t == table and name in others]
        wrong += [f"--set {a.table}.{a.name}" for a in asked.assigned
                  if a.table == table and a.name in others]  # fmt: skip
        if wrong and self.by is not None:
            with_this = f"{_dashed(self.by.option)} {values[self.by.option]}"
            do = "do nothing" if wrong[1:] else "does nothing"
            raise ArgumentError(f"{', '.join(wrong)} {do} with {with_this}: leave it out.")


class _Asked:
    """What the command line and the config file say."""

    def __init__(
        self, groups: Mapping[str, _Group], context: typer.Context, values: Mapping[str, Any]
    ) -> None:
        known = [
            (table, name)
            for table, group in groups.items()
            for cls in group.classes.values()
            for name in settings_of(cls)
        ]
        sources = {name: context.get_parameter_source(name) for _, name in known}
        self.options = {
            name: values[name] for name, s in sources.items() if s and s.name == "COMMANDLINE"
        }
        self.groups = groups
        self.file: Path | None = values.get("config")
        self.document = {} if self.file is None else read_config(self.file)
        self.in_file = names_in(self.document)
        self.assigned = assignments(values.get("changes") or ())
        check_names(str(self.file), self.in_file, known)
        check_names("--set", [(a.table, a.name) for a in self.assigned], known)

    def given(self) -> Given:
        by_user = {*self.options, *(a.name for a in self.assigned if not a.inside)}
        return Given(self.file, frozenset(name for _, name in self.in_file) - by_user)

    def dataclasses(self, plain: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, Any]:
        """Each group's dataclass: options beat --set, which beats the file, which beats start."""
        built: dict[str, Any] = {}
        said = dict(plain)
        for table, group in self.groups.items():
            cls = group.chosen(said)
            group.check(table, cls, said, self)
            known = settings_of(cls)
            begin = start.get(table)
            values = {
                name: each.default if begin is None else getattr(begin, name)
                for name, each in known.items()
            }
            values |= self.document.get(table, {})
            values = changed(values, [a for a in self.assigned if a.table == table])
            values |= {name: value for name, value in self.options.items() if name in known}
            for name, each in known.items():
                if values[name] is MISSING:
                    shown = each.shown.metavar if each.shown.argument else _dashed(name)
                    raise ArgumentError(f"{shown} is missing: give it, or a --config that has it.")
            built[table] = cls(**{n: _value(known[n], v) for n, v in values.items()})
            said |= vars(built[table])
        return built


def _group(hint: Any) -> _Group | None:
    kind, said = parts_of(hint)
    if by := next((s for s in said if isinstance(s, By)), None):
        return _Group(by.classes, by)
    return _Group({"": kind}) if isinstance(kind, type) and is_dataclass(kind) else None


def _either(old: Setting, new: Setting, only: str) -> Setting:
    """One option for a name that two classes have."""
    text, default = _text(old), old.default
    if _text(new) != text:
        text += f" {only.capitalize()}: {_text(new)}"
    if new.default != default:
        text += f" By default {default}, {only} {new.default}."
        default = None
    return old._replace(text=text, default=default)


def _option(each: Setting, *, config: bool = False, based: bool = False) -> inspect.Parameter:
    """A setting as an argument that typer makes an option of.

    Args:
        each: The setting.
        config: A file may have it.
        based: It is not its own default that counts.
    """
    shown, hint, text = each.shown, _type(each.hint), _text(each)
    needed = each.default is MISSING
    unset = based or each.default in (None, ()) or (needed and config) or each.default == {}
    default: Any = inspect.Parameter.empty if needed and not config else each.default
    default = None if unset else default
    if needed and config:
        text += " Needed, here or in --config."
    about: dict[str, Any] = {
        "help": text, "metavar": shown.metavar, "show_default": not unset,
        "rich_help_panel": shown.panel, "hidden": shown.hidden,
    }  # fmt: skip
    if shown.argument:
        info = typer.Argument(**about)
    else:
        name = shown.option or _dashed(each.name)
        if hint is bool and (based or default is True):
            name = f"{name}/--no-{name[2:]}"
        info = typer.Option(*filter(None, (name, shown.letter)), **about)
    annotation: Any = Annotated[hint | None if unset else hint, info]
    return _parameter(each.name, annotation, default)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _type(hint: Any) -> Any:
    """The type that typer reads a setting of this annotation with."""
    hint = parts_of(hint)[0]
    kind, parts = get_origin(hint), [part for part in get_args(hint) if part is not NoneType]
    if kind in (Union, UnionType):
        choices = [part for part in parts if get_origin(part) is Literal]
        if not choices:
            return _type(parts[0])
        return choices[0] if any(get_origin(p) is Callable for p in parts) else str
    if kind is tuple:
        inner = [_type(part) for part in parts if part is not Ellipsis]
        if Ellipsis not in parts:
            return GenericAlias(tuple, (*inner,))
        # typer takes no list of choices
        return GenericAlias(list, str if get_origin(inner[0]) is Literal else inner[0])
    return str if kind is Mapping else hint


def _value(each: Setting, value: Any) -> Any:
    """What typer or TOML read, as the setting has it."""
    hint = parts_of(each.hint)[0]
    kinds = [parts_of(part)[0] for part in (hint, *get_args(hint))]
    if isinstance(value, str) and any(get_origin(kind) is Mapping for kind in kinds):
        return read_object(each.name, value)
    if isinstance(value, str) and float in kinds:
        try:
            return float(value)
        except ValueError:
            return value
    return value


def read_object(name: str, text: str) -> dict[str, Any]:
    """A JSON object that an option was given.

    Raises:
        ArgumentError: It is none.
    """
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ArgumentError(
            f"{name} must be a JSON object such as '{{\"depth\": 6}}', not {text!r}."
        )
    return found


def _text(each: Setting) -> str:
    """The first paragraph, without the marks of a docstring."""
    first = each.text.partition("\n\n")[0]
    return re.sub(r":\w+:`~?([^`]*)`|``(?:([a-z_]+)|([^`]*))``", _unmarked, first)


def _unmarked(found: re.Match[str]) -> str:
    """A name in a docstring as the command line has it: an argument is an option there."""
    return found[1] or found[3] or _dashed(found[2])


def _dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"
