"""Several outputs of one model, each with a likelihood of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ..errors import ArgumentError
from .likelihood import Likelihood, Target, per_example
from .predictive import Gathered, Predictive


class Heads(Likelihood):
    """A likelihood for each output of a model, taken as independent given the output.

    Args:
        likelihoods: By the name of an output: a key of the dict that the model gives, an attribute
            of an object, or a number, the place in a tuple. The targets are a dict, or a tuple, in
            the same way. Outputs that are not named here count for nothing.

    Raises:
        ArgumentError: There is none, or a value is no likelihood.
    """

    def __init__(self, likelihoods: Mapping[Any, Likelihood]) -> None:
        super().__init__()
        wrong = [n for n, v in likelihoods.items() if not isinstance(v, Likelihood)]
        names = list(likelihoods)
        if not names or wrong or not all(isinstance(n, str | int) for n in names):
            raise ArgumentError(
                "A mapping of likelihoods has names of outputs (or places in a tuple) and a "
                "likelihood for each, such as {'depth': Gaussian('predicted')}, got "
                f"{likelihoods!r:.150}."
            )
        self.names = names
        self.each = nn.ModuleList(likelihoods.values())

    def items(self) -> Iterator[tuple[Any, Likelihood]]:
        """Names of outputs and their likelihoods."""
        for name, likelihood in zip(self.names, self.each, strict=True):
            assert isinstance(likelihood, Likelihood)
            yield name, likelihood

    def _parts(self, output: Any, target: Any) -> Iterator[tuple[Likelihood, Any, Target]]:
        for name, likelihood in self.items():
            yield likelihood, picked(output, name, "output"), picked(target, name, "target")

    def log_densities(self, output: Any, target: Any) -> Tensor:
        """The sum over the targets of each example, (batch,): heads have shapes of their own."""
        return self._sum(each.log_densities(f, y) for each, f, y in self._parts(output, target))

    def objective(self, output: Any, target: Any) -> Tensor:
        return self._sum(each.objective(f, y) for each, f, y in self._parts(output, target))

    def _sum(self, parts: Iterator[Tensor]) -> Tensor:
        return torch.stack([per_example(part) for part in parts]).sum(0)

    def check(self, output: Any, target: Any) -> None:
        for each, f, y in self._parts(output, target):
            each.check(f, y)

    def mask(self, target: Any) -> Tensor | None:
        raise ArgumentError("Each head has a mask of its own.")

    def check_shapes(self) -> None:
        for _, head in self.items():
            head.check_shapes()

    def counts(self, target: Any) -> Tensor:
        each = [head.counts(picked(target, name, "target")) for name, head in self.items()]
        return torch.stack([count.cpu() for count in each]).sum(0)

    def distribution(self, output: Any) -> Distribution:
        raise ArgumentError("Each head has a distribution of its own.")

    def density(self, found: Any, target: Target) -> Tensor:
        raise ArgumentError("Each head has a density of its own.")

    def sample(self, output: Any, target: Any, generator: torch.Generator | None) -> Any:
        return {
            name: head.sample(
                picked(output, name, "output"), picked(target, name, "target"), generator
            )
            for name, head in self.items()
        }

    def gather(self) -> Gathered:
        return _GatheredHeads(self)

    def extra_repr(self) -> str:
        return ", ".join(map(repr, self.names))


class _GatheredHeads(Gathered):
    """A predictive distribution for each head, by its name."""

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads)
        self.parts = {name: head.gather() for name, head in heads.items()}

    def add(self, output: Any) -> None:
        for name, part in self.parts.items():
            part.add(picked(output, name, "output"))

    def result(self) -> Any:
        return PredictiveHeads({name: part.result() for name, part in self.parts.items()})


class PredictiveHeads(dict[Any, Predictive]):
    """What many draws predict of each head, by its name."""

    def log_prob(self, target: Any) -> Tensor:
        """Log densities of the targets, each by itself, summed for each example, (batch,)."""
        each = [p.log_prob(picked(target, name, "target")) for name, p in self.items()]
        return torch.stack([per_example(densities) for densities in each]).sum(0)


def picked(value: Any, name: str | int, what: str) -> Any:
    """One of several outputs or targets.

    Raises:
        ArgumentError: There is none of that name.
    """
    known: Any = type(value).__name__
    if isinstance(value, Mapping):
        if name in value:
            return value[name]
        known = f"the {what}s {', '.join(map(str, value))}"
    elif isinstance(name, int):
        if isinstance(value, tuple | list) and -len(value) <= name < len(value):
            return value[name]
        if isinstance(value, tuple | list):
            known = f"{len(value)} {what}s"
    elif hasattr(value, name) and not isinstance(value, Tensor):
        return getattr(value, name)
    raise ArgumentError(
        f"The mapping of likelihoods names the {what} {name!r}, and there is: {known}."
    )
