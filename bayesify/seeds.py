"""One derivation of seeds: what is random by itself has a seed of its own, from one for all."""

from __future__ import annotations

import hashlib

_MASK = (1 << 64) - 1


def fold(seed: int, *indices: int) -> int:
    """Derive the 63-bit seed of a member of a family from ``seed``, also in a family of families.

    ``fold(seed, a, b)`` is ``fold(fold(seed, a), b)``: the b-th member of the a-th family. Where
    a seed has several families, the first index tells them apart.

    Args:
        seed: Any integer, taken modulo 2**64.
        indices: Likewise; :func:`key_of` makes one of a name.

    Returns:
        In [0, 2**63). A neighbour in any argument gives an unrelated seed.

    Reference:
        Steele, Lea and Flood, 2014, "Fast splittable pseudorandom number generators" (splitmix64).
    """
    for index in indices:
        # not symmetric: member 1 of seed 0 must not be member 0 of seed 1
        seed = _mix(_mix(seed & _MASK) + (index & _MASK)) >> 1
    return seed


def key_of(name: str) -> int:
    """A 63-bit key of a name, the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def _mix(value: int) -> int:
    """The finaliser of splitmix64: all bits depend on all bits."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
