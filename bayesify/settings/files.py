"""Config files: TOML, with a table for each dataclass of settings; the options override them."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ArgumentError
from .fields import nearest, plain

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Assignment(NamedTuple):
    """``table.name=value``; ``inside`` are further keys of a value that is a mapping itself."""

    table: str
    name: str
    inside: tuple[str, ...]
    value: Any


def check_data(path: Path, spec: str, option: str = "--data") -> None:
    """Refuse a data set that a file names and that more than reading images would open.

    Args:
        path: The file.
        spec: The data set.
        option: How the user would name it.

    Raises:
        ArgumentError: It is one of timm's, which may download, unpickle, or run another library.
    """
    if spec.startswith("timm:"):
        raise ArgumentError(
            f"{path} names the data set {spec!r}, which code of other libraries opens, and a file "
            f"does not choose which code runs. Give it yourself: {option} {shlex.quote(spec)}"
        )


def read_config(path: Path) -> dict[str, Any]:
    """The tables of a config file.

    Raises:
        ArgumentError: It cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ArgumentError(f"The config {path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"The config {path} is no TOML: {error}.") from error


def config_text(title: str, tables: Mapping[str, Any]) -> str:
    """The TOML that :func:`read_config` reads: a table for each dataclass. None is left out."""
    lines = [f"# {title}"]
    for table, settings in tables.items():
        values = {name: value for name, value in plain(settings).items() if value is not None}
        lines += ["", f"[{table}]", *(f"{name} = {_toml(value)}" for name, value in values.items())]
    return "\n".join(lines) + "\n"


def assignments(texts: Iterable[str]) -> list[Assignment]:
    """What ``--set`` says: values of TOML; what is none is a text.

    Raises:
        ArgumentError: One is not of the form ``table.name=value``.
    """
    found = []
    for text in texts:
        path, _, value = text.partition("=")
        names = [part.strip() for part in path.split(".")]
        if len(names) < 2 or "=" not in text or not all(names):
            raise ArgumentError(
                f"--set takes TABLE.NAME=VALUE, such as run.workers=4, not {text!r}."
            )
        found.append(Assignment(names[0], names[1], tuple(names[2:]), _value(value.strip())))
    return found


def changed(values: Mapping[str, Any], by: Iterable[Assignment]) -> dict[str, Any]:
    """The values of one table after some assignments."""
    result = dict(values)
    for each in by:
        place, keys = result, (each.name, *each.inside)
        for key in keys[:-1]:
            below = place.get(key, {})
            if not isinstance(below, Mapping):
                raise ArgumentError(
                    f"--set: {each.table}.{key} is {below!r}, which holds no names."
                )
            place[key] = dict(below)
            place = place[key]
        place[keys[-1]] = each.value
    return result


def check_names(
    where: str, names: Iterable[tuple[str, str]], known: Collection[tuple[str, str]]
) -> None:
    """Refuse a table or a name in it that nothing reads.

    Args:
        where: What has them, in words.
        names: Pairs of both; the name is empty for what is a value outside any table.
        known: Those of the settings.

    Raises:
        ArgumentError: With the nearest of each.
    """
    paths = [".".join(pair) for pair in known]
    unknown = [".".join(pair).rstrip(".") for pair in names if pair not in known]
    if unknown:
        found = (f"{name} (the nearest is {nearest(name, paths)})" for name in unknown)
        raise ArgumentError(f"{where}: there is no setting {', '.join(found)}.")


def names_in(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The pairs of table and name in what :func:`read_config` gave."""
    return [
        (table, name)
        for table, values in document.items()
        for name in (values if isinstance(values, Mapping) else [""])
    ]


def _value(text: str) -> Any:
    try:
        found = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, bool | int | float | str | list | dict) else text


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Mapping):
        if "null" in json.dumps(value):  # TOML has none: as the command line takes it
            return _toml(json.dumps(value))
        return "{" + ", ".join(f"{_toml(str(k))} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
