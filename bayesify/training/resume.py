"""A fit that was interrupted goes on: its state in one file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ArgumentError, CheckpointError
from ..settings.training import CHANGEABLE
from ..storage import check_target, locked
from ..storage.state import StateKind, mismatched, read_state


class Interrupted(KeyboardInterrupt):
    """A fit ended by Ctrl-C, SIGTERM or SIGHUP, with its state in a file."""


def _of_format_1(tensors: dict[str, Tensor], values: Any) -> dict[str, Any]:
    """The state in a file of format 1: tensors by dotted names, all else as plain JSON."""

    def below(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    def numbered(prefix: str) -> list[Tensor]:
        found = below(prefix)
        return [found[str(i)] for i in range(len(found))]

    optimizer: dict[int, dict[str, Tensor]] = {}
    for key, value in below("optimizer.").items():
        index, _, name = key.partition(".")
        optimizer.setdefault(int(index), {})[name] = value
    return {
        **values,
        "holdout_losses": [math.inf if v is None else v for v in values["holdout_losses"]],
        "model": below("model."),
        "best": below("best."),
        "start": numbered("start."),
        "average": numbered("average."),
        "optimizer": optimizer,
        "random": {**values["random"], "torch": below("random.")},
    }


FIT = StateKind("fit", "state of a fit", "Start without resume.", "bayesify.fit", _of_format_1)


def read_fit(path: Path) -> dict[str, Any]:
    """The state of a fit.

    Raises:
        CheckpointError: There is no such file, or it is no state of a fit.
    """
    if not os.path.isfile(path):
        raise CheckpointError(
            f"There is nothing to resume: {path} does not exist. Start without resume."
        )
    return read_state(path, FIT)


def check_same(path: Path, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse to go on with other data or settings than those that the fit began with.

    Raises:
        ArgumentError: With all that differs.
    """
    plain = json.loads(json.dumps(dict(given)))
    other = [
        f"{key}={plain.get(key)!r} (began with {saved.get(key)!r})"
        for key in sorted({*saved, *plain} - CHANGEABLE)
        if saved.get(key) != plain.get(key)
    ]
    if other:
        raise ArgumentError(
            f"The fit in {path} cannot go on with {', '.join(other)}. Give what it began with, or "
            "start anew without resume."
        )


def check_names(path: Path, saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse the state of another model.

    Raises:
        CheckpointError: A tensor is missing, superfluous, or of another shape.
    """
    wrong = mismatched(own, saved)
    if wrong:
        raise CheckpointError(
            f"{path} holds the fit of another model: {len(wrong)} tensors differ in name or "
            f"shape ({', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''})."
        )


_KINDS: dict[str, type | tuple[type, ...]] = {
    "settings": dict, "step": int, "bound": (int, float), "epoch_loss": (int, float),
    "losses": list, "kl": list, "holdout_losses": list, "seconds": (int, float), "random": dict,
    "model": dict, "best": dict, "start": list, "average": list, "optimizer": dict,
}  # fmt: skip


def check_values(path: Path, saved: Mapping[str, Any], steps: int) -> None:
    """Refuse a state that lacks something, or has it of another kind.

    Raises:
        CheckpointError: With the first that is wrong.
    """
    wrong = [key for key, kind in _KINDS.items()
             if not isinstance(saved.get(key), kind) or isinstance(saved[key], bool)]  # fmt: skip
    if not wrong and not 0 <= saved["step"] <= steps:
        wrong = ["step"]
    wrong += [
        key
        for key in ("losses", "kl", "holdout_losses")
        if key not in wrong and not all(isinstance(v, int | float) for v in saved[key])
    ]
    wrong += [
        key
        for key in ("model", "best")
        if key not in wrong and not all(isinstance(v, Tensor) for v in saved[key].values())
    ]
    if wrong:
        raise FIT.damaged(path, f"{wrong[0]} is {saved.get(wrong[0])!r:.60}")


def like(own: Tensor, saved: Tensor) -> Tensor:
    """``saved``, if it can stand for ``own``.

    Raises:
        ValueError: It is of another shape.
    """
    if own.shape != saved.shape:
        raise ValueError(f"a tensor is {tuple(saved.shape)} in place of {tuple(own.shape)}")
    return saved


@contextmanager
def held_checkpoint(path: str | os.PathLike[str] | None, resume: bool) -> Iterator[Path | None]:
    """The file of the state, asked before long work, and no other fit's in the block.

    Raises:
        ArgumentError: ``resume`` without a file.
        CheckpointError: It cannot be written, exists and is not to be resumed, or another fit has
            it.
    """
    if path is None:
        if resume:
            raise ArgumentError("fit: resume needs checkpoint, the file to go on from.")
        yield None
        return
    target = check_target(path, overwrite=True)
    with locked(target.with_name(f".{target.name}.lock"), f"{path}, the state of a fit,"):
        if os.path.exists(target) and not resume:
            raise CheckpointError(
                f"{path} holds the state of an earlier fit: go on with it (resume=True, --resume; "
                "one that has ended takes no further step), or remove it."
            )
        yield target
