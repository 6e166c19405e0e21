"""The draw of ViT-B/16's weights on a card, in bytes a second, beside a copy.

    python benchmarks/draw.py [--rounds 30]      1 minute on a card, by estimate

A draw reads mean and log variance and writes the weight, 12 bytes a weight in float32; its backward
reads gradient and log variance and writes one gradient, also 12. The copy moves 1 GiB in the same
round. Writes `results/draw_cuda.json`, and `docs/speed.md` anew.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import speed_table
import timm
import torch
from paired import paired
from provenance import machine, provenance

import bayesify
from bayesify.kernels import grouped
from bayesify.posterior import sites
from bayesify.storage import replacing

RESULT = Path(__file__).parent / "results" / "draw_cuda.json"
REPEATS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "There is no CUDA device.\n")
    model = bayesify.to_bbb(timm.create_model("vit_base_patch16_224").cuda(), logvar=-6.0)
    items = [grouped.Item(s.mean, s.raw, s.slot.key, s.slot.buffers) for s in sites(model)]
    weights = sum(item.mean.numel() for item in items)
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    seed = torch.tensor(1)
    drawn = grouped.draw(items, seed)
    values = [value for value, _ in drawn]
    upstream = [torch.ones_like(value) for value in values]
    logvars = [item.logvar for item in items]

    def copy() -> None:
        for _ in range(REPEATS):
            target.copy_(source)

    def draw() -> None:
        with torch.no_grad():
            for _ in range(REPEATS):
                grouped.draw(items, seed)

    def backward() -> None:
        for _ in range(REPEATS):
            torch.autograd.grad(values, logvars, upstream, retain_graph=True)

    moved: dict[str, tuple[Any, int]] = {
        "copy": (copy, 2 * 4 * source.numel()),
        "draw": (draw, 12 * weights),
        "backward": (backward, 12 * weights),
    }
    for run, _ in moved.values():
        run()
    rows = paired({name: run for name, (run, _) in moved.items()}, "copy", options.rounds, "cuda")
    found = {}
    for name, (_, size) in moved.items():
        found[name] = {
            "bytes_per_second": REPEATS * size / rows[name]["seconds"],
            # ratio of times, turned into that of bytes a second
            **{k: size / moved["copy"][1] / rows[name][k] for k in ("low", "median", "high")},
        }
        print(f"{name:10}{found[name]['bytes_per_second'] / 1e12:.2f} TB/s, "
              f"{100 * found[name]['median']:.0f} % of the copy")  # fmt: skip
    record = {
        "command": f"benchmarks/draw.py --rounds {options.rounds}", "rounds": options.rounds,
        "threads": torch.get_num_threads(), "machine": machine("cuda"), "weights": weights,
        **provenance("torch", "triton", "timm"), "rates": found,
    }  # fmt: skip
    with replacing(RESULT, overwrite=True) as path:
        path.write_text(json.dumps(record, indent=1) + "\n")
    speed_table.write()


if __name__ == "__main__":
    main()
