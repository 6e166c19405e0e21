"""Every random number of a run is a function of (seed, what it is for, epoch, step, index)."""

from __future__ import annotations

from enum import IntEnum

from bayesify import ArgumentError
from bayesify.seeds import fold


class Stream(IntEnum):
    """What random numbers are for; those of one stream say nothing about another's."""

    ORDER = 1
    """Of the images, in an epoch."""
    VIEWS = 2
    """Of a batch (epoch, step, part), or of one image (epoch, index)."""
    STEP = 3
    """All else in a micro-batch (step, index): draws of the weights, dropout."""
    MEASURED = 4
    """Draws that measure a run, by number."""
    CORRUPTED = 5
    """Of the pixels of a test batch, by number."""


def seed_of(stream: Stream, seed: int, *place: int) -> int:
    """The seed of one place in a stream, in [0, 2**63).

    Raises:
        ArgumentError: A number is below 0.
    """
    if min(seed, *place) < 0:
        raise ArgumentError(f"seed, epoch and step must be 0 or more, not {(seed, *place)}.")
    return fold(seed, stream, *place)
