"""What files of strangers say reaches a terminal or a table as text, and nothing else."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from bayesify.cli import render
from bayesify.cli.rows import written_rows
from bayesify.errors import CheckpointError

EVIL = "a\x1b]0;owned\x07b\x9b31m[bold]c[/] :smile: \u202egpj.exe\rd\udcff"
SHOWN = "a\\x1b]0;owned\\x07b\\x9b31m[bold]c[/] :smile: \\u202egpj.exe\\rd\\udcff"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal with colours, on which everything is printed."""
    written = io.StringIO()

    def console(*, stderr: bool) -> Console:
        return Console(file=written, force_terminal=True, width=200, highlight=False,
                       markup=False, emoji=False)  # fmt: skip

    monkeypatch.setattr(render, "_console", console)
    return written


def _progress(text: str) -> None:
    with render.progress(text, 2) as bar:
        bar.to(1, 2, text)
        bar.say(text)


def _status(text: str) -> None:
    with render.status(text):
        pass


@pytest.mark.parametrize(
    "show",
    [
        render.text,
        render.note,
        render.error,
        render.trace,
        lambda text: render.table([text], [[text]]),
        lambda text: render.code(f"x = 1  # {text}", title=text),
        _progress,
        _status,
    ],
)
def test_a_text_is_shown_as_it_is_with_controls_escaped(
    terminal: io.StringIO, show: Callable[[str], None]
) -> None:
    show(EVIL)
    found = terminal.getvalue()
    assert "owned" in found
    for control in ("\x1b]", "\x07", "\x9b", "\u202e", "\udcff", "\rd"):
        assert control not in found
    assert "[bold]c[/] :smile:" in found


def test_lines_and_tabs_stay() -> None:
    assert render.printable("a\n\tb é 漢") == "a\n\tb é 漢"
    assert render.printable(EVIL) == SHOWN


def test_colours_of_libraries_are_left_out_of_an_error(terminal: io.StringIO) -> None:
    render.error("\x1b[31mred\x1b[0m and \x1b[2Jcleared")
    assert "red and \\x1b[2Jcleared" in terminal.getvalue()


def rows() -> list[dict[str, object]]:
    broken: dict[str, object] = {"image": "c.png", "class": None, "probability": None}
    broken |= {"probabilities": None, "error": "gone"}
    read: dict[str, object] = {"image": "=1+2.png", "class": EVIL, "probability": 0.75}
    read |= {"probabilities": {"-x": 0.25, EVIL: 0.75}, "error": None}
    return [broken, read, broken]


def test_a_csv_steers_no_terminal_and_holds_no_formula(tmp_path: Path) -> None:
    with written_rows(tmp_path / "a.csv", overwrite=False) as write:
        for row in rows():
            write(row)
    first, second, third = csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text("utf-8")))
    assert list(second.values()) == ["'=1+2.png", SHOWN, "0.75", "", "0.25", "0.75"]
    assert list(second) == ["image", "class", "probability", "error", "p(-x)", f"p({SHOWN})"]
    assert first == third
    assert list(first.values()) == ["c.png", "", "", "gone", "", ""]


def test_a_csv_of_images_none_of_which_could_be_read(tmp_path: Path) -> None:
    with written_rows(tmp_path / "a.csv", overwrite=False) as write:
        write(rows()[0])
    assert (tmp_path / "a.csv").read_text().split() == [
        "image,class,probability,error", "c.png,,,gone"
    ]  # fmt: skip


def test_json_has_every_text_as_it_is(tmp_path: Path) -> None:
    with written_rows(tmp_path / "a.json", overwrite=False) as write:
        for row in rows():
            write(row)
    text = (tmp_path / "a.json").read_text("ascii")
    assert "\x1b" not in text
    assert json.loads(text) == rows()


def test_rows_are_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with pytest.raises(KeyboardInterrupt), written_rows(path, overwrite=False) as add:  # noqa: PT012
        add(rows()[0])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_error_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    from bayesify.cli.guard import guard

    with pytest.raises(typer.Exit) as ended, guard(False, json=True):
        raise CheckpointError("a.safetensors is \x1b[31mdamaged")
    assert ended.value.exit_code == 1
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out
    assert printed.err == ""
    message = "a.safetensors is \x1b[31mdamaged"
    assert json.loads(printed.out) == {
        "error": {"kind": "CheckpointError", "message": message, "exit_code": 1}
    }
