"""Counted noise: Philox as published, and numbers that are normal and independent."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from bayesify.kernels import philox
from bayesify.seeds import fold, key_of

# kat_vectors of Random123, lines "philox4x32 10": counter, key, answer
VECTORS = [
    "00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd",
    "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1",
]
COUNT = 1 << 20
SEEDS = (0, -1, 1234567890123456789)


def normal(seed: int, key: int, size: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    tensor = torch.empty(size, dtype=dtype)
    philox.fill_normal(tensor, seed, key)
    return tensor


@pytest.mark.parametrize("line", VECTORS)
def test_the_words_are_the_published_ones(line: str) -> None:
    words = [int(word, 16) for word in line.split()]
    found = philox.philox([torch.tensor([word]) for word in words[:4]], words[4:6])
    assert [int(word) for word in found] == words[6:]


def test_elements_are_those_of_the_definition_in_numpy() -> None:
    seed, key, size = -(5 << 40) + 3, (9 << 33) + 1, 11
    low = seed % 2**64
    expected: list[float] = []
    for block in range(3):
        counter = [torch.tensor([w]) for w in (block, 0, key % 2**32, key >> 32)]
        words = [int(w) for w in philox.philox(counter, (low % 2**32, low >> 32))]
        for first, second in (words[:2], words[2:]):
            u = np.float32(first) * np.float32(2**-32) + np.float32(2**-33)
            v = np.float32(second) * np.float32(2**-32) + np.float32(2**-33)
            radius, angle = math.sqrt(-2 * math.log(u)), 2 * math.pi * float(v)
            expected += [radius * math.cos(angle), radius * math.sin(angle)]
    np.testing.assert_allclose(normal(seed, key, (size,)).numpy(), expected[:size], rtol=1e-12)


def test_an_element_depends_on_its_index_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = normal(1, 2, (1000,))
    assert torch.equal(normal(1, 2, (10, 7)).view(-1), whole[:70])
    assert torch.equal(normal(1, 2, (1000,), torch.float32), whole.float())
    monkeypatch.setattr(philox, "_PIECE", 64)
    assert torch.equal(normal(1, 2, (1000,)), whole)
    assert normal(1, 2, ()).item() == whole[0]
    assert normal(1, 2, (0, 3)).shape == (0, 3)


def test_the_extreme_words_make_finite_numbers() -> None:
    words = torch.tensor([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
    for first, second in torch.cartesian_prod(words, words):
        for value in philox.box_muller(first, second):
            assert abs(float(value)) < math.sqrt(2 * 33 * math.log(2)) + 1e-9


@pytest.mark.parametrize("seed", SEEDS)
def test_the_numbers_are_standard_normal(seed: int) -> None:
    x = normal(seed, key_of("layer.weight"), (COUNT,)).numpy()
    assert abs(x.mean()) < 4 / math.sqrt(COUNT)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / COUNT)
    assert abs(scipy.stats.skew(x)) < 4 * math.sqrt(6 / COUNT)
    assert abs(scipy.stats.kurtosis(x)) < 4 * math.sqrt(24 / COUNT)
    assert scipy.stats.kstest(x, "norm").pvalue > 1e-3
    for part in range(4):  # each number of a block by itself
        assert scipy.stats.kstest(x[part::4], "norm").pvalue > 1e-3


def test_the_tails_are_normal() -> None:
    x = np.concatenate([normal(seed, 1, (COUNT,)).numpy() for seed in range(4)])
    for threshold in (3.0, 4.0, 4.5):
        expected = len(x) * scipy.stats.norm.sf(threshold)
        for tail in (x > threshold, x < -threshold):
            assert abs(tail.sum() - expected) < 4 * math.sqrt(expected) + 1


def uncorrelated(x: Tensor, y: Tensor) -> None:
    bound = 4.5 / math.sqrt(len(x))
    for a, b in ((x, y), (x.square() - 1, y.square() - 1), (x.abs(), y), (x, y.abs())):
        correlation = torch.corrcoef(torch.stack([a, b]))[0, 1]
        assert abs(float(correlation)) < bound


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 1024, 4096])
def test_elements_are_independent(lag: int) -> None:
    x = normal(7, key_of("layer.weight"), (COUNT,))
    uncorrelated(x[:-lag], x[lag:])


def test_parameters_steps_and_ranks_are_independent() -> None:
    count = COUNT // 4
    key = key_of("layer.weight")
    base = normal(1000, key, (count,))
    for other in (key_of("layer.bias"), key + 1, key ^ (1 << 62), fold(key, 1)):
        uncorrelated(base, normal(1000, other, (count,)))
    for seed in (1001, 1000 + (1 << 32), 1000 ^ (1 << 61)):  # the next step
        uncorrelated(base, normal(seed, key, (count,)))
    for rank in (0, 1, 7):  # as scope.new_seed folds it in
        uncorrelated(base, normal(1000 + fold(0, rank), key, (count,)))
    # element 4 e of one key is not element e of another
    uncorrelated(base[::4][: count // 4], normal(1000, key + 1, (count // 4,)))
