"""Settings of :func:`bayesify.prune_` and its kin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from .fields import Seed, Whole, checked, refuse

ScoreName = Literal["snr", "magnitude", "variance", "random"]
Scope = Literal["tensor", "global"]
SCORE: ScoreName = "snr"


@dataclass(frozen=True, kw_only=True)
class NofMSettings:
    """The settings of :func:`bayesify.prune_n_of_m_`.

    Args:
        only: Only what these patterns match is pruned, as in ``bayesify convert``; all without.
        skip: But not what these match: skip beats only.
        seed: Seed of the random score.
    """

    function: ClassVar[str] = "prune_n_of_m_"

    only: tuple[str, ...] | Any = ()
    skip: tuple[str, ...] | Any = ()
    seed: Seed = 0

    def __post_init__(self) -> None:
        refuse(self.function, checked(self))


@dataclass(frozen=True, kw_only=True)
class UnitSettings(NofMSettings):
    """The settings of :func:`bayesify.prune_units_`.

    Args:
        scope: The share of each tensor, or of all together.
    """

    function: ClassVar[str] = "prune_units_"

    scope: Scope = "tensor"


@dataclass(frozen=True, kw_only=True)
class PruneSettings(UnitSettings):
    """The settings of :func:`bayesify.prune_`.

    Args:
        min_dim: Leave tensors of fewer dimensions; 1 prunes biases and norms too.
    """

    function: ClassVar[str] = "prune_"

    min_dim: Whole = 2
