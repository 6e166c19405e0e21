"""``bayesify recipe byov``: options, what is printed, exit codes."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from byov_small import CONFIG, small_data
from recipes.byov import cli
from recipes.byov.config import BYOVConfig, RunConfig
from recipes.byov.presets import PRESETS
from recipes.byov.runtime.log import read_log
from recipes.byov.train import Outcome

ROOT = Path(__file__).parents[2]


def small_options(folder: Path) -> list[str]:
    """The run of :mod:`byov_small` as options."""
    values: dict[str, Any] = {
        name: value
        for name, value in CONFIG.to_json().items()
        if value != PRESETS["demo"].config.to_json()[name]
    }
    values["encoder_args"] = json.dumps(values["encoder_args"])
    options = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    return [
        *options, f"--data={small_data(folder)}", f"--out={folder / 'run'}", "--log-every=1",
        "--no-stop-on-collapse",
    ]  # fmt: skip


def invoke(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1"}).invoke(cli.app, list(arguments))


def test_a_run_prints_numbers_files_and_what_comes_next(tmp_path: Path) -> None:
    result = invoke("train", *small_options(tmp_path))
    assert result.exit_code == 0, result.output
    shown = result.stdout
    for row in ("raw pixels", "untrained encoder", "trained encoder"):
        assert re.search(rf"{row}.*\d+\.\d\d%", shown)
    table = shown[: shown.index("Bayesian encoder:")]
    assert max(map(len, table.splitlines())) <= 80
    for name in ("encoder", "student", "teacher"):
        assert str(tmp_path / "run" / f"{name}.safetensors") in shown
    commands = re.findall(r"^  (bayesify \w+)", shown, re.MULTILINE)
    assert commands == ["bayesify eval", "bayesify fit", "bayesify prune"]
    assert len(read_log(tmp_path / "run" / "log.jsonl")) > 9


def test_every_field_is_an_option() -> None:
    command: Any = typer.main.get_command(cli.app)
    options = {name for p in command.commands["train"].params for name in p.opts}
    for each in (*fields(BYOVConfig), *fields(RunConfig)):
        assert f"--{each.name.replace('_', '-')}" in options


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[BYOVConfig, RunConfig]]:
    """What each training was asked for; none takes place."""
    seen: list[tuple[BYOVConfig, RunConfig]] = []

    def note(byov: BYOVConfig, run: RunConfig, resume: bool) -> Outcome:
        seen.append((byov, run))
        return Outcome(0, 1, None, None)

    monkeypatch.setattr(cli, "_train", note)
    return seen


def test_options_replace_those_of_the_preset(asked: list[tuple[BYOVConfig, RunConfig]]) -> None:
    invoke("train", "-p", "imagenet-vit-b16", "--lr=1", "--no-amp", '--encoder-args={"depth": 2}')
    [(byov, run)] = asked
    assert (byov.lr, run.amp) == (1.0, False)
    assert byov.batch_size == 8192
    assert byov.encoder_args == {"depth": 2}


def test_skip_may_be_given_several_times(asked: list[tuple[BYOVConfig, RunConfig]]) -> None:
    for given in ([], ["encoder.fc_norm.bias"], ["LayerNorm", "re:a{1,2}"]):
        invoke("train", *[f"--skip={pattern}" for pattern in given])
    assert [byov.skip for byov, _ in asked] == [
        (), ("encoder.fc_norm.bias",), ("LayerNorm", "re:a{1,2}"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "preset must be one of"),
        (["--tau-base", "1.5"], "tau_base"),
        (["--encoder-args", "{depth: 2}"], "encoder_args must be a JSON object"),
        (["--batch-size", "1"], "BatchNorm"),
        (["--data", "/nowhere"], "/nowhere"),
        (["--device", "abacus"], "device 'abacus'"),
    ],
)
def test_wrong_usage_ends_with_2_and_names_the_field(arguments: list[str], message: str) -> None:
    result = invoke("train", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_presets_are_listed() -> None:
    result = invoke("presets")
    assert all(name in result.stdout for name in PRESETS)


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from recipes.byov import cli; import typer.main\n"
        "typer.main.get_command(cli.app)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
