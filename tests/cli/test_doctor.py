"""cli/doctor.py: what is installed beside what is wanted, and a remedy for each fault."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from typing import Any

import pytest
from typer.testing import CliRunner

import bayesify
from bayesify.cli import doctor
from bayesify.cli.app import app
from bayesify.kernels import native


def requires(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: list(lines))


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_all_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    requires(monkeypatch, "torch>=2.0", "numpy>=1.0; python_version >= '3.0'")
    monkeypatch.setattr(native, "there", lambda: True)
    monkeypatch.setattr(doctor, "NEWEST_TORCH", "99.0")
    result = run("--strict")
    assert result.exit_code == 0, result.output
    assert "Nothing is wrong." in result.stdout


def test_each_fault_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    requires(
        monkeypatch, "torch>=99.5", "surely-absent>=1", "never>=1; python_version < '3'",
        "also-absent>=2; extra == 'more'",
    )  # fmt: skip
    monkeypatch.setattr(native, "there", lambda: False)
    result = run("--json", "--strict")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    verdicts = {p["name"]: p["verdict"] for p in found["packages"]}
    assert verdicts == {"torch": "out of range", "surely-absent": "missing"}
    assert found["extras"] == [{"name": "more", "missing": ["also-absent>=2"]}]
    assert found["devices"][0]["draws_by"] == "plain torch"
    problems = "\n".join(found["problems"])
    assert "pip install 'torch>=99.5'" in problems
    assert "surely-absent is not installed" in problems
    assert "pip install -e ." in problems


def test_a_torch_newer_than_any_tested_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    requires(monkeypatch, "torch>=2.0")
    monkeypatch.setattr(doctor, "NEWEST_TORCH", "2.1")
    assert any("newer than 2.1" in problem for problem in doctor.examine()["problems"])


def test_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    found = doctor.examine()
    assert found["packages"] == []
    assert "runs from a checkout" in found["problems"][0]


@pytest.mark.parametrize("compiled", [True, False])
def test_a_terminal_of_80_columns_shows_all(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = [f"absent-{i}>=1; extra == 'many'" for i in range(30)]
    requires(monkeypatch, "torch>=2.0", *lacking)
    monkeypatch.setattr(native, "there", lambda: compiled)
    monkeypatch.setattr(doctor, "_memory", lambda: 7 << 29)
    monkeypatch.setenv("COLUMNS", "80")
    result = run()
    lines = result.stdout.splitlines()
    assert max(map(len, lines[1:])) <= 80
    assert len(lines) < 25
    words = " ".join(result.stdout.split())
    assert f"bayesify {bayesify.__version__}, Python {platform.python_version()}" in words
    assert f"torch {metadata.version('torch')} >=2.0 ok" in words
    assert "many not there absent-0>=1, absent-1>=1" in words
    assert "and 25 more" in words
    assert f"cpu 3.5 {'C library' if compiled else 'plain torch'}" in words
    assert compiled or "pip install -e ." in result.stderr


def test_a_system_that_does_not_tell_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Windows."""
    monkeypatch.delattr("os.sysconf")
    assert doctor.examine()["devices"][0]["memory"] is None
    result = run()
    assert result.exit_code == 0, result.output
