"""Signals to a fit, to a run of the recipe, and to their workers: nothing is lost, nobody stays."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

import bayesify
from bayesify import BayesifyError
from bayesify.loading import Loader
from bayesify.signals import ASKING, waiting_signals
from bayesify.training import Interrupted, Progress, fit
from byov_small import CONFIG
from recipes.byov import train, train_log
from recipes.byov.config import RunConfig
from recipes.byov.runtime import checkpoint

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")

PATIENCE = 60.0
ROOT = Path(__file__).resolve().parents[2]


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """What ``condition`` gives once that is true."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError(f"waited in vain for {what}")


def written(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat")
        return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def started(target: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """A process with a group of its own, out of a server that has imported what takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["recipes.byov.train", "timm"])
    process = context.Process(target=_in_own_group, args=(target, arguments))
    process.start()
    return process


def _in_own_group(target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    try:
        target(*arguments)
    except KeyboardInterrupt as interrupt:
        print(interrupt, file=sys.stderr)
        sys.exit(130)


def publish(path: Path, text: str) -> None:
    """Write a file that another process waits for."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.rename(path)


def points() -> TensorDataset:
    return TensorDataset(torch.randn(60, 2), torch.arange(60) % 3)


def fit_until_told(folder: Path, stop_at: int, workers: int) -> None:
    """A fit that stands still at a step until the file ``go`` is there."""
    torch.manual_seed(1)
    model, data = bayesify.to_bbb(nn.Linear(2, 3)), points()

    def on_step(progress: Progress) -> None:
        if progress.step == stop_at:
            pids = [child.pid for child in multiprocessing.active_children()]
            publish(folder / "ready", " ".join(map(str, pids)))
            while not (folder / "go").exists():
                time.sleep(0.01)

    fit(model, data, epochs=4, batch_size=10, lr=0.01, checkpoint=folder / "state",
        resume=(folder / "state").exists(), workers=workers, on_step=on_step)  # fmt: skip
    bayesify.save(model, folder / "done")


@pytest.mark.parametrize(
    "sent",
    [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGHUP,), (signal.SIGTERM, signal.SIGTERM)],
    ids=lambda sent: "+".join(number.name for number in sent),
)
def test_a_signal_to_the_group_ends_a_fit_after_its_step(
    tmp_path: Path, sent: tuple[signal.Signals, ...]
) -> None:
    process = started(fit_until_told, tmp_path, 3, 2)
    try:
        pids = [int(pid) for pid in wait_for(lambda: written(tmp_path / "ready"), "a step").split()]
        assert len(pids) == 2
        for number in sent:
            os.killpg(process.pid or 0, number)
        for pid in pids:  # as Slurm and systemd do
            os.kill(pid, sent[0])
        time.sleep(0.3)  # long enough for the end of a worker that answers
        (tmp_path / "go").touch()
        process.join(PATIENCE)
        assert process.exitcode == 130
        wait_for(lambda: not any(map(alive, pids)), "the end of the workers")
    finally:
        process.kill()
    resumed = started(fit_until_told, tmp_path, -1, 2)
    resumed.join(PATIENCE)
    assert resumed.exitcode == 0
    alone = tmp_path / "alone"
    alone.mkdir()
    fit_until_told(alone, -1, 0)
    assert (tmp_path / "done").read_bytes() == (alone / "done").read_bytes()


def with_server(folder: Path) -> None:
    """Workers come out of a server, which is their parent to the system."""
    multiprocessing.set_start_method("forkserver", force=True)
    fit_until_told(folder, 3, 2)


def with_forks(folder: Path) -> None:
    fit_until_told(folder, 3, 2)


@pytest.mark.parametrize("target", [with_forks, with_server])
def test_workers_end_after_their_parent_was_killed(
    tmp_path: Path, target: Callable[..., None]
) -> None:
    process = started(target, tmp_path)
    pids = [int(pid) for pid in wait_for(lambda: written(tmp_path / "ready"), "a step").split()]
    process.kill()
    process.join()
    wait_for(lambda: not any(map(alive, pids)), "the end of the workers")


class Stuck(TensorDataset):
    """The second example never comes."""

    def __getitem__(self, index: int) -> Any:
        if index:
            Path(str(self.path)).write_text(str(os.getpid()))
            while True:
                time.sleep(60)
        return self.tensors[0][index]

    path: Path


def leave_a_stuck_worker(folder: Path) -> None:
    data = Stuck(torch.zeros(4, 1))
    data.path = folder / "pid"
    next(iter(Loader(data, num_workers=1, prefetch_factor=2)))
    wait_for(lambda: written(data.path), "the second example")


def test_a_worker_that_is_stuck_is_ended_with_its_parent(tmp_path: Path) -> None:
    process = started(leave_a_stuck_worker, tmp_path)
    process.join(PATIENCE)
    assert process.exitcode == 0
    assert not alive(int(written(tmp_path / "pid")))


def test_only_a_second_ctrl_c_is_not_waited_for() -> None:
    before = [signal.getsignal(number) for number in ASKING]
    with waiting_signals() as signals:
        assert not signals.requested
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
            signal.raise_signal(number)
        assert signals.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in ASKING] == before


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with waiting_signals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert not signals.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_hangup_ends_a_fit_that_can_go_on(tmp_path: Path) -> None:
    def on_step(progress: Progress) -> None:
        if progress.step == 2:
            signal.raise_signal(signal.SIGHUP)

    model = bayesify.to_bbb(nn.Linear(2, 3))
    with pytest.raises(Interrupted, match="after step 2"):
        fit(model, points(), epochs=1, batch_size=10, lr=0.01, checkpoint=tmp_path / "state",
            on_step=on_step)  # fmt: skip


def train_until_told(folder: Path, rank: int, port: int) -> None:
    """One process of a run of BYOV, with a worker, that stands still at a step."""
    own = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(own | {"RANK": str(rank), "LOCAL_RANK": str(rank)})

    def on_step(progress: train_log.Progress) -> None:
        if progress.step == 2:
            publish(folder / f"ready{rank}", str(multiprocessing.active_children()[0].pid))
            while not (folder / "go").exists():
                time.sleep(0.01)

    run = RunConfig(data=str(folder / "images"), out=folder / "run", device="cpu", workers=1,
                    stop_on_collapse=False, log_every=1, eval_every=0)  # fmt: skip
    config = replace(CONFIG, head_norm="layer", batch_size=8)
    try:
        train.train(config, run, resume=True, watcher=train_log.Watcher(on_step=on_step))
    except BayesifyError as error:
        (folder / f"error{rank}").write_text(str(error))
        sys.exit(1)


def two_ranks(folder: Path) -> list[ForkServerProcess]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [started(train_until_told, folder, rank, port) for rank in range(2)]


def image_files(folder: Path) -> Path:
    """16 images in two folders."""
    for number in range(16):
        path = folder / "images" / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((28, 28), 10 * number, np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def at_step(folder: Path) -> list[int]:
    """The workers of both processes, which stand still."""
    ready = [folder / f"ready{rank}" for rank in range(2)]
    wait_for(lambda: all(map(written, ready)), "a step")
    return [int(written(path)) for path in ready]


def test_signals_to_all_processes_of_a_run_end_it_after_its_step(tmp_path: Path) -> None:
    """As torchrun does, which may send SIGTERM more than once; then all go on."""
    ranks = two_ranks(image_files(tmp_path))
    try:
        workers = at_step(tmp_path)
        for number in (signal.SIGTERM, signal.SIGTERM):
            for process in ranks:
                os.killpg(process.pid or 0, number)
            time.sleep(0.05)  # so that both arrive
        (tmp_path / "go").touch()
        for process in ranks:
            process.join(PATIENCE)
        assert [process.exitcode for process in ranks] == [0, 0]
        newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
        assert newest == checkpoint.path_of(tmp_path / "run" / "checkpoints", 2)
        wait_for(lambda: not any(map(alive, workers)), "the end of the workers")
        ranks += two_ranks(tmp_path)
        for process in ranks[2:]:
            process.join(PATIENCE)
        assert [process.exitcode for process in ranks] == [0] * 4
        assert (tmp_path / "run" / "encoder.safetensors").exists()
    finally:
        for process in ranks:
            process.kill()


def test_a_process_that_dies_ends_the_others_with_a_message(tmp_path: Path) -> None:
    ranks = two_ranks(image_files(tmp_path))
    try:
        workers = at_step(tmp_path)
        ranks[1].kill()
        (tmp_path / "go").touch()
        ranks[0].join(PATIENCE)
        assert ranks[0].exitcode == 1
        assert "Process 0 of 2 has lost another one" in written(tmp_path / "error0")
        wait_for(lambda: not any(map(alive, workers)), "the end of the workers")
    finally:
        for process in ranks:
            process.kill()


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def last_step(log: Path) -> int:
    lines = [json.loads(line) for line in written(log).splitlines(keepends=True) if "\n" in line]
    return max((line["step"] for line in lines), default=0)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_torchrun_restarts_a_run_and_ends_it_after_its_step(tmp_path: Path) -> None:
    """A process is killed; then SIGTERM comes to the whole group of torchrun."""
    image_files(tmp_path)
    small = {"patch_size": 14, "embed_dim": 16, "depth": 1, "num_heads": 2}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "--max-restarts", "1", "-m", "recipes.byov", "train", "--resume",
        "--data", "images", "--out", "run", "--device", "cpu", "--workers", "1",
        "--log-every", "1", "--eval-every", "0", "--no-stop-on-collapse",
        "--encoder", "vit_tiny_patch16_224", "--encoder-args", json.dumps(small),
        "--image-size", "28", "--batch-size", "8", "--epochs", "5000", "--head-norm", "layer",
        "--projector-hidden", "16", "--projector-out", "8", "--warmup-epochs", "1",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log, said = tmp_path / "run" / "log.jsonl", tmp_path / "stderr"
    with said.open("w") as stderr:
        torchrun = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stderr=stderr, start_new_session=True
        )
    try:
        wait_for(lambda: last_step(log) >= 4 or torchrun.poll() is not None, "four steps")
        first = children(torchrun.pid)
        os.kill(first[1], signal.SIGKILL)
        wait_for(lambda: "Going on from" in written(said), "the restart")
        begun = last_step(log)
        wait_for(lambda: last_step(log) > begun + 2, "steps after the restart")
        ranks = children(torchrun.pid)
        workers = [worker for rank in ranks for worker in children(rank)]
        assert set(ranks).isdisjoint(first)
        os.killpg(torchrun.pid, signal.SIGTERM)
        torchrun.wait(PATIENCE)
        assert f"Stopped at step {last_step(log):,} of" in " ".join(written(said).split())
        checkpoints = tmp_path / "run" / "checkpoints"
        assert checkpoint.latest(checkpoints) == checkpoint.path_of(checkpoints, last_step(log))
        wait_for(lambda: not any(map(alive, [*ranks, *workers])), "the end of all")
    finally:
        torchrun.kill()
