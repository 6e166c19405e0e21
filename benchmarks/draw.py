"""The draw alone: on the CPU with and without the C library, on a GPU beside a copy of memory.

    python benchmarks/draw.py [--rounds 30]                  1 minute on 2 cores
    python benchmarks/draw.py --device cuda [--rounds 30]    half a minute on a GPU

On the CPU: draws, KL divergence and the gradients of both, of the weights of ViT-Tiny/16. On a
GPU those of ViT-B/16, in bytes a second: a draw reads mean and log variance and writes the weight,
12 bytes a weight in float32; its backward reads gradient and log variance and writes one gradient,
also 12; the copy moves 1 GiB in the same round. Writes `results/draw.json` or
`results/draw_cuda.json`, and `docs/speed.md` anew.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import speed_table
import timm
import torch
from paired import keep_memory, paired, without_library

import bayesify
from bayesify.kernels import grouped, native
from bayesify.posterior import sites
from bayesify.provenance import machine, provenance
from bayesify.storage import replacing

RESULTS = Path(__file__).parent / "results"
REPEATS = 10


def items_of(name: str, device: str) -> list[grouped.Item]:
    model = bayesify.to_bbb(timm.create_model(name).to(device), initial_std=math.exp(-3.0))
    return [grouped.Item(s.mean, s.raw, s.slot.key, s.slot.buffers) for s in sites(model)]


def on_cpu(items: list[grouped.Item], rounds: int) -> dict[str, Any]:
    """Times of plain torch over those of the C library, and seconds, by part of a step."""
    seed = torch.tensor(1)
    upstream = [torch.ones_like(item.mean) for item in items]

    def drawn() -> list[Any]:
        return grouped.draw(items, seed)

    def draw() -> None:
        with torch.no_grad():
            drawn()

    def with_kl() -> tuple[list[Any], torch.Tensor]:
        made = drawn()
        return made, grouped.gaussian_kl([(hook, 0.0, 1.0) for _, hook in made if hook])

    def kl_and_gradients() -> None:
        made, kl = with_kl()
        torch.autograd.backward([v for v, _ in made] + [kl], [*upstream, torch.tensor(1e-5)])
        for item in items:
            item.mean.grad = item.logvar.grad = None

    parts: dict[str, Callable[[], Any]] = {
        "draw without gradient": draw, "draw and KL": with_kl,
        "draw, KL and gradients": kl_and_gradients,
    }  # fmt: skip

    found = {}
    for name, run in parts.items():
        ways = {"library": run, "torch": without_library(run)}
        for way in ways.values():
            way()
        found[name] = paired(ways, "library", rounds)
        print(name, *(f"{way} {1000 * row['seconds']:.1f} ms" for way, row in found[name].items()))
    return found


def on_gpu(items: list[grouped.Item], rounds: int) -> dict[str, Any]:
    """Bytes a second of draw, backward and copy, and over those of the copy."""
    weights = sum(item.mean.numel() for item in items)
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    seed = torch.tensor(1)
    values = [value for value, _ in grouped.draw(items, seed)]
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
    rows = paired({name: run for name, (run, _) in moved.items()}, "copy", rounds, "cuda")
    found = {}
    for name, (_, size) in moved.items():
        found[name] = {
            "bytes_per_second": REPEATS * size / rows[name]["seconds"],
            # ratio of times, turned into that of bytes a second
            **{k: size / moved["copy"][1] / rows[name][k] for k in ("low", "median", "high")},
        }
        print(f"{name:10}{found[name]['bytes_per_second'] / 1e12:.2f} TB/s, "
              f"{100 * found[name]['median']:.0f} % of the copy")  # fmt: skip
    return found


def main() -> None:
    keep_memory()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "There is no CUDA device.\n")
    if device == "cpu" and not native.there():
        parser.exit(
            1, "bayesify was installed without a C compiler: there is nothing to compare.\n"
        )
    items = items_of("vit_base_patch16_224" if device == "cuda" else "vit_tiny_patch16_224", device)
    found = (on_gpu if device == "cuda" else on_cpu)(items, options.rounds)
    packages = ("torch", "triton", "timm") if device == "cuda" else ("torch", "timm")
    record = {
        "command": f"benchmarks/draw.py --device {device} --rounds {options.rounds}",
        "rounds": options.rounds, "threads": torch.get_num_threads(), "machine": machine(device),
        "weights": sum(item.mean.numel() for item in items), **provenance(*packages),
        "rates": found,
    }  # fmt: skip
    result = RESULTS / ("draw_cuda.json" if device == "cuda" else "draw.json")
    with replacing(result, overwrite=True) as path:
        path.write_text(json.dumps(record, indent=1) + "\n")
    speed_table.write()


if __name__ == "__main__":
    main()
