"""cli/outputs.py: no command writes over what it reads or what else it writes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from bayesify import models, training
from bayesify.cli.app import app
from bayesify.storage import load, read_header
from recipes.byov.cli import app as byov

FACTORY = """
from torch import nn


def net():
    return nn.Sequential(nn.Conv2d(3, 6, 4), nn.Flatten(), nn.Linear(6, 3))
"""
MODEL = ("--model", "outputfactory:net")
BUILT = ("convert", "outputfactory:net", "--img-size", 4, "--quiet")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a converted model, its weights, a data set, an image, and links to them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("outputfactory.py").write_text(FACTORY)
    images, labels = torch.randint(0, 256, (12, 4, 4, 3)).to(torch.uint8), torch.arange(12) % 3
    save_file({"images": images, "labels": labels}, "d.safetensors")
    Image.new("RGB", (4, 4)).save("a.png")
    save_file(models.create_model("outputfactory:net").state_dict(), "w.safetensors")
    run(*BUILT, "--weights", "w.safetensors", "--out", "net")
    Path("there").symlink_to(".")
    Path("link").symlink_to("net")
    Path("link.csv").symlink_to("net")
    Path("link.png").symlink_to("net")
    Path("data.json").symlink_to("d.safetensors")
    yield tmp_path
    sys.modules.pop("outputfactory", None)


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def contents() -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(Path().iterdir()) if p.is_file()}


def words(result: Result) -> str:
    return " ".join(result.stderr.replace("│", " ").split())


def fit(*arguments: object, code: int = 0) -> Result:
    command = ("fit", "net", "d.safetensors", *MODEL, "-b", 4, "--epochs", 1, "--quiet")
    return run(*command, *arguments, code=code)


def no_work(*_: object, **__: object) -> None:
    raise AssertionError("work began")


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize(
    ("out", "state"),
    [("x", "x"), ("x", "./x"), ("x", "there/x"), ("there/x", "x"), ("new", "dangling")],
)
def test_a_fit_has_two_outputs(
    out: str, state: str, force: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("dangling").symlink_to("there/new")
    monkeypatch.setattr(training, "fit", no_work)
    monkeypatch.setattr("bayesify.cli.checkpoint.open_model", no_work)
    before = contents()
    message = words(fit("--out", out, "--checkpoint", state, *force, code=2))
    assert f"--out and --checkpoint are the same file, {Path(state)}: give two names" in message
    assert contents() == before


@pytest.mark.parametrize(
    "command",
    [
        (*BUILT, "--weights", "w.safetensors", "--out", "there/w.safetensors"),
        ("fit", "net", "d.safetensors", *MODEL, "--out", "d.safetensors"),
        ("fit", "net", "d.safetensors", *MODEL, "--out", "new", "--checkpoint", "link"),
        ("fit", "net", "d.safetensors", *MODEL, "--out", "new", "--checkpoint", "data.json"),
        ("fit", "net", "d.safetensors", *MODEL, "--out", "d.safetensors", "--method",
         "laplace-diag"),
        ("prune", "net", *MODEL, "--sparsity", 0.5, "--deterministic", "--out", "net"),
        ("prune", "net", *MODEL, "--curve", "--data", "d.safetensors", "--plot", "link.png"),
        ("export", "net", *MODEL, "--out", "link"),
        ("export", "net", *MODEL, "--format", "torch", "--out", "there/net"),
        ("report", "net", "d.safetensors", *MODEL, "--out", "net"),
        ("report", "net", "d.safetensors", *MODEL, "--out", "data.json"),
        ("report", "net", "fashion-sample", *MODEL, "--ood", "d.safetensors", "--out",
         "d.safetensors"),
        ("predict", "net", "a.png", *MODEL, "--out", "link.csv"),
        ("predict", "net", "d.safetensors", *MODEL, "--out", "data.json"),
    ],
    ids=lambda command: " ".join(map(str, command)),
)  # fmt: skip
@pytest.mark.parametrize("force", [(), ("--force",)])
def test_no_input_is_lost(command: tuple[object, ...], force: tuple[str, ...]) -> None:
    before = contents()
    message = words(run(*command, *force, code=2))
    assert "which would be lost: give another name." in message
    assert contents() == before


def test_a_newer_state_may_replace_its_file() -> None:
    whole = contents()["net"]
    assert "--force to replace it" in words(fit("--out", "net", code=2))
    assert contents()["net"] == whole
    fit("--out", "link", "--force")
    assert "fit" in read_header(Path("net"))["info"]
    assert Path("link").is_symlink()
    run("prune", "net", *MODEL, "--sparsity", 0.5, "--out", "net", "--force", "--quiet")
    assert {"fit", "pruned"} <= set(read_header(Path("net"))["info"])
    load("net", model=models.create_model("outputfactory:net"))


def test_a_fit_in_place_that_is_cut_short_leaves_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"a part")
        raise OSError("disk full")

    before = contents()
    monkeypatch.setattr("bayesify.storage.writing.save_file", full)
    assert "disk full" in words(fit("--out", "net", "--force", code=1))
    Path("net.resume").unlink()  # the fit's own state
    assert contents() == before


def test_a_name_that_is_no_file_is_no_input() -> None:
    run("export", "net", *MODEL, "--out", "fashion-sample", "--quiet")
    run("predict", "net", "a.png", *MODEL, "--out", "new.csv")


def seeming_run() -> None:
    """A folder with what tells a run of the recipe: a checkpoint, which is not opened here."""
    Path("run/checkpoints").mkdir(parents=True)
    Path("run/checkpoints/step-00000001.safetensors").touch()


@pytest.mark.parametrize("command", ["train", "prune", "figures"])
def test_the_folder_of_a_recipe(command: str, tmp_path: Path) -> None:
    Path("images").mkdir()
    Path("file").write_text("here")
    seeming_run()
    folders = [] if command == "train" else ["run"]

    def refused(out: str, message: str, code: int = 2) -> None:
        before = sorted(tmp_path.rglob("*"))
        arguments = [command, *folders, "--data", "there/images", "--out", out]
        result = CliRunner().invoke(byov, arguments)
        assert result.exit_code == code, (result.output, result.exception)
        shown = words(result).replace(" ", "")  # a panel breaks a long path anywhere
        assert message.replace(" ", "") in shown
        assert sorted(tmp_path.rglob("*")) == before

    refused("images", "--out is --data, images: give a folder of its own")
    refused("file", "file is a file: give another name")
    refused("file/new", "file is a file: give another name")
    os.chmod("images", 0o500)
    if not os.access("images", os.W_OK):  # the superuser may write everywhere
        refused("images/new", "is not writable", code=1)


@pytest.mark.parametrize("command", ["eval", "prune", "figures"])
def test_a_run_that_cannot_take_its_results(command: str) -> None:
    seeming_run()
    Path("run/results").write_text("no folder")
    result = CliRunner().invoke(byov, [command, "run"])
    assert result.exit_code == 2, result.output
    assert "RUN_DIR needs a folder" in words(result)
