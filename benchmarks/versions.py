"""The test suite in corners of the supported range: oldest and newest versions, another Python.

    python benchmarks/versions.py oldest            the lower bounds of pyproject.toml, Python 3.10
    python benchmarks/versions.py newest            whatever is newest in the bounds
    python benchmarks/versions.py python3.12        the same on another Python
    python benchmarks/versions.py oldest --only tests/core     a part; noted, not recorded

Each corner has an environment of its own, made by uv in `.corners/`, several GB each. A Python is
looked for on PATH and among those of pyenv; where uv can reach where they are kept, it fetches one.
Each test is noted in `.corners/` as it ends. A run that was stopped goes on where it ended when the
same command is given again: what passed or was skipped at this commit does not run again, what
failed does. `--since COMMIT` takes what ran at an earlier commit too, and the record says so. What
ran, with counts, goes to `results/versions.json` and, as a table, to `docs/versions.md`. `make
test-oldest`, `make test-newest` and `make test-python PYTHON=...` call it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "versions.json"
PAGE = ROOT / "docs" / "versions.md"
FOLDER = ROOT / ".corners"
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
    parser.add_argument("--since", metavar="COMMIT", help="take what ran at it and later ones")
    options = parser.parse_args()
    corner, base = options.corner, options.corner
    if corner not in ("oldest", "newest"):
        base = interpreter(corner)
        corner = said(base, "-c", "import sys; print('python%d.%d' % sys.version_info[:2])")
    python = environment(corner, base)
    now = commit()
    notes = kept(corner, now, options.since)
    ended = run(corner, python, now, notes, options.workers, options.only)
    if options.only:
        sys.exit(ended)
    notes = kept(corner, now, options.since)
    record = record_of(corner, python, notes, whole=ended in (0, 1, 5))  # 5: all had run before
    write(record)
    if not record["whole"]:
        print("This was not the whole suite. The same command goes on where this one ended.")
    sys.exit(record["failed"] > 0 or not record["whole"])


def said(*command: str | Path) -> str:
    """What a command prints."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def interpreter(name: str) -> str:
    """A Python by its name or path; else what uv may fetch. pyenv puts some on PATH that refuse."""
    places = [shutil.which(name)]
    if re.fullmatch(r"(python)?[\d.]+", name):
        name = name.removeprefix("python")
        home = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
        numbered = {tuple(map(int, re.findall(r"\d+", p.name))): p for p in home.glob(f"{name}.*")}
        newest = [str(numbered[key] / "bin" / "python") for key in sorted(numbered, reverse=True)]
        places += [shutil.which(f"python{name}"), *newest]
    for found in places:
        if found and not subprocess.run([found, "-c", ""], capture_output=True).returncode:
            return found
    return name


def environment(corner: str, base: str) -> Path:
    """Make or renew the environment of a corner on the Python ``base``; gives its Python."""
    python = FOLDER / corner / "bin" / "python"
    uv = [sys.executable, "-m", "uv"]
    if not python.exists():
        wanted = {"oldest": interpreter(OLDEST_PYTHON), "newest": sys.executable}.get(corner, base)
        subprocess.run([*uv, "venv", "--python", wanted, FOLDER / corner], check=True)
    resolution = "lowest-direct" if corner == "oldest" else "highest"
    subprocess.run(
        [*uv, "pip", "install", "--upgrade", "--python", python,
         "--resolution", resolution,
         "--editable", f"{ROOT}[test]"],
        check=True,
    )  # fmt: skip
    installed = said(*uv, "pip", "freeze", "--python", python)
    before = FOLDER / f"{corner}.txt"
    if not before.exists() or before.read_text("utf-8") != installed:
        notes_of(corner).unlink(missing_ok=True)  # they are of other versions
        before.write_text(installed, "utf-8")
    return python


def commit() -> str:
    """The commit, and whether what the tests see differs from it."""
    sources = ("bayesify", "recipes", "tests", "examples", "benchmarks/*.py", "pyproject.toml")
    changed = said("git", "status", "--porcelain", "--", *sources)
    return said("git", "rev-parse", "--short=10", "HEAD") + ("+changes" if changed else "")


def notes_of(corner: str) -> Path:
    """One line of JSON for each test that ended, by corner_log.py."""
    return FOLDER / f"{corner}.jsonl"


def kept(corner: str, now: str, since: str | None) -> dict[str, dict[str, str]]:
    """The last note of each test, of those that count: of this commit, or since another."""
    if not notes_of(corner).exists():
        return {}
    rows = map(json.loads, notes_of(corner).read_text("utf-8").splitlines())
    counting = {now}
    if since is not None:
        later = said("git", "rev-list", "--abbrev-commit", "--abbrev=10", f"{since}..HEAD")
        counting |= {said("git", "rev-parse", "--short=10", since), *later.splitlines()}
    return {row["test"]: row for row in rows if row["commit"] in counting}


def run(
    corner: str, python: Path, now: str, notes: dict[str, dict[str, str]], workers: str,
    only: list[str],
) -> int:  # fmt: skip
    """Run what is not done yet; gives how pytest ended."""
    done = FOLDER / f"{corner}.done"
    fine = [name for name, row in notes.items() if row["outcome"] != "failed"]
    # what is not committed may have changed since
    done.write_text("" if "+" in now else "\n".join(fine), "utf-8")
    return subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "corner_log", "-n", workers, "--dist", "worksteal",
         "--continue-on-collection-errors", *(OLD_WARNINGS if corner == "oldest" else ()), *only],
        cwd=ROOT, check=False,
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "benchmarks"),
            "CORNER_LOG": str(notes_of(corner)), "CORNER_DONE": str(done), "CORNER_COMMIT": now,
        },
    ).returncode  # fmt: skip


def record_of(
    corner: str, python: Path, notes: dict[str, dict[str, str]], whole: bool
) -> dict[str, Any]:
    """Versions, counts, and the names of what failed."""
    facts = subprocess.run(
        [python, "-c", _FACTS % (SHOWN,)], cwd=FOLDER, capture_output=True, text=True, check=True
    )
    outcomes = Counter(row["outcome"] for row in notes.values())
    skipped = Counter(row["reason"] for row in notes.values() if row["outcome"] == "skipped")
    return {
        "corner": corner, **json.loads(facts.stdout), "whole": whole,
        "commits": dict(Counter(row["commit"] for row in notes.values())),
        "files": len({name.partition("::")[0] for name in notes}),
        "passed": outcomes["passed"], "failed": outcomes["failed"],
        "failures": {
            name: row["reason"] for name, row in notes.items() if row["outcome"] == "failed"
        },
        "expected_failures": outcomes["expected"], "skipped": dict(skipped),
    }  # fmt: skip


def write(record: dict[str, Any]) -> None:
    """Keep a result, and the table of all. A part takes no whole one's place."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if record["whole"] or not known.get(record["corner"], {}).get("whole"):
        known[record["corner"]] = record
    RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(json.loads(RESULTS.read_text())))  # in the order of the file


def page(known: dict[str, Any]) -> str:
    """What stands in docs/versions.md."""
    lines = [
        "# Versions that the tests ran with", "",
        "Written by `python benchmarks/versions.py CORNER`. `make test-oldest` takes the lower",
        "bounds of pyproject.toml, `make test-newest` the newest versions that they allow.", "",
        "| corner | Python | torch | torchvision | timm | numpy | others | suite | passed "
        "| failed | skipped |",
        "|---|---|---|---|---|---|---|---|---:|---:|---:|",
    ]  # fmt: skip
    for name, row in sorted(known.items()):
        versions = row["versions"]
        others = ", ".join(f"{k} {v}" for k, v in versions.items() if k not in SHOWN[:4])
        cells = [name, row["python"], *(versions.get(k, "") for k in SHOWN[:4]), others,
                 "whole" if row["whole"] else f"{row['files']} files", row["passed"],
                 row["failed"], sum(row["skipped"].values())]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    for name, row in sorted(known.items()):
        at = ", ".join(
            f"{commit} ({count} tests)" if len(row["commits"]) > 1 else commit
            for commit, count in row["commits"].items()
        )
        lines += ["", f"## {name}", "", f"At commit {at}.", ""]
        if not row["whole"]:
            lines += [f"A part of the suite: {row['files']} files of tests ran.", ""]
        lines += [f"- failed: `{test}`: {reason}" for test, reason in row["failures"].items()]
        lines += [f"- skipped {count}: {reason}" for reason, count in row["skipped"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
