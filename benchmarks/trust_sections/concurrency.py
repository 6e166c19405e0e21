"""Threads, asyncio and forks that draw at the same time: each gets what it would get alone."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bayesify
from bayesify import at_mean, one_draw, predict, sampled

from .forks import Child
from .section import FAULT, Section, Trial

_SEEDS = 12


def _net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    )
    return bayesify.to_bbb(net, initial_std=0.22, skip="@before-batchnorm").eval()


class _Alone:
    """What one thread alone gets, by what it does and its seed."""

    def __init__(self) -> None:
        self.model = _net()
        self.inputs = torch.randn(3, 1, 8, 8)
        self.ways: dict[str, Callable[[int], Tensor]] = {
            "one_draw": self.one_draw, "predict": self.predict, "draws": self.draws,
            "at_mean": self.at_mean, "gradient": self.gradient, "estimator": self.twice,
        }  # fmt: skip
        self.expected = {
            (way, seed): call(seed) for way, call in self.ways.items() for seed in range(_SEEDS)
        }

    def one_draw(self, seed: int) -> Tensor:
        with torch.no_grad(), one_draw(self.model, seed=seed):
            return self.call()

    def predict(self, seed: int) -> Tensor:
        found: Tensor = predict(self.model, self.inputs, num_samples=3, seed=seed)
        return found

    def draws(self, seed: int) -> Tensor:
        return torch.cat([d.flatten() for d in bayesify.draws(self.model, seed).values()]).detach()

    def at_mean(self, seed: int) -> Tensor:
        with torch.no_grad(), at_mean(self.model):
            return self.call()

    def gradient(self, seed: int) -> Tensor:
        with one_draw(self.model, seed=seed):
            loss = self.call().square().sum()
        tensors = [t for p in bayesify.posteriors(self.model) for t in (p.mean, p.logvar)]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, tensors)])

    def twice(self, seed: int) -> Tensor:
        """Two calls in one scope inside of another mode."""
        with torch.no_grad(), sampled(self.model), one_draw(self.model, seed=seed):
            return torch.cat([self.call(), self.call()])

    def call(self) -> Tensor:
        found: Tensor = self.model(self.inputs)
        return found

    def wrong(self, way: str, seed: int, found: Tensor) -> str | None:
        same = torch.equal(found, self.expected[way, seed])
        return None if same else f"{way}, seed {seed}: another result than alone"


def _work(rng: random.Random, calls: int, alone: _Alone) -> list[tuple[str, int]]:
    return [(rng.choice(list(alone.ways)), rng.randrange(_SEEDS)) for _ in range(calls)]


def _threads(rng: random.Random, alone: _Alone, _: Path) -> list[str]:
    wrong: list[str] = []
    count = rng.randrange(2, 7)
    begin = threading.Barrier(count)

    def run(work: list[tuple[str, int]]) -> None:
        begin.wait()
        for way, seed in work:
            try:
                found = alone.wrong(way, seed, alone.ways[way](seed))
            except Exception as error:
                found = f"{way}: {type(error).__name__}: {error}"
            if found is not None:
                wrong.append(found)

    threads = [threading.Thread(target=run, args=(_work(rng, 12, alone),)) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


def _tasks(rng: random.Random, alone: _Alone, _: Path) -> list[str]:
    """Tasks that hand over in the middle of a scope."""
    wrong: list[str] = []

    async def run(seed: int, pauses: int, mean: bool) -> None:
        block: Any = at_mean(alone.model) if mean else one_draw(alone.model, seed=seed)
        way = "at_mean" if mean else "one_draw"
        with block:
            for _ in range(pauses):
                await asyncio.sleep(0)
                with torch.no_grad():
                    found = alone.wrong(way, seed, alone.call())
                if found is not None:
                    wrong.append(found)

    async def together() -> None:
        await asyncio.gather(
            *(run(rng.randrange(_SEEDS), rng.randrange(1, 5), rng.random() < 0.3)
              for _ in range(rng.randrange(2, 9)))
        )  # fmt: skip

    asyncio.run(together())
    return wrong


def _forks(rng: random.Random, alone: _Alone, folder: Path) -> list[str]:
    """A fork inside a scope goes on with it, and so does its parent."""
    seed, log = rng.randrange(_SEEDS), folder / "fork"
    log.unlink(missing_ok=True)
    # autograd refuses a fork of a process that has used it
    work = [(way, other) for way, other in _work(rng, 6, alone) if way != "gradient"]

    def inside() -> int:
        with torch.no_grad():
            found = [alone.wrong("one_draw", seed, alone.call())]
        return sum(f is not None for f in found)

    def run() -> int:
        bad = inside()
        for way, other in work:
            bad += alone.wrong(way, other, alone.ways[way](other)) is not None
        return bad

    with one_draw(alone.model, seed=seed):
        children = [Child(run, log) for _ in range(2)]
        bad = inside()
        codes = [child.wait() for child in children]
    return [] if codes == [0, 0] and not bad else [f"forks: {codes}, parent {bad}"]


_WAYS = (_threads, _threads, _tasks, _forks)


def _prepare(folder: Path) -> Trial:
    alone = _Alone()

    def trial(index: int) -> str:
        wrong = _WAYS[index % len(_WAYS)](random.Random(f"together {index}"), alone, folder)
        return f"{FAULT}: {wrong[0]}" if wrong else "as alone"

    return trial


CONCURRENCY = Section(
    "concurrency",
    "threads, tasks of asyncio and forks that draw, predict and take gradients of one model at "
    "the same time: each gets, bit for bit, what it gets alone",
    share=60,
    full=1_000,
    prepare=_prepare,
    seconds=200.0,
    slow=30.0,
)
