"""benchmarks/versions.py: what is noted of each test, what need not run again, and the page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import versions

SUITE = """
import pytest

def test_passes():
    pass

def test_fails():
    assert 1 == 2

@pytest.mark.skip(reason="too old")
def test_skipped():
    pass

@pytest.mark.xfail(reason="known")
def test_expected():
    assert False

@pytest.fixture
def spoilt():
    yield
    raise ValueError("at the end")

def test_ends_badly(spoilt):
    pass
"""
OUTCOMES = {
    "test_s.py::test_passes": "passed",
    "test_s.py::test_fails": "failed",
    "test_s.py::test_skipped": "skipped",
    "test_s.py::test_expected": "expected",
    "test_s.py::test_ends_badly": "failed",
    "test_broken.py": "failed",
}


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A suite of five tests and a file that cannot be imported, as if it were a checkout's."""
    (tmp_path / "test_s.py").write_text(SUITE)
    (tmp_path / "test_broken.py").write_text("import surely_absent")
    (tmp_path / "pytest.ini").write_text("[pytest]")
    (tmp_path / "benchmarks").symlink_to(versions.ROOT / "benchmarks")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # of these tests, not of that suite
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    monkeypatch.setattr(versions, "FOLDER", tmp_path)
    return tmp_path


def run(workers: int, notes: dict[str, dict[str, str]]) -> int:
    return versions.run("old", Path(sys.executable), "c0", notes, str(workers), [])


def test_each_test_is_noted_once(suite: Path) -> None:
    assert run(2, {}) == 1
    notes = [json.loads(line) for line in versions.notes_of("old").read_text().splitlines()]
    assert {row["test"]: row["outcome"] for row in notes} == OUTCOMES
    assert len(notes) == len(OUTCOMES)
    reasons = {row["test"].partition("::")[2]: row["reason"] for row in notes}
    assert reasons["test_skipped"] == "too old"
    assert reasons["test_fails"] == "assert 1 == 2"
    assert reasons["test_ends_badly"] == "ValueError: at the end"
    assert reasons[""] == "ModuleNotFoundError: No module named 'surely_absent'"


def test_what_passed_does_not_run_again(suite: Path) -> None:
    run(0, {})
    file = versions.notes_of("old")
    before = len(file.read_text().splitlines())
    run(0, versions.kept("old", "c0", None))
    again = [json.loads(line)["test"] for line in file.read_text().splitlines()[before:]]
    assert sorted(again) == sorted(name for name, how in OUTCOMES.items() if how == "failed")
    assert versions.kept("old", "c1", None) == {}  # of another commit


def test_what_a_stopped_run_noted_counts(suite: Path) -> None:
    (suite / "test_broken.py").write_text("def test_kills():\n    import os; os._exit(9)")
    environment = {**os.environ, "PYTEST_ADDOPTS": "-p no:randomly test_s.py test_broken.py"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", environment)
        assert run(0, {}) == 9
    assert {n: r["outcome"] for n, r in versions.kept("old", "c0", None).items()} == {
        name: outcome for name, outcome in OUTCOMES.items() if name != "test_broken.py"
    }


def record(corner: str, whole: bool, **more: Any) -> dict[str, Any]:
    return {
        "corner": corner, "python": "3.10.1", "c_library": True, "versions": {"torch": "2.6.0"},
        "whole": whole, "commits": {"c0": 3}, "files": 2, "passed": 1, "failed": 1,
        "failures": {"tests/core/test_a.py::test_b": "assert 1 == 2"}, "expected_failures": 0,
        "skipped": {"too old": 1}, **more,
    }  # fmt: skip


def test_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"python": "3.10.1", "c_library": True, "versions": {"torch": "2.6.0"}}
    monkeypatch.setattr(versions, "FOLDER", tmp_path)
    monkeypatch.setattr(versions, "_FACTS", f"print({json.dumps(json.dumps(facts))}) or %r")
    notes = {
        name: {"outcome": how, "reason": "why", "commit": "c0" if how == "passed" else "c1"}
        for name, how in OUTCOMES.items()
    }
    found = versions.record_of("old", Path(sys.executable), notes, whole=True)
    assert found["commits"] == {"c0": 1, "c1": 5}
    assert found["files"] == 2
    assert [found[k] for k in ("passed", "failed", "expected_failures")] == [1, 3, 1]
    assert found["skipped"] == {"why": 1}
    assert found["versions"]["torch"] == "2.6.0"


def test_a_part_takes_no_whole_ones_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "RESULTS", tmp_path / "r.json")
    monkeypatch.setattr(versions, "PAGE", tmp_path / "p.md")
    versions.write(record("old", False, passed=3))
    assert "| 2 files | 3 |" in (tmp_path / "p.md").read_text()
    versions.write(record("old", True, passed=4))
    versions.write(record("old", False, passed=5))
    text = (tmp_path / "p.md").read_text()
    assert "| whole | 4 |" in text
    assert "- failed: `tests/core/test_a.py::test_b`: assert 1 == 2" in text
    assert "- skipped 1: too old" in text


def test_the_page_is_that_of_the_results() -> None:
    known = json.loads(versions.RESULTS.read_text())
    assert versions.PAGE.read_text() == versions.page(known)


def test_a_python_that_refuses_to_start_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pyenv puts on PATH for versions that are not chosen."""
    shim = tmp_path / "python3.10"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert versions.interpreter("python3.10") == "3.10"  # for uv to find or fetch
    for name in ("3.10.9", "3.10.13"):
        home = tmp_path / "versions" / name / "bin"
        home.mkdir(parents=True)
        (home / "python").symlink_to(sys.executable)
    assert versions.interpreter("3.10") == str(tmp_path / "versions/3.10.13/bin/python")
    assert subprocess.run([versions.interpreter(sys.executable), "-c", ""]).returncode == 0
