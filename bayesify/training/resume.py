"""A fit that was interrupted goes on: its state in one file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ArgumentError, CheckpointError
from ..settings.training import CHANGEABLE
from ..storage import check_target, locked, parse_json, replacing

KEY = "bayesify.fit"
FORMAT = 1


class Interrupted(KeyboardInterrupt):
    """A fit ended by Ctrl-C, SIGTERM or SIGHUP, with its state in a file."""


class FitState(NamedTuple):
    """All that decides how a fit goes on: tensors by name, and what JSON can hold."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


def write_state(path: Path, state: FitState) -> None:
    """Write the file whole or not at all; an older one of the same name is replaced."""
    document = json.dumps({"format": FORMAT, **state.values}, sort_keys=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.tensors.items()}
    owned = {
        key: value.clone() if value.untyped_storage().nbytes() != value.nbytes else value
        for key, value in tensors.items()
    }
    with replacing(path, overwrite=True) as temporary:
        save_file(owned, temporary, metadata={KEY: document})


def read_state(path: Path) -> FitState:
    """Read what :func:`write_state` wrote.

    Raises:
        CheckpointError: There is no such file, or it is no state of a fit.
    """
    if not path.is_file():
        raise CheckpointError(
            f"There is nothing to resume: {path} does not exist. Start without resume."
        )
    try:
        with safe_open(path, framework="pt") as file:
            document = (file.metadata() or {}).get(KEY)
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
        values = None if document is None else parse_json(document)
    except Exception as error:  # a damaged file raises nearly anything
        raise CheckpointError(
            f"{path} is no readable safetensors file ({error}); it may be cut short."
        ) from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no state of a fit that this version of bayesify can go on with. Start "
            "without resume."
        )
    return FitState(tensors, values)


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
    wrong = sorted(
        key
        for key in {*saved, *own}
        if key not in saved or key not in own or saved[key].shape != own[key].shape
    )
    if wrong:
        raise CheckpointError(
            f"{path} holds the fit of another model: {len(wrong)} tensors differ in name or "
            f"shape ({', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''})."
        )


_KINDS: dict[str, type | tuple[type, ...]] = {
    "settings": dict, "step": int, "bound": (int, float), "epoch_loss": (int, float),
    "losses": list, "kl": list, "holdout_losses": list, "seconds": (int, float), "random": dict,
}  # fmt: skip


def check_values(path: Path, saved: FitState, steps: int) -> None:
    """Refuse a state that lacks something, or has it of another kind.

    Raises:
        CheckpointError: With the first that is wrong.
    """
    values = saved.values
    wrong = [key for key, kind in _KINDS.items()
             if not isinstance(values.get(key), kind) or isinstance(values[key], bool)]  # fmt: skip
    if not wrong and not 0 <= values["step"] <= steps:
        wrong = ["step"]
    wrong += [
        key
        for key in ("losses", "kl", "holdout_losses")
        if key not in wrong and not all(isinstance(v, int | float | None) for v in values[key])
    ]
    if wrong:
        raise damaged(path, f"{wrong[0]} is {values.get(wrong[0])!r:.60}")


def damaged(path: Path, reason: object) -> CheckpointError:
    """The error for a state that cannot be gone on from."""
    return CheckpointError(
        f"{path} is no whole state of a fit ({reason}): it is damaged. Start without resume."
    )


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
        if target.exists() and not resume:
            raise CheckpointError(
                f"{path} holds the state of an earlier fit: go on with it (resume=True, --resume; "
                "one that has ended takes no further step), or remove it."
            )
        yield target
