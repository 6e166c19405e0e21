"""Where a number comes from: the commit of this code, the machine, the versions, the date."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .kernels import native

_ROOT = Path(__file__).parents[1]
_SOURCES = ("bayesify", "recipes", "benchmarks/*.py", "benchmarks/*/*.py", "examples")


def provenance(*packages: str) -> dict[str, Any]:
    """What a file of results holds beside its numbers and :func:`machine`.

    Args:
        packages: Names of installed packages, whose versions are noted.
    """
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit(),
        "versions": {package: version(package) for package in packages},
        "c_library": native.there(),
    }


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Processor, cores that may be used, threads of torch, Python, and where the work is done."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return {
        "processor": _processor(),
        "cores": os.cpu_count() if affinity is None else len(affinity(0)),
        "system": platform.system(),
        "python": platform.python_version(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        **({"cuda": torch.version.cuda} if torch.device(device).type == "cuda" else {}),
    }


def device_name(device: torch.device | str) -> str:
    """The GPU's name, or ``cpu``."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def gpu_of(machine: Mapping[str, Any]) -> str | None:
    """The GPU in what :func:`machine` gave, also in results from before; None of a CPU."""
    name = machine.get("device", "cpu")
    if name == "cpu":
        return machine.get("card")
    return f"{name}, CUDA {machine['cuda']}" if "cuda" in machine else name


def commit(root: Path = _ROOT) -> str | None:
    """The commit of this code, with ``+changes`` where sources differ; None outside a checkout.

    Args:
        root: Of the checkout.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None  # installed below a checkout of something else
        changed = git("status", "--porcelain", "--", *_SOURCES)
        return git("rev-parse", "--short=10", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text("utf-8").splitlines() if table.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
