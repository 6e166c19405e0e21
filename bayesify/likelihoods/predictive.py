"""What many draws predict together: the mixture of their distributions, each target by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..errors import ArgumentError
from ..numeric import count, real
from ..welford import Welford

Target = Tensor | Sequence[Any] | Mapping[Any, Any]
"""What is to be predicted, or a pair of it and a mask: True where a target counts.

Of several heads a mapping or a sequence of such.
"""

KEPT_BYTES = 256 << 20
"""Distributions of all draws that take no more memory are kept, for quantiles and densities."""

_SAMPLES = 8192
"""Samples in all behind a quantile that has no closed form."""


class Densities(Protocol):
    """What a mixture asks of a :class:`Likelihood`."""

    scores: Tensor | None

    def mask(self, target: Target) -> Tensor | None:
        """Which targets count; None if all do."""

    def distribution(self, output: Any) -> Distribution:
        """That of the targets, given one draw's output."""

    def density(self, found: Any, target: Target) -> Tensor:
        """Log density of each target, given a distribution."""

    def moments(self, found: Any) -> tuple[Tensor, Tensor]:
        """Mean and variance of each target, given a distribution."""


class Bounds(NamedTuple):
    """Ends of an interval for each target."""

    low: Tensor
    high: Tensor


class Predictive:
    """The mixture over K draws of what each says of a target: ``mean_k p(y | f_k)``.

    All of it is of each target by itself, and has the shape of the outputs; of :class:`Categorical`
    the numbers are those of each class, a one for the class that it is. Targets of one example vary
    together over the draws: their joint density is the mean over the draws of the exponential of
    :meth:`Likelihood.log_prob`.

    Attributes:
        mean: Mean of the mixture; of classes and of yes or no the probability.
        aleatoric_std: Root of the mean of the draws' variances: what more data would leave.
        epistemic_std: Standard deviation (divisor K) of the draws' means: what more data remove.
        num_samples: Number K of draws.
    """

    def __init__(
        self,
        likelihood: Densities,
        mean: Tensor,
        aleatoric_std: Tensor,
        epistemic_std: Tensor,
        num_samples: int,
        components: list[Distribution] | None,
    ) -> None:
        self.likelihood, self.num_samples = likelihood, num_samples
        self.mean, self.aleatoric_std, self.epistemic_std = mean, aleatoric_std, epistemic_std
        self._components = components

    @property
    def std(self) -> Tensor:
        """Standard deviation of the mixture, the root of the sum of both squares."""
        return torch.hypot(self.aleatoric_std, self.epistemic_std)

    @property
    def components(self) -> list[Distribution]:
        """The distribution of each draw.

        Raises:
            ArgumentError: They were too large to be kept.
        """
        if self._components is None:
            raise ArgumentError(
                f"The outputs of {self.num_samples} draws were too large to be kept, and mean and "
                "standard deviations alone are left of them. Densities, quantiles, samples and "
                "entropies need all: predict smaller batches, or with fewer num_samples."
            )
        return self._components

    def log_prob(self, target: Target) -> Tensor:
        """Log density of each target, of the shape of the targets, 0 where it is masked.

        Args:
            target: As :meth:`Likelihood.log_prob` takes it.

        Raises:
            ArgumentError: The targets do not fit, or the draws were too large to be kept.
        """
        plain: Any = target[0] if isinstance(target, tuple | list) else target
        densities = [self.likelihood.density(c, target).double() for c in self.components]
        found = log_mean_exp(torch.stack(densities)).to(self.mean.dtype)
        return found.reshape(plain.shape) if found.numel() == plain.numel() else found

    def quantile(self, level: float) -> Tensor:
        """The least number that the target is below, or at, with this probability.

        Args:
            level: The probability, between 0 and 1.

        Raises:
            ArgumentError: ``level`` is out of range, the targets have no order, or the draws were
                too large to be kept.
        """
        expected = "between 0 and 1"
        level = real("quantile: level", level, expected, lambda value: 0.0 < value < 1.0)
        return self._quantile(level)

    def interval(self, level: float = 0.9) -> Bounds:
        """The central interval that holds the target with probability ``level``.

        Args:
            level: Between 0 and 1; the ends are the quantiles ``(1 - level) / 2`` and
                ``(1 + level) / 2``.

        Raises:
            ArgumentError: As :meth:`quantile`.
        """
        expected = "between 0 and 1"
        level = real("interval: level", level, expected, lambda value: 0.0 < value < 1.0)
        return Bounds(self._quantile((1 - level) / 2), self._quantile((1 + level) / 2))

    def _quantile(self, level: float) -> Tensor:
        """By samples, where the mixture has no closed form of its distribution function."""
        drawn = self.sample(_SAMPLES).double()
        return drawn.quantile(level, dim=0, interpolation="lower").to(self.mean.dtype)

    def sample(self, num_samples: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Targets drawn from the mixture, (num_samples, ...).

        Sample i is of draw ``i mod K``, so that the targets of an example in one sample vary
        together as the draws' do.

        Args:
            num_samples: How many, at least 1.
            generator: Gives the seed; None takes the same samples on every call.

        Raises:
            ArgumentError: ``num_samples`` is no such number, or the draws were too large to be
                kept.
        """
        number = count("num_samples", num_samples)
        seed = 0 if generator is None else int(torch.randint(1 << 62, (), generator=generator))
        components = self.components
        used = components[:number]
        device = self.mean.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)  # torch's distributions take no generator
            rounds = -(-number // len(used))
            drawn = torch.stack([c.sample((rounds,)) for c in used], 1)
        return drawn.flatten(0, 1)[:number]

    def conformal(self, level: float = 0.9) -> Any:
        r"""Intervals or sets that hold a new target with probability ``level`` at least.

        From the n scores that :func:`bayesify.recalibrate_` has kept of held-out data it takes the
        :math:`\lceil (n + 1) \mathrm{level} \rceil`-th smallest, q. That holds for each target by
        itself, on average over examples like those, whatever the model.

        Args:
            level: Between 0 and 1.

        Returns:
            Of real numbers the :class:`Bounds` ``mean -+ q std``; of classes which are in the set,
            those of probability ``1 - q`` at least, bool and of the shape of ``mean``; of yes or no
            the same for (no, yes), (..., 2). With fewer than ``level / (1 - level)`` scores q is
            infinite.

        Raises:
            ArgumentError: ``level`` is out of range, or there are no scores.
        """
        expected = "between 0 and 1"
        level = real("conformal: level", level, expected, lambda value: 0.0 < value < 1.0)
        scores = self.likelihood.scores
        if scores is None:
            raise ArgumentError(
                "conformal needs the scores of held-out data: bayesify.recalibrate_(model, data)."
            )
        rank = math.ceil((len(scores) + 1) * level * (1 - 1e-12))
        quantile = math.inf if rank > len(scores) else float(scores[rank - 1])
        return self._held(quantile)

    def _held(self, quantile: float) -> Any:
        return Bounds(self.mean - quantile * self.std, self.mean + quantile * self.std)

    def entropy(self) -> Tensor:
        """Entropy of each target's mixture in nats, for densities the differential one.

        Raises:
            ArgumentError: It has no closed form here, or the draws were too large to be kept.
        """
        raise ArgumentError(
            f"{type(self.likelihood).__name__} has no entropy here: take -log_prob of samples."
        )


class Gathered:
    """Takes the outputs of draws one by one; keeps their distributions where they are small."""

    def __init__(self, likelihood: Densities, kind: type[Predictive] = Predictive) -> None:
        self.likelihood, self.kind = likelihood, kind
        self.components: list[Distribution] | None = []
        self.bytes = 0
        self.means: Welford | None = None
        self.variances: Welford | None = None

    def add(self, output: Any) -> None:
        """One more draw's output.

        Raises:
            ArgumentError: It has another shape than the first.
        """
        found = self.likelihood.distribution(output)
        mean, variance = self.likelihood.moments(found)
        if self.means is None or self.variances is None:
            self.means, self.variances = Welford(mean), Welford(variance)
        elif mean.shape != self.means.mean.shape:
            raise ArgumentError(
                f"A draw gave outputs of the shape {tuple(mean.shape)}, another of "
                f"{tuple(self.means.mean.shape)}."
            )
        self.means.add(mean)
        self.variances.add(variance)
        self.bytes += 2 * mean.nbytes
        if self.components is not None:
            self.components.append(found)
            if self.bytes > KEPT_BYTES and len(self.components) > 1:
                self.components = None

    def result(self) -> Predictive:
        """The mixture of all that was added.

        Raises:
            ArgumentError: There was nothing.
        """
        if self.means is None or self.variances is None:
            raise ArgumentError("A predictive distribution needs the output of one draw at least.")
        mean, epistemic = self.means.moments()
        aleatoric = self.variances.moments()[0].clamp_min(0.0).sqrt()
        number = self.means.count
        return self.kind(self.likelihood, mean, aleatoric, epistemic, number, self.components)


def log_mean_exp(values: Tensor) -> Tensor:
    """The logarithm of the mean over the first dimension of the exponentials."""
    return values.logsumexp(0) - math.log(len(values))
