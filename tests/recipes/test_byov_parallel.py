"""Several processes against one process that does the same work."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bayesify import torch_support
from byov_small import CONFIG, small_run, started, stop_at
from recipes.byov import step, train
from recipes.byov.config import BYOVConfig, RunConfig
from recipes.byov.runtime import checkpoint
from recipes.byov.runtime.seeds import seed_of


def in_processes(count: int, config: BYOVConfig, run: RunConfig) -> None:
    """Train as torchrun would, in processes that find each other by the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        started(config, run, common | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(count)
    ]
    try:
        for process in ranks:
            process.join(timeout=240)
        assert [process.exitcode for process in ranks] == [0] * count
    finally:
        for process in ranks:
            process.kill()


def final(run: RunConfig) -> dict[str, torch.Tensor]:
    newest = checkpoint.latest(run.out / "checkpoints")
    assert newest is not None
    return load_file(newest)


@pytest.mark.parametrize(("shard", "alone_first"), [(False, 0), (False, 2), (True, 0), (True, 2)])
def test_two_processes_are_one_that_accumulates(
    tmp_path: Path, shard: bool, alone_first: int
) -> None:
    """From the start, or going on with what one process has begun; weights whole or sharded."""
    if shard and torch_support.installed() < (2, 7):
        pytest.skip("FSDP2 of torch 2.6 itself does not run on the CPU")
    config = replace(CONFIG, head_norm="layer", prior="teacher", clip_norm=1.0, epochs=2)
    alone = small_run(tmp_path, out=tmp_path / "alone", accumulate=2)
    train.train(config, alone)
    two = small_run(tmp_path, out=tmp_path / "two", shard=shard)
    if alone_first:
        begun = replace(two, accumulate=2, shard=False)
        assert train.train(config, begun, watcher=stop_at(alone_first)).step == alone_first
    in_processes(2, config, two)
    left, right = final(alone), final(two)
    weights = [name for name in left if name.startswith(("/student/", "/teacher/"))]
    assert len(weights) > 20
    for name in weights:
        torch.testing.assert_close(right[name], left[name], rtol=1e-4, atol=1e-6, msg=name)
    for file in ("encoder", "student", "teacher"):
        mine, other = (load_file(run.out / f"{file}.safetensors") for run in (two, alone))
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            if name.startswith("head."):  # the online probe: each process has its own
                continue
            torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_draw_of_each_process_is_its_own(tmp_path: Path) -> None:
    """The numbers of two micro-batches with one draw are others."""
    config = replace(CONFIG, head_norm="layer", epochs=2, logvar_init=-4.0)
    run = small_run(tmp_path, out=tmp_path / "a", accumulate=2)
    train.train(config, run)
    first = final(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "seed_of", lambda of, seed, at, index: seed_of(of, seed, at, 0))
        run = small_run(tmp_path, out=tmp_path / "b", accumulate=2)
        train.train(config, run)
    assert any(not torch.equal(first[n], v) for n, v in final(run).items() if "student" in n)


@pytest.mark.gpu  # with more than one process torch's SyncBatchNorm refuses tensors of the CPU
def test_synchronised_batchnorm_at_the_means_is_one_batch(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    config = replace(CONFIG, conversion="none", epochs=2)
    whole = small_run(tmp_path, out=tmp_path / "whole", device="cuda")
    train.train(config, whole)
    two = small_run(tmp_path, out=tmp_path / "two", device="cuda")
    in_processes(2, config, two)
    for name, value in final(two).items():
        if name.startswith("/student/"):
            torch.testing.assert_close(value, final(whole)[name], rtol=1e-2, atol=1e-4, msg=name)
