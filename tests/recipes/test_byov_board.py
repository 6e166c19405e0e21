"""What TensorBoard reads of a run, by its own reader."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bayesify import ArgumentError
from byov_small import CONFIG, small_run, stop_at
from recipes.byov.runtime.log import read_log
from recipes.byov.train import train


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events: Any = reader.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_has_the_numbers_of_the_log_also_after_a_stop(tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=2)
    run = small_run(tmp_path, tensorboard=True, checkpoint_every=9)
    assert train(config, run, watcher=stop_at(3)).results is None
    train(config, run, resume=True)
    found = scalars(run.out / "tensorboard")
    log = read_log(run.out / "log.jsonl")
    for kind, name in (("step", "loss"), ("step", "logvar_travel"), ("epoch", "knn")):
        lines = {line["step"]: line[name] for line in log if line["kind"] == kind}
        assert lines
        assert found[f"{kind}/{name}"] == pytest.approx(lines, rel=1e-6)
    layer = "projector.0.weight"
    epochs = {
        line["step"]: line["layers"][layer]["mean_snr"] for line in log if line["kind"] == "epoch"
    }
    assert found[f"epoch/layers/{layer}/mean_snr"] == pytest.approx(epochs, rel=1e-6)


def test_without_tensorboard_the_run_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ArgumentError, match=r"pip install 'bayesify\[tensorboard\]'"):
        train(CONFIG, small_run(tmp_path, tensorboard=True))
