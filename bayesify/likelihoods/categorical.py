"""One of C classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical as OneOf
from torch.distributions import Distribution
from torch.nn import functional as F

from ..errors import ArgumentError
from ..numeric import positive, real, whole
from .likelihood import (
    Likelihood,
    Target,
    axis_number,
    axis_of,
    described,
    logits_in,
    masked_to,
    may_look,
    per_example,
    placed,
    split,
)
from .mixtures import Classes
from .predictive import Gathered


class Categorical(Likelihood):
    r"""Class numbers, from the logits of C classes.

    .. math:: \log p(y|f) = f_y / T - \log \sum_c \exp(f_c / T)

    Args:
        dim: Axis of the classes in the output: -1 for a table (batch, classes) and for tokens, 1
            for images (batch, classes, height, width).
        ignore_index: A label that counts for nothing.
        weight: A factor for each class, (C,); it changes the training alone, as in
            ``torch.nn.CrossEntropyLoss`` but without dividing by the sum of the weights.
        label_smoothing: Share of a label that is spread over all classes, from 0 to below 1; it
            changes the training alone.
        temperature: The factor T, above 0, which divides each draw's logits;
            :func:`bayesify.recalibrate_` sets it.

    Shape:
        Outputs (batch, ..., C, ...), targets the same without the axis of the classes.

    Raises:
        ArgumentError: An argument has a value that cannot work.

    >>> Categorical().log_prob(torch.zeros(2, 4), torch.tensor([3, -100]))
    tensor([-1.3863,  0.0000])
    """

    weight: Tensor | None

    def __init__(
        self,
        dim: int = -1,
        ignore_index: int = -100,
        *,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.dim = axis_number("Categorical", dim)
        expected = "a whole number"
        self.ignore_index = whole(
            "Categorical: ignore_index", ignore_index, expected, least=-(1 << 62), below=1 << 62
        )
        if weight is not None:
            weight = torch.as_tensor(weight, dtype=torch.float32).detach().clone()
            if weight.dim() != 1 or not bool((torch.isfinite(weight) & (weight >= 0)).all()):
                raise ArgumentError(
                    "Categorical: weight must have one finite number of at least 0 for each class."
                )
        self.register_buffer("weight", weight)
        self.label_smoothing = real(
            "Categorical: label_smoothing", label_smoothing, "from 0 to below 1",
            lambda value: 0.0 <= value < 1.0,
        )  # fmt: skip
        self.temperature = real(
            "Categorical: temperature", temperature, "a finite number above 0", positive
        )

    def arguments(self) -> dict[str, Any]:
        found = {"dim": self.dim, "ignore_index": self.ignore_index}
        if self.label_smoothing:
            found["label_smoothing"] = self.label_smoothing  # type: ignore[assignment]
        return found | ({} if self.temperature == 1.0 else {"temperature": self.temperature})

    def logits(self, output: Any) -> Tensor:
        """The logits divided by the temperature, classes on axis 1, as torch's losses have them."""
        logits = logits_in(output, "Categorical")
        axis = axis_of(self.dim, logits.dim(), "Categorical")
        if axis == 0 or logits.shape[axis] < 2:
            raise ArgumentError(
                f"Categorical(dim={self.dim}) needs the logits of at least 2 classes on that axis; "
                f"the model gave {tuple(logits.shape)}. For one logit of yes or no take Bernoulli."
            )
        logits = logits.movedim(axis, 1)
        return logits if self.temperature == 1.0 else logits / self.temperature

    def log_densities(self, output: Any, target: Target) -> Tensor:
        logits = self.logits(output)
        labels, mask = placed(*self._labels(target, logits), logits)
        # what is out of range gives NaN: on a card torch's own check ends the process
        known = (labels >= 0) & (labels < logits.shape[1])
        found = -F.cross_entropy(logits, torch.where(known, labels, 0), reduction="none")
        return masked_to(torch.where(known, found, torch.nan), mask, 0.0)

    def objective(self, output: Any, target: Target) -> Tensor:
        if self.weight is None and not self.label_smoothing:
            return super().objective(output, target)
        logits = self.logits(output)
        labels, mask = placed(*self._labels(target, logits), logits)
        weight = None if self.weight is None else self.weight.to(logits)
        if weight is not None and len(weight) != logits.shape[1]:
            raise ArgumentError(
                f"Categorical: weight has {len(weight)} numbers, and the model gives "
                f"{logits.shape[1]} classes."
            )
        known = (labels >= 0) & (labels < logits.shape[1])
        found = -F.cross_entropy(
            logits, torch.where(known, labels, 0), weight, reduction="none",
            label_smoothing=self.label_smoothing,
        )  # fmt: skip
        return per_example(masked_to(found, mask, 0.0))

    def mask(self, target: Target) -> Tensor:
        labels, mask = split(target)
        known = labels != self.ignore_index
        return known if mask is None else mask & known

    def check(self, output: Any, target: Target) -> None:
        logits = self.logits(output)
        labels, mask = self._labels(target, logits)
        if not may_look(labels):
            return
        labels, classes = labels[mask], logits.shape[1]
        if labels.numel() == 0:
            return
        low, high = (int(v) for v in labels.aminmax())
        if low < 0 or high >= classes:
            raise ArgumentError(
                f"Label {low if low < 0 else high} is out of range: the model gives {classes} "
                f"classes, so labels go from 0 to {classes - 1}. A label that stands for none is "
                "Categorical(ignore_index=...)."
            )

    def _labels(self, target: Target, logits: Tensor) -> tuple[Tensor, Tensor]:
        labels, _ = split(target)
        shape = (logits.shape[0], *logits.shape[2:])
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != shape:
            soft = labels.is_floating_point() and labels.dim() == logits.dim()
            what = "soft or one-hot labels" if soft else "float targets"
            why = (
                f"{what}: {described(labels)}" if labels.is_floating_point() else described(labels)
            )
            raise ArgumentError(
                f"Categorical(dim={self.dim}) needs one whole class number for each target, of "
                f"the shape {shape}, got {why}. Of one-hot labels take targets.argmax(dim); real "
                "numbers are Gaussian's, and 0 or 1 for each output Bernoulli's."
            )
        return labels.long(), self.mask(target)

    # -- predictions -----------------------------------------------------------------------------

    def distribution(self, output: Any) -> Distribution:
        return OneOf(logits=self.logits(output).movedim(1, -1), validate_args=False)

    def density(self, found: Any, target: Target) -> Tensor:
        logs: Tensor = found.logits.movedim(-1, 1)  # normalised, as torch keeps them
        labels, mask = placed(*self._labels(target, logs), logs)
        known = (labels >= 0) & (labels < logs.shape[1])
        picked = logs.gather(1, torch.where(known, labels, 0).unsqueeze(1)).squeeze(1)
        return masked_to(torch.where(known, picked, torch.nan), mask, 0.0)

    def moments(self, found: Any) -> tuple[Tensor, Tensor]:
        probs: Tensor = found.logits.exp()
        probs = probs.movedim(-1, axis_of(self.dim, probs.dim(), "Categorical"))
        return probs, probs * (1 - probs)

    @property
    def scale_name(self) -> str:
        return "temperature"

    def gather(self) -> Gathered:
        return Gathered(self, Classes)

    def sample(self, output: Any, target: Target, generator: torch.Generator | None) -> Target:
        probs = self.logits(output).double().softmax(1).movedim(1, -1).cpu()
        drawn = torch.multinomial(probs.flatten(0, -2), 1, generator=generator)
        labels, _ = split(target)
        return drawn[:, 0].view(probs.shape[:-1]).to(labels.device), self.mask(target)

    def curvature(self, output: Any, target: Target) -> Iterator[Tensor]:
        logits = self.logits(output)
        mask = self._labels(target, logits)[1].to(logits.device)
        axis = axis_of(self.dim, logits.dim(), "Categorical")
        probs, known = logits.softmax(1), mask.to(logits.dtype).unsqueeze(1) / self.temperature
        flat = probs.flatten(2) if probs.dim() > 2 else probs.unsqueeze(2)
        for t in range(flat.shape[2]):
            p = flat[:, :, t]
            for c in range(flat.shape[1]):
                vector = torch.zeros_like(flat)
                vector[:, :, t] = -p * p[:, c : c + 1].sqrt()
                vector[:, c, t] += p[:, c].sqrt()
                yield (vector.view(probs.shape) * known).movedim(1, axis)
