"""What converting costs, and what a converted model costs beside the original.

    python benchmarks/convert.py [--repeats 5] [--calls 40]

Conversion and first call are measured in new processes, since a first time is what a user has.
The cost of a call is measured in pairs, one of each after the other, and given as the median of
their ratios with quartiles. Writes `results/convert.json`, and `docs/speed.md` anew.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import speed_table
import timm
import torch

import bayesify
from bayesify.provenance import machine, provenance
from bayesify.storage import replacing

RESULT = Path(__file__).parent / "results" / "convert.json"
FIRST = ("resnet50", "vit_base_patch16_224")
PAIRED = (("resnet18", 1), ("resnet18", 16), ("vit_tiny_patch16_224", 1))


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.no_grad()
def first(name: str) -> dict[str, float]:
    """Seconds of everything that happens once, in this process."""
    model = timm.create_model(name).eval()
    image = torch.randn(1, 3, 224, 224)
    model(image)
    found = {
        "plan_s": seconds(lambda: bayesify.plan(model)),
        "to_bbb_s": seconds(lambda: bayesify.to_bbb_(model)),
    }
    with bayesify.sampled(model):
        found["first_call_s"] = seconds(lambda: model(image))
        found["second_call_s"] = statistics.median(
            [seconds(lambda: model(image)) for _ in range(5)]
        )
    return found


@torch.no_grad()
def paired(name: str, batch: int, calls: int) -> dict[str, dict[str, float]]:
    """Ratios of calls that alternate."""
    torch.manual_seed(0)
    original = timm.create_model(name).eval()
    converted = bayesify.to_bbb(original)
    images = torch.randn(batch, 3, 224, 224)
    drawn = bayesify.draws(converted, seed=1)
    pairs = {
        "at the means / original": (
            nullcontext(), lambda: converted(images), lambda: original(images),
        ),
        "draws given / functional_call": (
            bayesify.one_draw(converted, seed=1),
            lambda: converted(images),
            lambda: torch.func.functional_call(original, drawn, (images,)),
        ),
    }  # fmt: skip
    found = {}
    for what, (context, ours, theirs) in pairs.items():
        with context:
            for _ in range(3):
                ours(), theirs()
            ratios = []
            for call in range(calls):
                if call % 2:
                    b, a = seconds(theirs), seconds(ours)
                else:
                    a, b = seconds(ours), seconds(theirs)
                ratios.append(a / b)
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[what] = {"low": low, "median": middle, "high": high}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="new processes a model")
    parser.add_argument("--calls", type=int, default=40, help="pairs of calls")
    parser.add_argument("--first", help=argparse.SUPPRESS)  # what a new process does
    options = parser.parse_args()
    if options.first:
        print(json.dumps(first(options.first)))
        return
    record: dict[str, Any] = {
        "command": f"benchmarks/convert.py --repeats {options.repeats} --calls {options.calls}",
        "repeats": options.repeats, "calls": options.calls, "seed": 0,
        "threads": torch.get_num_threads(), "machine": machine(),
        **provenance("torch", "timm"), "first": {}, "paired": {},
    }  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in FIRST:
        command = [sys.executable, __file__, "--first", name]
        runs = [
            subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            for _ in range(options.repeats)
        ]
        record["first"][name] = [json.loads(run.stdout.splitlines()[-1]) for run in runs]
        print(name, record["first"][name], flush=True)
    for name, batch in PAIRED:
        record["paired"][f"{name}, {batch}"] = paired(name, batch, options.calls)
        print(name, batch, record["paired"][f"{name}, {batch}"], flush=True)
    with replacing(RESULT, overwrite=True) as path:
        path.write_text(json.dumps(record, indent=1) + "\n")
    speed_table.write()


if __name__ == "__main__":
    main()
