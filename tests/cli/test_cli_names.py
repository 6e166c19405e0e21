"""Names that no file can have, and folders that are none: an error of one kind, before the work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from test_cli_outputs import FACTORY
from typer.testing import CliRunner, Result

import bayesify
from bayesify.cli.app import app
from bayesify.data import load_dataset
from bayesify.errors import CheckpointError, DataError
from bayesify.models import create_model
from byov_small import CONFIG, small_run
from recipes.byov.train import train

IMPOSSIBLE = ["x" * 5000, "~nobody-of-this-name/x", "loop", "loop/x", "\0", "file/x"]
COMMANDS = [
    ("inspect", "NAME"), ("eval", "NAME", "fashion-sample"), ("eval", "net", "NAME"),
    ("eval", "net", "fashion-sample", "--ood", "NAME"), ("predict", "net", "NAME"),
    ("predict", "net", "fashion-sample", "-o", "NAME/a.csv"), ("prune", "NAME", "--sparsity", 0.5),
    ("prune", "net", "--sparsity", 0.5, "-o", "NAME"), ("fit", "net", "NAME", "-o", "o"),
    ("fit", "net", "fashion-sample", "-o", "NAME"), ("export", "NAME"),
    ("fit", "net", "fashion-sample", "-o", "o", "--checkpoint", "NAME", "--resume"),
    ("report", "net", "fashion-sample", "-o", "NAME"), ("report", "net", "NAME"),
    ("convert", "test_resnet", "--weights", "NAME"), ("convert", "test_resnet", "-o", "NAME"),
    ("recipe", "byov", "eval", "NAME"), ("recipe", "byov", "prune", "NAME"),
    ("recipe", "byov", "train", "--data", "NAME", "--out", "o"),
]  # fmt: skip


def run(*arguments: object) -> Result:
    runner = CliRunner(env={"COLUMNS": "8000", "NO_COLOR": "1"})
    return runner.invoke(app, [str(a) for a in arguments])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("predictfactory.py").write_text(FACTORY)
    result = run("convert", "predictfactory:net", "--img-size", 4, "-q", "--out", "net")
    assert result.exit_code == 0, result.output
    Path("loop").symlink_to("loop")
    Path("file").write_text("a text")
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(map(str, c)))
def test_names_that_no_file_can_have(folder: Path, command: tuple[object, ...]) -> None:
    before = sorted(os.listdir())
    for name in IMPOSSIBLE:
        words = [str(word).replace("NAME", name) for word in command]
        if "net" in words:
            words += ["--model", "predictfactory:net"]
        result = run(*words)
        assert result.exit_code in (1, 2), (name[:40], result.output[-400:])
        assert "--debug" not in result.output, (name[:40], result.output[:200])
        assert not isinstance(result.exception, OSError)
        assert sorted(os.listdir()) == before


@pytest.mark.parametrize("name", ["x" * 5000, "loop", "loop/x", "\0", "file/x"])
def test_folders_of_a_run_that_cannot_be(folder: Path, name: str) -> None:
    result = run("recipe", "byov", "train", "--data", "fashion-sample", "--out", name)
    assert result.exit_code in (1, 2), result.output[-400:]
    assert "--debug" not in result.output


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_the_errors_of_python(folder: Path, name: str) -> None:
    with pytest.raises(DataError):
        load_dataset(name, split="test")
    with pytest.raises(DataError):
        load_dataset(name + ".safetensors", split="test")
    with pytest.raises(CheckpointError, match="does not exist"):
        bayesify.load(name)
    with pytest.raises(Exception, match="There is no weights file"):
        create_model("test_resnet", weights=name)


def test_a_folder_without_a_run_is_told_before_others_are_measured(folder: Path) -> None:
    made = small_run(folder, eval_every=0)
    train(CONFIG, made)
    for command in ("eval", "prune"):
        result = run("recipe", "byov", command, made.out, "loop", "--epochs", 1)
        assert result.exit_code == 2
        assert "loop holds no run" in " ".join(result.stderr.split())
    result = run("recipe", "byov", "eval", made.out, "-k", 0, "--epochs", 1, "--ood", "loop")
    assert result.exit_code == 2
    assert not (made.out / "results").exists()


@pytest.mark.parametrize("command", ["train", "eval", "prune", "figures"])
def test_seeds_that_no_generator_takes(folder: Path, command: str) -> None:
    made = small_run(folder, eval_every=0)
    if command != "train":
        train(CONFIG, made)
    where = ("--data", "fashion-sample", "--out", "o") if command == "train" else (made.out,)
    result = run("recipe", "byov", command, *where, "--seed", 1 << 64)
    assert result.exit_code == 2, result.output[-400:]
    assert "2**63" in result.output
    assert not Path("o").exists()
    assert not (made.out / "results").exists()
