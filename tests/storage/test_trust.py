"""A file of bayesify that comes from elsewhere runs no code that it names, in any command."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import bayesify
from bayesify import CheckpointError, create_model
from bayesify.cli.app import app
from bayesify.models import SPEC

LIBRARY = """
from pathlib import Path
Path({marker!r}).touch()
import timm

def resnet(**arguments):
    return timm.create_model("test_resnet", **arguments)

def small():
    return resnet(num_classes=10, in_chans=1)
"""
SMALL: dict[str, Any] = {"num_classes": 10, "in_chans": 1}

Rewrite = Callable[..., Path]


class Payload:
    """A pickle that touches a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """It is there once the code of one who hands on a file has run."""
    return tmp_path / "marker"


@pytest.fixture
def named(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> Rewrite:
    """A file of a test_resnet for Fashion-MNIST that says that something else builds it."""
    library = tmp_path / "library"
    library.mkdir()
    for name in ("handed_on.py", "hubconf.py"):
        (library / name).write_text(LIBRARY.format(marker=str(marker)))
    monkeypatch.syspath_prepend(library)
    monkeypatch.delitem(sys.modules, "handed_on", raising=False)
    monkeypatch.chdir(tmp_path)
    torch.save(Payload(marker), "payload.pt")

    def make(name: str, **arguments: Any) -> Path:
        torch.manual_seed(0)
        model = bayesify.to_bbb(create_model("test_resnet", img_size=32, **SMALL)).eval()
        spec = getattr(model, SPEC)
        bayesify.save(model, "plain.safetensors", spec=spec, overwrite=True)
        header = bayesify.storage.read_header("plain.safetensors")
        header["model"]["spec"] = {"name": name, "model_args": arguments}
        tensors = load_file("plain.safetensors")
        save_file(tensors, "file.safetensors", metadata={"bayesify": json.dumps(header)})
        return Path("file.safetensors")

    return make


HUB = {"repo_or_dir": "library", "model": "resnet", "source": "local", **SMALL}
NAMED: list[tuple[str, dict[str, Any]]] = [
    ("handed_on:resnet", SMALL),
    ("torch.hub:load", HUB),
    ("builtins:exec", {}),
    ("hf-hub:a/b", {}),
    ("local-dir:library", {}),
    ("test_resnet", {"checkpoint_path": "payload.pt"}),
    ("test_resnet", {"pretrained": True, "pretrained_cfg": {"file": "payload.pt"}}),
    ("test_resnet", {"pretrained_cfg_overlay": {"file": "payload.pt"}}),
    ("torchvision:resnet18", {"weights": "DEFAULT"}),
    ("torchvision:fasterrcnn_resnet50_fpn", {"pretrained_backbone": True}),
]


@pytest.mark.parametrize(("name", "arguments"), NAMED)
def test_load_does_not_run_what_a_file_names(
    name: str, arguments: dict[str, Any], named: Rewrite, marker: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    file = named(name, **arguments)
    read: list[Any] = []
    monkeypatch.setattr(torch, "load", lambda *a, **k: read.append(a))
    with pytest.raises(CheckpointError, match="cannot be built"):
        bayesify.load(file)
    assert not read
    assert not marker.exists()


COMMANDS = [
    ["inspect"],
    ["eval", "fashion-sample", "-k", "1"],
    ["fit", "fashion-sample", "-o", "x.safetensors"],
    ["predict", "fashion-sample", "-k", "1"],
    ["prune", "--sparsity", "0.5", "-o", "x.safetensors"],
    ["prune", "--curve", "--data", "fashion-sample", "-k", "1"],
    ["export", "--format", "safetensors", "-o", "x.safetensors"],
    ["report", "fashion-sample", "-o", "x.html"],
]


def invoke(file: Path, command: list[str], *more: str) -> Result:
    runner = CliRunner(env={"COLUMNS": "4000", "NO_COLOR": "1", "TERM": "dumb"})
    return runner.invoke(app, [command[0], str(file), *command[1:], *more])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c[:2]))
@pytest.mark.parametrize(("name", "arguments"), [NAMED[0], NAMED[1], NAMED[5]])
def test_commands_do_not_run_what_a_file_names(
    name: str, arguments: dict[str, Any], command: list[str], named: Rewrite, marker: Path
) -> None:
    result = invoke(named(name, **arguments), command)
    assert "Traceback" not in result.output
    assert not marker.exists()
    if command != ["inspect"] and command[1] != "--sparsity":  # they build nothing
        assert result.exit_code in (1, 2), result.output
        assert not list(Path().glob("x.*"))


def test_arguments_of_a_factory_come_from_the_user(named: Rewrite, marker: Path) -> None:
    """Who names torch's hub has not said which folder of it."""
    file, command = named("torch.hub:load", **HUB), ["export", "--format", "safetensors"]
    for given in ([], ["--model-args", "{}"], ["--model-args", json.dumps({**HUB, "model": "a"})]):
        refused = invoke(file, command, "--model", "torch.hub:load", *given)
        assert refused.exit_code == 2, refused.output
        assert "does not choose what code is called with" in refused.stderr
    assert not marker.exists()
    message = " ".join(line.strip("│ ") for line in refused.stderr.splitlines())
    [options] = [part for part in message.split("if you trust them: ")[1:]]
    options = options.partition("╰")[0]
    given = shlex.split(options)[:2]
    assert given == ["--model-args", json.dumps(HUB, sort_keys=True)]
    result = invoke(file, command, "--model", "torch.hub:load", *given)
    assert result.exit_code == 0, result.output
    assert marker.exists()


def test_arguments_that_are_no_json(named: Rewrite) -> None:
    file, command = named("handed_on:resnet", **SMALL), ["predict", "fashion-sample"]
    for text in ("{", "[1]"):
        result = invoke(file, command, "--model", "handed_on:resnet", "--model-args", text)
        assert result.exit_code == 2
        assert "must be a JSON object" in result.stderr


def test_a_factory_without_arguments_needs_its_name_alone(named: Rewrite, marker: Path) -> None:
    result = invoke(
        named("handed_on:small"),
        ["export", "--format", "safetensors"],
        "--model",
        "handed_on:small",
    )
    assert result.exit_code == 0, result.output
    assert marker.exists()
