"""The BYOV grid on CIFAR-10, a few cells at a time.

    python -m recipes.byov.paper.cifar10 --data DATA --minutes 9 --jobs 4     on a GPU
    python -m recipes.byov.paper.cifar10 --scale cpu --group core --minutes 60 --jobs 2
    python -m recipes.byov.paper.cifar10 --list

Runs the next missing cells of `cells.py`, several side by side; what a time limit ends goes on
the next time. Each finished cell is one JSON in `benchmarks/results/byov/SCALE`; `docs.py` makes
the docs of them. CIFAR-10 is given as `bayesify recipe byov train --data` takes it:
`timm:torch/cifar10@DIR` or a .safetensors file.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from .cells import CELLS, SCALES, Cell, Scale, result_of, run_cell, wanted

UNFINISHED = 75
_GRACE = 90  # seconds that a run gets to write its checkpoint
_SHORTEST = 20  # seconds that must be left to start a cell


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scale", choices=SCALES, default="gpu")
    parser.add_argument("--data", help="in place of the scale's data set")
    parser.add_argument(
        "--ood", action="append", default=[], help="data set of other classes (OOD)"
    )
    parser.add_argument("--device", help="in place of the scale's")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--jobs", type=int, default=1, help="cells side by side")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", action="append", default=[], help="glob on the cells' names")
    parser.add_argument("--group", action="append", default=[], help="group of cells")
    parser.add_argument("--work", type=Path, default=Path("runs") / "byov", help="checkpoints")
    parser.add_argument("--list", action="store_true", help="the cells and what is missing")
    parser.add_argument("--cell", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    scale = SCALES[asked.scale]
    if asked.cell:
        [cell] = [c for c in CELLS if c.name == asked.cell[0]]
        done = run_cell(scale, cell, int(asked.cell[1]), work=asked.work, data=asked.data,
                        device=asked.device, ood=asked.ood)  # fmt: skip
        sys.exit(0 if done else UNFINISHED)
    cells = wanted(asked.only, asked.seeds, asked.group)
    if asked.list:
        for cell, seed in cells:
            there = result_of(scale, cell, seed).exists()
            print(f"{cell.group:16}{cell.name:32}seed {seed}  {'done' if there else 'missing'}")
        return
    missing = [(c, s) for c, s in cells if not result_of(scale, c, s).exists()]
    print(f"{len(missing)} of {len(cells)} cells are missing.", flush=True)
    run_all(scale, missing, asked)


def run_all(scale: Scale, missing: list[tuple[Cell, int]], asked: argparse.Namespace) -> None:
    """Keep ``--jobs`` processes busy until the time is over."""
    end = time.monotonic() + 60 * asked.minutes
    waiting, failed = list(missing), []
    running: dict[subprocess.Popen[bytes], str] = {}
    try:
        while waiting or running:
            left = end - time.monotonic()
            while waiting and len(running) < asked.jobs and left > _SHORTEST:
                cell, seed = waiting.pop(0)
                running[_start(scale, cell, seed, asked)] = f"{cell.name}, seed {seed}"
            for process in [p for p in running if p.poll() is not None]:
                name = running.pop(process)
                if process.returncode not in (0, UNFINISHED):
                    failed.append(name)
                print(f"{name}: {'finished' if process.returncode == 0 else 'not finished'}",
                      flush=True)  # fmt: skip
            if left <= 0 or (left <= _SHORTEST and not running):
                break
            time.sleep(0.5)
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)
        until = time.monotonic() + _GRACE
        for process, name in running.items():
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
            print(f"{name}: goes on the next time", flush=True)
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


def _start(
    scale: Scale, cell: Cell, seed: int, asked: argparse.Namespace
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", f"{__package__}.cifar10"]
    command += ["--scale", scale.name, "--work", str(asked.work)]
    for option in ("data", "device"):
        if getattr(asked, option):
            command += [f"--{option}", getattr(asked, option)]
    for spec in asked.ood:
        command += ["--ood", spec]
    threads = str(max(1, (os.cpu_count() or 1) // asked.jobs))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    return subprocess.Popen([*command, "--cell", cell.name, str(seed)], env=environment)


if __name__ == "__main__":
    main()
