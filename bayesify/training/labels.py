"""Labels of a classification, looked at while they are used."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import ArgumentError


class LabelCheck:
    """Says what is wrong with labels, of which cross_entropy's own complaint says little.

    Args:
        wanted: Whether the loss is a classification by whole class numbers.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.first_epoch = True
        self.low: int | None = None
        self.high: int | None = None

    def look(self, outputs: Any, targets: Tensor) -> None:
        """Compare the labels of a batch with the number of classes.

        Raises:
            ArgumentError: They are soft, or out of range.
        """
        if not self.wanted or not isinstance(outputs, Tensor) or targets.numel() == 0:
            return
        if targets.is_floating_point() or targets.dim() == outputs.dim() > 1:
            raise ArgumentError(
                f"The labels are soft or one-hot ({targets.dtype} {tuple(targets.shape)}), "
                "expected one whole class number for each example. Take targets.argmax(1), or, to "
                "train on probabilities, give loss=torch.nn.CrossEntropyLoss()."
            )
        classes = outputs.shape[1] if outputs.dim() > 1 else 0
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
