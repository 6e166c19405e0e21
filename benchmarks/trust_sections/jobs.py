"""Commands that write files: what they are given, and what they leave when nothing goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from .forks import Child, Writes, command, preload

FACTORY = """
import torch
from torch import nn

def _made(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()

def small():
    return _made(lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    ))

def large():
    return _made(lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(192, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(),
        nn.Linear(1024, 3),
    ))
"""
_ENCODER = {"patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}


class Job(NamedTuple):
    """A command that writes.

    Args:
        name: What it is called in outcomes.
        words: Its arguments, given the folder of inputs and that of outputs.
        target: The file that it is for, in the folder of outputs.
        resume: What it is called with, too, to go on after an end that came too early.
        state: The file that it goes on from; without it, it starts anew.
        overwrites: It may be told to replace a target that is there (``--force``).
    """

    name: str
    words: Callable[[Path, Path], list[object]]
    target: str
    resume: str | None = None
    state: str | None = None
    overwrites: bool = True


class Reference(NamedTuple):
    """What a job leaves: its files, which of them have the same bytes each time, how long it
    takes, and how often it changes its folder."""

    files: frozenset[str]
    same: dict[str, bytes]
    seconds: float
    writes: int


def _small(inputs: Path) -> list[object]:
    return [inputs / "small.bbb.safetensors", inputs / "data.safetensors"]


def _fit(workers: int) -> Callable[[Path, Path], list[object]]:
    data = "data.safetensors" if workers == 0 else "images"
    return lambda i, o: [
        "fit", i / "small.bbb.safetensors", i / data, "-o", o / "fitted", "--epochs", 4, "-b", 8,
        "--model", "trustfactory:small", "--device", "cpu", "--holdout", 0.25, "--average", 0.5,
        "--workers", workers,
    ]  # fmt: skip


def byov(inputs: Path, outputs: Path) -> list[object]:
    """A run of the recipe of two seconds, its results in ``outputs / "run"``."""
    return [
        "recipe", "byov", "train", "--data", inputs / "data.safetensors", "--out",
        outputs / "run", "--device", "cpu", "--encoder", "vit_tiny_patch16_224",
        "--encoder-args", json.dumps(_ENCODER), "--image-size", 8, "--channels", 1,
        "--augmentation", "cifar", "--batch-size", 8, "--epochs", 6, "--warmup-epochs", 1,
        "--projector-hidden", 8, "--projector-out", 4, "--log-every", 1, "--eval-every", 0,
        "--monitor-images", 8, "--no-stop-on-collapse", "--head-norm", "layer",
    ]  # fmt: skip


_LARGE = ("--model", "trustfactory:large")
JOBS: dict[str, Job] = {
    job.name: job
    for job in (
        Job("fit", _fit(0), "fitted", "--resume", "fitted.resume"),
        Job("fit with a worker", _fit(1), "fitted", "--resume", "fitted.resume"),
        Job("byov", byov, "run/encoder.safetensors", "--resume", "run", overwrites=False),
        Job(
            "save",
            lambda i, o: ["convert", "trustfactory:large", "--img-size", 8, "-o", o / "saved"],
            "saved",
        ),
        Job(
            "prune",
            lambda i, o: ["prune", i / "large.bbb.safetensors", "--sparsity", 0.5, "-o",
                          o / "pruned", *_LARGE],
            "pruned",
        ),
        Job(
            "export",
            lambda i, o: ["export", i / "large.bbb.safetensors", "-o", o / "means", *_LARGE],
            "means",
        ),
        Job(
            "export of a program",
            lambda i, o: ["export", i / "small.bbb.safetensors", "--format", "torch", "-k", 2,
                          "-o", o / "program.pt2", "--model", "trustfactory:small"],
            "program.pt2",
        ),
        Job(
            "report",
            lambda i, o: ["report", *_small(i), "-o", o / "page.html", "-k", 2, "--resamples", 2,
                          "--no-pruning", "--device", "cpu", "--model", "trustfactory:small"],
            "page.html",
        ),
        Job(
            "predict",
            lambda i, o: ["predict", *_small(i), "-o", o / "rows.csv", "-k", 2, "--device", "cpu",
                          "--model", "trustfactory:small", "--probabilities"],
            "rows.csv",
        ),
    )
}  # fmt: skip


class Bench:
    """Inputs, and references as far as they were asked for.

    Args:
        folder: An empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs = folder / "inputs"
        self.inputs.mkdir()
        (self.inputs / "trustfactory.py").write_text(FACTORY)
        sys.path.insert(0, str(self.inputs))
        preload()
        self._make_data()
        for size in ("small", "large"):
            out = self.inputs / f"{size}.bbb.safetensors"
            words = ["convert", f"trustfactory:{size}", "--img-size", 8, "-o", out, "-q"]
            child = Child(partial(command, words), folder / "log")
            if child.wait() != 0:
                raise RuntimeError(child.said())
        self.input_bytes = contents(self.inputs)
        self._references: dict[str, Reference] = {}
        self._count = 0

    def _make_data(self) -> None:
        rng = np.random.default_rng(0)
        labels = np.arange(96) % 3
        pixels = rng.integers(0, 120, (96, 8, 8, 1)) + 60 * labels[:, None, None, None]
        images = torch.from_numpy(pixels.astype(np.uint8))
        whole = {"images": images, "labels": torch.from_numpy(labels)}
        tests = {"test_" + key: value[:24].clone() for key, value in whole.items()}
        save_file({**whole, **tests}, self.inputs / "data.safetensors")
        for number in range(48):
            path = self.inputs / "images" / "abc"[labels[number]] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[number, :, :, 0].numpy()).save(path)

    def outputs(self) -> Path:
        """An empty folder for one trial."""
        place = self.folder / "outputs"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return place

    def words(self, job: Job, outputs: Path, *more: object) -> list[object]:
        return [*job.words(self.inputs, outputs), *more]

    def start(
        self, job: Job, outputs: Path, *more: object, kill_at: int | None = None, number: int = 9
    ) -> Child:
        """Begin a job in a fork; it ends itself before a change of its folder, if it is told to."""
        words = self.words(job, outputs, *more)

        def work() -> int:
            writes = Writes(outputs, kill_at, number)
            code = command(words)
            self.counted.write_text(str(writes.count))
            return code

        log = self.folder / "log"
        log.unlink(missing_ok=True)
        return Child(work, log)

    @property
    def counted(self) -> Path:
        return self.folder / "counted"

    def reference(self, job: Job) -> Reference:
        """What a job leaves, by two runs of it in different folders."""
        if job.name not in self._references:
            found = []
            for number in range(2):
                outputs = self.folder / f"reference {number}"
                outputs.mkdir(exist_ok=True)
                started = time.monotonic()
                child = self.start(job, outputs)
                code = child.wait()
                seconds = time.monotonic() - started
                if code != 0:
                    raise RuntimeError(f"{job.name}: {code}: {child.said()}")
                found.append(contents(outputs))
                shutil.rmtree(outputs)
            first, second = found
            same = {name: data for name, data in first.items() if second.get(name) == data}
            if job.target not in same or first.keys() != second.keys():
                raise RuntimeError(f"{job.name} does not write the same file twice")
            writes = int(self.counted.read_text())
            self._references[job.name] = Reference(frozenset(first), same, seconds, writes)
        return self._references[job.name]

    def finish(self, job: Job, outputs: Path, forced: bool) -> str | None:
        """Go on with a job that was ended, and compare: None, or what is wrong."""
        more: list[object] = ["--force"] if forced else []
        if job.state is not None and (outputs / job.state).exists():
            more.append(job.resume)
        child = self.start(job, outputs, *more)
        if (code := child.wait()) != 0:
            if not forced and "exists" in child.said() and (outputs / job.target).exists():
                return self.finish(job, outputs, True)  # it had written its file
        if code != 0:
            return f"going on ends with {code}: {child.said()[-300:]}"
        return self.difference(job, outputs)

    def difference(self, job: Job, outputs: Path) -> str | None:
        """In what the outputs are not those of the reference."""
        expected, found = self.reference(job), contents(outputs)
        if found.keys() != expected.files:
            return f"other files: {sorted(found.keys() ^ expected.files)}"
        wrong = [name for name, data in expected.same.items() if found[name] != data]
        if wrong:
            return f"other bytes: {wrong}"
        if contents(self.inputs) != self.input_bytes:
            return "an input has changed"
        return None


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones too; folders without a file count as one."""
    found = {}
    for place, folders, names in os.walk(folder):
        for name in names:
            path = Path(place) / name
            if "__pycache__" not in path.parts:
                found[str(path.relative_to(folder))] = path.read_bytes()
        if not folders and not names and Path(place) != folder:
            found[str(Path(place).relative_to(folder)) + "/"] = b""
    return found
