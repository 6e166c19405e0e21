"""The page on speed: what it says of what was measured, and of what was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fit
import memory
import paired
import pytest
import speed_table
import torch
from cifar_resnet20 import resnet20

ROW = {"low": 1.01, "median": 1.04, "high": 1.1, "seconds": 2.0}
BASE: dict[str, Any] = {
    "command": "benchmarks/x.py", "commit": "abc", "date": "2026-01-01", "rounds": 3, "threads": 2,
    "machine": {"processor": "P", "cores": 2, "system": "Linux", "python": "3.11"},
    "versions": {"torch": "2.15"},
}  # fmt: skip
GPU = {**BASE, "machine": {**BASE["machine"], "card": "H100"}}
SIZES = dict.fromkeys(speed_table.PARTS, 2 << 20)


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(speed_table, "RESULTS", tmp_path)
    monkeypatch.setattr(speed_table, "PAGE", tmp_path / "speed.md")
    monkeypatch.setattr(speed_table, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text(f"before\n{speed_table.BEGIN}old\n{speed_table.END}after\n")
    return tmp_path / "speed.md"


def put(page: Path, name: str, record: dict[str, Any]) -> None:
    (page.parent / name).write_text(json.dumps(record))


def test_nothing_is_said_of_what_was_not_measured(page: Path) -> None:
    speed_table.write()
    text = page.read_text()
    assert "Not measured: a training step of ViT-B/16" in text
    assert "benchmarks/draw.py" in text
    assert "A training step\n" not in text


def test_targets_are_met_or_missed(page: Path) -> None:
    rows = {
        **dict.fromkeys(("deterministic", *speed_table.SHOWN), ROW),
        "bayesify": {**ROW, "median": 1.06}, "IVON": {"error": "E: no"},
    }  # fmt: skip
    put(page, "step.json", {**BASE, "models": {"resnet18": rows, "vit_tiny_patch16_224": rows}})
    cases = {"vit_tiny_patch16_224, 64": rows, "vit_tiny_patch16_224, 1": rows}
    put(page, "predict.json", {**BASE, "draws": 30, "cases": cases})
    speed_table.write()
    text = page.read_text()
    assert "resnet18, batch 16: 1.09 (met); vit_tiny, batch 16: 1.05 (missed, 1.06)" in text
    assert (
        "vit_tiny_patch16_224, 64: 1.05 (missed, 1.06); vit_tiny_patch16_224, 1: 1.7 (met)" in text
    )
    assert "| IVON | fails | fails |" in text
    readme = (page.parent / "README.md").read_text()
    assert readme.startswith("before\n<!-- speed: begin -->\n| time over")
    assert readme.endswith("<!-- speed: end -->after\n")
    assert "old" not in readme
    assert "| bayesify | 1.06 | 1.06 | 1.06 |\n| bayesian-torch reparam | 1.04 |" in readme
    assert "| IVON | fails | fails | fails |" in readme
    assert "IVON on resnet18: E: no" in text


def test_a_gpu(page: Path) -> None:
    rows = {
        "deterministic": {**ROW, "peak_bytes": 1 << 30},
        "bayesify": {**ROW, "peak_bytes": (1 << 30) + 1600},
    }
    name = "vit_base_patch16_224"
    put(page, "step_cuda.json", {**GPU, "weights": {name: 100}, "models": {name: rows}})
    graphed = {**rows, "bayesify": {**ROW, "seconds": 0.1}, "deterministic, CUDA graph": ROW}
    put(page, "predict_cuda.json", {**GPU, "draws": 30, "cases": {f"{name}, 1": graphed}})
    put(page, "memory_cuda.json", {
        **GPU, "cases": {"m, batch 2": {"full": {"weights": 7, **SIZES, "peak": 3 << 20}}},
    })  # fmt: skip
    rate = {"bytes_per_second": 3e12, "median": 0.8}
    rates = dict.fromkeys(("draw", "backward", "copy"), rate)
    put(page, "draw_cuda.json", {**GPU, "weights": 100, "rates": rates})
    methods = {"BYOL": ROW, "BYOV, N(0, I)": {**ROW, "median": 1.06}}
    put(page, "byov_step_cuda.json", {**GPU, "batch": 256, "methods": methods})
    speed_table.write()
    text = page.read_text()
    assert "Not measured" not in text
    assert "bytes a weight (target 17): bayesify 16.0." in text
    assert "Target: 1.05 (missed, 1.060)." in text
    assert (
        "20.0 times as fast as eager forwards (10), 20.0 times as fast as CUDA graphs (2)" in text
    )
    assert "| m, batch 2: full | 7 | 2 | 2 | 2 | 2 | 2 | 10 | 3 |" in text
    assert "80 % of the bandwidth of a copy (3.00 TB/s; target 70 %)" in text
    assert "*H100; P, 2 cores" in text


def test_a_target_is_not_rounded_to_what_was_reached() -> None:
    assert speed_table.verdict(1.05, 1.05) == "met"
    assert speed_table.verdict(1.0541, 1.05) == "missed, 1.054"
    assert speed_table.verdict(1.06, 1.05) == "missed, 1.06"


def test_the_draw_alone(page: Path) -> None:
    ways = {"library": {**ROW, "median": 1.0}, "torch": {**ROW, "median": 4.0}}
    record = {**BASE, "c_library": True, "weights": 1234, "rates": {"draw": ways}}
    put(page, "draw.json", record)
    speed_table.write()
    text = page.read_text()
    assert "Of the 1,234 weights" in text
    assert "| draw | 2000.0 | 2000.0 | 4.00 (1.01 to 1.10) |" in text
    assert "torch 2.15, bayesify with its C library; commit" in text


def test_a_fit(page: Path) -> None:
    row = dict.fromkeys(("images_per_second", "once_seconds", "over_loop", "over_fit"), ROW)
    slow = {**row, "over_loop": {"low": 0.8, "median": 0.85, "high": 0.9}}
    cases = {
        "a": {"deterministic, fit": slow, "Bayesian, fit": row},
        "b": {"deterministic, fit": row, "Bayesian, fit": slow},
    }
    put(page, "fit.json", {**BASE, "cases": cases})
    speed_table.write()
    text = page.read_text()
    assert "Target, over either: 0.9: a (met); b (missed, 0.85)." in text
    assert "| b | Bayesian, fit | 1.0 | 0.85 (0.80 to 0.90) | 1.04 (1.01 to 1.10) | 1.0 |" in text


def test_the_loop_takes_the_steps_of_a_deterministic_fit() -> None:
    ends = []
    for run in (fit.looped, fit.fitted):
        torch.manual_seed(0)
        model = resnet20()
        data = fit.random_images(model, 12)
        assert len(run(model, data, 4, "rand-augment")) == 5  # the start, three steps, the end
        ends.append(model.state_dict())
    loop, own = ends
    for name, tensor in loop.items():
        assert torch.equal(tensor, own[name]), name


def test_ratios_are_of_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 3.0, 4.0, 2.0])  # the order turns: base, other; other, base
    monkeypatch.setattr(paired, "timed", lambda run, device: next(times))
    found = paired.paired({"base": print, "other": print}, "base", 2)
    assert found["base"]["median"] == 1.0
    assert found["other"]["median"] == 2.5
    assert found["other"]["seconds"] == 3.5


def test_storages_are_counted_once() -> None:
    tensor = torch.zeros(4, 6)
    found = memory.storages([tensor, tensor[1:], tensor.t(), torch.zeros(2)])
    assert sorted(found.values()) == [8, 96]
