"""Where a number comes from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from bayesify.provenance import commit, device_name, gpu_of, machine, provenance

ME = ("-c", "user.name=t", "-c", "user.email=t@example.org")


def git(folder: Path, *arguments: str) -> str:
    command = ["git", *ME, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "bayesify").mkdir()
    (tmp_path / "bayesify" / "a.py").write_text("a = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_the_commit_and_whether_sources_differ(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "--short=10", "HEAD").strip()
    assert commit(checkout) == head
    (checkout / "notes.txt").write_text("no source")
    assert commit(checkout) == head
    (checkout / "bayesify" / "b.py").write_text("b = 2\n")
    assert commit(checkout) == f"{head}+changes"


def test_a_package_inside_another_checkout_has_no_commit(checkout: Path, tmp_path: Path) -> None:
    installed = checkout / "lib" / "site-packages"
    installed.mkdir(parents=True)
    assert commit(installed) is None


def test_nor_has_one_outside_any(tmp_path: Path) -> None:
    assert commit(tmp_path) is None


def test_what_results_hold() -> None:
    found = {"machine": machine(), **provenance("torch")}
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["machine"]["device"] == device_name("cpu") == "cpu"


def test_the_gpu_also_of_earlier_results() -> None:
    assert gpu_of({"processor": "P"}) is None
    assert gpu_of(machine()) is None
    assert gpu_of({"processor": "P", "card": "H100, CUDA 13.0"}) == "H100, CUDA 13.0"
    assert gpu_of({"device": "H100", "cuda": "13.0"}) == "H100, CUDA 13.0"
    assert gpu_of({"device": "H100"}) == "H100"
