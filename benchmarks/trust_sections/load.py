"""Much of everything: inputs, draws, weights; time and memory are what is asked."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import bayesify
from bayesify import storage
from bayesify.inference import Predictor

from .forks import Child, command
from .jobs import Bench
from .section import FAULT, Section, Trial

_INPUTS, _DRAWS = 1_000_000, 1_000
_WIDTH, _BLOCKS = 4096, 60  # 60 blocks of 4096 x 4096 weights, 1.007 billion in all


def peak() -> float:
    """The most memory that this process has had, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _inputs(bench: Bench, outputs: Path) -> str:
    """A table of predictions of a million images, by the command."""
    data = outputs / "million.safetensors"
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (_INPUTS, 8, 8, 1), dtype=torch.uint8, generator=generator)
    save_file({"images": images, "labels": torch.arange(_INPUTS) % 3}, data)
    del images
    words = [
        "predict", bench.inputs / "small.bbb.safetensors", data, "-o", outputs / "rows.csv",
        "-k", 10, "-b", 1024, "--device", "cpu", "--model", "trustfactory:small",
    ]  # fmt: skip
    if command(words) != 0:
        raise RuntimeError("the command failed")
    with open(outputs / "rows.csv") as lines:
        rows = sum(1 for _ in lines) - 1
    if rows != _INPUTS:
        raise RuntimeError(f"{rows:,} rows")
    return f"`bayesify predict` of {rows:,} images of 8 x 8, 10 draws, into a .csv"


def _draws(_: Bench, __: Path) -> str:
    """A thousand draws: the summary takes no more memory than of a few."""
    model = bayesify.to_bbb(nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10)))
    predictor = Predictor(model.eval(), num_samples=_DRAWS, seed=0, reduce="probabilities")
    for _batch in range(4):
        found = predictor(torch.randn(256, 256))
        if not bool(found.mean.sum(1).allclose(torch.ones(256))):
            raise RuntimeError("no probabilities")
    return f"four batches of 256 through a network of 137,000 weights, K = {_DRAWS:,}"


def _weights(_: Bench, outputs: Path) -> str:
    """Converted without data; then each block by itself is filled, drawn, measured and saved."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(_BLOCKS)))
    bayesify.to_bbb_(model)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, _WIDTH, generator=generator)
    weights, kl = 0, 0.0
    for number, block in enumerate(model):
        block.to_empty(device="cpu")
        with torch.no_grad():
            for p in bayesify.posteriors(block):
                p.mean.normal_(0.0, _WIDTH**-0.5, generator=generator)
                p.logvar.fill_(-12.0)
                weights += p.mean.numel()
            with bayesify.one_draw(block, seed=number):
                x = block(x)
            kl += float(bayesify.kl_divergence(block))
        path = outputs / f"{number}.safetensors"
        storage.save(block, path)
        path.unlink()
        block.to("meta")
    if not bool(torch.isfinite(x).all()):
        raise RuntimeError("an activation is not finite")
    return f"{weights:,} weights, converted on meta, then drawn, measured and saved shard by shard"


_KINDS: tuple[Callable[[Bench, Path], str], ...] = (_inputs, _draws, _weights)


def _prepare(folder: Path) -> Trial:
    bench = Bench(folder)
    result = folder / "result"

    def trial(index: int) -> str:
        outputs = bench.outputs()

        def work() -> int:
            before, started = peak(), time.perf_counter()
            told = _KINDS[index](bench, outputs)
            seconds, more = time.perf_counter() - started, peak() - before
            result.write_text(f"{told}: {seconds:,.0f} s, {more:,.0f} MiB")
            return 0

        child = Child(work, folder / "log")
        if child.wait(3000.0) != 0:
            return f"{FAULT}: {child.said()[-300:]}"
        return result.read_text()

    return trial


LOAD = Section(
    "load",
    "much at once: time, and memory beyond that of a process that has imported all",
    share=len(_KINDS),
    full=len(_KINDS),
    prepare=_prepare,
    seconds=3100.0,
    slow=3100.0,
    kept=True,
)
