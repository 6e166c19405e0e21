"""Files of a run: what goes in comes out, and what is broken is named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bayesify import CheckpointError
from recipes.byov.runtime import checkpoint

STATE: dict[str, Any] = {
    "step": 3,
    "rate": 0.1 + 0.2,
    "none": None,
    "flag": True,
    "optimizer": {"state": {0: {"step": torch.tensor(3.0), "m": torch.randn(2, 3)}, 7: {}}},
    "tied": [torch.arange(4), torch.arange(4)],
}


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    path = checkpoint.path_of(tmp_path / "new", 3)
    shared = torch.randn(5)
    checkpoint.write(path, {**STATE, "a": shared, "b": shared.view(5, 1)})
    back = checkpoint.read(path)
    assert back["rate"] == STATE["rate"]
    assert list(back["optimizer"]["state"]) == [0, 7]
    assert torch.equal(back["optimizer"]["state"][0]["m"], STATE["optimizer"]["state"][0]["m"])
    assert (back["none"], back["flag"], back["step"]) == (None, True, 3)
    assert torch.equal(back["b"][:, 0], shared)


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    path = checkpoint.path_of(tmp_path, 1)
    checkpoint.write(path, STATE)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=r"(?s)step-00000001.*no readable checkpoint"):
        checkpoint.read(path)


def test_another_safetensors_file_is_named(tmp_path: Path) -> None:
    path = checkpoint.path_of(tmp_path, 1)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        checkpoint.read(path)


def test_newest_and_best_stay(tmp_path: Path) -> None:
    for step in (1, 2, 10, 9):
        checkpoint.write(checkpoint.path_of(tmp_path, step), {"step": step})
    assert checkpoint.latest(tmp_path) == checkpoint.path_of(tmp_path, 10)
    checkpoint.tidy(tmp_path, keep_last=1, best=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        checkpoint.path_of(tmp_path, step).name for step in (2, 10)
    ]
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_tensors_that_do_not_fit_are_named() -> None:
    target = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"do not fit: b, c"):
        checkpoint.copy_into(target, {"a": torch.ones(2), "b": torch.ones(4), "c": torch.ones(1)})
    assert target["a"].eq(0).all()
