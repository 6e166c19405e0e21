"""Times of several methods, each divided by that of a base method in the same round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def paired(
    runs: dict[str, Callable[[], Any]], base: str, rounds: int, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Median ratio to ``base`` with quartiles, and median seconds, by method.

    Every round runs each method once, in an order that turns.
    """
    seconds: dict[str, list[float]] = {method: [] for method in runs}
    order = list(runs)
    for turn in range(rounds):
        turn %= len(order)
        for method in order[turn:] + order[:turn]:
            seconds[method].append(timed(runs[method], device))
    found = {}
    for method, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[base], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        found[method] = {
            "low": low, "median": middle, "high": high, "seconds": statistics.median(times),
        }  # fmt: skip
    return found


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds of one run; on a card until the card has finished."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
