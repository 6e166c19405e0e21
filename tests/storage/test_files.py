"""storage/files.py and storage/locks.py: whole files, their modes, strays, and who may write."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import socket
import stat
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bayesify
from bayesify.errors import CheckpointError
from bayesify.export import export_onnx, export_safetensors, export_torch
from bayesify.storage import check_target, locked, replacing
from bayesify.storage.files import _move_to_free
from byov_small import CONFIG, small_run
from recipes.byov import train
from recipes.byov.runtime.log import RunLog
from recipes.byov.train_log import Watcher

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no such modes and locks there")


def write(path: Path, text: str = "new", *, overwrite: bool = True) -> None:
    with replacing(path, overwrite=overwrite) as temporary:
        temporary.write_text(text)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# -- modes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o664, 0o444])
def test_a_file_that_is_overwritten_hands_on_its_mode(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    path.chmod(kept)
    write(path)
    assert (path.read_text(), mode(path)) == ("new", kept)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007])
def test_a_new_file_follows_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        bayesify.save(bayesify.to_bbb(nn.Linear(2, 1)), tmp_path / "a")
    finally:
        os.umask(before)
    assert mode(tmp_path / "a") == 0o666 & ~mask


def test_nobody_else_reads_what_is_being_written(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as temporary:
        assert mode(temporary.parent) == 0o700
        assert temporary.parent.parent == tmp_path


# -- strays ------------------------------------------------------------------------------------


def _write_and_wait(folder: str, ready: Any) -> None:
    with replacing(Path(folder) / "a", overwrite=True) as temporary:
        temporary.write_bytes(bytes(1000))
        (temporary.parent / ".tmpSdRv4f").write_bytes(bytes(1000))  # as safetensors does
        ready.set()
        signal.pause()


def process(target: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    found = multiprocessing.get_context("forkserver").Process(target=target, args=arguments)
    found.start()
    return found


def test_a_write_removes_what_killed_writers_left_and_nothing_else(tmp_path: Path) -> None:
    others = [tmp_path / ".tmpabc", tmp_path / ".elsewhere.1.0123456789abcdef.tmp"]
    others[0].touch()
    others[1].mkdir()
    ready = [multiprocessing.get_context("forkserver").Event() for _ in range(2)]
    writers = [process(_write_and_wait, str(tmp_path), event) for event in ready]
    try:
        assert all(event.wait(60) for event in ready)
        assert len(list(tmp_path.glob(".*.tmp"))) == 3
        writers[0].kill()
        writers[0].join()
        write(tmp_path / "b")
        [left] = set(tmp_path.glob(".*.tmp")) - set(others)
        assert f".{writers[1].pid}." in left.name, "a living writer lost its file"
        writers[1].kill()
        writers[1].join()
        write(tmp_path / "b")
        assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "b"])
    finally:
        for writer in writers:
            writer.kill()


# -- what is no file ---------------------------------------------------------------------------


def special_files(folder: Path) -> dict[str, Path]:
    paths = {name: folder / name for name in ("fifo", "socket", "loop", "to_device", "folder")}
    os.mkfifo(paths["fifo"])
    with socket.socket(socket.AF_UNIX) as bound:
        before = os.getcwd()
        os.chdir(folder)  # the name of a socket must be short
        bound.bind("socket")
        os.chdir(before)
    paths["loop"].symlink_to("loop")
    paths["to_device"].symlink_to("/dev/null")
    paths["folder"].mkdir()
    return paths | {"device": Path("/dev/null")}


@pytest.mark.parametrize("kind", ["fifo", "socket", "loop", "to_device", "device", "folder"])
def test_only_a_file_is_overwritten(tmp_path: Path, kind: str) -> None:
    path = special_files(tmp_path)[kind]
    before = sorted(tmp_path.iterdir()), path.lstat().st_mode
    with pytest.raises(CheckpointError, match=r"give (another|the) name"):
        check_target(path, overwrite=True)
    with pytest.raises(CheckpointError, match=str(path)), replacing(path, overwrite=True):
        pass
    assert (sorted(tmp_path.iterdir()), path.lstat().st_mode) == before
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_a_link_to_a_name_that_is_free_makes_that_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("b")
    write(tmp_path / "link", overwrite=False)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "b").read_text() == "new"


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_name_that_cannot_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="is no name of a file"):
        check_target(tmp_path / name, overwrite=True)


def test_a_run_whose_results_cannot_be_written_does_not_begin(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    run.out.mkdir()
    os.mkfifo(run.out / "student.safetensors")
    with pytest.raises(CheckpointError, match="a pipe"):
        train.train(CONFIG, run)
    assert os.listdir(run.out) == ["student.safetensors"]


# -- two writers -------------------------------------------------------------------------------


@pytest.mark.parametrize("links", [True, False])
def test_of_two_writers_without_force_one_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:

        def refused(*_: object) -> None:
            raise PermissionError("no links here")

        monkeypatch.setattr(os, "link", refused)
    path = tmp_path / "a"
    with pytest.raises(CheckpointError, match="a exists"), replacing(path) as slow:  # noqa: PT012
        slow.write_text("slow")
        write(path, "fast", overwrite=False)
    assert path.read_text() == "fast"
    assert os.listdir(tmp_path) == ["a"]
    write(tmp_path / "b", overwrite=False)
    assert (tmp_path / "b").read_text() == "new"
    (tmp_path / "c").write_text("c")
    with pytest.raises(FileExistsError):
        _move_to_free(tmp_path / "c", path)


def test_a_lock_has_one_holder_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, "This"):
        with (
            pytest.raises(CheckpointError, match=rf"This is in use by process {os.getpid()} on"),
            locked(path, "This"),
        ):
            pass
        assert path.exists()
    with locked(path, "This"):
        pass
    assert not path.exists()


def _hold(path: str, ready: Any) -> None:
    with locked(Path(path), "This"):
        child = os.fork()
        if child == 0:  # it outlives its parent, and must not keep the lock
            signal.pause()
        ready.put(child)
        signal.pause()


def test_a_lock_ends_with_its_process_though_a_child_lives_on(tmp_path: Path) -> None:
    path, ready = tmp_path / "lock", multiprocessing.get_context("forkserver").SimpleQueue()
    holder = process(_hold, str(path), ready)
    child = ready.get()
    try:
        with pytest.raises(CheckpointError, match=f"process {holder.pid} on"), locked(path, "This"):
            pass
        holder.kill()
        holder.join()
        with locked(path, "This"):
            pass
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)


def test_a_second_fit_with_one_state_is_refused_at_its_start(tmp_path: Path) -> None:
    data = torch.utils.data.TensorDataset(torch.randn(20, 2), torch.arange(20) % 3)
    model, state = bayesify.to_bbb(nn.Linear(2, 3)), tmp_path / "state"
    arguments: dict[str, Any] = {"epochs": 1, "batch_size": 10, "lr": 0.01, "checkpoint": state}
    refused: list[str] = []

    def on_step(_: object) -> None:
        for resume in (False, True):
            with pytest.raises(CheckpointError, match="in use by process") as error:
                bayesify.fit(bayesify.to_bbb(nn.Linear(2, 3)), data, **arguments, resume=resume)
            refused.append(str(error.value))

    bayesify.fit(model, data, **arguments, on_step=on_step)
    assert len(refused) == 4
    assert os.listdir(tmp_path) == ["state"]


def test_a_second_run_in_a_folder_is_refused_at_its_start(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    refused = []

    class Stop(Exception):
        pass

    def on_step(_: object) -> None:
        with pytest.raises(CheckpointError, match="in use by process"):
            train.train(CONFIG, run, resume=True)
        refused.append(1)
        raise Stop

    with pytest.raises(Stop):
        train.train(CONFIG, run, watcher=Watcher(on_step=on_step))
    assert refused
    assert sorted(os.listdir(run.out)) == ["log.jsonl", "run.toml"]


# -- full disks --------------------------------------------------------------------------------


class limit:
    """In the block no file grows beyond a size, as on a full disk."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def _export_torch(path: Path) -> None:
    export_torch(_model(), path, torch.zeros(2, 30), overwrite=True)


def _export_onnx(path: Path) -> None:
    pytest.importorskip("onnxscript")
    export_onnx(_model(), path, torch.zeros(2, 30), overwrite=True)


def _export_safetensors(path: Path) -> None:
    export_safetensors(_model(), path, overwrite=True)


def _save(path: Path) -> None:
    bayesify.save(_model(), path, overwrite=True)


def _model() -> nn.Module:
    return bayesify.to_bbb(nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 3)))


@pytest.mark.parametrize("size", [0, 2000])
@pytest.mark.parametrize("writer", [_export_torch, _export_onnx, _export_safetensors, _save, write])
def test_a_full_disk_is_one_error_and_the_old_file_stays(
    tmp_path: Path, writer: Callable[[Path], None], size: int
) -> None:
    path = tmp_path / "a.pt2"
    path.write_text("old")
    if writer is write:
        writer = lambda path: write(path, "x" * 5000)  # noqa: E731
    with limit(size), pytest.raises(CheckpointError, match=r"a\.pt2 cannot be written .*too large"):
        writer(path)
    assert os.listdir(tmp_path) == ["a.pt2"]
    assert path.read_text() == "old"


def test_a_log_on_a_full_disk(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    with limit(20), pytest.raises(CheckpointError, match=r"log\.jsonl cannot be written"):
        log.add("step", 1, {"loss": 1.0})
    log.cut(0)
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_a_program_is_read_back(tmp_path: Path) -> None:
    _export_torch(tmp_path / "a.pt2")
    program = torch.export.load(tmp_path / "a.pt2").module()
    assert program(torch.zeros(3, 30)).shape == (3, 3)
