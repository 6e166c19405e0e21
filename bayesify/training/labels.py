"""Labels of a classification, looked at while they are used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..classes import check_count
from ..errors import ArgumentError
from ..inference import class_logits, warn_of_probabilities


class LabelCheck:
    """Says what is wrong with outputs and labels where there is one label for each example.

    Args:
        wanted: Whether the loss is a classification by whole class numbers.
        wanted_by: Who asks, for the messages.
        instead: What to do with other outputs or targets, a sentence.
        named: The classes of the data set and its name, where the outputs are to get these names.
    """

    def __init__(
        self,
        wanted: bool,
        wanted_by: str,
        instead: str,
        named: tuple[Sequence[str], str] | None = None,
    ) -> None:
        self.wanted, self.wanted_by, self.instead = wanted, wanted_by, instead
        self.named = named
        self.ignored: int | None = None
        """A label that counts for nothing."""
        self.first_batch = self.first_epoch = True
        self.low: int | None = None
        self.high: int | None = None

    def look(self, outputs: Any, targets: Tensor) -> None:
        """Compare the labels of a batch with the logits.

        Raises:
            ArgumentError: There is no table of logits, or the labels are soft, of several columns
                or out of range.
            DataError: The data set has another number of named classes than there are outputs.
        """
        if not self.wanted:
            return
        logits = class_logits(outputs, self.wanted_by, self.instead)
        whole = not (targets.is_floating_point() or targets.is_complex())
        if not whole or targets.dtype == torch.bool or targets.shape != logits.shape[:1]:
            raise ArgumentError(
                f"The labels are soft or one-hot, or none ({targets.dtype} "
                f"{tuple(targets.shape)}): {self.wanted_by} needs one whole class number for each "
                f"example, of the shape {tuple(logits.shape[:1])}. Of one-hot labels take "
                f"targets.argmax(1). {self.instead}".rstrip()
            )
        if self.first_batch:
            self.first_batch = False
            warn_of_probabilities(logits, self.wanted_by)
            if self.named is not None:
                check_count(self.named[0], logits.shape[1], self.named[1])
        if self.ignored is not None:
            targets = targets[targets != self.ignored]
        if len(targets) == 0:
            return
        classes = logits.shape[1]
        low, high = (int(v) for v in targets.aminmax())
        if low < 0 or high >= classes:
            raise ArgumentError(
                f"Label {low if low < 0 else high} is out of range: the model gives {classes} "
                f"classes, so labels go from 0 to {classes - 1}. Build it with num_classes=N."
            )
        self.low = low if self.low is None else min(low, self.low)
        self.high = high if self.high is None else max(high, self.high)

    def end_of_epoch(self) -> None:
        """Refuse a first epoch in which every label was the same.

        Raises:
            ArgumentError: To classify takes two classes.
        """
        first, self.first_epoch = self.first_epoch, False
        if first and self.low is not None and self.low == self.high:
            raise ArgumentError(
                f"Every label of the first epoch is {self.low}: to classify takes at least two "
                "classes. Are the labels lost, or those of one class left?"
            )
