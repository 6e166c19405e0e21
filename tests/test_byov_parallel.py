"""Several processes against one process that does the same work."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from byov_small import CONFIG, small_run
from recipes.byov import checkpoint, train
from recipes.byov.config import BYOVConfig, RunConfig

ROOT = Path(__file__).parents[1]

RANK = """
import json, sys
from recipes.byov.config import BYOVConfig, RunConfig
from recipes.byov.train import train
config, run = json.loads(sys.argv[1])
train(BYOVConfig.from_json(config), RunConfig(**run))
"""


def in_processes(count: int, code: str, argument: Any) -> None:
    """Run ``code`` as torchrun would, in processes that find each other by the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", code, json.dumps(argument)]
    started = [
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | common | {"RANK": str(r), "LOCAL_RANK": str(r)}
        )
        for r in range(count)
    ]
    try:
        assert [process.wait(timeout=240) for process in started] == [0] * count
    finally:
        for process in started:
            process.kill()


def plain(run: RunConfig) -> dict[str, Any]:
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(run).items()
    }


def final(run: RunConfig) -> dict[str, torch.Tensor]:
    newest = checkpoint.latest(run.out / "checkpoints")
    assert newest is not None
    return load_file(newest)


def compared(tmp_path: Path, config: BYOVConfig) -> None:
    alone = small_run(tmp_path, out=tmp_path / "alone", accumulate=2)
    train.train(config, alone)
    two = small_run(tmp_path, out=tmp_path / "two")
    in_processes(2, RANK, [config.to_json(), plain(two)])
    left, right = final(alone), final(two)
    weights = [name for name in left if name.startswith(("/student/", "/teacher/"))]
    assert len(weights) > 20
    for name in weights:
        torch.testing.assert_close(right[name], left[name], rtol=1e-4, atol=1e-6, msg=name)


def test_two_processes_are_one_that_accumulates(tmp_path: Path) -> None:
    config = replace(CONFIG, head_norm="layer", prior="teacher", clip_norm=1.0, epochs=2)
    compared(tmp_path, config)


def test_the_draw_of_each_process_is_its_own(tmp_path: Path) -> None:
    """The numbers of two micro-batches with one draw are others."""
    config = replace(CONFIG, head_norm="layer", epochs=2, logvar_init=-4.0)
    run = small_run(tmp_path, out=tmp_path / "a", accumulate=2)
    train.train(config, run)
    first = final(run)
    original = train.key_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "key_of", lambda seed, step, index: original(seed, step, 0))
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
    in_processes(2, RANK, [config.to_json(), plain(two)])
    for name, value in final(two).items():
        if name.startswith("/student/"):
            torch.testing.assert_close(value, final(whole)[name], rtol=1e-2, atol=1e-4, msg=name)
