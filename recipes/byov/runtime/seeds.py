"""Seeds from numbers: every random number of a run is a function of (seed, epoch, step, index)."""

from __future__ import annotations

import hashlib

import numpy as np

from bayesify import ArgumentError


def seed_of(*numbers: int) -> int:
    """A seed in [0, 2**63) from several numbers; a neighbour in any of them gives an unrelated one.

    Of the order of images and their views, and of the draws that measure a run.

    Raises:
        ArgumentError: A number is below 0.
    """
    try:
        return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
    except ValueError as error:
        raise ArgumentError(f"seed, epoch and step must be 0 or more, not {numbers}.") from error


def key_of(seed: int, step: int, index: int) -> int:
    """The seed of all that is random in one micro-batch of one step, in [0, 2**63).

    Not that of :func:`seed_of`, which the views of the same step have.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
