"""How two numbers of each image go together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Rank correlation; None where one of them is the same for all."""
    from scipy import stats

    return None if _constant(x) or _constant(y) else float(stats.spearmanr(x, y).statistic)


def correlations(x: Sequence[float], y: Sequence[float]) -> dict[str, float | None]:
    """Pearson, Spearman, and how normal y is around its regression on x.

    ``ks`` is the largest distance of the residual's distribution from the normal one of its own
    mean and variance, ``ks_limit`` what 5 % of normal samples exceed (Lilliefors, large n).
    """
    from scipy import stats

    n = len(x)
    if _constant(x) or _constant(y):
        return {"pearson": None, "spearman": None, "n": n}
    pearson = float(stats.pearsonr(x, y).statistic)
    if n < 3:
        return {"pearson": pearson, "spearman": None, "n": n}
    line = stats.linregress(x, y)
    residual = np.asarray(y) - line.intercept - line.slope * np.asarray(x)
    scale = residual.std()
    z = residual / scale if scale > 0 else residual
    return {
        "pearson": pearson,
        "spearman": spearman(x, y),
        "residual_skew": float((z**3).mean()),
        "residual_excess_kurtosis": float((z**4).mean() - 3),
        "ks": float(stats.kstest(z, "norm").statistic),
        "ks_limit": 0.895 / (math.sqrt(n) - 0.01 + 0.85 / math.sqrt(n)),
        "n": n,
    }


def _constant(values: Sequence[float]) -> bool:
    return min(values) == max(values)
