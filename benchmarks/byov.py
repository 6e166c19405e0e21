"""A step of BYOV beside that of deterministic BYOL by the same code: ViT-Tiny/4, batch 256.

    PYTHONPATH=. python benchmarks/byov.py [--rounds 7]      7 minutes on 2 cores
    PYTHONPATH=. python benchmarks/byov.py --device cuda     2 minutes on a GPU, by estimate

A step is both forwards of the student, the teacher's, the loss, the KL, backward, AdamW and the
moving averages, on views that are made beforehand. In every round each method takes one, in an
order that turns, and its time is divided by that of BYOL's step of the same round; the result is
the median of these ratios with quartiles. On CUDA the student runs under bfloat16 autocast and is
compiled. Writes `results/byov_step.json` or `results/byov_step_cuda.json`, and `docs/speed.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import speed_table
import torch
from paired import keep_memory, paired

from bayesify.provenance import machine, provenance
from bayesify.storage import replacing
from recipes.byov.config import RunConfig
from recipes.byov.presets import PRESETS
from recipes.byov.runtime.distributed import World
from recipes.byov.step import Stepper

RESULTS = Path(__file__).parent / "results"
BATCH = 256
METHODS: dict[str, dict[str, Any]] = {
    "BYOL": {"conversion": "none"},
    "BYOV, N(0, I)": {},
    "BYOV, N(mu_T, Sigma_T)": {"prior": "teacher"},
}


def step_of(changes: dict[str, Any], device: torch.device) -> Callable[[], Any]:
    """One step after the other of one method, always on the same views."""
    config = replace(PRESETS["cifar10-vit-tiny"].config, batch_size=BATCH, **changes)
    cuda = device.type == "cuda"
    run = RunConfig(device=str(device), amp=cuda, compile=cuda)
    torch.manual_seed(0)
    stepper = Stepper(config, run, World(0, 1, device), num_classes=10, num_images=50_000)
    view1, view2 = (torch.randn(BATCH, 3, 32, 32, device=device) for _ in range(2))
    labels = torch.randint(0, 10, (BATCH,), device=device)
    steps = iter(range(1_000_000))

    def step() -> None:
        stepper.backward(next(steps), [(view1, view2, labels)], 0.5, norm_wanted=False)
        stepper.advance(0.99)

    return step


def main() -> None:
    keep_memory()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    steps = {name: step_of(changes, device) for name, changes in METHODS.items()}
    for step in steps.values():
        for _ in range(3 if device.type == "cuda" else 1):
            step()
    found = paired(steps, "BYOL", options.rounds, options.device)
    for method, row in found.items():
        print(f"{method:26}{row['median']:.3f} ({row['low']:.3f} to {row['high']:.3f}), "
              f"{1000 * row['seconds']:.0f} ms", flush=True)  # fmt: skip
    record = {
        "command": f"benchmarks/byov.py --device {options.device} --rounds {options.rounds}",
        "rounds": options.rounds, "seed": 0, "batch": BATCH,
        "threads": torch.get_num_threads(), "machine": machine(options.device),
        **provenance("torch", "timm"),
        "methods": found,
    }  # fmt: skip
    cpu = options.device == "cpu"
    result = RESULTS / ("byov_step.json" if cpu else "byov_step_cuda.json")
    with replacing(result, overwrite=True) as path:
        path.write_text(json.dumps(record, indent=1) + "\n")
    speed_table.write()


if __name__ == "__main__":
    main()
