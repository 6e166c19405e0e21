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


def test_the_settings_that_a_run_writes_repeat_it(tmp_path: Path) -> None:
    quick = ("--epochs=1", "--warmup-epochs=0", "--eval-every=0", "--no-baselines")
    assert invoke("train", *small_options(tmp_path), *quick).exit_code == 0
    file, again = tmp_path / "run" / "run.toml", tmp_path / "again"
    result = invoke("train", "--config", str(file), "--out", str(again))
    assert result.exit_code == 0, result.output
    for name in ("encoder", "student", "teacher"):
        first, second = (f / f"{name}.safetensors" for f in (tmp_path / "run", again))
        assert first.read_bytes() == second.read_bytes()
    assert (again / "run.toml").read_text() == file.read_text().replace(
        json.dumps(str(tmp_path / "run")), json.dumps(str(again))
    )


def test_options_beat_set_which_beats_the_file_which_beats_the_preset(
    tmp_path: Path, asked: list[tuple[BYOVConfig, RunConfig]]
) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[byov]\nlr = 0.5\nepochs = 70\nseed = 3\n[byov.encoder_args]\ndepth = 1\n")
    changes = ("--set", "byov.epochs=80", "--set", "byov.seed=4", "--set=byov.encoder_args.width=2")
    invoke("train", "-p", "cifar10-vit-tiny", "--config", str(file), *changes, "--seed=5")
    [(byov, run)] = asked
    assert (byov.lr, byov.epochs, byov.seed) == (0.5, 80, 5)
    assert byov.encoder_args == {"depth": 1, "width": 2}
    assert (byov.batch_size, run.data) == (512, PRESETS["cifar10-vit-tiny"].run.data)


def test_a_config_file_does_not_choose_code(
    tmp_path: Path, asked: list[tuple[BYOVConfig, RunConfig]]
) -> None:
    file = tmp_path / "a.toml"

    def refused(text: str, *arguments: str) -> str:
        file.write_text(text)
        asked.clear()
        result = invoke("train", "--config", str(file), *arguments)
        assert result.exit_code == (130 if asked else 2), result.output
        return " ".join(result.stderr.replace("│", " ").split())

    code = "a file does not choose which code runs"
    factory = '[byov]\nencoder = "my:net"\nencoder_args = {depth = 1}\n'
    assert code in refused(factory)
    assert "--encoder my:net" in refused(factory)
    assert code in refused(factory, "--encoder", "my:net")
    assert code in refused(factory, "--encoder", "my:net", "--set", "byov.encoder_args.depth=2")
    assert refused(factory, "--encoder", "my:net", "--encoder-args", '{"depth": 1}') == ""
    assert code in refused('[run]\ndata = "timm:torch/cifar10@data"')
    assert refused('[run]\ndata = "timm:torch/cifar10@data"', "--data", "timm:x@y") == ""
    assert "no setting byov.lrr (the nearest is byov.lr)" in refused("[byov]\nlrr = 1")


def test_a_config_file_is_not_written_over(
    tmp_path: Path, asked: list[tuple[BYOVConfig, RunConfig]]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f'# mine\n[run]\nout = "{tmp_path}"\n')
    result = invoke("train", "--config", str(file))
    assert result.exit_code == 2
    assert "is in --out, where a new run writes its own" in " ".join(
        result.stderr.replace("│", " ").split()
    )
    assert asked == []
    assert invoke("train", "--config", str(file), "--resume").exit_code == 130
