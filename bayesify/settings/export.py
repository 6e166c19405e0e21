"""Settings of :func:`bayesify.to_program`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .fields import Count, Seed, Shown, checked, refuse


@dataclass(frozen=True, kw_only=True)
class ProgramSettings:
    """What a program is made of.

    Args:
        num_samples: So many draws in one program, which gives mean probabilities. By default the
            means, with the output of the model.

            It is an :class:`bayesify.Ensemble`.
        per_draw: With several draws: give the probabilities of each too.
        shrink: Leave out the channels that are pruned as a whole, and what reads them, where the
            next layer allows it.
        seed: Seed of the draws.
    """

    num_samples: Annotated[Count | None, Shown(option="--ensemble", letter="-k", metavar="K")] = (
        None
    )
    per_draw: bool = False
    shrink: bool = False
    seed: Seed = 0

    def __post_init__(self) -> None:
        refuse("to_program", checked(self))
        if self.per_draw and self.num_samples is None:
            refuse(
                "to_program", ["per_draw belongs to an ensemble: give num_samples, --ensemble K."]
            )
