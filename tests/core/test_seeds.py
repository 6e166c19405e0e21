"""Seeds from a seed."""

from __future__ import annotations

import numpy as np

from bayesify.seeds import fold, key_of


def test_fold_mixes_as_splitmix64_does() -> None:
    state = np.array([0, 1234567], dtype=np.uint64)
    # the first outputs of the published generator for these two seeds
    first = np.array([0xE220A8397B1DCDAF, 6457827717110365317], dtype=np.uint64)
    for seed, mixed in zip(state.tolist(), first.tolist(), strict=True):
        # an index that undoes the sum brings the second round back to the seed
        assert fold(seed, (seed - mixed) % (1 << 64)) == mixed >> 1


def test_seeds_are_those_of_earlier_versions() -> None:
    assert fold(0, 0) == 6017775124710473527
    assert fold(7, 1, 2) == 1223394113395387870
    assert key_of("layer.weight") == 6191503076671015293


def test_families_of_families() -> None:
    assert fold(7) == 7
    assert fold(7, 1, 2) == fold(fold(7, 1), 2)
    seeds = [fold(s, a, b) for s in range(8) for a in range(8) for b in range(8)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
