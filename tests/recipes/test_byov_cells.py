"""The grid of cells: every cell can be trained, is kept once, and says what was not run."""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from byov_small import CONFIG, small_run
from recipes.byov.evaluation.protocol import EvalSettings
from recipes.byov.evaluation.uncertainty import UncertaintySettings
from recipes.byov.paper import cells, cifar10, docs
from recipes.byov.paper.cells import CELLS, SCALES, Scale, config_of, run_cell, subsample, wanted


def test_every_cell_of_every_scale_is_a_config_of_its_own() -> None:
    assert len({cell.name for cell in CELLS}) == len(CELLS)
    for scale in SCALES.values():
        configs = [str(config_of(scale, cell, 0)) for cell in CELLS]
        same = {c.name for c in CELLS if configs.count(str(config_of(scale, c, 0))) > 1}
        # what the scale has already: its batch size, its predictor's ratio
        own = {"byol", f"byol-batch-{scale.config.batch_size}", "byol-no-ema"}
        assert same <= own | {f"byol-predictor-x{scale.config.predictor_lr_ratio:g}"}


def test_the_order_is_that_of_importance_then_of_seeds() -> None:
    order = wanted(seeds=2)
    assert [c.name for c, _ in order[:3]] == ["byol", "byol-no-wd", "byov-zero"]
    assert [seed for _, seed in order] == [0] * len(CELLS) + [1] * len(CELLS)
    assert [c.name for c, _ in wanted(["*-teacher"], 1, ["core"])] == ["byov-teacher"]


def test_a_thinned_log_keeps_the_epochs_and_few_steps() -> None:
    log = [{"kind": "step", "step": s, "loss": 1.0, "lr": 2.0} for s in range(1000)]
    log += [{"kind": "epoch", "step": 999, "epoch": 1, "layers": {}, "knn": 0.1}]
    kept = list(subsample(log, layers=True))
    assert 200 <= len(kept) <= 202
    assert kept[0] == {"kind": "step", "step": 0, "loss": 1.0}
    assert kept[-1] == {"kind": "epoch", "step": 999, "epoch": 1, "layers": {}}
    assert all(line["kind"] == "step" for line in subsample(log, layers=False))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scale:
    monkeypatch.setattr(cells, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(docs, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "PAGE", tmp_path / "docs" / "byov.md")
    monkeypatch.setattr(docs, "IMAGES", tmp_path / "docs" / "images")
    uncertainty = UncertaintySettings(
        spread_draws=3, pool=8, most=3, latent_draws=3, images=8, shifted=()
    )
    scale = Scale("cpu", "Tiny.", replace(CONFIG, logvar_lr_ratio=40.0),
                  small_run(tmp_path, eval_every=0), EvalSettings(num_samples=2, epochs=3),
                  uncertainty)  # fmt: skip
    monkeypatch.setitem(cells.SCALES, "cpu", scale)
    return scale


def test_a_cell_is_trained_measured_and_in_the_docs(
    tiny: Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [byol], [zero] = ([c for c in CELLS if c.name == name] for name in ("byol", "byov-zero"))
    lines: list[str] = []
    for cell in (byol, zero):
        cell = replace(cell, needs=("eval", "prune"))
        assert run_cell(tiny, cell, 0, work=tmp_path / "work", on_progress=lines.append)
    docs.main()
    text = (tmp_path / "docs" / "byov.md").read_text()
    assert "| core | byov-zero | 1 |" in text
    assert "| table 1 | no-conv-zero | not run |" in text
    assert "n < 3" in text
    assert (tmp_path / "docs" / "images" / "cpu" / "fig4.png").exists()
    assert "## Scale: imagenet\n\nNot run." in text
    # a second call trains nothing
    lines.clear()
    assert run_cell(tiny, replace(zero, needs=("eval",)), 0, work=tmp_path / "work",
                    on_progress=lines.append)  # fmt: skip
    assert not any("training" in line for line in lines)


def test_one_job_after_the_other_runs_every_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def start(scale: Scale, cell: Any, seed: int, asked: Any) -> Any:
        started.append((cell.name, seed))
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(cifar10, "_start", start)
    order = wanted(["byol", "byov-zero"], seeds=2)
    asked = argparse.Namespace(minutes=5.0, jobs=1)
    cifar10.run_all(SCALES["cpu"], order, asked)
    assert started == [(cell.name, seed) for cell, seed in order]
