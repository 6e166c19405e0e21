"""Convert every model of timm and torchvision and check it; write the table of what held.

    python benchmarks/zoo.py [--jobs 2] [--only 'vit_*'] [--again] [--minutes 60] [--render]

Every model is checked in a process of its own, with a time limit: first the structure of all
models, without data, then the numbers of the smallest model of each structural group, then the
numbers of the others below 30 M parameters. A second run goes on where the first one ended.
What failed is checked again. `zoo_checks.py` says what is checked. The result file has one line of
JSON a model; from it come `docs/zoo.md` and the table that `bayesify models` shows.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import os
import sys
import time
from collections import defaultdict
from multiprocessing.connection import wait
from pathlib import Path

import zoo_table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from zoo_process import Job, Row

from bayesify.provenance import provenance
from bayesify.storage import replacing

RESULT = Path(__file__).parent / "results" / "zoo.jsonl"
LIMIT_S = {"structural": 240, "numeric": 1200}
SMALL = 30_000_000
"""Parameters below which every model is checked in numbers."""
MEDIUM = 40_000_000
"""Parameters above which the numbers are those of a model with fewer layers, if it is alike."""


def read() -> dict[str, Row]:
    if not RESULT.exists():
        return {}
    rows = (json.loads(line) for line in RESULT.read_text().splitlines())
    return {row["name"]: row for row in rows}


def write(rows: dict[str, Row]) -> None:
    with replacing(RESULT, overwrite=True) as path:
        path.write_text("".join(json.dumps(rows[name]) + "\n" for name in sorted(rows)))


def work(check: str, name: str, shallow: bool) -> Row:
    """One check of one model, in the process of a job."""
    import zoo_checks

    if check == "structural":
        return zoo_checks.structural(name)
    return zoo_checks.numeric(name, shallow)


# -- all of them -----------------------------------------------------------------------------


def numeric_queue(rows: dict[str, Row]) -> list[tuple[str, bool]]:
    """Names to check in numbers, the smallest of each group first, and whether with few layers."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows.values():
        if "group" in row:
            groups[row["group"]].append(row)
    first = [
        min(group, key=lambda row: (row["parameters"], row["name"])) for group in groups.values()
    ]
    first.sort(key=lambda row: row["parameters"])
    chosen = {row["name"] for row in first}
    rest = [row for row in rows.values() if row.get("parameters", SMALL) < SMALL]
    rest = sorted((r for r in rest if r["name"] not in chosen), key=lambda row: row["parameters"])
    return [(row["name"], row["parameters"] > MEDIUM) for row in [*first, *rest]]


def run(checks: list[str], jobs: int, only: str, again: bool, minutes: float) -> None:
    import zoo_models

    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the server's own path lacks this folder
    multiprocessing.set_forkserver_preload(["zoo_warm"])
    rows = read()
    known = [n for n in zoo_models.names() if fnmatch.fnmatchcase(n, only)]
    stop = time.monotonic() + 60 * minutes
    source = provenance("torch", "timm", "torchvision")
    columns = (
        TextColumn("{task.description:<11}"), BarColumn(), MofNCompleteColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[now]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for check in checks:
            if check == "structural":
                queue = [(name, False) for name in known]
            else:
                queue = [item for item in numeric_queue(rows) if item[0] in set(known)]
            if not again:
                queue = [
                    item for item in queue
                    if rows.get(item[0], {}).get(check, {"problems": ["not run"]})["problems"]
                ]  # fmt: skip
            bar = progress.add_task(check, total=len(queue), now="")
            queue.reverse()
            running: list[Job] = []
            while running or (queue and time.monotonic() < stop):
                while queue and len(running) < jobs and time.monotonic() < stop:
                    name, shallow = queue.pop()
                    running.append(Job(name, work, (check, name, shallow), LIMIT_S[check]))
                    progress.update(bar, now=running[-1].name)
                wait([job.pipe for job in running], timeout=1.0)
                for job in list(running):
                    found = job.result()
                    if found is None:
                        continue
                    running.remove(job)
                    row = rows.setdefault(job.name, {"name": job.name})
                    for key in ("group", "family", "parameters", "tensors"):
                        if check == "structural" and key in found:
                            row[key] = found.pop(key)
                    row[check] = found | source
                    write(rows)
                    progress.advance(bar)
                    for problem in found["problems"][:2]:
                        progress.console.print(f"{job.name}: {check}: {problem}", markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="models checked at the same time")
    parser.add_argument("--only", default="*", help="glob of model names")
    parser.add_argument("--check", choices=["structural", "numeric"], help="only this check")
    parser.add_argument("--again", action="store_true", help="also what passed already")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing later")
    parser.add_argument("--render", action="store_true", help="only write the tables")
    options = parser.parse_args()
    if not options.render:
        checks = [options.check] if options.check else ["structural", "numeric"]
        run(checks, options.jobs, options.only, options.again, options.minutes)
    zoo_table.render(read())


if __name__ == "__main__":
    main()
