"""The tables of docs/posterior.md, from the lines that benchmarks/posterior.py wrote."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "posterior.md"
WITHOUT_SIGMA = (
    "deterministic", "temperature scaling", "fine-tuned", "fine-tuned, temperature scaling",
    "ensemble", "MC dropout", "IVON",
)  # fmt: skip


def write(result: Path, trials: Path, page: Path = PAGE) -> None:
    """Put the tables between the marks of the page; what stands around them is left alone."""
    text = page.read_text(encoding="utf-8")
    for mark, made, path in (("trials", trial_table, trials), ("results", tables, result)):
        begin, end = marks(mark)
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = f"{head}{begin}\n{made(rows)}{end}{tail}"
    page.write_text(text, encoding="utf-8")


def marks(name: str) -> tuple[str, str]:
    """What stands before and after a table in the page."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def trial_table(rows: list[dict[str, Any]]) -> str:
    """The trials by which the settings were chosen, the least NLL first."""
    lines = [
        "| | epochs | augmentation | learning rates | initial sigma | BatchNorm | top-1 % | NLL "
        "| ECE |",
        "| --- | ---: | --- | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for row in sorted(rows, key=lambda row: float(row["test"]["nll"])):
        used, found = row["settings"], row["test"]
        sigma = "" if row["method"] in WITHOUT_SIGMA else f"{used['relative_std']:g}"
        rates = [used["lr"], used["logvar_lr"]] if sigma else [used["lr"]]
        if row["method"] == "IVON":
            rates = [used["ivon_lr"]]
        cells = [
            row["method"], str(used["epochs"]), used["augment"],
            ", ".join(f"{rate:g}" for rate in rates), sigma,
            "kept" if used["freeze_batchnorm"] else "gathered",
            f"{100 * found['accuracy']:.2f}", f"{found['nll']:.4f}", f"{found['ece']:.4f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    used = rows[0]["settings"]
    note = (
        f"K = {used['samples']}, {used['test_images']:,} held-out images, one seed, prior "
        f"N(0, {used['prior_std']:g}^2). Of two learning rates the second is that of the log "
        "variances."
    )
    return "\n".join([*lines, "", note, ""])


def tables(rows: list[dict[str, Any]]) -> str:
    """Two tables, of clean and of corrupted images, and what they were measured with."""
    by_method: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_method[row["method"]].append(row)
    lines = [
        "| | seeds | top-1 % | NLL | ECE | Brier | OOD AUROC | fit, min |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method, found in by_method.items():
        cells = [
            spread([100 * r["test"]["accuracy"] for r in found], 2),
            *(spread([r["test"][key] for r in found], 4) for key in ("nll", "ece", "brier")),
            spread([r["ood"]["auroc"] for r in found], 3),
            f"{statistics.mean(r['seconds']['fit'] for r in found) / 60:.1f}",
        ]
        lines.append(f"| {method} | {len(found)} | {' | '.join(cells)} |")
    kinds = list(rows[0]["corrupted"])
    if kinds:
        lines += [
            "",
            "Corrupted images, mean over the five severities: NLL by kind, then the means over all "
            "25 settings.",
            "",
            f"| | {' | '.join(kinds)} | NLL | ECE | top-1 % |",
            "| --- |" + " ---: |" * (len(kinds) + 3),
        ]
        for method, found in by_method.items():
            cells = [spread([over(r, "nll", kind) for r in found], 3) for kind in kinds]
            cells += [spread([over(r, key) for r in found], 3) for key in ("nll", "ece")]
            cells.append(spread([100 * over(r, "accuracy") for r in found], 1))
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *source(rows[0]), ""])


def over(row: dict[str, Any], key: str, kind: str | None = None) -> float:
    """Mean over the severities of one kind of corruption, or of all."""
    corrupted = row["corrupted"]
    chosen = corrupted.values() if kind is None else [corrupted[kind]]
    return float(statistics.mean(at[key] for each in chosen for at in each))


def spread(values: list[float], digits: int) -> str:
    """Mean and, of several seeds, their standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def source(row: dict[str, Any]) -> list[str]:
    used, where = row["settings"], row["machine"]
    return [
        f"Means ± standard deviation over the seeds. {used['train_images']:,} training images, "
        f"epochs: {used['epochs']}, {used['test_images']:,} test images, {used['ood_images']:,} "
        f"strangers, {used['corrupted_images']:,} images at each corruption, K = "
        f"{used['samples']} draws; augmentation {used['augment']}, learning rates {used['lr']:g} "
        f"and {used['logvar_lr']:g}, initial sigma {used['relative_std']:g} of each tensor's RMS, "
        f"prior N(0, {used['prior_std']:g}^2), BatchNorm's statistics "
        f"{'kept' if used['freeze_batchnorm'] else 'gathered anew'}; trained and predicted in "
        f"{'bfloat16 autocast' if used['amp'] else 'float32'}.",
        f"*{where['processor']}, {where['cores']} cores, {row['device']}, torch "
        f"{row['versions']['torch']}, commit `{row['commit']}`, {row['date']}.*",
    ]
