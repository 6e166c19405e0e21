"""The examples, the demo and every Python block of the documentation run, and say what is true."""

import ast
import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.image
import pytest
import torch
import typer
from typer.core import TyperGroup

import bayesify
from bayesify.cli.app import app
from bayesify.estimators import registry

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
# A python block and, where it follows at once, the text block with what it prints.
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)


def script(path: Path) -> Any:
    """The module of a script, freshly imported and not run."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks() -> list[Any]:
    return [
        pytest.param(page, *match.groups(), id=f"{page.name}-{number}")
        for page in PAGES
        for number, match in enumerate(BLOCK.finditer(page.read_text("utf-8")), 1)
    ]


def test_the_readme_has_blocks_to_run() -> None:
    assert len(blocks()) >= 3


@pytest.mark.parametrize(("page", "code", "printed"), blocks())
def test_a_block_of_the_documentation_runs(
    page: Path,
    code: str,
    printed: str | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "_ESTIMATORS", dict(registry._ESTIMATORS))
    exec(compile(code, str(page), "exec"), {"__name__": "__main__"})
    if printed is not None:
        said = [line.rstrip() for line in capsys.readouterr().out.rstrip().splitlines()]
        assert said == printed.rstrip().splitlines()


COMMAND = re.compile(r"^    (bayesify (?:.*\\\n)*.*)$", re.MULTILINE)


def command_lines() -> list[Any]:
    pages = (*PAGES, ROOT / "recipes" / "byov" / "README.md")
    return [
        pytest.param(line, id=f"{page.parent.name}-{page.name}-{number}")
        for page in pages
        for number, line in enumerate(COMMAND.findall(page.read_text("utf-8")), 1)
    ]


def test_the_documentation_has_commands() -> None:
    assert len(command_lines()) >= 20


@pytest.mark.parametrize("line", command_lines())
def test_a_command_of_the_documentation_has_only_options_that_there_are(line: str) -> None:
    """The command line takes it as it stands; it is not run."""
    _, *left = shlex.split(line.replace("\\\n", ""), comments=True)
    command: Any = typer.main.get_command(app)
    context = None
    while isinstance(command, TyperGroup):
        context = command.make_context(command.name, list(left), parent=context)
        command, left = command.get_command(context, left[0]), left[1:]
    if "--help" not in left:
        command.make_context(command.name, left, parent=context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8"))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).is_file()] == []


def test_the_readme_says_of_the_demo_what_the_recorded_file_says() -> None:
    recorder = script(ROOT / "benchmarks" / "record_demo.py")
    readme = recorder.README.read_text("utf-8")
    record = json.loads(recorder.RESULT.read_text("utf-8"))
    assert recorder.with_section(readme, record) == readme
    worse = {**record, "rows": [{**row, "nll": row["nll"] + 0.1} for row in record["rows"]]}
    assert recorder.with_section(readme, worse) != readme


def test_the_recorded_demo_is_this_demo() -> None:
    demo, recorder = script(EXAMPLES / "demo.py"), script(ROOT / "benchmarks" / "record_demo.py")
    record = json.loads(recorder.RESULT.read_text("utf-8"))
    assert record["what"] == "examples/demo.py"
    assert record["settings"] == json.loads(json.dumps(demo.settings(0, demo.EPOCHS)))
    assert {"commit", "machine", "versions", "seconds"} <= set(record)


def test_the_figure_is_small() -> None:
    assert (ROOT / "docs" / "images" / "demo.png").stat().st_size < 300_000


def test_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = script(EXAMPLES / "demo.py")
    monkeypatch.setattr(demo, "NUM_SAMPLES", 2)
    record = demo.main(["--out", str(tmp_path / "out"), "--epochs", "1", "--holdout"])
    assert [row["prediction"] for row in record["rows"]] == [
        "deterministic", "at the means", "MC average"
    ]  # fmt: skip
    assert all(row["accuracy"] > 0.3 for row in record["rows"])  # chance is 0.1
    assert json.loads((tmp_path / "out" / "result.json").read_text("utf-8")) == record
    assert bayesify.load(tmp_path / "out" / "model.bbb.safetensors").training is False
    height, width, _ = matplotlib.image.imread(tmp_path / "out" / "demo.png").shape
    assert min(height, width) > 400
    assert "MC average" in capsys.readouterr().out


def test_regression(tmp_path: Path) -> None:
    result = script(EXAMPLES / "regression.py").main(str(tmp_path / "picture.png"))
    assert result["rmse"] < 0.1
    assert 0.9 < result["share_in_95_percent_band"] <= 1.0
    assert result["std_far_away"] > 1.5 * result["std_at_the_data"]
    assert matplotlib.image.imread(tmp_path / "picture.png").shape[1] > 600


def test_finetune_timm() -> None:
    torch.manual_seed(0)
    before, means, average = script(EXAMPLES / "finetune_timm.py").main(images=1000, epochs=2)
    assert before.accuracy > 0.5
    assert min(means.accuracy, average.accuracy) > before.accuracy - 0.02


def test_own_loop() -> None:
    assert min(script(EXAMPLES / "own_loop.py").main(epochs=40).values()) > 0.95


def test_the_own_loop_takes_public_names_only() -> None:
    tree = ast.parse((EXAMPLES / "own_loop.py").read_text("utf-8"))
    imported = [
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and "bayesify" in (node.module or "")
        for alias in node.names
    ]
    assert {module for module, _ in imported} == {"bayesify"}
    assert {name for _, name in imported} <= set(bayesify.__all__)


@pytest.mark.parametrize("name", ["regression", "finetune_timm", "own_loop"])
def test_an_example_is_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text("utf-8").splitlines()) <= 100
