"""The log of a run: one JSON object a line, cut back to the checkpoint that a run goes on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bayesify import CheckpointError
from bayesify.json_numbers import finite
from bayesify.storage import parse_json, replacing

from .tensorboard import TensorBoardWriter


class RunLog:
    """``log.jsonl``; every line has a ``kind`` and the ``step`` that it belongs to.

    Args:
        path: The file, or None to write nothing (all processes but the first).
        tensorboard: TensorBoard, which gets the same; None without it.
    """

    def __init__(self, path: Path | None, tensorboard: TensorBoardWriter | None = None) -> None:
        self.path = path
        self.tensorboard = tensorboard

    def add(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append a line; a number that is not finite, which JSON lacks, becomes null."""
        if self.path is not None:
            line = json.dumps({"kind": kind, "step": step, **finite(values)}, allow_nan=False)
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
            except OSError as error:
                raise CheckpointError(f"{self.path} cannot be written ({error}).") from error
        if self.tensorboard is not None and kind != "start":
            self.tensorboard.add(kind, step, values)

    def cut(self, step: int) -> None:
        """Keep what a run had written when it was at ``step``, in whole lines; 0: nothing."""
        if self.path is None or not self.path.exists():
            return
        lines = self.path.read_text("utf-8").splitlines(keepends=True)
        try:
            kept = [
                line for line in lines if line.endswith("\n") and _was_there(parse_json(line), step)
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.path} is no log of a run ({type(error).__name__}: {error}). Remove it to "
                "go on without what it says."
            ) from error
        with replacing(self.path, overwrite=True) as temporary:
            temporary.write_text("".join(kept), "utf-8")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Every line of a log, but for a last one that a killed run has left half-written.

    Raises:
        CheckpointError: A line is none that a run writes.
    """
    try:
        lines = path.read_text("utf-8").splitlines(keepends=True)
        found = [parse_json(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no log of a run ({error}).") from error
    for number, line in enumerate(found, 1):
        if not isinstance(line, dict) or not (
            isinstance(line.get("kind"), str) and type(line.get("step")) is int
        ):
            raise CheckpointError(f"{path} is no log of a run: see its line {number}.")
    return found


def _was_there(line: dict[str, Any], step: int) -> bool:
    """Whether a line stood there at the checkpoint of ``step``; the end comes after them all."""
    return step > 0 and line["step"] <= step and line["kind"] != "end"
