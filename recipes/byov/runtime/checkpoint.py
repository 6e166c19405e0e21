"""Checkpoints: everything a run needs to go on as if it had never stopped, without a pickle.

One safetensors file each, written whole or not at all: the tensors, and in its metadata the JSON
of all else. What is random in a run is a function of (seed, step, index), so that no generator's
state has to be kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bayesify import CheckpointError
from bayesify.storage import parse_json, replacing

from ..config import differences
from .fsdp import placed_like

FORMAT = 1
_KEY = "byov"
_NAME = re.compile(r"step-(\d+)\.safetensors")


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write nested dicts, lists, tensors, numbers and texts.

    Raises:
        CheckpointError: The file cannot be written; nothing is left of it.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps({"format": FORMAT, "state": _flatten(state, "", tensors)}, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, overwrite=True) as temporary:
        save_file(tensors, temporary, metadata={_KEY: text})


def read(path: Path) -> dict[str, Any]:
    """What :func:`write` was given, on the CPU.

    Raises:
        CheckpointError: The file is damaged, or no checkpoint of this recipe.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {})[_KEY]
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        header = parse_json(text)
        if header["format"] > FORMAT:
            raise CheckpointError(f"{path} is of a newer version of this recipe: update bayesify.")
        state: dict[str, Any] = _nest(header["state"], tensors)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        raise damaged(path, error) from error
    return state


def damaged(path: Path, error: Exception) -> CheckpointError:
    """The error for a checkpoint that cannot be read or used."""
    return CheckpointError(
        f"{path} is no readable checkpoint of this recipe ({type(error).__name__}: {error}). "
        "Remove it to go on from the one before."
    )


def check_run(path: Path, state: Mapping[str, Any]) -> None:
    """Refuse what is no checkpoint of a run: something is missing, or of another kind.

    Raises:
        CheckpointError: With the first that is wrong.
    """
    try:
        _check_kinds(state)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, error) from error


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


def _flatten(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """JSON in which every tensor is a reference; keys keep their type, and tuples become lists."""
    if isinstance(value, Tensor):
        # a copy: two tensors of one memory are refused by safetensors
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": key}
    if isinstance(value, Mapping):
        return {"dict": [[k, _flatten(v, f"{key}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return [_flatten(v, f"{key}/{i}", tensors) for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{key} is a {type(value).__name__}, which a checkpoint cannot hold")


def _nest(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_nest(v, tensors) for v in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {k: _nest(v, tensors) for k, v in value["dict"]}
    return value


def copy_into(targets: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Fill tensors in place, sharded ones with what is theirs of the whole.

    Raises:
        CheckpointError: A name or a shape differs.
    """
    wrong = sorted(targets.keys() ^ saved.keys()) + [
        name for name in targets.keys() & saved.keys() if targets[name].shape != saved[name].shape
    ]
    if wrong:
        raise CheckpointError(f"Tensors of a checkpoint do not fit: {', '.join(wrong[:5])}.")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(placed_like(saved[name], target))
