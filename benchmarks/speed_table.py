"""`docs/speed.md`, from the result files of `convert.py` and `step.py`."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
TARGETS = {"vit_tiny_patch16_224": 1.05, "resnet18": 1.09, "mlp": 2.2}


def write() -> None:
    """Write the page from whatever has been measured."""
    parts = [
        "# Speed\n",
        "Everything here was measured on the CPU; on CUDA nothing has been. `make bench` measures "
        "it again and writes this page. Machines are noisy: ratios are of times taken one after "
        "the other in one run, and their median counts.\n",
    ]
    for name, section in (("step.json", steps), ("convert.json", conversion)):
        file = RESULTS / name
        if file.exists():
            parts += section(json.loads(file.read_text()))
    PAGE.write_text("\n".join(parts) + "\n")


def source(record: dict[str, Any]) -> str:
    where = record["machine"]
    versions = ", ".join(f"{p} {v}" for p, v in record["versions"].items())
    return (
        f"*{where['processor']}, {where['cores']} cores, {record['threads']} threads, Python "
        f"{where['python']}, {versions}; commit `{record['commit']}`, {record['date']}, "
        f"`{record['command']}`.*\n"
    )


def ratio(row: dict[str, Any]) -> str:
    if "error" in row:
        return "not installed" if row["error"] == "not installed" else "fails"
    return f"{row['median']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def steps(record: dict[str, Any]) -> list[str]:
    names = list(record["models"])
    methods = list(next(iter(record["models"].values())))
    shapes = {"vit_tiny_patch16_224": "vit_tiny, batch 16", "resnet18": "resnet18, batch 16",
              "mlp": "MLP of 10.5 M weights, batch 64"}  # fmt: skip
    lines = [
        "## A training step\n",
        "Forward, loss with its KL term, backward and AdamW (fused), over the deterministic step "
        f"of the same round: median of {record['rounds']} rounds (quartiles). Peers in the "
        "settings that `benchmarks/step.py` states.\n",
        "| | " + " | ".join(shapes[n] for n in names) + " |",
        "| --- |" + " ---: |" * len(names),
    ]
    for method in methods:
        if method != "deterministic":
            cells = [ratio(record["models"][n][method]) for n in names]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    base = [f"{1000 * record['models'][n]['deterministic']['seconds']:.0f} ms" for n in names]
    lines.append(f"| *deterministic* | {' | '.join(base)} |")
    ours = {n: record["models"][n]["bayesify"]["median"] for n in names}
    ends = {n: "met" if ours[n] <= TARGETS[n] else f"missed, {ours[n]:.2f}" for n in names}
    said = [f"{shapes[n]}: {TARGETS[n]} ({ends[n]})" for n in names]
    failed = {
        f"{m} on {n}: {row['error']}"
        for n in names for m, row in record["models"][n].items()
        if row.get("error", "not installed") != "not installed"
    }  # fmt: skip
    lines += [f"\nTargets: {'; '.join(said)}.", *sorted(failed), "", source(record)]
    return lines


def conversion(record: dict[str, Any]) -> list[str]:
    lines = [
        f"## Converting\n\nIn {record['repeats']} new processes each, seconds: median (lowest to "
        "highest).\n",
        "| | plan | to_bbb_ | both | first call that draws, less a later one |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, runs in record["first"].items():
        columns = {
            "plan": [r["plan_s"] for r in runs],
            "to_bbb_": [r["to_bbb_s"] for r in runs],
            "both": [r["plan_s"] + r["to_bbb_s"] for r in runs],
            "trace": [r["first_call_s"] - r["second_call_s"] for r in runs],
        }
        cells = [
            f"{statistics.median(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in columns.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        f"\n## A call\n\nRatio of times, median of {record['calls']} pairs (quartiles), 224 "
        "px, no gradient. *Draws given*: the weights of a held draw are read, none is made.\n",
        "| model, batch | at the means / original | draws given / functional_call |",
        "| --- | ---: | ---: |",
    ]
    for name, ratios in record["paired"].items():
        cells = [f"{r['median']:.3f} ({r['low']:.3f} to {r['high']:.3f})" for r in ratios.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, "", source(record)]


if __name__ == "__main__":
    write()
