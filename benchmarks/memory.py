"""Memory of a training step: parameters, gradients, optimizer, draws and activations.

    python benchmarks/memory.py [--only resnet18]      1 minute on 2 cores
    python benchmarks/memory.py --device cuda          2 minutes on a GPU, by estimate

Of a deterministic model and of the presets full, no-conv, no-layernorm and linear-only, with
AdamW and the KL divergence. Each number is the sum of the sizes of distinct storages, so that
nothing depends on an allocator. What the backward has saved that is neither a parameter nor a draw
counts as activations, and memory that is kept from step to step for draws counts as draws. On CUDA
the peak that the allocator saw stands beside them. Writes `results/memory.json` or
`results/memory_cuda.json`, and `docs/speed.md` anew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import speed_table
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bayesify
from bayesify.posterior import sites
from bayesify.provenance import machine, provenance
from bayesify.storage import replacing

RESULTS = Path(__file__).parent / "results"
CASES = {
    "cpu": [("vit_tiny_patch16_224", 16), ("resnet18", 16)],
    "cuda": [
        ("vit_base_patch16_224", 256), ("vit_small_patch16_224", 256), ("resnet50", 256),
    ],
}  # fmt: skip
VARIANTS = ("deterministic", "full", "no-conv", "no-layernorm", "linear-only")


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Sizes of distinct storages by address."""
    found = (t.untyped_storage() for t in tensors)
    return {s.data_ptr(): s.nbytes() for s in found}


def measure(name: str, batch: int, variant: str, device: str) -> dict[str, int]:
    """Bytes by what holds them, in the third step of a training."""
    torch.manual_seed(0)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    model = timm.create_model(name).train().to(device)
    weights = 0
    groups: Any = model.parameters()
    if variant != "deterministic":
        bayesify.to_bbb_(model, preset=variant)
        weights = sum(site.mean.numel() for site in sites(model))
        groups = bayesify.param_groups(model, lr=1e-4)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.0, fused=True)
    x, y = torch.randn(batch, 3, 224, 224, device=device), torch.zeros(batch, dtype=torch.long)
    y = y.to(device)
    saved: dict[int, int] = {}
    drawn: dict[int, int] = {}

    def forward(count: bool) -> Tensor:
        def pack(tensor: Tensor) -> Tensor:
            if count:
                saved.update(storages([tensor]))
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast(device, torch.bfloat16, enabled=device == "cuda"),
        ):
            if variant != "deterministic" and count:
                with bayesify.one_draw(model):
                    loss = F.cross_entropy(model(x), y)
                    drawn.update(draws_of(model))
            else:
                loss = F.cross_entropy(model(x), y)
        if variant != "deterministic":
            loss = bayesify.elbo_loss(loss, model, num_data=50_000)
        return loss

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(3):
        forward(count=step == 2).backward()
        gradients = storages(p.grad for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    parameters = storages([*model.parameters(), *model.buffers()])
    state = storages(v for s in optimizer.state.values() for v in s.values() if v.dim())
    kept = kept_by(model)
    own = {**parameters, **drawn, **kept, **storages([x, y])}
    result = {
        "weights": weights,
        "parameters": sum(parameters.values()),
        # on the CPU a gradient may lie in the memory that is kept for draws
        "gradients": sum(size for place, size in gradients.items() if place not in kept),
        "optimizer": sum(state.values()),
        "draws": sum({**drawn, **kept}.values()),
        "activations": sum(size for place, size in saved.items() if place not in own),
    }
    if device == "cuda":
        torch.cuda.synchronize()
        result["peak"] = torch.cuda.max_memory_allocated() - before
    return result


def kept_by(model: nn.Module) -> dict[int, int]:
    """Memory that is kept from one draw to the next."""
    return {s.data_ptr(): s.nbytes() for site in sites(model) for s in site.slot.buffers.kept()}


def draws_of(model: nn.Module) -> dict[int, int]:
    """Of the draw that is held now."""
    from bayesify.scope import LOCAL

    scope = LOCAL.modes[-1].scope
    return storages(scope.realised.values()) if scope is not None else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", help="only this model; nothing is written")
    options = parser.parse_args()
    results: dict[str, dict[str, dict[str, int]]] = {}
    for name, batch in CASES[options.device]:
        if options.only and options.only != name:
            continue
        results[f"{name}, batch {batch}"] = rows = {}
        for variant in VARIANTS:
            rows[variant] = row = measure(name, batch, variant, options.device)
            sizes = ", ".join(f"{k} {v / 2**20:.0f}" for k, v in row.items() if k != "weights")
            print(f"{name:24}{variant:16}{row['weights']:>12,} weights; MiB: {sizes}", flush=True)
    if options.only:
        return
    record = {
        "command": f"benchmarks/memory.py --device {options.device}", "seed": 0,
        "threads": torch.get_num_threads(), "machine": machine(options.device),
        **provenance("torch", "timm"),
        "cases": results,
    }  # fmt: skip
    result = RESULTS / ("memory.json" if options.device == "cpu" else "memory_cuda.json")
    with replacing(result, overwrite=True) as path:
        path.write_text(json.dumps(record, indent=1) + "\n")
    speed_table.write()


if __name__ == "__main__":
    main()
