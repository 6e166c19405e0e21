"""A plugin of pytest for versions.py: notes each test as it ends, and leaves out what is done.

The environment says where: CORNER_LOG is the file that gets a line of JSON for each test,
CORNER_DONE one with the names of tests that need not run again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

LOG, DONE = Path(os.environ["CORNER_LOG"]), Path(os.environ["CORNER_DONE"])
COMMIT = os.environ["CORNER_COMMIT"]
PHASES = ("setup", "call", "teardown")

_found: dict[str, tuple[str, str]] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Runs in each worker of xdist, which must all see the same: DONE does not change meanwhile."""
    done = set(DONE.read_text("utf-8").splitlines())
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be imported, or that skips itself."""
    if report.outcome != "passed" and "PYTEST_XDIST_WORKER" not in os.environ:
        _note(report.nodeid, report.outcome, _reason(report))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Comes to the process that was started, also of what its workers run."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    before = _found.get(report.nodeid, ("passed", ""))
    if report.outcome != "passed" and before[0] != "failed":
        expected = hasattr(report, "wasxfail") and report.outcome == "skipped"
        before = ("expected" if expected else report.outcome, _reason(report))
    _found[report.nodeid] = before
    if report.when == "teardown" or report.when not in PHASES:  # no phase: its worker crashed
        _note(report.nodeid, *_found.pop(report.nodeid))


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    lines = str(report.longrepr).strip().splitlines()
    return next((line[2:].strip() for line in lines if line.startswith("E ")), "")[:200]


def _note(test: str, outcome: str, reason: str) -> None:
    row = {"test": test, "outcome": outcome, "reason": reason, "commit": COMMIT}
    with LOG.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
