"""Many attempts to make bayesify lose, execute or swallow something, with counts of how they ended.

    python benchmarks/trust.py                       each section's share; goes on where it ended
    python benchmarks/trust.py files --count 5000    one section, up to 5,000 trials of it
    python benchmarks/trust.py --minutes 120         towards the full counts, all sections in turn
    python benchmarks/trust.py --again files 1234    one trial, with its traceback if it has one

The sections stand in trust_sections/. A trial is known by its number: the same number is the same
damage. Trials run in a process of their own, which is killed if one hangs; of each, time and memory
are measured too. Results: benchmarks/results/trust.json; `--fresh` forgets them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # the recipe, as a checkout has it

from trust_sections import SECTIONS
from trust_sections.section import FAULT, TRACE, Section, Trial

from bayesify.provenance import machine, provenance

RESULTS = Path(__file__).parent / "results" / "trust.json"
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "trust.md"
_BATCH = 60.0  # seconds of one section before the next has its turn
_LIMIT = 16 << 30  # bytes that a process of trials may ask for
_KEPT = 50


class Ended(NamedTuple):
    """One trial: how it ended, and what it took: seconds of a processor, MiB."""

    number: int
    outcome: str
    seconds: float
    mib: float

    def fault(self, section: Section) -> str | None:
        """Why it counts as a fault of this section, if it does."""
        if self.outcome.startswith(FAULT):
            return self.outcome
        if self.seconds > section.slow:
            return f"{FAULT}: {self.seconds:.1f} s, {self.outcome}"
        if self.mib > section.large:
            return f"{FAULT}: {self.mib:,.0f} MiB, {self.outcome}"
        return None


def measured(trial: Trial, index: int) -> Ended:
    """Carry out one trial."""
    _forget_peak()
    before = _peak_mib()
    started = _cpu()
    try:
        outcome = trial(index)
    except Exception as error:  # of the section itself
        outcome = f"{FAULT}: the trial failed: {type(error).__name__}: {error}"
    seconds = _cpu() - started
    return Ended(index, outcome, seconds, max(0.0, _peak_mib() - before))


def _cpu() -> float:
    """Seconds that processors have worked for this process and its ended children: what a trial
    takes, whatever else the machine does."""
    return sum(os.times()[:4])


def _forget_peak() -> None:
    if os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mib() -> float:
    if os.path.exists("/proc/self/status"):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _work(name: str, pipe: Connection) -> None:
    """A process of trials: the numbers come in, how each ended goes out."""
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (_LIMIT, _LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory(prefix="trust-") as folder:
        trial = _section(name).prepare(Path(folder))
        pipe.send(None)
        while (index := pipe.recv()) is not None:
            pipe.send(measured(trial, index))


class Worker:
    """A process of trials of one section, begun anew after one that hung or died."""

    def __init__(self, section: Section) -> None:
        self.section = section
        self._process: Any = None
        self._pipe: Any = None

    def run(self, index: int) -> Ended:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, other = context.Pipe()
            self._process = context.Process(target=_work, args=(self.section.name, other))
            self._process.start()
            other.close()
            self._pipe.recv()
        started = time.perf_counter()
        self._pipe.send(index)
        if not self._pipe.poll(self.section.seconds):
            self._process.kill()
            return self._lost(index, f"{FAULT}: hangs", started)
        try:
            ended: Ended = self._pipe.recv()
        except EOFError:
            self._process.join()
            return self._lost(
                index, f"{FAULT}: the process died: {self._process.exitcode}", started
            )
        return ended

    def _lost(self, index: int, outcome: str, started: float) -> Ended:
        self.close()
        return Ended(index, outcome, time.perf_counter() - started, 0.0)

    def close(self) -> None:
        if self._process is not None:
            if self._process.is_alive():
                self._pipe.send(None)
            self._process.join()
            self._pipe.close()
        self._process = None


def add(section: Section, found: dict[str, Any], ended: Ended) -> str | None:
    """Count one trial in the results of its section; the fault, if it is one."""
    fault = ended.fault(section)
    found["trials"] = ended.number + 1
    outcome = FAULT if fault is not None else "done" if section.kept else ended.outcome
    found["outcomes"][outcome] = found["outcomes"].get(outcome, 0) + 1
    found["executed"] += int(f"{FAULT}: executed" in ended.outcome)
    found["slow"] += int(ended.seconds > section.slow)
    found["large"] += int(ended.mib > section.large)
    found["most_seconds"] = max(found["most_seconds"], round(ended.seconds, 2))
    found["most_mib"] = max(found["most_mib"], round(ended.mib))
    if fault is not None and len(found["faults"]) < _KEPT:
        found["faults"].append({"trial": ended.number, "outcome": fault})
    if section.kept:
        found.setdefault("kept", []).append(
            {"outcome": ended.outcome, "seconds": round(ended.seconds, 1)}
        )
    return fault


def empty(section: Section) -> dict[str, Any]:
    """The results of a section before its first trial."""
    return {
        "what": section.what, "full": section.full, "trials": 0, "outcomes": {}, "executed": 0,
        "slow": 0, "large": 0, "most_seconds": 0.0, "most_mib": 0, "faults": [],
    }  # fmt: skip


def sources(section: Section) -> str:
    """A digest of the code that is tried, and of what tries it."""
    here = Path(__file__).parent / "trust_sections"
    own = [Path(str(sys.modules[section.prepare.__module__].__file__))]
    own += [here / f"{name}.py" for name in ("forks", "jobs", "mutations", "section")]
    code = [f for folder in ("bayesify", "recipes") for f in sorted((ROOT / folder).rglob("*.py"))]
    digest = hashlib.sha256()
    for file in (*code, ROOT / "bayesify" / "kernels" / "native.c", *own):
        digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def read() -> dict[str, Any]:
    """All results so far, by section."""
    if not RESULTS.exists():
        return {"sections": {}}
    found: dict[str, Any] = json.loads(RESULTS.read_text("utf-8"))
    for section in found["sections"].values():
        section.setdefault("date", found["date"])
        section.setdefault("commit", found["commit"])
    return found


def write(results: dict[str, Any]) -> None:
    """Write them whole or not at all."""
    packages = ("bayesify", "numpy", "pillow", "safetensors", "timm", "torch", "torchvision")
    document = {**provenance(*packages), "machine": machine()}
    document["sections"] = results["sections"]
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    temporary.replace(RESULTS)
    PAGE.write_text(page(document), "utf-8")


def page(document: dict[str, Any]) -> str:
    """docs/trust.md: what was tried and how it ended."""
    versions = ", ".join(f"{name} {value}" for name, value in document["versions"].items())
    lines = [
        "# What was tried to break it",
        "",
        "`make trust` tries it again, goes on where it ended, and writes this page;",
        "`python benchmarks/trust.py --minutes 120` goes on towards the full counts, and `--again",
        "SECTION NUMBER` repeats one trial, which its number decides. A *fault* is an error of",
        "another kind than bayesify's own or more than one, code that a file executes, a hang or a",
        "death, a file that is lost or half written, another result than without the trouble, or",
        "more time or memory than the section allows. What is promised is in",
        "[SECURITY.md](../SECURITY.md).",
        "",
        "| | trials | full count | faults | how they ended | longest, CPU |",
        "| --- | ---: | ---: | ---: | --- | ---: |",
    ]
    known = {section.name: section for section in SECTIONS}
    results = {name: document["sections"][name] for name in known if name in document["sections"]}
    for name, found in results.items():
        others = {k: count for k, count in found["outcomes"].items() if k != FAULT}
        cells = [
            f"[{name}](#{name})", f"{found['trials']:,}", f"{found['full']:,}",
            f"{found['outcomes'].get(FAULT, 0):,}",
            ", ".join(f"{count:,} {k}" for k, count in sorted(others.items())),
            f"{found['most_seconds']:.1f} s",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    executed = sum(found["executed"] for found in results.values())
    lines += ["", f"Code of a file that was executed: {executed}.", ""]
    for name, found in results.items():
        lines += [f"## {name}", "", _sentence(found["what"]), ""]
        if known[name].slow <= 5.0:
            lines += [
                f"More than {known[name].slow:g} s of a processor: {found['slow']} trials. More "
                f"than {known[name].large:,.0f} MiB: {found['large']}; the most was "
                f"{found['most_mib']:,} MiB.",
                "",
            ]
        lines += [f"- {kept['outcome']} ({kept['seconds']:g} s)" for kept in found.get("kept", ())]
        lines += [f"- trial {fault['trial']}: {fault['outcome']}" for fault in found["faults"]]
        lines += ["", f"*{found['date']}, commit `{found['commit']}`.*", ""]
    place = document["machine"]
    lines += [
        f"*{place['processor']}, {place['cores']} cores, Python {place['python']}, {versions}.*",
        "",
    ]
    return re.sub("\n{3,}", "\n\n", "\n".join(lines))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def run(chosen: Sequence[Section], wanted: dict[str, int], until: float, fresh: bool) -> int:
    """Carry out the trials that are wanted and not there yet, a batch of each section in turn."""
    results = read()
    for section in chosen:
        found = results["sections"].get(section.name)
        now = sources(section)
        if found is None or fresh or found["sources"] != now:  # other code has ended otherwise
            results["sections"][section.name] = {**empty(section), "sources": now}
        results["sections"][section.name] |= {"what": section.what, "full": section.full}
    left = [s for s in chosen if results["sections"][s.name]["trials"] < wanted[s.name]]
    workers = {section.name: Worker(section) for section in left}
    while left and time.monotonic() < until:
        for section in list(left):
            found = results["sections"][section.name]
            turn = min(until, time.monotonic() + _BATCH)
            while found["trials"] < wanted[section.name] and time.monotonic() < turn:
                ended = workers[section.name].run(found["trials"])
                if (fault := add(section, found, ended)) is not None:
                    print(f"{section.name} {ended.number}: {fault}", flush=True)
            if found["trials"] >= wanted[section.name]:
                left.remove(section)
                workers[section.name].close()
            found |= {key: provenance()[key] for key in ("date", "commit")}
            write(results)
            print(line(section.name, found), flush=True)
    for worker in workers.values():
        worker.close()
    return sum(results["sections"][s.name]["outcomes"].get(FAULT, 0) for s in chosen)


def line(name: str, found: dict[str, Any]) -> str:
    """One section's results in a line."""
    outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in found["outcomes"].items())
    return f"{name}: {found['trials']:,} of {found['full']:,} trials ({outcomes})"


def again(name: str, index: int) -> None:
    """Carry out one trial here, with the tracebacks of what it catches."""
    os.environ[TRACE] = "1"
    with tempfile.TemporaryDirectory(prefix="trust-") as folder:
        print(measured(_section(name).prepare(Path(folder)), index))


def _section(name: str) -> Section:
    for section in SECTIONS:
        if section.name == name:
            return section
    raise SystemExit(f"There is no section {name!r}: {', '.join(s.name for s in SECTIONS)}.")


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", help="by default all")
    parser.add_argument("--count", type=int, help="trials of each section")
    parser.add_argument("--minutes", type=float, help="go on to the full counts, so long")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--again", nargs=2, metavar=("SECTION", "TRIAL"), help="one trial")
    given = parser.parse_args()
    if given.again is not None:
        again(given.again[0], int(given.again[1]))
        return
    chosen = [_section(name) for name in given.sections] or list(SECTIONS)
    wanted = {s.name: given.count or (s.share if given.minutes is None else s.full) for s in chosen}
    until = time.monotonic() + (15.0 if given.minutes is None else given.minutes) * 60
    raise SystemExit(min(1, run(chosen, wanted, until, given.fresh)))


if __name__ == "__main__":
    main()
