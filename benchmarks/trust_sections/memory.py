"""Memory and descriptors stay as they are over many steps, conversions, files and predictions."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import TensorDataset

import bayesify
from bayesify import elbo_loss, param_groups, predict, storage
from bayesify.training import fit

from .forks import Child
from .section import FAULT, Section, Trial

_GROWTH = 4.0
"""MiB between a fifth of the way and the end, above which it counts as a fault."""


class Now(NamedTuple):
    """Resident memory in MiB, and open descriptors."""

    mib: float
    descriptors: int


def now() -> Now:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Now(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd")))


def _net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(288, 3),
    )  # fmt: skip


def _steps(_: Path) -> Callable[[], object]:
    model = bayesify.to_bbb(_net())
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3))
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])

    def step() -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        elbo_loss(loss, model, num_data=100).backward()
        optimizer.step()

    return step


def _conversions(_: Path) -> Callable[[], object]:
    x = torch.randn(2, 1, 8, 8)

    def convert() -> None:
        model = bayesify.to_bbb(_net())
        model(x).sum().backward()
        bayesify.to_deterministic(model)

    return convert


def _files(folder: Path) -> Callable[[], object]:
    model, path = bayesify.to_bbb(_net()), folder / "file"

    def again() -> None:
        storage.save(model, path, overwrite=True)
        storage.load(path, _net())

    return again


def _predictions(_: Path) -> Callable[[], object]:
    model = bayesify.to_bbb(_net()).eval()
    sizes = iter(range(10**9))

    def again() -> None:
        images = torch.randn(1 + next(sizes) % 7, 1, 8, 8)
        predict(model, images, num_samples=3, seed=0, reduce="probabilities")

    return again


def _fits(folder: Path) -> Callable[[], object]:
    points = TensorDataset(torch.randn(12, 2), torch.arange(12) % 3)

    def again() -> None:
        model = bayesify.to_bbb(nn.Linear(2, 3))
        fit(model, points, epochs=1, batch_size=4, lr=1e-3, checkpoint=folder / "state")
        (folder / "state").unlink(missing_ok=True)

    return again


_KINDS: tuple[tuple[str, int, Callable[[Path], Callable[[], object]]], ...] = (
    ("steps of training", 10_000, _steps),
    ("conversions there and back", 1_000, _conversions),
    ("saves and loads", 1_000, _files),
    ("predictions", 2_000, _predictions),
    ("fits", 200, _fits),
)


def _prepare(folder: Path) -> Trial:
    def trial(index: int) -> str:
        name, count, make = _KINDS[index]
        result = folder / "result"

        def work() -> int:
            torch.manual_seed(0)
            call = make(folder)
            for number in range(count):
                if number == count // 5:
                    begin = now()
                call()
            end = now()
            same = end.descriptors == begin.descriptors
            result.write_text(f"{end.mib - begin.mib:.1f} {end.mib:.0f} {int(same)}")
            return 0

        child = Child(work, folder / "log")
        if child.wait(560.0) != 0:
            return f"{FAULT}: {name}: {child.said()[-300:]}"
        growth, most, same = result.read_text().split()
        told = f"{count:,} {name}: {growth} MiB more at the end than at a fifth, {most} MiB in all"
        if float(growth) > _GROWTH or same != "1":
            return f"{FAULT}: {told}, as many descriptors: {same}"
        return told

    return trial


MEMORY = Section(
    "memory",
    "memory and descriptors over 10,000 steps of training, 1,000 conversions, 1,000 files, 2,000 "
    "predictions, 200 fits: a fault is a growth of 4 MiB, or of one descriptor",
    share=len(_KINDS),
    full=len(_KINDS),
    prepare=_prepare,
    seconds=590.0,
    slow=590.0,
    kept=True,
)
