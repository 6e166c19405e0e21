"""Without the packages that are optional, all else works, and what needs one names its extra."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = (
    "jinja2", "markupsafe", "matplotlib", "onnx", "onnxruntime", "onnxscript", "peft", "pyarrow",
    "scipy", "tensorboard", "transformers",
)  # fmt: skip

RUN = """
import sys

for name in {absent!r}:
    sys.modules[name] = None  # importing it fails

import json, pkgutil
from importlib import import_module
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import bayesify
import bayesify.report, recipes

for package in (bayesify, recipes):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        name = module.name
        if not name.endswith(("__main__", "._native", "triton_kernels", "triton_draw")):
            import_module(name)

found = dict()

def tried(name, function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        found[name] = f"{{type(error).__name__}}: {{error}}"
    else:
        found[name] = "works"

x, y = torch.randn(16, 3), torch.randint(2, (16,))
model = bayesify.to_bbb(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
data = TensorDataset(x, y)
tried("fit", lambda: bayesify.fit(model, data, epochs=1, batch_size=8, lr=1e-3))
tried("predict", lambda: bayesify.predict(model, x, num_samples=2))
tried("evaluate", lambda: bayesify.evaluate(model, data, num_samples=2))
tried("laplace", lambda: bayesify.fit_laplace_(bayesify.to_bbb(nn.Linear(3, 2)), data))
tried("save", lambda: bayesify.save(model, "m.bbb.safetensors"))
tried("load", lambda: bayesify.load("m.bbb.safetensors", nn.Sequential(
    nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))))
tried("prune", lambda: bayesify.prune_(model, 0.5))
tried("safetensors", lambda: bayesify.export_safetensors(model, "e.safetensors"))
tried("onnx", lambda: bayesify.export_onnx(model, "e.onnx", x))
tried("report", import_module("bayesify.report.page").check_installed)
tried("figures", import_module("bayesify.report.figure").figure_class)
tried("paper", import_module("bayesify.report").check_installed, "scipy")
Path("t.parquet").write_bytes(b"PAR1")
tried("parquet", import_module("bayesify.data").read_table, "t.parquet")
tried("tensorboard", import_module("recipes.byov.runtime.tensorboard").TensorBoardWriter,
      Path("log"), 0)

from typer.testing import CliRunner
from bayesify.cli.app import app

result = CliRunner().invoke(app, ["doctor", "--json"])
tried("doctor", json.loads, result.stdout)
print(json.dumps(found))
"""
EXTRA_OF = {"onnx": "onnx", "report": "report", "figures": "report", "paper": "report",
            "parquet": "tables", "tensorboard": "tensorboard"}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each feature said in a process where nothing optional can be imported."""
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[0] = {str(ROOT)!r}\n"
         + RUN.format(absent=OPTIONAL)],
        cwd=tmp_path_factory.mktemp("run"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    answers: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answers


@pytest.mark.parametrize("feature", EXTRA_OF)
def test_what_needs_an_extra_names_it(found: dict[str, Any], feature: str) -> None:
    assert found[feature].startswith("ArgumentError: ")
    assert f"pip install 'bayesify[{EXTRA_OF[feature]}]'" in found[feature]


def test_all_else_works(found: dict[str, Any]) -> None:
    others = {name: answer for name, answer in found.items() if name not in EXTRA_OF}
    assert len(others) > 8
    assert set(others.values()) == {"works"}, others


@pytest.mark.parametrize(
    ("absent", "feature"),
    [("jinja2", "report"), ("matplotlib", "report"), ("onnx", "onnx"), ("onnxscript", "onnx")],
)
def test_the_package_that_is_missing_is_named(
    absent: str, feature: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    import bayesify
    from bayesify.report import check_installed

    monkeypatch.setitem(sys.modules, absent, None)
    model = bayesify.to_bbb(torch.nn.Linear(2, 2))
    needs: dict[str, Callable[[], Any]] = {
        "report": check_installed,
        "onnx": lambda: bayesify.export_onnx(model, tmp_path / "x.onnx", torch.ones(1, 2)),
    }
    with pytest.raises(bayesify.ArgumentError, match=rf"needs (the package )?{absent}: pip"):
        needs[feature]()
