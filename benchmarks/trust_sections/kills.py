"""SIGKILL at any moment of a command that writes; what is there is whole, and it goes on."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

from .forks import wait_for
from .jobs import JOBS, Bench, contents
from .section import FAULT, Section, Trial

_TRIED = (
    "fit", "byov", "save", "prune", "export", "report", "fit", "byov", "export of a program",
    "fit with a worker",
)  # fmt: skip
OLD = b"an older file"


def _prepare(folder: Path) -> Trial:
    bench = Bench(folder)

    def trial(index: int) -> str:
        rng = random.Random(f"kill {index}")
        job = JOBS[_TRIED[index % len(_TRIED)]]
        expected = bench.reference(job)
        outputs = bench.outputs()
        forced = job.overwrites and rng.random() < 0.5
        if forced:
            (outputs / job.target).write_bytes(OLD)
        more = ["--force"] if forced else []
        # half of the kills right before a change of the folder, half at any time
        if rng.random() < 0.5:
            child = bench.start(job, outputs, *more, kill_at=rng.randrange(expected.writes))
        else:
            child = bench.start(job, outputs, *more)
            time.sleep(rng.random() * expected.seconds)
            child.send(signal.SIGKILL)
        code = child.wait()
        if code not in (0, -signal.SIGKILL):
            return f"{FAULT}: {job.name} ends with {code}: {child.said()[-300:]}"
        if not wait_for(lambda: not child.left(), 10.0):
            return f"{FAULT}: {job.name} leaves processes"
        there = contents(outputs)
        if (found := there.get(job.target)) is not None:
            whole = [expected.same[job.target], *([OLD] if forced else [])]
            if found not in whole:
                return f"{FAULT}: {job.name} leaves a part of {job.target}"
        elif forced:
            return f"{FAULT}: {job.name} has lost the older {job.target}"
        if code == 0:
            wrong = bench.difference(job, outputs)
        else:
            wrong = bench.finish(job, outputs, forced)
        if wrong is not None:
            return f"{FAULT}: {job.name} ({code}): {wrong}"
        return "had ended" if code == 0 else "went on"

    return trial


KILLS = Section(
    "kills",
    "SIGKILL at any moment of a fit, a run of BYOV, convert, prune, export or report; what is "
    "there is whole, and going on gives the same bytes",
    share=40,
    full=200,
    prepare=_prepare,
    seconds=590.0,
    slow=60.0,
)
