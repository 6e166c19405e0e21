"""The log of a run: one JSON object a line, cut back to the checkpoint that a run goes on from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bayesify import CheckpointError
from bayesify.storage import replacing

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
            line = json.dumps({"kind": kind, "step": step, **_finite(values)}, allow_nan=False)
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
        kept = [
            line
            for line in self.path.read_text("utf-8").splitlines(keepends=True)
            if line.endswith("\n") and _was_there(json.loads(line), step)
        ]
        with replacing(self.path, overwrite=True) as temporary:
            temporary.write_text("".join(kept), "utf-8")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Every line of a log."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _was_there(line: dict[str, Any], step: int) -> bool:
    """Whether a line stood there at the checkpoint of ``step``; the end comes after them all."""
    return step > 0 and line["step"] <= step and line["kind"] != "end"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
