"""`docs/speed.md`, and the README's table, from the results on speed and memory."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bayesify.provenance import gpu_of

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
README = PAGE.parents[1] / "README.md"
BEGIN, END = "<!-- speed: begin -->\n", "<!-- speed: end -->"
ONE_IMAGE = "vit_tiny_patch16_224, 1"
SHOWN = (
    "bayesify", "bayesian-torch reparam", "torchbayesian", "torch_blue", "IVON",
    "posteriors vi.diag",
)  # fmt: skip
TARGETS = {
    "vit_tiny_patch16_224": 1.05, "resnet18": 1.09, "mlp": 2.2,
    "vit_base_patch16_224": 1.03, "vit_small_patch16_224": 1.05, "resnet50": 1.05,
}  # fmt: skip
FIT_TARGET = 0.9
PREDICT_TARGETS = {"vit_tiny_patch16_224, 64": 1.05, "vit_tiny_patch16_224, 1": 1.7}
SHAPES = {
    "vit_tiny_patch16_224": "vit_tiny, batch 16", "resnet18": "resnet18, batch 16",
    "mlp": "MLP of 10.5 M weights, batch 64", "vit_base_patch16_224": "ViT-B/16, batch 256",
    "vit_small_patch16_224": "ViT-S/16, batch 256", "resnet50": "resnet50, batch 256",
}  # fmt: skip
NOTHING_SAID = ("not installed", "not measured")
"""What stands in place of a time and is no fault of the method."""
PARTS = ("parameters", "gradients", "optimizer", "draws", "activations")
CUDA = {
    "step_cuda.json": "a training step of ViT-B/16, ViT-S/16 and resnet50 (`benchmarks/step.py "
    "--device cuda`, 3 minutes by estimate)",
    "predict_cuda.json": "30 draws (`benchmarks/predict.py --device cuda`, 3 minutes)",
    "byov_step_cuda.json": "a step of BYOV (`benchmarks/byov.py --device cuda`, 2 minutes)",
    "memory_cuda.json": "memory (`benchmarks/memory.py --device cuda`, 2 minutes)",
    "draw_cuda.json": "the draw alone (`benchmarks/draw.py --device cuda`, 1 minute)",
}


def write() -> None:
    """Write the page from whatever has been measured."""
    parts = [
        "# Speed\n",
        "`make bench` measures it again and writes this page. Machines are noisy: ratios are of "
        "times taken one after the other in one run, and their median counts. Steps, draws and "
        "fits run with a glibc that keeps freed memory (`keep_memory` in `benchmarks/paired.py`): "
        "without, the same code is faster or slower from one start to the next.\n",
    ]
    sections: tuple[tuple[str, Callable[[dict[str, Any]], list[str]]], ...] = (
        ("step.json", steps),
        ("predict.json", predictions),
        ("draw.json", parts_of_a_step),
        ("byov_step.json", byov_steps),
        ("memory.json", memory),
        ("fit.json", fits),
        ("convert.json", conversion),
    )
    for name, section in sections:
        file = RESULTS / name
        if file.exists():
            parts += section(json.loads(file.read_text()))
    parts.append("## On a GPU\n")
    on_gpu = dict(sections[:5]) | {"draw.json": rates}
    for name, section in on_gpu.items():
        file = RESULTS / name.replace(".json", "_cuda.json")
        if file.exists():
            found = section(json.loads(file.read_text()))
            parts += [line.replace("## ", "### ", 1) for line in found]
    missing = [what for name, what in CUDA.items() if not (RESULTS / name).exists()]
    if missing:
        parts.append(f"Not measured: {'; '.join(missing)}.\n")
    PAGE.write_text("\n".join(parts) + "\n")
    step, predict = RESULTS / "step.json", RESULTS / "predict.json"
    if step.exists() and predict.exists():
        head, _, rest = README.read_text().partition(BEGIN)
        table = short(json.loads(step.read_text()), json.loads(predict.read_text()))
        README.write_text(f"{head}{BEGIN}{table}{END}{rest.partition(END)[2]}")


def short(step: dict[str, Any], predict: dict[str, Any]) -> str:
    """Medians of both, method by method."""
    lines = [
        f"| time over the deterministic one | {' | '.join(SHAPES[n] for n in step['models'])} "
        f"| {predict['draws']} draws, vit_tiny, one image |",
        "| --- |" + " ---: |" * (len(step["models"]) + 1),
    ]
    for method in SHOWN:
        rows = [rows[method] for rows in step["models"].values()]
        rows.append(predict["cases"][ONE_IMAGE][method])
        cells = ["fails" if "error" in row else f"{row['median']:.2f}" for row in rows]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def source(record: dict[str, Any]) -> str:
    where = record["machine"]
    versions = ", ".join(f"{p} {v}" for p, v in record["versions"].items())
    gpu = f"{name}; " if (name := gpu_of(where)) else ""
    library = ", bayesify with its C library" if record.get("c_library") else ""
    return (
        f"*{gpu}{where['processor']}, {where['cores']} cores, {record['threads']} threads, Python "
        f"{where['python']}, {versions}{library}; commit `{record['commit']}`, {record['date']}, "
        f"`{record['command']}`.*\n"
    )


def ratio(row: dict[str, Any]) -> str:
    if "error" in row:
        return row["error"] if row["error"] in NOTHING_SAID else "fails"
    return f"{row['median']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def verdict(value: float, limit: float) -> str:
    """With a third digit where two would hide that it was missed."""
    if value <= limit:
        return "met"
    return f"missed, {value:.2f}" if round(value, 2) > limit else f"missed, {value:.3f}"


def steps(record: dict[str, Any]) -> list[str]:
    names = list(record["models"])
    methods = list(next(iter(record["models"].values())))
    count = record.get("in_a_row", 1)  # older results have one
    together = f", {count} steps at a time" if count > 1 else ""
    if gpu_of(record["machine"]) and count == 1:
        together = ", the GPU waited for after each step, all models on it at once"
    lines = [
        "## A training step\n",
        "Forward, loss with its KL term, backward and AdamW (fused), over the deterministic step "
        f"of the same round: median of {record['rounds']} rounds (quartiles){together}. "
        "Peers in the settings that `benchmarks/step.py` states.\n",
        "| | " + " | ".join(SHAPES[n] for n in names) + " |",
        "| --- |" + " ---: |" * len(names),
    ]
    for method in methods:
        if method != "deterministic":
            cells = [ratio(record["models"][n][method]) for n in names]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    base = [f"{1000 * record['models'][n]['deterministic']['seconds']:.0f} ms" for n in names]
    lines.append(f"| *deterministic* | {' | '.join(base)} |")
    if any("peak_bytes" in row for row in record["models"][names[0]].values()):
        lines += peaks(record)
    ours = {n: record["models"][n]["bayesify"]["median"] for n in names}
    said = [f"{SHAPES[n]}: {TARGETS[n]} ({verdict(ours[n], TARGETS[n])})" for n in names]
    failed = {
        f"\n{m} on {n}: {row['error'].splitlines()[0]}"
        for n in names for m, row in record["models"][n].items()
        if row.get("error", "not installed") not in NOTHING_SAID
    }  # fmt: skip
    lines += [f"\nTargets: {'; '.join(said)}.", *sorted(failed), "", source(record)]
    return lines


def peaks(record: dict[str, Any]) -> list[str]:
    """Peak memory beyond that of the deterministic step, in bytes for each weight."""
    lines = []
    for name, methods in record["models"].items():
        base, weights = methods["deterministic"]["peak_bytes"], record["weights"][name]
        said = [
            f"{method} {(row['peak_bytes'] - base) / weights:.1f}"
            for method, row in methods.items() if "peak_bytes" in row and method != "deterministic"
        ]  # fmt: skip
        lines.append(
            f"\nPeak memory of {SHAPES[name]} above the deterministic {base / 2**30:.1f} GiB, "
            f"bytes a weight (target 17): {', '.join(said)}."
        )
    return lines


def predictions(record: dict[str, Any]) -> list[str]:
    cases = list(record["cases"])
    methods = list(dict.fromkeys(m for rows in record["cases"].values() for m in rows))
    lines = [
        f"## {record['draws']} draws\n",
        f"`bayesify.predict` with {record['draws']} draws, and peers with as many passes, over "
        f"{record['draws']} deterministic forwards of the same round: median of "
        f"{record['rounds']} rounds (quartiles), of four times as many for one image, 224 px, no "
        "gradient.\n",
        "| model, batch | " + " | ".join(cases) + " |",
        "| --- |" + " ---: |" * len(cases),
    ]
    for method in methods:
        if method != "deterministic":
            cells = [ratio(record["cases"][c].get(method, {"error": ""})) for c in cases]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    base = [f"{1000 * record['cases'][c]['deterministic']['seconds']:.0f} ms" for c in cases]
    lines.append(f"| *deterministic* | {' | '.join(base)} |")
    ours = {c: record["cases"][c]["bayesify"]["median"] for c in cases}
    said = [
        f"{c}: {limit} ({verdict(ours[c], limit)})"
        for c, limit in PREDICT_TARGETS.items() if c in ours
    ]  # fmt: skip
    for case, rows in record["cases"].items():
        graphed = rows.get("deterministic, CUDA graph", {})
        if "seconds" in graphed and case.endswith(", 1"):
            eager, mine = rows["deterministic"]["seconds"], rows["bayesify"]["seconds"]
            said.append(
                f"{case}: {eager / mine:.1f} times as fast as eager forwards (10), "
                f"{graphed['seconds'] / mine:.1f} times as fast as CUDA graphs (2)"
            )
    return [*lines, f"\nTargets: {'; '.join(said)}." if said else "", "", source(record)]


def byov_steps(record: dict[str, Any]) -> list[str]:
    rows = record["methods"]
    cuda = gpu_of(record["machine"]) is not None
    limit = 1.05 if cuda else 1.03
    ours = rows["BYOV, N(0, I)"]["median"]
    return [
        "## A step of BYOV\n",
        "Student, teacher, loss, KL, backward, AdamW and moving averages over the step of "
        f"deterministic BYOL by the same code: ViT-Tiny/4, batch {record['batch']}, median of "
        f"{record['rounds']} rounds (quartiles).\n",
        "| | ratio |",
        "| --- | ---: |",
        *(f"| {name} | {ratio(row)} |" for name, row in rows.items() if name != "BYOL"),
        f"| *BYOL* | {1000 * rows['BYOL']['seconds']:.0f} ms |",
        f"\nTarget: {limit} ({'met' if ours <= limit else f'missed, {ours:.3f}'}).\n",
        source(record),
    ]


def memory(record: dict[str, Any]) -> list[str]:
    peak = any("peak" in r for rows in record["cases"].values() for r in rows.values())
    columns = [*PARTS, "sum", *(["peak"] if peak else [])]
    lines = [
        "## Memory of a training step\n",
        "MiB of distinct storages, with AdamW and the KL divergence. *Draws*: the drawn weights, "
        "and memory that is kept from step to step for them and for gradients. *Activations*: what "
        "else the backward has saved.\n",
        "| | Bayesian weights | " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * (1 + len(columns)),
    ]
    for case, rows in record["cases"].items():
        for variant, row in rows.items():
            sizes = {**row, "sum": sum(row[part] for part in PARTS)}
            cells = " | ".join(f"{sizes[c] / 2**20:,.0f}" for c in columns)
            lines.append(f"| {case}: {variant} | {row['weights']:,} | {cells} |")
    return [*lines, "", source(record)]


def fits(record: dict[str, Any]) -> list[str]:
    cases: dict[str, dict[str, Any]] = record["cases"]
    lines = [
        "## A fit\n",
        "Images a second of `bayesify.fit`, and over those of a deterministic fine-tune of the "
        "same loader, by a loop written in torch and by `fit` itself: median of "
        f"{record['rounds']} rounds (quartiles). *Once*: seconds of a call beyond its steps. "
        "BatchNorm is frozen: otherwise a Bayesian fit ends with one more forward pass over the "
        "images.\n",
        "| | | images a second | over the loop | over the deterministic fit | once |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    said = []
    for case, rows in cases.items():
        for method, row in rows.items():
            speed = f"{row['images_per_second']['median']:.1f}"
            once = f"{max(0.0, row['once_seconds']['median']):.1f}"  # noise may make it negative
            cells = [method, speed, ratio(row["over_loop"]), ratio(row["over_fit"]), once]
            lines.append(f"| {case} | {' | '.join(cells)} |")
        ours = rows["Bayesian, fit"]
        least = min(ours[base]["median"] for base in ("over_loop", "over_fit"))
        said.append(f"{case} ({'met' if least >= FIT_TARGET else f'missed, {least:.2f}'})")
    target = f"\nTarget, over either: {FIT_TARGET}: {'; '.join(said)}."
    return [*lines, target, "", source(record)]


def parts_of_a_step(record: dict[str, Any]) -> list[str]:
    lines = [
        "## The draw alone\n",
        f"Of the {record['weights']:,} weights of ViT-Tiny/16 in float32, with the C library that "
        "is compiled when bayesify is installed, and with plain torch, which does its work where "
        f"there is no compiler: median of {record['rounds']} rounds (quartiles).\n",
        "| | C library, ms | plain torch, ms | ratio |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, ways in record["rates"].items():
        library, torch = (1000 * ways[way]["seconds"] for way in ("library", "torch"))
        lines.append(f"| {name} | {library:.1f} | {torch:.1f} | {ratio(ways['torch'])} |")
    return [*lines, "", source(record)]


def rates(record: dict[str, Any]) -> list[str]:
    draw, back, copy = (record["rates"][n] for n in ("draw", "backward", "copy"))
    return [
        "## The draw alone\n",
        f"Of {record['weights']:,} weights in float32: {100 * draw['median']:.0f} % of the "
        f"bandwidth of a copy ({copy['bytes_per_second'] / 1e12:.2f} TB/s; target 70 %), its "
        f"backward {100 * back['median']:.0f} %.\n",
        source(record),
    ]


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
