"""docs/posterior.md, from the lines that benchmarks/posterior.py wrote."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "posterior.md"
BEGIN, END = "<!-- posterior: begin -->", "<!-- posterior: end -->"


def write(result: Path, page: Path = PAGE) -> None:
    """Put the tables between the marks of the page; what stands around them is left alone."""
    rows = [json.loads(line) for line in result.read_text(encoding="utf-8").splitlines()]
    head, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    page.write_text(f"{head}{BEGIN}\n{tables(rows)}{END}{tail}", encoding="utf-8")


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
        f"{'kept' if used['freeze_batchnorm'] else 'gathered anew'}.",
        f"*{where['processor']}, {where['cores']} cores, {row['device']}, torch "
        f"{row['versions']['torch']}, commit `{row['commit']}`, {row['date']}.*",
    ]
