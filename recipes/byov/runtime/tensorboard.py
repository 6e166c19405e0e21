"""The numbers of a run for TensorBoard, beside its log."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bayesify import ArgumentError, CheckpointError


class TensorBoardWriter:
    """TensorBoard's event files; every number of a line of the log becomes a scalar.

    Args:
        folder: Where they are written.
        start: Step that the run goes on from: what stands behind it is dropped.

    Raises:
        ArgumentError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, start: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ArgumentError(
                "tensorboard needs the package of that name: pip install 'bayesify[tensorboard]'."
            ) from error
        writer: Any = SummaryWriter
        self._writer = writer(str(folder), purge_step=start + 1 if start else None)

    def add(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Write the numbers of one line."""
        try:
            for name, value in _numbers(values, kind):
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
        except OSError as error:
            raise CheckpointError(f"TensorBoard's files cannot be written ({error}).") from error


def _numbers(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        name = f"{prefix}/{key}"
        if isinstance(value, Mapping):
            yield from _numbers(value, name)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            if math.isfinite(value):
                yield name, value
