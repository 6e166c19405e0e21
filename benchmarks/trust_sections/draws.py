"""Is the noise that of a normal distribution, and are all of its streams independent?"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy import stats

import bayesify
from bayesify.kernels import native, philox
from bayesify.seeds import key_of

from .section import FAULT, Section, Trial

_N = 1 << 18
_LEAST = 1e-9
"""A p-value below it counts as a fault: in 10,000 tests of true draws one chance in 100,000."""
EDGES = (0, 1, -1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, -(2**63), 2**63, 2**64 - 1)
"""Seeds at the edges of the integers of C."""


def _noise(seed: int, name: str, count: int = _N) -> np.ndarray:
    out = torch.empty(count)
    (native if native.there() else philox).fill_normal(out, seed, key_of(name))
    return out.double().numpy()


def _two_sided(z: float) -> float:
    return float(2 * stats.norm.sf(abs(z)))


def _moments(x: np.ndarray) -> list[float]:
    n = len(x)
    # standard errors of the first four moments of N(0, 1)
    errors = [(x**k).mean() - m for k, m in ((1, 0), (2, 1), (3, 0), (4, 3))]
    widths = [1.0, 2.0, 15.0, 96.0]
    return [_two_sided(e / (w / n) ** 0.5) for e, w in zip(errors, widths, strict=True)]


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    return _two_sided(float((x * y).mean()) * len(x) ** 0.5)


def _seed(rng: random.Random) -> int:
    return rng.choice(EDGES) if rng.random() < 0.3 else rng.getrandbits(63)


def _alone(rng: random.Random) -> list[float]:
    x = _noise(_seed(rng), f"layer{rng.random()}.weight")
    return [*_moments(x), float(stats.kstest(x, "norm").pvalue)]


def _tails(rng: random.Random) -> list[float]:
    x = _noise(_seed(rng), f"{rng.random()}", 4 * _N)
    found = []
    for bound in (2.0, 3.0, 4.0):
        expected = 2 * stats.norm.sf(bound)
        hits = int((np.abs(x) > bound).sum())
        found.append(float(stats.binomtest(hits, len(x), expected).pvalue))
    return found


def _lags(rng: random.Random) -> list[float]:
    x = _noise(_seed(rng), "w")
    lags = (1, 2, 3, 4, 8, 64, 1000, 1024, rng.randrange(5, _N // 2))
    return [_correlation(x[:-lag], x[lag:]) for lag in lags] + [
        _correlation(x[:-1] ** 2 - 1, (x[1:] ** 2 - 1) / 2)
    ]


def _streams(rng: random.Random) -> list[float]:
    """Neighbours among seeds and names, and halves and bits of them exchanged."""
    seed = _seed(rng)
    first = _noise(seed, "layer.1.weight")
    others = [_noise(seed, "layer.2.weight"), _noise(seed, "layer.1.bias")]
    others += [
        _noise(s, "layer.1.weight") for s in (seed + 1, seed ^ 1 << 32, seed ^ 1 << 63, ~seed)
    ]
    return [_correlation(first, other) for other in others]


def _of_a_model(rng: random.Random) -> list[float]:
    """The draws of a model: (weight - mean) / sigma, over weights and over seeds."""
    torch.manual_seed(rng.getrandbits(30))
    model = bayesify.to_bbb(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)))
    begin = rng.getrandbits(62)
    both = []
    for number in range(24):
        drawn = bayesify.draws(model, begin + number)
        both.append(
            torch.cat([
                ((drawn[p.name] - p.mean) / (0.5 * p.logvar).exp()).detach().double().flatten()
                for p in bayesify.posteriors(model)
            ]).numpy()
        )  # fmt: skip
    table = np.stack(both)
    flat = table.flatten()
    return [
        *_moments(flat), float(stats.kstest(flat, "norm").pvalue),
        _correlation(table[:-1].flatten(), table[1:].flatten()),
        _correlation(table[:, :4096].flatten(), table[:, 4160:8256].flatten()),
    ]  # fmt: skip


def _edges(rng: random.Random) -> list[float]:
    """Seeds at the edges give streams of their own, of which no two are alike."""
    found = [_noise(seed, "w", 1 << 14) for seed in EDGES]
    return [
        p
        for i, x in enumerate(found)
        for p in [*_moments(x), *(_correlation(x, y) for j, y in enumerate(found[:i])
                                  if EDGES[i] % 2**64 != EDGES[j] % 2**64)]
    ]  # fmt: skip


_TESTS: tuple[Callable[[random.Random], list[float]], ...] = (
    _alone, _tails, _lags, _streams, _of_a_model, _edges,
)  # fmt: skip


def _prepare(_: Path) -> Trial:
    def trial(index: int) -> str:
        test = _TESTS[index % len(_TESTS)]
        values = test(random.Random(f"draw {index}"))
        least = min(values)
        # many small values together would show what no single one does
        together = float(stats.kstest(values, "uniform").pvalue) if len(values) > 20 else 1.0
        if not least > _LEAST or together < _LEAST / 1000:
            return f"{FAULT}: {test.__name__}: p = {least:.3g}, together {together:.3g}"
        return "as expected"

    return trial


DRAWS = Section(
    "draws",
    "statistical tests of the noise: moments, Kolmogorov and Smirnov, tails, lags, correlations "
    "between neighbours among seeds and names, draws of a model, seeds at the edges of integers; "
    "a fault is a p-value below 1e-9",
    share=60,
    full=1_000,
    prepare=_prepare,
    seconds=200.0,
    slow=30.0,
)
