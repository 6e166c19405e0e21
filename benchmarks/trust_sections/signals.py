"""SIGTERM, SIGINT and SIGHUP, once or twice, to a process, its group, or the group of torchrun."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .forks import Child, command, wait_for
from .jobs import JOBS, Bench, Job, byov, contents
from .section import FAULT, Section, Trial

_ROOT = Path(__file__).resolve().parents[2]
_TRIED = ("fit", "byov", "fit with a worker", "byov", "byov in two processes")
_EVERY = 50  # trials, of which the last is one of torchrun
_TWO = Job(
    "byov in two processes", byov, "run/encoder.safetensors", "--resume", "run", overwrites=False
)


class _Two:
    """Two processes of one run, as torchrun starts them."""

    def __init__(self, bench: Bench, outputs: Path) -> None:
        self._bench, self._outputs = bench, outputs

    def start(self, *more: object) -> list[Child]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return [self._rank(rank, port, *more) for rank in range(2)]

    def _rank(self, rank: int, port: int, *more: object) -> Child:
        words = self._bench.words(_TWO, self._outputs, *more)
        own = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

        def work() -> int:
            os.environ.update({**own, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            return command(words)

        log = self._bench.folder / f"log {rank}"
        log.unlink(missing_ok=True)
        return Child(work, log)

    def whole(self, *more: object) -> str | None:
        children = self.start(*more)
        codes = [child.wait() for child in children]
        return None if codes == [0, 0] else f"{codes}: {children[0].said()[-300:]}"


# long: a closure for each kind of trial
def _prepare(folder: Path) -> Trial:
    bench = Bench(folder)
    two: dict[str, bytes] = {}

    def two_expected() -> dict[str, bytes]:
        if not two:
            outputs = bench.outputs()
            if (wrong := _Two(bench, outputs).whole()) is not None:
                raise RuntimeError(wrong)
            log = "run/log.jsonl"
            two.update({k: v for k, v in contents(outputs).items() if k != log})
        return two

    def of_two(rng: random.Random, sent: Sequence[int]) -> str:
        expected = two_expected()
        outputs = bench.outputs()
        processes = _Two(bench, outputs)
        children = processes.start()
        time.sleep(rng.random() * 4.0)
        for number in sent:
            for child in children:
                child.send(number, group=True)
            time.sleep(0.05 * rng.random())
        codes = [child.wait() for child in children]
        if None in codes:
            return f"{FAULT}: two processes hang: {children[0].said()[-300:]}"
        more = ["--resume"] if (outputs / "run").exists() else []
        if (wrong := processes.whole(*more)) is not None:
            return f"{FAULT}: two processes ({codes}) do not go on: {wrong}"
        found = contents(outputs)
        other = [name for name, data in expected.items() if found.get(name) != data]
        return f"{FAULT}: two processes ({codes}): other {other}" if other else "went on"

    def of_torchrun(rng: random.Random, sent: Sequence[int]) -> str:
        outputs = bench.outputs()
        words = [str(word) for word in bench.words(_TWO, outputs, "--resume")[2:]]
        words[words.index("--epochs") + 1] = "5000"
        program = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "recipes.byov", *words,
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
        said, log = bench.folder / "torchrun", outputs / "run" / "log.jsonl"
        with said.open("w") as stderr:
            torchrun = subprocess.Popen(
                program, cwd=outputs, env=environment, stderr=stderr, stdout=stderr,
                start_new_session=True,
            )  # fmt: skip
        try:
            if not wait_for(lambda: log.exists() and log.read_text().count('"step"') > 4, 90.0):
                return f"{FAULT}: torchrun takes no steps: {said.read_text()[-300:]}"
            for number in sent:
                os.killpg(torchrun.pid, number)
                time.sleep(0.05 * rng.random())
            try:
                torchrun.wait(60.0)
            except subprocess.TimeoutExpired:
                return f"{FAULT}: torchrun hangs"
        finally:
            torchrun.kill()
            torchrun.wait()
        text = " ".join(said.read_text().split())
        if not re.search(r"Stopped at step [\d,]+ of", text):
            return f"{FAULT}: torchrun's run does not say where it stopped: {text[-300:]}"
        return "stopped after its step" if contents(outputs) else f"{FAULT}: nothing is there"

    def trial(index: int) -> str:
        rng = random.Random(f"signal {index}")
        number = rng.choice((signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
        sent = [number] * rng.choice((1, 2))
        if index % _EVERY == _EVERY - 1:
            return of_torchrun(rng, [signal.SIGTERM] * rng.choice((1, 2)))
        name = _TRIED[index % len(_TRIED)]
        if name == _TWO.name:
            return of_two(rng, sent)
        job = JOBS[name]
        expected = bench.reference(job)
        outputs, group = bench.outputs(), rng.random() < 0.5
        if rng.random() < 0.5:
            at = rng.randrange(expected.writes)
            child = bench.start(job, outputs, kill_at=at, number=number)
        else:
            child = bench.start(job, outputs)
            time.sleep(rng.random() * expected.seconds)
            child.send(number, group=group)
        for more in sent[1:]:
            time.sleep(0.1 * rng.random())
            child.send(more, group=group)
        code = child.wait()
        # before a command has begun, a signal does what it always does
        if code not in (0, 130, -number):
            return f"{FAULT}: {name}, {sent} end it with {code}: {child.said()[-300:]}"
        if "Traceback" in child.said():
            return f"{FAULT}: {name}, {sent}, {code}, a traceback: {child.said()[-300:]}"
        if not wait_for(lambda: not child.left(), 10.0):
            return f"{FAULT}: {name}, {sent}: processes are left"
        whole = code == 0 and (outputs / job.target).exists()
        wrong = bench.difference(job, outputs) if whole else bench.finish(job, outputs, False)
        if wrong is not None:
            return f"{FAULT}: {name}, {sent} ({code}): {wrong}"
        return "had ended" if whole else "went on" if code in (0, 130) else "had not begun"

    return trial


SIGNALS = Section(
    "signals",
    "SIGTERM, SIGINT or SIGHUP, once or twice, to the process or group of a fit, of BYOV in one "
    "or two processes, of torchrun; it ends with a message, no process stays, and going on gives "
    "the same bytes",
    share=30,
    full=200,
    prepare=_prepare,
    seconds=590.0,
    slow=200.0,
)
