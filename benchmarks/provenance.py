"""Where a result comes from: machine, versions, commit and date."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bayesify.kernels import native

ROOT = Path(__file__).parents[1]


def commit() -> str:
    """The commit, and whether sources differ from it."""
    sources = ("bayesify", "recipes", "tests/reference.py", "benchmarks/*.py")
    changed = _git("status", "--porcelain", "--", *sources)
    return _git("rev-parse", "--short=10", "HEAD") + ("+changes" if changed else "")


def provenance(*packages: str) -> dict[str, Any]:
    """What every result file holds beside its numbers."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit(),
        "versions": {package: version(package) for package in packages},
        "c_library": native.there(),
    }


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores that may be used, Python, and the card if the work is done there."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.system(),
        "python": platform.python_version(),
        **({"card": _card()} if device == "cuda" else {}),
    }


def _card() -> str:
    import torch

    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def _git(*args: str) -> str:
    return subprocess.run(
        ["git", *args], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
