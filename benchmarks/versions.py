"""The test suite in corners of the supported range: oldest and newest versions, another Python.

    python benchmarks/versions.py oldest            the lower bounds of pyproject.toml, Python 3.10
    python benchmarks/versions.py newest            whatever is newest in the bounds
    python benchmarks/versions.py python3.12        the same on another Python
    python benchmarks/versions.py oldest --only tests/core/test_scope.py   a part, not recorded

Each corner has an environment of its own, made by uv in `.corners/`, several GB each. uv takes a
Python that it finds on PATH, or fetches one where it can reach where they are kept. What ran,
with counts, goes to `results/versions.json` and, as a table, to `docs/versions.md`. `make
test-oldest`, `make test-newest` and `make test-python PYTHON=...` call it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "versions.json"
PAGE = ROOT / "docs" / "versions.md"
OLDEST_PYTHON = "3.10"
SHOWN = ("torch", "torchvision", "timm", "numpy", "safetensors", "rich", "typer", "transformers")
# old versions of other libraries use what newer ones of their own dependencies deprecate
OLD_WARNINGS = ("-W", "ignore::DeprecationWarning", "-W", "ignore::FutureWarning")

_FACTS = """
import json, platform
from importlib.metadata import version, PackageNotFoundError
from bayesify.kernels import native
found = {"python": platform.python_version(), "c_library": native.there(), "versions": {}}
for name in %r:
    try:
        found["versions"][name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("corner", help="oldest, newest, or a Python such as python3.12")
    parser.add_argument("--workers", default="2")
    parser.add_argument("--only", nargs="*", default=[], help="test files; nothing is recorded")
    options = parser.parse_args()
    corner = options.corner
    if corner not in ("oldest", "newest"):  # a Python, which may be given by its path
        corner = subprocess.run(
            [corner, "-c", "import sys; print('python%d.%d' % sys.version_info[:2])"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    python = environment(corner, options.corner)
    record = run(corner, python, options.workers, options.only)
    if not options.only:
        write(record)
    sys.exit(record["failed"] > 0 or not (record["whole"] or options.only))


def environment(corner: str, base: str) -> Path:
    """Make or renew the environment of a corner on the Python ``base``; gives its Python."""
    folder = ROOT / ".corners" / corner
    python = folder / "bin" / "python"
    uv = [sys.executable, "-m", "uv"]
    wanted = {"oldest": OLDEST_PYTHON, "newest": sys.executable}.get(corner, base)
    if not python.exists():
        subprocess.run([*uv, "venv", "--python", wanted, folder], check=True)
    resolution = "lowest-direct" if corner == "oldest" else "highest"
    subprocess.run(
        [*uv, "pip", "install", "--upgrade", "--python", python,
         "--resolution", resolution,
         "--editable", f"{ROOT}[test]"],
        check=True,
    )  # fmt: skip
    return python


def run(corner: str, python: Path, workers: str, only: list[str]) -> dict[str, Any]:
    """Run the suite; gives versions, counts and the names of what failed."""
    report = ROOT / ".corners" / f"{corner}.xml"
    report.unlink(missing_ok=True)
    quiet = OLD_WARNINGS if corner == "oldest" else ()
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-n", workers, "--dist", "worksteal", *quiet,
         f"--junitxml={report}", *only],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    return record_of(corner, python, report, whole=done.returncode in (0, 1) and not only)


def record_of(corner: str, python: Path, report: Path, whole: bool) -> dict[str, Any]:
    """What a report of pytest says; of a run that was stopped it has the tests until then."""
    facts = subprocess.run(
        [python, "-c", _FACTS % (SHOWN,)],
        cwd=ROOT / ".corners", capture_output=True, text=True, check=True,
    )  # fmt: skip
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    cases = list(suite.iter("testcase"))
    bad = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped: dict[str, int] = {}
    not_run = 0
    for case in suite.iter("skipped"):
        not_run += 1
        reason = (case.get("message") or "").strip()
        if case.get("type") != "pytest.xfail":
            skipped[reason] = skipped.get(reason, 0) + 1
    commit = subprocess.run(
        ["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True,
        check=True,
    ).stdout.strip()  # fmt: skip
    return {
        "corner": corner, **json.loads(facts.stdout), "commit": commit, "whole": whole,
        "files": len({case.get("classname") for case in cases}),
        "passed": len(cases) - not_run - len(bad), "failed": len(bad), "failures": bad,
        "expected_failures": not_run - sum(skipped.values()), "skipped": skipped,
    }  # fmt: skip


def write(record: dict[str, Any]) -> None:
    """Keep a result, and the table of all."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[record["corner"]] = record
    RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    lines = [
        "# Versions that the tests ran with", "",
        "Written by `python benchmarks/versions.py CORNER`. `make test-oldest` takes the lower",
        "bounds of pyproject.toml, `make test-newest` the newest versions that they allow.", "",
        "| corner | Python | torch | torchvision | timm | numpy | others | files | passed "
        "| failed | skipped |",
        "|---|---|---|---|---|---|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name, row in sorted(known.items()):
        versions = row["versions"]
        others = ", ".join(f"{k} {v}" for k, v in versions.items() if k not in SHOWN[:4])
        cells = [name, row["python"], *(versions.get(k, "") for k in SHOWN[:4]), others,
                 row["files"], row["passed"], row["failed"],
                 sum(row["skipped"].values())]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    for name, row in sorted(known.items()):
        lines += ["", f"## {name}", "", f"At commit {row['commit']}.", ""]
        if not row["whole"]:
            lines += [f"A part of the suite: {row['files']} files of tests ran.", ""]
        lines += [f"- failed: `{failure}`" for failure in row["failures"]]
        lines += [f"- skipped {count}: {reason}" for reason, count in row["skipped"].items()]
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
