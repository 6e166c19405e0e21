"""Runs of an earlier version (commit 954ff71) are read, measured and gone on from."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from byov_small import CONFIG, small_data, small_run
from recipes.byov.evaluation.evaluate import evaluate
from recipes.byov.evaluation.protocol import EvalSettings
from recipes.byov.evaluation.runs import open_run
from recipes.byov.paper.cells import RESULTS
from recipes.byov.paper.results import record_of
from recipes.byov.runtime.log import read_log
from recipes.byov.train import train

RUN = Path(__file__).parents[1] / "files" / "byov_run"
TINY = replace(
    CONFIG,
    encoder_args={"patch_size": 14, "embed_dim": 4, "depth": 1, "num_heads": 1},
    projector_hidden=4,
    projector_out=4,
)


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was stopped at step 5 of 9; its data are named beside it."""
    monkeypatch.chdir(tmp_path)
    small_data(tmp_path)
    shutil.copytree(RUN, tmp_path / "run")
    return tmp_path


def test_an_earlier_run_is_gone_on_from(earlier: Path) -> None:
    before = read_log(earlier / "run" / "log.jsonl")
    run = replace(small_run(earlier), data="small.safetensors")
    outcome = train(TINY, run, resume=True)
    assert (outcome.step, outcome.steps) == (9, 9)
    after = read_log(earlier / "run" / "log.jsonl")
    assert after[: len(before)] == before
    assert [line["step"] for line in after if line["kind"] == "step"] == [*range(1, 10)]


def test_an_earlier_run_is_measured(earlier: Path) -> None:
    opened = open_run(earlier / "run", device="cpu")
    assert opened.step == 5
    rows = evaluate(opened, "linear", EvalSettings(num_samples=2, epochs=3))["numbers"]["rows"]
    assert {row["prediction"] for row in rows} >= {"at the means", "MC average", "teacher"}


def test_earlier_results_on_ood_images_are_found_under_their_present_name() -> None:
    value = json.loads((RESULTS / "cpu" / "byov-zero-s6.json").read_text("utf-8"))
    assert "strangers" in value["results"]
    numbers = record_of(value["facts"], value["log"], value["results"]).numbers("ood")
    assert numbers == value["results"]["strangers"]["numbers"]
