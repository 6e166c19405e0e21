"""Times of several methods, each divided by that of a base method in the same round."""

from __future__ import annotations

import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar
from unittest import mock

import torch

from bayesify.kernels import native

_KEEPING = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_THRESHOLD_": str(1 << 40)}


def keep_memory() -> None:
    """Start this process anew with a glibc that keeps freed memory, as jemalloc would.

    Else it hands large blocks back to the system and takes them again in every step, of whichever
    method's tensors happen to lie at the end of the heap: ratios of the same code then differ from
    one start to the next.
    """
    if not _KEEPING.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_KEEPING})


def without_library(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` as where bayesify was installed without a C compiler."""

    @functools.wraps(run)
    def plain(*args: Any) -> Any:
        with mock.patch.object(native, "there", return_value=False):
            return run(*args)

    return plain


_T = TypeVar("_T")


def paired(
    runs: dict[str, Callable[[], Any]], base: str, rounds: int, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Median ratio to ``base`` with quartiles, and median seconds, by method."""
    seconds = by_round(
        {method: functools.partial(timed, run, device) for method, run in runs.items()}, rounds
    )
    found = {}
    for method, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[base], strict=True)]
        found[method] = {**spread(ratios), "seconds": statistics.median(times)}
    return found


def by_round(measurements: dict[str, Callable[[], _T]], rounds: int) -> dict[str, list[_T]]:
    """What each gives in each round, which makes all of them once, in an order that turns."""
    found: dict[str, list[_T]] = {method: [] for method in measurements}
    order = list(measurements)
    for turn in range(rounds):
        turn %= len(order)
        for method in order[turn:] + order[:turn]:
            found[method].append(measurements[method]())
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"low": low, "median": middle, "high": high}


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds of one run; on a GPU until the GPU has finished."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
