"""Signals to a fit, to a run of the recipe, and to their workers: nothing is lost, nobody stays."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import bayesify
from bayesify.loading import Loader
from bayesify.signals import ASKING, waiting_signals
from bayesify.training import Interrupted, Progress, fit

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")

PATIENCE = 120.0


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
        return super().__getitem__(index)

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
