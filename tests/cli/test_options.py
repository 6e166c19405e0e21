"""cli/options.py: how options are made of dataclasses, and what beats what."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
import typer.main
from typer.testing import CliRunner, Result

from bayesify.cli.app import app
from bayesify.cli.options import By, Given, Json, command
from bayesify.settings import Shown
from bayesify.settings.fields import Count, PartShare, Positive, checked, refuse


@dataclass(frozen=True, kw_only=True)
class Broth:
    """A soup.

    Args:
        water: Litres of it.
        salt: Share of salt. It is :func:`x` and ``water`` and ``2 * water``.
        cooking: How.
    """

    water: Annotated[Count, Shown(letter="-w")] = 2
    salt: PartShare = 0.25
    cooking: Literal["slow", "fast"] = "slow"

    def __post_init__(self) -> None:
        refuse("broth", checked(self))


@dataclass(frozen=True, kw_only=True)
class Stew(Broth):
    """A soup without much water.

    Args:
        water: Cups of it.
        meat: Pieces.
    """

    water: Count = 5
    meat: Annotated[tuple[str, ...], Shown(metavar="PIECE")] = ()


@dataclass(frozen=True, kw_only=True)
class Table:
    """Where it is eaten.

    Args:
        pot: Its pot.
        soup: Which.
        heat: A number, or how it is found.
        guests: Who comes.
        lit: Whether there is a candle.
    """

    pot: Annotated[Path, Shown(argument=True, metavar="POT")]
    soup: Literal["broth", "stew"] = "broth"
    heat: Positive | Literal["felt"] = "felt"
    guests: Mapping[str, Any] = field(default_factory=dict)
    lit: bool = False

    def __post_init__(self) -> None:
        refuse("table", checked(self))


SEEN: list[dict[str, Any]] = []


def cook(
    table: Table,
    soup: Annotated[Broth | Stew, By("soup", {"broth": Broth, "stew": Stew})],
    given: Given,
    *,
    loud: Annotated[bool, Shown(text="Say it.")] = True,
    times: Annotated[int, typer.Option(help="How often.")] = 1,
    json: Json = False,
) -> None:
    """Cook."""
    SEEN.append({"table": table, "soup": soup, "given": given, "loud": loud, "times": times})


kitchen = typer.Typer()
kitchen.command()(command(cook))


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    SEEN.clear()


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner(env={"COLUMNS": "80", "TERM": "dumb"}).invoke(
        kitchen, [*map(str, arguments)]
    )
    assert result.exit_code == code, result.output
    return result


def refused(*arguments: object) -> str:
    result = run(*arguments, code=2)
    assert SEEN == []
    return " ".join(line.strip("│╭╮╰╯─ ") for line in result.stderr.splitlines()).strip()


def test_a_function_gets_the_dataclasses() -> None:
    run("iron", "-w", 3, "--heat", 90, "--guests", '{"anna": 1}', "--lit", "--no-loud")
    assert SEEN == [
        {
            "table": Table(pot=Path("iron"), heat=90.0, guests={"anna": 1}, lit=True),
            "soup": Broth(water=3), "loud": False, "times": 1,
            "given": Given(None, frozenset()),
        }
    ]  # fmt: skip


def test_another_option_chooses_the_dataclass() -> None:
    run("iron", "--soup", "stew", "--meat", "beef", "--meat", "bone")
    assert SEEN[0]["soup"] == Stew(water=5, meat=("beef", "bone"))
    SEEN.clear()
    assert "--meat does nothing with --soup broth: leave it out." in refused("iron", "--meat", "x")


def test_options_beat_set_which_beats_the_file_which_beats_the_default() -> None:
    Path("a.toml").write_text(
        '[table]\npot = "copper"\nguests = {anna = 1, ben = 2}\nlit = true\n'
        "[soup]\nwater = 7\nsalt = 0.125\n"
    )
    file = ("--config", "a.toml")
    run(*file)
    table = Table(pot=Path("copper"), guests={"anna": 1, "ben": 2}, lit=True)
    assert SEEN[-1]["table"] == table
    assert SEEN[-1]["soup"] == Broth(water=7, salt=0.125)
    names = {"pot", "guests", "lit", "water", "salt"}
    assert SEEN[-1]["given"] == Given(Path("a.toml"), frozenset(names))
    changes = ("--set", "soup.water=8", "--set", "table.guests.cleo=3", "--set", "table.lit=false")
    run(*file, *changes)
    assert SEEN[-1]["soup"] == Broth(water=8, salt=0.125)
    assert SEEN[-1]["table"].guests == {"anna": 1, "ben": 2, "cleo": 3}
    assert not SEEN[-1]["table"].lit
    # a part of a value is not the whole of it
    assert SEEN[-1]["given"].by_file == {"pot", "guests", "salt"}
    run("iron", *file, *changes, "--water", 2)
    assert SEEN[-1]["soup"] == Broth(water=2, salt=0.125)
    assert SEEN[-1]["table"].pot == Path("iron")
    assert SEEN[-1]["given"].by_file == {"guests", "salt"}


def test_what_cannot_be_understood_is_one_error() -> None:
    Path("a.toml").write_text('[table]\npot = "copper"\n[soup]\nwatr = 7\n[sup]\nsalt = 1\n')
    assert "a.toml: there is no setting soup.watr (the nearest is soup.water), sup.salt" in refused(
        "--config", "a.toml"
    )
    assert "--set: there is no setting soup.wter (the nearest is soup.water)." in refused(
        "iron", "--set", "soup.wter=1"
    )
    assert "POT is missing: give it, or a --config that has it." in refused()
    assert "broth: water must be a whole number above 0, got 0." in refused("iron", "-w", 0)
    assert "table: heat must be above 0 and finite, or 'felt', got 'warm'." in refused(
        "iron", "--heat", "warm"
    )
    assert "guests must be a JSON object" in refused("iron", "--guests", "[1]")
    Path("a.toml").write_text('[table]\npot = "copper"\n[soup]\nmeat = ["beef"]\n')
    assert "soup.meat does nothing with --soup broth" in refused("--config", "a.toml")
    run("--config", "a.toml", "--soup", "stew")
    assert SEEN[-1]["soup"] == Stew(meat=("beef",))


def test_errors_are_json_where_that_was_asked_for() -> None:
    result = run("iron", "-w", 0, "--json", code=2)
    assert '"kind": "ArgumentError"' in result.stdout


def test_help_has_all_that_the_dataclass_says() -> None:
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", run("--help").stdout).split())
    assert "--water -w" in shown
    assert (
        "Litres of it (at least 1). With --soup stew: Cups of it (at least 1). By default 2, with "
        "--soup stew 5."
    ) in shown
    assert "Share of salt (from 0 to below 1). It is x and --water and 2 * water." in shown
    assert "[default: 0.25]" in shown
    assert "Its pot. Needed, here or in --config." in shown
    assert "With --soup stew --meat PIECE" in shown


# -- the commands ----------------------------------------------------------------------------


def commands() -> dict[str, Any]:
    top: Any = typer.main.get_command(app)
    byov: Any = typer.main.get_command(__import__("recipes.byov.cli", fromlist=["app"]).app)
    found = {name: each for name, each in top.commands.items() if name != "recipe"}
    return {**found, **{f"byov {name}": each for name, each in byov.commands.items()}}


def test_every_option_has_a_text_and_there_is_debug_everywhere() -> None:
    found = commands()
    assert len(found) >= 15
    for name, each in found.items():
        texts = {p.name: getattr(p, "help", None) for p in each.params}
        assert all(texts.values()), (name, texts)
        assert "debug" in texts or name == "byov presets"


@pytest.mark.parametrize("name", ["fit", "prune", "report", "convert", "eval", "predict", "export"])
def test_help_fits_80_columns(name: str) -> None:
    runner = CliRunner(env={"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"})
    shown = runner.invoke(app, [name, "--help"]).stdout
    assert max(map(len, shown.splitlines())) <= 80
    cut = [line for line in shown.splitlines() if "…" in line]
    assert cut == []
