"""cli/doctor.py: what is installed beside what is wanted, and a remedy for each fault."""

from __future__ import annotations

import json
from importlib import metadata
from typing import Any

import pytest
from typer.testing import CliRunner

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
