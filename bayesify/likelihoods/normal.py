"""Real numbers with Gaussian noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal
from torch.nn import functional as F

from ..errors import ArgumentError
from ..numeric import positive, real, whole
from .bernoulli import one_by_one
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
    placed,
    split,
    with_nan,
)
from .mixtures import Normals
from .predictive import Gathered

Noise = Literal["learned", "predicted"] | float

_LEAST = 1e-6
"""Least standard deviation of predicted noise, in units of ``scale``."""


class Gaussian(Likelihood):
    r"""Real numbers with Gaussian noise: regression.

    .. math:: p(y|f) = N(y;\ a + b f,\ (c\, b\, \sigma)^2)

    with the location a and the scale b of the targets, so that a network gives numbers around 0 and
    all densities, errors and intervals are in the target's own units.

    Args:
        noise: Where sigma comes from: ``"learned"``, a parameter for each output, which begins at
            1; ``"predicted"``, a second half of the output along ``dim`` after that of the means,
            :math:`\sigma = \log(1 + e^s) + 10^{-6}`; or a number, the standard deviation itself in
            the target's own units.
        dim: Axis of the outputs: -1 for (batch, outputs), 1 for images (batch, outputs, height,
            width). Where it has one output the targets may lack it.
        outputs: Number of outputs along ``dim``, for learned noise; None learns it from the first
            output that the likelihood sees.
        location: The number a, or one for each output.
        scale: The number b, above 0, or one for each output.
        noise_scale: The factor c, above 0, on the noise; :func:`bayesify.recalibrate_` sets it.

    Shape:
        Outputs (batch, ..., D, ...), or 2D for predicted noise; targets (batch, ..., D, ...), NaN
        where one is not known.

    Attributes:
        log_noise: The logarithm of the learned sigma, (D,), in units of the scale.

    Raises:
        ArgumentError: An argument has a value that cannot work.

    >>> Gaussian(2.0).log_prob(torch.zeros(1, 3), torch.zeros(1, 3)) / 3
    tensor([-1.6121])
    """

    log_noise: nn.Parameter | None
    location: Tensor
    scale: Tensor

    def __init__(
        self,
        noise: Noise = "learned",
        dim: int = -1,
        *,
        outputs: int | None = None,
        location: Tensor | float = 0.0,
        scale: Tensor | float = 1.0,
        noise_scale: float = 1.0,
    ) -> None:
        super().__init__()
        expected = "'learned', 'predicted' or a finite standard deviation above 0"
        if noise not in ("learned", "predicted"):
            noise = real("Gaussian: noise", noise, expected, positive)
        self.noise: Noise = noise
        self.dim = axis_number("Gaussian", dim)
        self.register_parameter("log_noise", None)
        if outputs is not None:
            outputs = whole("Gaussian: outputs", outputs, "None or a whole number above 0")
            if self.noise != "learned":
                raise ArgumentError("Gaussian: outputs is for noise='learned': leave it out.")
            self._learn(outputs, torch.empty(0))
        self.register_buffer("location", _numbers("location", location, lambda v: v.isfinite()))
        self.register_buffer("scale", _numbers("scale", scale, lambda v: v.isfinite() & (v > 0)))
        self.noise_scale = real(
            "Gaussian: noise_scale", noise_scale, "a finite number above 0", positive
        )

    def arguments(self) -> dict[str, Any]:
        found: dict[str, Any] = {"noise": self.noise, "dim": self.dim}
        return found | ({} if self.noise_scale == 1.0 else {"noise_scale": self.noise_scale})

    def standardise_(self, targets: Tensor) -> Gaussian:
        """Take location and scale from targets: mean and standard deviation of each output.

        Args:
            targets: All training targets, (examples, ..., outputs, ...), NaN where not known; of
                one dimension, those of one output.

        Returns:
            Itself.

        Raises:
            ArgumentError: An output has fewer than two known targets, or all of them are equal.
        """
        values, mask = with_nan(targets)
        values = values.double()
        if mask is not None:
            values = values.masked_fill(~mask, torch.nan)
        axis = axis_of(self.dim, values.dim(), "Gaussian")
        columns = values.reshape(-1, 1) if axis == 0 else values.movedim(axis, -1).flatten(0, -2)
        mean = columns.nanmean(0)
        std = (columns - mean).square().nanmean(0).sqrt()
        if not bool((mean.isfinite() & (std > 0)).all()):
            raise ArgumentError(
                "Gaussian: the targets of an output are all equal, infinite or unknown, so that "
                "they have no scale. Leave the output out, or give location and scale yourself."
            )
        self.location, self.scale = mean.float(), std.float()
        return self

    # -- the noise -------------------------------------------------------------------------------

    def std(self) -> Tensor:
        """Standard deviation of the noise in the target's units, (outputs,) or of no dimension.

        Raises:
            ArgumentError: The noise is predicted, or learned and of no known shape yet.
        """
        if self.noise == "predicted":
            raise ArgumentError("Gaussian('predicted') has the noise in the model's output.")
        self.check_shapes()
        if self.log_noise is not None:
            return self.log_noise.exp() * self.scale.to(self.log_noise) * self.noise_scale
        return torch.tensor(float(self.noise) * self.noise_scale)

    def check_shapes(self) -> None:
        if self.noise == "learned" and self.log_noise is None:
            raise ArgumentError(
                "The noise of Gaussian('learned') has no shape before it has seen an output: say "
                "it, Gaussian('learned', outputs=1)."
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        noise = state_dict.get(prefix + "log_noise")
        if self.log_noise is None and isinstance(noise, Tensor) and self.noise == "learned":
            self._learn(len(noise), self.scale)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _learn(self, outputs: int, like: Tensor) -> None:
        start = torch.zeros(outputs, dtype=torch.float32, device=like.device)
        self.log_noise = nn.Parameter(start)

    def _mean_and_std(self, output: Any) -> tuple[Tensor, Tensor]:
        """Both in the target's units, of the output's shape; predicted noise halves it."""
        output = logits_in(output, "Gaussian")
        axis = axis_of(self.dim, output.dim(), "Gaussian")
        number = 1 if axis == 0 else output.shape[axis]
        raw: Tensor | None = None
        if self.noise == "predicted":
            if axis == 0 or number % 2:
                raise ArgumentError(
                    f"Gaussian('predicted', dim={self.dim}) needs two outputs for each target on "
                    "that axis, all means and then all raw standard deviations; the model gave "
                    f"{tuple(output.shape)}."
                )
            number //= 2
            output, raw = output.split(number, axis)
        scale = self._along(self.scale, number, axis, output, "scale")
        location = self._along(self.location, number, axis, output, "location")
        if raw is not None:
            std = (F.softplus(raw) + _LEAST) * scale
        elif self.noise == "learned":
            if self.log_noise is None:
                self._learn(number, output)
            assert self.log_noise is not None
            noise = self._along(self.log_noise, number, axis, output, "learned noise")
            std = noise.exp() * scale
        else:
            std = torch.as_tensor(float(self.noise), dtype=output.dtype, device=output.device)
        if self.noise_scale != 1.0:
            std = std * self.noise_scale
        return output * scale + location, std.expand_as(output)

    def _along(self, values: Tensor, number: int, axis: int, like: Tensor, what: str) -> Tensor:
        """One number for each output, beside the others on their axis."""
        if values.dim() and len(values) != number and len(values) != 1:
            raise ArgumentError(
                f"Gaussian(dim={self.dim}): the {what} is of {len(values)} outputs, and the model "
                f"gives {number} on that axis ({tuple(like.shape)})."
            )
        values = values.to(like)
        return values.view(-1, *(1,) * (like.dim() - 1 - axis)) if axis and values.dim() else values

    # -- densities -------------------------------------------------------------------------------

    def density(self, found: Any, target: Target) -> Tensor:
        mean: Tensor = found.loc
        values, mask = placed(*self._values(target, mean), mean)
        values = masked_to(values.to(mean.dtype), mask, mean.detach())
        return masked_to(found.log_prob(values), mask, 0.0)

    def mask(self, target: Target) -> Tensor | None:
        return with_nan(target)[1]

    def check(self, output: Any, target: Target) -> None:
        values, _ = split(target)
        if may_look(values) and values.is_floating_point() and bool(values.isinf().any()):
            raise ArgumentError("Gaussian: a target is infinite. One that is not known is NaN.")

    def _values(self, target: Target, mean: Tensor) -> tuple[Tensor, Tensor | None]:
        axis = axis_of(self.dim, mean.dim(), "Gaussian")
        advice = (
            f"There is one output for each target, along dim={self.dim}"
            + (" all means and then all raw standard deviations." if self.noise == "predicted"
               else ".")
            + " Give targets or output another shape, or name another dim."
        )  # fmt: skip
        values, mask = with_nan(target)
        values = fitted(values, mean.shape, axis, "Gaussian", advice)
        return values, None if mask is None else mask.view(values.shape)

    # -- predictions -----------------------------------------------------------------------------

    def distribution(self, output: Any) -> Distribution:
        return Normal(*self._mean_and_std(output), validate_args=False)

    @property
    def scale_name(self) -> str:
        return "noise_scale"

    def scores_of(self, predictive: Any, target: Target) -> Tensor:
        """Distances of the targets from the predicted mean, in predicted standard deviations."""
        values, mask = placed(*self._values(target, predictive.mean), predictive.mean)
        scores: Tensor = (values - predictive.mean).abs() / predictive.std
        return scores.flatten() if mask is None else scores[mask]

    def gather(self) -> Gathered:
        return Gathered(self, Normals)

    def sample(self, output: Any, target: Target, generator: torch.Generator | None) -> Target:
        mean, std = self._mean_and_std(output)
        _, mask = self._values(target, mean)
        noise = torch.randn(mean.shape, generator=generator, dtype=torch.float64)
        drawn = mean + std * noise.to(mean)
        return (drawn, mask.to(drawn.device)) if mask is not None else drawn

    def curvature(self, output: Any, target: Target) -> Iterator[Tensor]:
        given = logits_in(output, "Gaussian")
        mean, std = self._mean_and_std(given)
        axis = axis_of(self.dim, given.dim(), "Gaussian")
        _, mask = placed(*self._values(target, mean), mean)
        number = 1 if axis == 0 else mean.shape[axis]
        scale = self._along(self.scale, number, axis, mean, "scale")
        root = masked_to(scale / std, mask, 0.0)
        if self.noise != "predicted":
            yield from one_by_one(root)
            return
        raw = given.split(number, axis)[1]
        # the Fisher information in the standard deviation is 2 / std^2
        slope = math.sqrt(2.0) * raw.sigmoid() * scale * self.noise_scale / std
        second = masked_to(slope, mask, 0.0)
        nothing = torch.zeros_like(root)
        for vector in one_by_one(root):
            yield torch.cat([vector, nothing], axis)
        for vector in one_by_one(second):
            yield torch.cat([nothing, vector], axis)


def _numbers(name: str, value: Tensor | float, fits: Any) -> Tensor:
    numbers = torch.as_tensor(value, dtype=torch.float32).detach().clone()
    if numbers.dim() > 1 or numbers.numel() == 0 or not bool(fits(numbers).all()):
        kind = "finite numbers" if name == "location" else "finite numbers above 0"
        raise ArgumentError(
            f"Gaussian: {name} must be {kind}, one or one for each output, got {described(numbers)}"
            f" {numbers.flatten()[:3].tolist()}."
        )
    return numbers
