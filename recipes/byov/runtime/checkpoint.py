"""Checkpoints: everything a run needs to go on as if it had never stopped, without a pickle.

What is random in a run is a function of (seed, step, index), so that no generator's state has to be
kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesify import CheckpointError
from bayesify.storage.state import StateKind, mismatched, nested, read_state, write_state

from ..config import differences
from .fsdp import placed_like

_NAME = re.compile(r"step-(\d+)\.safetensors")

KIND = StateKind(
    "byov",
    "checkpoint of this recipe",
    "Remove it to go on from the one before.",
    "byov",
    lambda tensors, document: nested(document["state"], tensors),
)


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint, and its folder if that is missing.

    Raises:
        CheckpointError: The file cannot be written; nothing is left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_state(path, state, KIND)


def read(path: Path) -> dict[str, Any]:
    """What :func:`write` was given, on the CPU.

    Raises:
        CheckpointError: The file is damaged, or no checkpoint of this recipe.
    """
    return read_state(path, KIND)


def check_run(path: Path, state: Mapping[str, Any]) -> None:
    """Refuse what is no checkpoint of a run: something is missing, or of another kind.

    Raises:
        CheckpointError: With the first that is wrong.
    """
    try:
        _check_kinds(state)
    except (KeyError, TypeError, ValueError) as error:
        raise KIND.damaged(path, error) from error


def _check_kinds(state: Any) -> None:
    """Refuse a state that lacks what every one has, or has it of another kind."""
    for key, kind in (("identity", dict), ("student", dict), ("step", int)):
        if not isinstance(state[key], kind) or isinstance(state[key], bool):
            raise TypeError(f"{key} is {state[key]!r:.60}")
    if state["step"] < 0:
        raise ValueError(f"step is {state['step']}")
    if not isinstance(state["teacher"], dict | None):
        raise TypeError("teacher is no dict")
    for network in (state["student"], state["teacher"] or {}):
        for key, value in network.items():
            if not isinstance(key, str) or not isinstance(value, Tensor) or value.is_complex():
                raise TypeError(f"a network holds {key!r:.60}")
    if not isinstance(state["identity"]["data"]["name"], str):
        raise TypeError("the name of its data is no text")
    classes, started = state.get("classes"), state.get("initial_logvar")
    if not isinstance(classes, list | None) or not all(isinstance(c, str) for c in classes or ()):
        raise TypeError("classes is no list of texts")
    if not isinstance(started, dict | None) or not all(
        isinstance(name, str) and type(value) in (int, float)
        for name, value in (started or {}).items()
    ):
        raise TypeError("initial_logvar is no dict of numbers")


def path_of(folder: Path, step: int) -> Path:
    """The file of one step."""
    return folder / f"step-{step:08d}.safetensors"


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a folder."""
    return max(_all(folder).values(), default=None)


def tidy(folder: Path, *, keep_last: int, best: int | None) -> None:
    """Remove all but the newest checkpoints and the best.

    Args:
        folder: Of the checkpoints.
        keep_last: How many of the newest are kept.
        best: Step of one that is kept whatever its age.
    """
    found = _all(folder)
    for step in sorted(found)[:-keep_last]:
        if step != best:
            found[step].unlink()


def check_same(path: Path, saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another run.

    Raises:
        CheckpointError: With every difference.
    """
    found = differences(present, saved)
    if found:
        raise CheckpointError(
            f"{path} belongs to another run, of which it would be no continuation:\n  "
            + "\n  ".join(found)
            + "\nGive the same settings, or another folder for this run."
        )


def _all(folder: Path) -> dict[int, Path]:
    named = ((path, _NAME.fullmatch(path.name)) for path in folder.glob("step-*.safetensors"))
    return {int(match[1]): path for path, match in named if match}


def copy_into(targets: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Fill tensors in place, sharded ones with what is theirs of the whole.

    Raises:
        CheckpointError: A name or a shape differs.
    """
    wrong = mismatched(targets, saved)
    if wrong:
        raise CheckpointError(f"Tensors of a checkpoint do not fit: {', '.join(wrong[:5])}.")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(placed_like(saved[name], target))
