"""Any distribution of torch.distributions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from ..errors import ArgumentError
from .likelihood import Likelihood, Target, fitted, logits_in, may_look, placed, with_nan


class FromDistribution(Likelihood):
    r"""The density of any distribution that torch has, or that has the interface of one.

    Args:
        distribution: From the model's output to the distribution of the targets, one for each:
            ``lambda f: torch.distributions.Poisson(f.exp())``. It must not keep anything.

    Shape:
        Targets have the shape of the distribution, batch first; NaN where one is not known. An axis
        of one element at its end may be missing.

    Raises:
        ArgumentError: ``distribution`` is no function.

    >>> poisson = FromDistribution(lambda f: torch.distributions.Poisson(f.exp()))
    >>> poisson.log_prob(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))
    tensor([-2.])
    """

    def __init__(self, distribution: Callable[[Tensor], Distribution]) -> None:
        super().__init__()
        if not callable(distribution):
            raise ArgumentError(
                "FromDistribution needs a function from the model's output to a distribution of "
                f"torch.distributions, got {type(distribution).__name__}."
            )
        self.function = distribution

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def distribution(self, output: Any) -> Distribution:
        values = logits_in(output, "FromDistribution")
        try:
            found = self.function(values)
            _check_parameters(found)
        except ValueError as error:  # of torch.distributions: parameters out of range
            raise ArgumentError(
                f"FromDistribution: the model's output makes no distribution: {_first(error)} Let "
                "the function map every real number to a parameter, as exp and softplus do."
            ) from error
        shape = getattr(found, "batch_shape", None)
        if not isinstance(found, Distribution) or shape is None:
            raise ArgumentError(
                "FromDistribution: the function gave no distribution of torch.distributions but "
                f"a {type(found).__name__}."
            )
        if not shape or shape[0] != len(values):
            raise ArgumentError(
                f"FromDistribution: the function gave distributions of the shape {tuple(shape)} "
                f"for a batch of {len(values)}: their first dimension must be the batch."
            )
        return found

    def density(self, found: Any, target: Target) -> Tensor:
        like = found.mean
        values, mask = placed(*self._values(target, found), like)
        if values.is_floating_point():
            values = values.to(like.dtype)
        if mask is not None:
            wide = mask.view(*mask.shape, *(1,) * len(found.event_shape))
            values = torch.where(wide, values, _inside(found).to(values.dtype))
        try:
            densities = found.log_prob(values)
        except ValueError as error:
            raise _out_of_range(error) from error
        return densities if mask is None else torch.where(mask, densities, 0.0)

    def mask(self, target: Target) -> Tensor | None:
        return with_nan(target)[1]

    def check(self, output: Any, target: Target) -> None:
        found = self.distribution(output)
        values, mask = self._values(target, found)
        if not may_look(values):
            return
        device = logits_in(output, "FromDistribution").device
        try:
            support = found.support
            fits = support.check(values.to(device)) if support is not None else None
        except (NotImplementedError, ValueError, RuntimeError):
            return
        if fits is not None:
            wrong = ~fits if mask is None else ~fits & mask.to(device)
            if bool(wrong.any()):
                first = values.to(device)[wrong].flatten()[0].item()
                raise ArgumentError(
                    f"FromDistribution: a target is {first:g}, which {type(found).__name__} cannot "
                    f"give: its values are {support}."
                )

    def _values(self, target: Target, found: Distribution) -> tuple[Tensor, Tensor | None]:
        values, mask = with_nan(target)
        shape = found.batch_shape + found.event_shape
        advice = f"Let the function give one {type(found).__name__} for each target."
        axis = len(shape) - 1
        values = fitted(values, shape, axis, "FromDistribution", advice)
        if mask is None:
            return values, None
        mask = mask.view(values.shape)
        for _ in found.event_shape:
            partly = mask.any(-1) != mask.all(-1)
            if may_look(partly) and bool(partly.any()):
                raise ArgumentError(
                    f"FromDistribution: a target of {type(found).__name__} is masked in part, and "
                    "it has one density for all its elements: mask the whole."
                )
            mask = mask.all(-1)
        return values, mask

    def sample(self, output: Any, target: Target, generator: torch.Generator | None) -> Target:
        found = self.distribution(output)
        _, mask = self._values(target, found)
        seed = int(torch.randint(1 << 62, (), generator=generator))
        device = logits_in(output, "FromDistribution").device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)  # torch's distributions take no generator
            drawn = found.sample()
        if mask is None:
            return drawn
        wide = mask.view(*mask.shape, *(1,) * len(found.event_shape)).expand(drawn.shape)
        return drawn, wide.to(drawn.device)


def _inside(found: Distribution) -> Tensor:
    """For each target a value that its distribution can give: for the places of masked ones."""
    with torch.no_grad():
        value = found.mean.detach()
        try:
            mode = found.mode.detach()
        except NotImplementedError:
            return value
        support = found.support
        fits = support.check(value) & value.isfinite() if support is not None else value.isfinite()
        return torch.where(fits.view(*fits.shape, *(1,) * (value.dim() - fits.dim())), value, mode)


def _out_of_range(error: Exception) -> ArgumentError:
    return ArgumentError(f"FromDistribution: a target is out of range: {_first(error)}")


def _first(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip() or type(error).__name__


def _check_parameters(found: Any) -> None:
    """As torch.distributions checks them, which torch.compile switches off for all that follows."""
    if torch.compiler.is_compiling() or not isinstance(found, Distribution):
        return
    for name, constraint in found.arg_constraints.items():
        value = vars(found).get(name)  # others are made of these
        if constraints.is_dependent(constraint) or not isinstance(value, Tensor):
            continue
        if not bool(constraint.check(value).all()):
            raise ValueError(f"{type(found).__name__}: {name} must be {constraint}.")
