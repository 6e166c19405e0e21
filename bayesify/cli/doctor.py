"""``bayesify doctor``: what bayesify finds on this machine, and what is wrong with it."""

from __future__ import annotations

import os
import platform
import re
import warnings
from importlib import metadata
from typing import Annotated, Any

import typer

from ..settings import Shown
from .options import Json

NEWEST_TORCH = "2.15"
"""The newest minor version of torch that the tests ran with."""

MOST_SHOWN = 5
"""Packages in one cell of a table."""


def doctor(
    json: Json = False,
    strict: Annotated[bool, Shown(text="Exit with 1 if anything is wrong.")] = False,
) -> None:
    """Show versions, devices, the C library, kernels and extras, and what to do about each fault.

    Nothing is changed and nothing is downloaded.
    """
    from . import render

    found = examine()
    if json:
        render.as_json(found)
    else:
        render.text(f"bayesify {found['bayesify']}, Python {found['python']}, {found['platform']}")
        render.table(("package", "installed", "wanted", ""), [
            (p["name"], p["installed"] or "not installed", p["wanted"], p["verdict"])
            for p in found["packages"]
        ])  # fmt: skip
        render.table(("extra", "", "packages that it lacks"), [
            (e["name"], "there" if not e["missing"] else "not there", _first(e["missing"]))
            for e in found["extras"]
        ])  # fmt: skip
        render.table(("device", "memory in GiB", "draws by", "what it is"), [
            (d["device"], _gibibytes(d["memory"]), d["draws_by"], d["name"])
            for d in found["devices"]
        ])  # fmt: skip
        for problem in found["problems"]:
            render.note(problem)
        if not found["problems"]:
            render.text("Nothing is wrong.")
    if strict and found["problems"]:
        raise typer.Exit(1)


def _first(packages: list[str]) -> str:
    """Some of them; JSON has all."""
    rest = len(packages) - MOST_SHOWN
    return ", ".join(packages[:MOST_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _gibibytes(count: int | None) -> float | None:
    return None if count is None else round(count / 2**30, 1)


def examine() -> dict[str, Any]:
    """What is there: packages, extras, devices, and problems, each with its remedy."""
    from .. import __version__

    problems: list[str] = []
    packages, extras = _requirements(problems)
    devices = _devices(problems)
    _newer_torch(packages, problems)
    return {
        "bayesify": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "extras": extras,
        "devices": devices,
        "problems": problems,
    }


def _requirements(problems: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in metadata.requires("bayesify") or []]
    except metadata.PackageNotFoundError:
        problems.append(
            "bayesify runs from a checkout and is not installed: what it requires is unknown. "
            "pip install -e . there installs it and compiles its C library."
        )
        return [], []
    packages, missing = [], dict[str, list[str]]()
    for requirement in wanted:
        extra = re.search(r"extra == ['\"]([\w.-]+)['\"]", str(requirement.marker or ""))
        if extra is None and requirement.marker is not None and not requirement.marker.evaluate():
            continue
        installed = _version(requirement.name)
        fits = installed is not None and requirement.specifier.contains(installed, True)
        if extra is not None:
            lacks = missing.setdefault(extra[1], [])
            if not fits:
                lacks.append(f"{requirement.name}{requirement.specifier}")
            continue
        verdict = "ok" if fits else "missing" if installed is None else "out of range"
        packages.append({"name": requirement.name, "installed": installed,
                         "wanted": str(requirement.specifier), "verdict": verdict})  # fmt: skip
        if not fits:
            problems.append(
                f"{requirement.name} {installed or 'is not installed'} is not in "
                f"{requirement.specifier}: pip install '{requirement.name}{requirement.specifier}'"
            )
    return packages, [{"name": name, "missing": lacks} for name, lacks in missing.items()]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _newer_torch(packages: list[dict[str, Any]], problems: list[str]) -> None:
    from packaging.version import Version

    installed = next((p["installed"] for p in packages if p["name"] == "torch"), None)
    if installed and Version(installed).release[:2] > Version(NEWEST_TORCH).release[:2]:
        problems.append(
            f"torch {installed} is newer than {NEWEST_TORCH}, the newest that bayesify's tests ran "
            "with. It may work as well."
        )


def _devices(problems: list[str]) -> list[dict[str, Any]]:
    import torch

    from ..kernels import native
    from ..kernels.choice import by_triton

    with warnings.catch_warnings(record=True) as caught:  # of a library that does not load
        warnings.simplefilter("always")
        compiled = native.there()
    if not compiled:
        problems.append(str(caught[0].message) if caught else native.MISSING)
    devices = [
        {
            "device": "cpu",
            "name": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "memory": _memory(),
            "draws_by": "C library" if compiled else "plain torch",
        }
    ]
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        triton = by_triton(device)
        devices.append(
            {
                "device": str(device),
                "name": torch.cuda.get_device_name(device),
                "memory": torch.cuda.get_device_properties(device).total_memory,
                "draws_by": "Triton" if triton else "plain torch",
            }
        )
        if not triton:
            problems.append(
                f"Triton does not work on {device}: draws there are the same numbers, made slower."
            )
    return devices


def _memory() -> int | None:
    """Bytes of this machine; None where Python cannot tell, as on Windows."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
