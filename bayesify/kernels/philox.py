"""Noise of Philox4x32-10, counted and not generated: the plain-torch version, on any device.

Each number is a function of seed, parameter key and element alone. :mod:`.triton_draw` computes the
same numbers, up to the rounding of its logarithm, sine and cosine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

ROUNDS = 10
_FACTORS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_PIECE = 1 << 20  # elements at once: the words take 8 bytes each


def philox(counter: Iterable[Tensor], key: Sequence[int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four random words for each counter of four words, under a key of two.

    Args:
        counter: Four int64 tensors of one shape, with values in [0, 2**32).
        key: Two integers in [0, 2**32).

    Returns:
        Four int64 tensors of that shape, with values in [0, 2**32).

    Reference:
        Salmon et al., 2011, Parallel Random Numbers: As Easy as 1, 2, 3, SC11, section 3.3.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        low, high = _FACTORS[0] * c0, _FACTORS[1] * c2  # of 64 bits; int64 wraps around
        c0, c2 = (high >> 32) & _MASK ^ c1 ^ k0, (low >> 32) & _MASK ^ c3 ^ k1
        c1, c3 = high & _MASK, low & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def fill_normal(tensor: Tensor, seed: int, key: int) -> None:
    """Fill a contiguous tensor with standard normal noise.

    Element ``e`` is number ``e % 4`` of the block with the counter ``(e // 4, key)``, two words
    each, under the Philox key ``seed``. Words 0 and 1 make numbers 0 and 1 by the Box-Muller
    transform, words 2 and 3 the others. Uniform numbers are float32 also where the noise is wider.

    Args:
        tensor: Any floating-point tensor; it is filled in place.
        seed: An integer; its lower 64 bits count.
        key: A non-negative integer below 2**64, which identifies the parameter.
    """
    flat = tensor.view(-1)
    words = seed & _MASK, (seed >> 32) & _MASK
    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE]
        stop = start + piece.numel()
        block = torch.arange(start // 4, -(-stop // 4), device=tensor.device)
        counter = (block & _MASK, block >> 32, *(torch.full_like(block, k) for k in _split(key)))
        bits = philox(counter, words)
        pairs = [normal for i in (0, 2) for normal in box_muller(bits[i], bits[i + 1])]
        piece.copy_(torch.stack(pairs, 1).view(-1)[: piece.numel()])


def _split(key: int) -> tuple[int, int]:
    return key & _MASK, key >> 32


def box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normal numbers, in float64, of two random words of 32 bits.

    Reference:
        Box and Muller, 1958, A Note on the Generation of Random Normal Deviates.
    """
    radius = (-2.0 * _uniform(first).double().log()).sqrt()
    angle = 2.0 * math.pi * _uniform(second).double()
    return radius * angle.cos(), radius * angle.sin()


def _uniform(word: Tensor) -> Tensor:
    """In (0, 1]: never zero, of which there is no logarithm."""
    return word.float() * 2.0**-32 + 2.0**-33
