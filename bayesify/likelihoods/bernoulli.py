"""Yes or no, for each output by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli as Coin
from torch.distributions import Distribution
from torch.nn import functional as F

from ..errors import ArgumentError
from ..numeric import positive, real
from .likelihood import (
    Likelihood,
    Target,
    axis_number,
    axis_of,
    described,
    fitted,
    logits_in,
    masked_to,
    may_look,
    per_example,
    placed,
    with_nan,
)
from .mixtures import YesNo
from .predictive import Gathered

_ADVICE = (
    "Each output is the logit of one yes or no; an axis of one output that the targets lack is "
    "named by Bernoulli(dim=...)."
)


class Bernoulli(Likelihood):
    r"""Yes or no for each output: binary and multi-label classification.

    .. math:: \log p(y|f) = y f / T - \log(1 + \exp(f / T))

    Args:
        dim: An axis of one element in the output that the targets lack, such as -1 for outputs
            (batch, 1) and targets (batch,); None where both have one shape.
        pos_weight: A factor for the targets that are 1, a number or one for each element of the
            last axis; it changes the training alone.
        temperature: The factor T, above 0, which divides each draw's logits;
            :func:`bayesify.recalibrate_` sets it.

    Shape:
        Outputs (batch, ...), targets the same: 0 or 1 as whole or real numbers, or bool; NaN where
        a target is not known.

    Raises:
        ArgumentError: An argument has a value that cannot work.

    >>> Bernoulli().log_prob(torch.zeros(2, 3), torch.tensor([[0, 1, 1], [1, 0, 0]]))
    tensor([-2.0794, -2.0794])
    """

    pos_weight: Tensor | None

    def __init__(
        self,
        dim: int | None = None,
        *,
        pos_weight: Tensor | float | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.dim = None if dim is None else axis_number("Bernoulli", dim)
        if pos_weight is not None:
            pos_weight = torch.as_tensor(pos_weight, dtype=torch.float32).detach().clone()
            if pos_weight.dim() > 1 or not bool(
                (pos_weight > 0).all() & pos_weight.isfinite().all()
            ):
                raise ArgumentError("Bernoulli: pos_weight must be finite numbers above 0.")
        self.register_buffer("pos_weight", pos_weight)
        self.temperature = real(
            "Bernoulli: temperature", temperature, "a finite number above 0", positive
        )

    def arguments(self) -> dict[str, Any]:
        found: dict[str, Any] = {"dim": self.dim}
        return found | ({} if self.temperature == 1.0 else {"temperature": self.temperature})

    def logits(self, output: Any) -> Tensor:
        """The logits divided by the temperature."""
        logits = logits_in(output, "Bernoulli")
        return logits if self.temperature == 1.0 else logits / self.temperature

    def density(self, found: Any, target: Target) -> Tensor:
        return self._entropy(found.logits, target, None)

    def objective(self, output: Any, target: Target) -> Tensor:
        logits = self.logits(output)
        weight = None if self.pos_weight is None else self.pos_weight.to(logits)
        return per_example(self._entropy(logits, target, weight))

    def _entropy(self, logits: Tensor, target: Target, weight: Tensor | None) -> Tensor:
        values, mask = placed(*self._values(target, logits), logits)
        values = masked_to(values.to(logits.dtype), mask, 0.0)
        found = -F.binary_cross_entropy_with_logits(
            logits, values, reduction="none", pos_weight=weight
        )
        return masked_to(found, mask, 0.0)

    def mask(self, target: Target) -> Tensor | None:
        return with_nan(target)[1]

    def check(self, output: Any, target: Target) -> None:
        values, mask = self._values(target, self.logits(output))
        if not may_look(values) or values.dtype == torch.bool:
            return
        wrong = (values != 0) & (values != 1)
        if mask is not None:
            wrong &= mask
        if bool(wrong.any()):
            raise ArgumentError(
                f"Bernoulli needs targets that are 0 or 1, and one is {values[wrong][0].item():g}. "
                "Soft labels have no density; class numbers are Categorical's."
            )

    def _values(self, target: Target, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        axis = None if self.dim is None else axis_of(self.dim, logits.dim(), "Bernoulli")
        if axis and logits.shape[axis] != 1:
            raise ArgumentError(
                f"Bernoulli(dim={self.dim}): the output has {logits.shape[axis]} elements on that "
                f"axis ({described(logits)}), expected one. Leave dim out where the targets have "
                "the output's shape."
            )
        values, mask = with_nan(target)
        values = fitted(values, logits.shape, axis, "Bernoulli", _ADVICE)
        if mask is not None:
            mask = mask.view(values.shape)
        return values, mask

    # -- predictions -----------------------------------------------------------------------------

    def distribution(self, output: Any) -> Distribution:
        return Coin(logits=self.logits(output), validate_args=False)

    @property
    def scale_name(self) -> str:
        return "temperature"

    def gather(self) -> Gathered:
        return Gathered(self, YesNo)

    def sample(self, output: Any, target: Target, generator: torch.Generator | None) -> Target:
        logits = self.logits(output)
        _, mask = self._values(target, logits)
        drawn = torch.bernoulli(logits.double().sigmoid().cpu(), generator=generator)
        drawn = drawn.to(logits)
        return (drawn, mask.to(drawn.device)) if mask is not None else drawn

    def curvature(self, output: Any, target: Target) -> Iterator[Tensor]:
        logits = self.logits(output)
        _, mask = placed(*self._values(target, logits), logits)
        probs = logits.sigmoid()
        root = (probs * (1 - probs)).sqrt() / self.temperature
        yield from one_by_one(masked_to(root, mask, 0.0))


def one_by_one(values: Tensor) -> Iterator[Tensor]:
    """For each element of an example, ``values`` there and 0 elsewhere."""
    flat = values.reshape(len(values), -1)
    for i in range(flat.shape[1]):
        vector = torch.zeros_like(flat)
        vector[:, i] = flat[:, i]
        yield vector.view(values.shape)
