"""A disk that is full or cannot be written to: one error, nothing half written, nothing lost."""

from __future__ import annotations

import ctypes
import json
import random
import resource
from pathlib import Path

from .forks import Child, broken_rule, command
from .jobs import JOBS, Bench, Job, contents
from .kills import OLD
from .section import FAULT, Section, Trial

_TRIED = (
    "fit", "save", "prune", "export", "export of a program", "report", "predict", "byov", "save",
    "prune",
)  # fmt: skip
_NEW_NAMESPACE = 0x00020000  # CLONE_NEWNS of unshare(2)
_PRIVATE, _READ_ONLY, _AGAIN = 1 << 18 | 1 << 14, 1, 1 << 5  # MS_PRIVATE|MS_REC, MS_RDONLY, ...
_LEAST = 1 << 16  # a limit of file sizes holds for what a command prints, too
_NOT_ALLOWED = 77


def mount(place: Path, flags: int, options: str) -> bool:
    """A file system in memory at ``place``, or other options for it; whether that is allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    found: int = libc.mount(b"trust", bytes(place), b"tmpfs", flags, options.encode())
    return found == 0


def alone() -> bool:
    """See one's own mounts alone, with children; whether that is allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare") or libc.unshare(_NEW_NAMESPACE) != 0:
        return False
    libc.mount(None, b"/", None, _PRIVATE, None)
    return True


def _wrong(job: Job, bench: Bench, outputs: Path, code: int | None, old: bool) -> str | None:
    """What a command that found no room has done wrong."""
    expected = bench.reference(job).same[job.target]
    there = contents(outputs)
    found = there.get(job.target)
    if found is None:
        if old:
            return f"the older {job.target} is lost"
    elif found not in ([expected, OLD] if old else [expected]):
        return f"a part of {job.target} is left"
    if code == 0:
        return None if found == expected else "exit code 0 without the file"
    own = {job.target} if old or found is not None else set()
    strays = [n for n in there if n not in own and not n.startswith(job.state or "/")]
    strays += [n for n in there if ".tmp/" in n]
    return f"left behind: {strays}" if strays else None


def _prepare(folder: Path) -> Trial:
    bench = Bench(folder)
    result, log = folder / "result", folder / "log of the command"

    def attempt(job: Job, outputs: Path, way: str, size: int, old: bool) -> dict[str, object]:
        """In a process of its own: the command without room, and again with it."""
        if way != "limited":
            if not alone() or not mount(outputs, 0, f"size={size}"):
                return {"allowed": False}
        if old:
            (outputs / job.target).write_bytes(OLD)
        if way == "read-only":
            mount(outputs, _AGAIN | _READ_ONLY, "")
        more = ["--force"] if old else []
        words = bench.words(job, outputs, *more)

        def work() -> int:
            if way == "limited":
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            return command(words)

        log.unlink(missing_ok=True)
        child = Child(work, log)
        code = child.wait()
        wrong = broken_rule(code, child) or _wrong(job, bench, outputs, code, old)
        if wrong is None and code not in (0, 1):
            wrong = f"exit code {code}: {child.said()[-300:]}"
        if wrong is None and code == 1:
            if way != "limited":
                mount(outputs, _AGAIN, f"size={1 << 28}")
            wrong = bench.finish(job, outputs, old)
        return {"allowed": True, "wrong": wrong, "code": code}

    def trial(index: int) -> str:
        rng = random.Random(f"disk {index}")
        job = JOBS[_TRIED[index % len(_TRIED)]]
        expected = bench.reference(job)
        way = rng.choice(("full", "full", "full", "limited", "read-only"))
        old = job.overwrites and rng.random() < 0.5
        sizes = [len(data) for data in expected.same.values()]
        room = {"full": sum(sizes) * 2.2, "limited": max(sizes) * 1.1, "read-only": 1 << 20}[way]
        size = max(_LEAST if way == "limited" else 4096, int(rng.random() * room))
        outputs = bench.outputs()
        found: dict[str, object] = {"allowed": False}
        for tried in (way, "limited"):

            def work(tried: str = tried) -> int:
                result.write_text(json.dumps(attempt(job, outputs, tried, size, old)))
                return 0

            result.unlink(missing_ok=True)
            child = Child(work, folder / "log of the trial")
            if child.wait() != 0 or not result.exists():
                return f"{FAULT}: the trial failed: {child.said()[-300:]}"
            found = json.loads(result.read_text())
            if found["allowed"]:
                break
        if found["wrong"] is not None:
            return f"{FAULT}: {job.name}, {way}, {size:,} bytes: {found['wrong']}"
        return "written" if found["code"] == 0 else "refused"

    return trial


DISKS = Section(
    "disks",
    "a disk that is full, a limit of file sizes or a folder that cannot be written to, for each "
    "command that writes: one error, nothing half written, an older file is kept; with room it "
    "goes on",
    share=60,
    full=300,
    prepare=_prepare,
    seconds=590.0,
    slow=60.0,
)
