"""The state of work that can be gone on from: what goes in comes out, and what is wrong is said."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bayesify import CheckpointError
from bayesify.storage.state import (
    ADAM,
    StateKind,
    check_moments,
    mismatched,
    read_state,
    write_state,
)

KIND = StateKind("walk", "state of a walk", "Walk anew.", "old.walk", lambda t, j: {"old": j, **t})
STATE: dict[str, Any] = {
    "step": 3,
    "rate": 0.1 + 0.2,
    "none": None,
    "flag": True,
    "path": (1, "two", [math.inf, -math.inf]),
    "optimizer": {0: {"step": torch.tensor(3.0)}, 7: {}},
    "empty": torch.zeros(0, 4),
    "half": torch.ones(2, dtype=torch.bfloat16),
}


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_state(path, STATE, KIND)
    back = read_state(path, KIND)
    assert list(back) == list(STATE)
    for key in ("step", "rate", "none", "flag"):
        assert back[key] == STATE[key]
        assert type(back[key]) is type(STATE[key])
    assert back["path"] == [1, "two", [math.inf, -math.inf]]
    assert list(back["optimizer"]) == [0, 7]
    assert back["optimizer"][0]["step"] == 3.0
    for key in ("empty", "half"):
        assert back[key].dtype == STATE[key].dtype
        assert torch.equal(back[key], STATE[key])


def test_a_number_that_is_none_comes_back(tmp_path: Path) -> None:
    write_state(tmp_path / "state", {"loss": math.nan}, KIND)
    assert math.isnan(read_state(tmp_path / "state", KIND)["loss"])


def test_tensors_may_share_memory(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    state = {"whole": whole, "again": whole, "part": whole[2:4], "turned": whole.view(2, 3).T}
    write_state(tmp_path / "state", state, KIND)
    back = read_state(tmp_path / "state", KIND)
    assert all(torch.equal(back[key], value) for key, value in state.items())
    with safe_open(tmp_path / "state", framework="pt") as file:
        assert set(file.keys()) == {"/whole", "/again", "/part", "/turned"}


def test_what_a_state_cannot_hold_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"/a/0 is a .*Path, which a state cannot hold"):
        write_state(tmp_path / "state", {"a": [tmp_path.absolute().relative_to("/")]}, KIND)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_file_is_read_by_its_own_rule(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "state", metadata={"old.walk": '{"step": 2}'})
    back = read_state(tmp_path / "state", KIND)
    assert back["old"] == {"step": 2}
    assert back["a"] == 1.0


def test_wrong_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "state"

    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            read_state(path, KIND)

    refused("no readable state of a walk.*Walk anew")
    save_file({"a": torch.ones(1)}, path)
    refused("its metadata hold no state")
    write_state(path, STATE, KIND)
    path.write_bytes(path.read_bytes()[:-5])
    refused("no readable state of a walk")
    write_state(path, STATE, StateKind("run", "run", "", "run", lambda t, j: {}))
    refused("it holds the state of 'run'")
    newer = {"bayesify.state": json.dumps({"format": 99, "kind": "walk", "state": {"dict": []}})}
    save_file({}, path, metadata=newer)
    refused("of a newer version")
    lost = {"dict": [["a", {"tensor": "/a"}]]}
    document = json.dumps({"format": 2, "kind": "walk", "state": lost})
    save_file({}, path, metadata={"bayesify.state": document})
    refused("no readable state of a walk")


def test_names_and_shapes_that_differ() -> None:
    own = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}
    assert mismatched(own, {"a": torch.ones(2), "b": torch.ones(4), "d": torch.ones(1)}) == [
        "b", "c", "d"
    ]  # fmt: skip
    assert mismatched(own, own) == []


def test_what_an_optimizer_cannot_keep_is_refused() -> None:
    own = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([own])
    own.grad = torch.ones(3)
    optimizer.step()
    [kept] = optimizer.state_dict()["state"].values()
    check_moments(own, kept, ADAM)
    wrong = [
        {**kept, "exp_avg": torch.zeros(())},
        {**kept, "exp_avg_sq": torch.zeros(2)},
        {**kept, "step": torch.zeros(3)},
        {**kept, "other": torch.zeros(3)},
        {k: v for k, v in kept.items() if k != "exp_avg"},
    ]
    for moments in wrong:
        with pytest.raises(ValueError, match=r"the optimizer keeps|in place of"):
            check_moments(own, moments, ADAM)
