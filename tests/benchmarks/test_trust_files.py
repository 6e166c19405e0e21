"""A share of trust.py with the same damage on every run: no foreign error, nothing executed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import trust
from trust_sections import SECTIONS
from trust_sections.files import FILES
from trust_sections.images import IMAGES
from trust_sections.section import FAULT, Section, judged

from bayesify import DataError

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of Pillow and torch, about the damage
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def faults(section: Section, count: int, folder: Path) -> list[str]:
    trial = section.prepare(folder)
    ended = [trust.measured(trial, number) for number in range(count)]
    assert len({e.outcome for e in ended}) > 1  # some are taken, some refused
    return [f"{e.number}: {fault}" for e in ended if (fault := e.fault(section)) is not None]


def test_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert faults(FILES, 84, tmp_path) == []


def test_damaged_images(tmp_path: Path) -> None:
    assert faults(IMAGES, 150, tmp_path) == []


def test_what_counts_as_a_fault(tmp_path: Path) -> None:
    def refuse() -> None:
        raise DataError("no image")

    def start() -> None:
        import subprocess

        subprocess.run([sys.executable, "-c", ""], check=True)

    assert judged(lambda: None) == "taken"
    assert judged(refuse) == "refused"
    assert judged(lambda: {"b": 1}["a"]) == f"{FAULT}: KeyError: 'a'"
    assert judged(start).startswith(f"{FAULT}: executed subprocess.Popen")
    slow = trust.Ended(3, "taken", FILES.slow + 1, 0.0)
    large = trust.Ended(4, "refused", 0.1, FILES.large + 1)
    found = trust.empty(FILES)
    for ended in (slow, large, trust.Ended(5, "refused", 0.1, 1.0)):
        trust.add(FILES, found, ended)
    assert found["outcomes"] == {FAULT: 2, "refused": 1}
    assert (found["slow"], found["large"], found["trials"]) == (1, 1, 6)
    assert [f["trial"] for f in found["faults"]] == [3, 4]


def test_a_trial_that_allocates_is_measured() -> None:
    def allocate(number: int) -> str:
        return "taken" if len(b"x" * (300 << 20)) else ""

    assert trust.measured(allocate, 0).mib == pytest.approx(300, abs=60)


def test_the_page_is_that_of_the_results() -> None:
    results = trust.read()
    document = json.loads(trust.RESULTS.read_text("utf-8"))
    assert trust.PAGE.read_text("utf-8") == trust.page({**document, **results})
    known = {section.name for section in SECTIONS}
    assert set(results["sections"]) <= known
    for found in results["sections"].values():
        assert sum(found["outcomes"].values()) == found["trials"]
        assert found["outcomes"].get(FAULT, 0) == 0
