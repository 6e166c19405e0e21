"""A folder of a run that comes from elsewhere runs no code that it names."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bayesify import ArgumentError, CheckpointError, ModelError
from byov_small import CONFIG, small_run
from recipes.byov import cli
from recipes.byov.evaluation.runs import open_run
from recipes.byov.presets import PRESETS
from recipes.byov.runtime import checkpoint
from recipes.byov.runtime.log import read_log
from recipes.byov.train import train

Named = tuple[str, dict[str, Any]]

FACTORY = """
from pathlib import Path
Path({marker!r}).touch()
import timm

def encoder(**arguments):
    return timm.create_model("vit_tiny_patch16_224", img_size=28, **arguments)
"""


class Payload:
    """A pickle that touches a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = small_run(tmp_path_factory.mktemp("trained"), eval_every=0)
    train(CONFIG, run)
    return run.out


@pytest.fixture
def rewritten(trained: Path, tmp_path: Path) -> Callable[..., Path]:
    """The run with another identity, as one who hands it on could give it."""

    def make(**changes: Any) -> Path:
        newest = checkpoint.latest(trained / "checkpoints")
        assert newest is not None
        saved = checkpoint.read(newest)
        saved["identity"] |= changes
        folder = tmp_path / "run"
        checkpoint.write(folder / "checkpoints" / newest.name, saved)
        return folder

    return make


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """It is there once the code of one who hands on a run has run."""
    return tmp_path / "marker"


@pytest.fixture
def module(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> Named:
    """A factory on the path, as a file names it."""
    library = tmp_path / "library"
    library.mkdir()
    (library / "handed_on.py").write_text(FACTORY.format(marker=str(marker)))
    monkeypatch.syspath_prepend(library)
    monkeypatch.delitem(sys.modules, "handed_on", raising=False)
    return "handed_on:encoder", dict(CONFIG.encoder_args)


@pytest.fixture
def hub(tmp_path: Path, marker: Path) -> Named:
    """torch's hub with a folder, as a file names it."""
    repository = tmp_path / "hub"
    repository.mkdir()
    (repository / "hubconf.py").write_text(FACTORY.format(marker=str(marker)))
    source = {"repo_or_dir": str(repository), "model": "encoder", "source": "local"}
    return "torch.hub:load", {**source, **CONFIG.encoder_args}


def invoke(*arguments: object) -> Any:
    runner = CliRunner(env={"COLUMNS": "4000", "NO_COLOR": "1"})
    return runner.invoke(cli.app, [str(a) for a in arguments])


@pytest.mark.parametrize("kind", ["module", "hub"])
@pytest.mark.parametrize("command", ["eval", "prune", "figures"])
def test_a_folder_does_not_choose_code(
    kind: str, command: str, rewritten: Any, marker: Path, request: pytest.FixtureRequest
) -> None:
    encoder, arguments = request.getfixturevalue(kind)
    folder = rewritten(encoder=encoder, encoder_args=arguments)
    out = () if command == "eval" else ("--out", folder / "out")
    result = invoke(command, folder, *out)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert encoder in result.stderr
    assert "does not choose which code runs" in result.stderr
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["module", "hub"])
def test_what_the_error_says_to_give_opens_it(
    kind: str, rewritten: Any, trained: Path, marker: Path, request: pytest.FixtureRequest
) -> None:
    encoder, arguments = request.getfixturevalue(kind)
    folder = rewritten(encoder=encoder, encoder_args=arguments)
    with pytest.raises(ArgumentError) as refused:
        open_run(folder, device="cpu")
    options = shlex.split(str(refused.value)[str(refused.value).index("--encoder") :])
    assert options == [
        "--encoder",
        encoder,
        "--encoder-args",
        json.dumps(arguments, sort_keys=True),
    ]
    result = invoke("eval", folder, "-k", 0, "--epochs", 2, "--device", "cpu", "--json", *options)
    assert result.exit_code == 0, result.output
    assert marker.exists()
    plain = invoke("eval", trained, "-k", 0, "--epochs", 2, "--device", "cpu", "--json")
    assert json.loads(result.stdout)[0]["numbers"] == json.loads(plain.stdout)[0]["numbers"]


def test_arguments_come_from_the_user_too(rewritten: Any, hub: Named, marker: Path) -> None:
    encoder, arguments = hub
    folder = rewritten(encoder=encoder, encoder_args=arguments)
    other = {**arguments, "repo_or_dir": "elsewhere"}
    for given in (None, {}, other):
        with pytest.raises(ArgumentError, match="does not choose which code runs"):
            open_run(folder, encoder=encoder, encoder_args=given, device="cpu")
    with pytest.raises(ArgumentError, match="does not choose which code runs"):
        open_run(folder, encoder_args=arguments, device="cpu")
    assert not marker.exists()


def test_another_encoder_than_the_runs_is_refused(trained: Path) -> None:
    with pytest.raises(ArgumentError, match="was trained with --encoder vit_tiny"):
        open_run(trained, encoder="handed_on:encoder", device="cpu")
    result = invoke("eval", trained, "--encoder", "a:b", "--encoder-args", "[1]")
    assert result.exit_code == 2
    assert "must be a JSON object" in result.stderr


OWN = PRESETS["cifar10-resnet18"].config.encoder


@pytest.mark.parametrize("encoder", [CONFIG.encoder, OWN])
@pytest.mark.parametrize(
    "arguments",
    [
        {"checkpoint_path": "payload.pt"},
        {"pretrained": True, "pretrained_cfg": {"file": "payload.pt"}},
        {"pretrained": True},
        {"pretrained_cfg_overlay": {"file": "payload.pt"}},
        {"cache_dir": "."},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_networks_of_timm_read_no_file_for_a_folder(
    encoder: str, arguments: dict[str, Any], rewritten: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    marker = tmp_path / "marker"
    torch.save(Payload(marker), "payload.pt")
    read: list[Any] = []
    monkeypatch.setattr(torch, "load", lambda *a, **k: read.append(a))
    folder = rewritten(encoder=encoder, encoder_args=arguments, image_size=32)
    with pytest.raises(ModelError, match=f"cannot hold '{next(iter(arguments))}'"):
        open_run(folder, device="cpu")
    assert not read
    assert not marker.exists()


@pytest.mark.parametrize("encoder", ["hf-hub:a/b", "local-dir:/tmp/a", "builtins:exec"])
def test_other_names_are_refused(encoder: str, rewritten: Any) -> None:
    folder = rewritten(encoder=encoder, encoder_args={})
    with pytest.raises(ArgumentError, match=f"names the factory '{encoder}'"):
        open_run(folder, device="cpu")


def test_a_folder_does_not_choose_a_data_set_of_timm(
    rewritten: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(
        "timm.data.dataset_factory.create_dataset", lambda *a, **k: opened.append((a, k))
    )
    name = f"timm:hfds/some one/else@{tmp_path}"
    folder = rewritten(data={"name": name, "images": 48})
    result = invoke("eval", folder)
    assert result.exit_code == 2
    assert "does not choose which code runs" in result.stderr
    assert not opened
    with pytest.raises(ArgumentError, match=re.escape(f"--data {shlex.quote(name)}")):
        open_run(folder, device="cpu")
    with pytest.raises(Exception, match="does not name its classes"):
        open_run(folder, data=name, device="cpu")
    assert opened, "what the user names is opened"


def test_the_network_of_a_preset_needs_no_option(tmp_path: Path) -> None:
    small = {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4]}
    run = small_run(tmp_path, eval_every=0)
    train(replace(CONFIG, conversion="none", encoder=OWN, encoder_args=small, epochs=2), run)
    assert open_run(run.out, device="cpu").encoder.conv1.stride == (1, 1)


def test_a_damaged_run_is_one_kind_of_error(rewritten: Callable[..., Path]) -> None:
    changes: dict[str, Any]
    for changes in (
        {"encoder_args": {"patch_size": 14, "embed_dim": 160_000, "depth": 1, "num_heads": 2}},
        {"projector_hidden": 10_000_000},
        {"data": {}},
        {"data": {"name": 3}},
        {"epochs": "3"},
        {"skip": 3},
        {"conversion": []},
    ):
        with pytest.raises(CheckpointError):
            open_run(rewritten(**changes), device="cpu")


def test_a_log_that_was_cut_or_damaged(trained: Path, tmp_path: Path) -> None:
    text = (trained / "log.jsonl").read_text()
    path = tmp_path / "log.jsonl"
    path.write_text(text + '{"kind": "ste')  # as a killed run leaves it
    assert read_log(path) == read_log(trained / "log.jsonl")
    for damaged in ("[1]\n", '{"kind": 3, "step": 1}\n', "[" * 9999 + "\n"):
        path.write_text(damaged + text)
        with pytest.raises(CheckpointError, match="is no log of a run"):
            read_log(path)
