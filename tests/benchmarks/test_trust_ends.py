"""A share of trust.py's trials that end processes: the same on every run."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import trust
from trust_sections.commands import COMMANDS
from trust_sections.concurrency import CONCURRENCY
from trust_sections.disks import DISKS
from trust_sections.draws import DRAWS
from trust_sections.kills import KILLS
from trust_sections.section import FAULT
from trust_sections.signals import SIGNALS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals, mounts and /proc")

SHARE = {
    KILLS.name: (0, 2),
    SIGNALS.name: (0,),
    DISKS.name: (2, 8, 31),
    COMMANDS.name: (13, 14, 15, 17, 18, 19, 20),
    CONCURRENCY.name: (0, 3),
}


def _work(folder: Path, pipe: Any) -> None:
    """Forks come from a process that has imported all and has one thread."""
    torch.set_num_threads(1)
    for name, numbers in SHARE.items():
        place = folder / name
        place.mkdir()
        trial = trust._section(name).prepare(place)
        for number in numbers:
            pipe.send((name, trust.measured(trial, number)))
    pipe.send(None)


def test_a_share_of_what_ends_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(tmp_path, there))
    process.start()
    there.close()
    ended: dict[str, list[trust.Ended]] = {name: [] for name in SHARE}
    while (found := here.recv()) is not None:
        ended[found[0]].append(found[1])
    process.join()
    assert {name: len(found) for name, found in ended.items()} == {
        name: len(numbers) for name, numbers in SHARE.items()
    }
    outcomes = {(name, e.number): e.outcome for name, found in ended.items() for e in found}
    assert {key: o for key, o in outcomes.items() if o.startswith(FAULT)} == {}
    assert "went on" in outcomes.values()
    assert "refused" in outcomes.values()
    assert "exit code 2" in outcomes.values()


def test_draws_are_those_of_a_normal_distribution(tmp_path: Path) -> None:
    trial = DRAWS.prepare(tmp_path)
    assert {trial(number) for number in range(12)} == {"as expected"}


def test_a_bias_of_the_draws_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trust_sections import draws

    right = draws._noise
    monkeypatch.setattr(draws, "_noise", lambda *a: 1.02 * right(*a))
    trial = DRAWS.prepare(tmp_path)
    assert [trial(n).startswith(FAULT) for n in (0, 1, 3)] == [True, True, False]
    monkeypatch.setattr(draws, "_noise", lambda seed, name, *n: right(seed & 2**62 - 1, "w", *n))
    assert trial(3).startswith(FAULT)  # streams that are one
