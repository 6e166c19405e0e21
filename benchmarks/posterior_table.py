"""The tables of docs/posterior.md and of the README, from the lines of benchmarks/posterior.py."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bayesify.provenance import gpu_of

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "docs" / "posterior.md", ROOT / "README.md")
BETA = 0.3
"""The weight of the KL divergence in the row that stands for ours, as the trials chose it."""
OURS = f"ours, beta {BETA:g}"
PEERS = ("IVON", "bayesian-torch", "torchbayesian")
SHOWN = ("deterministic", "temperature scaling", *PEERS, "MC dropout", "ensemble", OURS)
"""Rows of the short table."""
ECE_AIM = 0.0066
"""That of temperature scaling in float32."""
WITHOUT_SIGMA = (
    "deterministic", "temperature scaling", "fine-tuned", "fine-tuned, temperature scaling",
    "ensemble", "MC dropout", "IVON",
)  # fmt: skip


def write(result: Path, trials: Path, pages: Iterable[Path] = PAGES) -> None:
    """Put the tables between their marks in the pages; what stands around them is left alone."""
    parts = (
        ("trials", trial_tables, trials), ("targets", target_table, result),
        ("results", tables, result), ("posterior", short_table, result),
    )  # fmt: skip
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for name, made, path in parts:
            begin, end = marks(name)
            if begin in text:
                head, _, rest = text.partition(begin)
                _, _, tail = rest.partition(end)
                text = f"{head}{begin}\n{made(lines_of(path))}{end}{tail}"
        page.write_text(text, encoding="utf-8")


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def marks(name: str) -> tuple[str, str]:
    """What stands before and after a table in the page."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def trial_tables(rows: list[dict[str, Any]]) -> str:
    """A table for each network that trials were made with, the latest first.

    The digest of its weights tells one from the other, and where there is none its number of
    training images.
    """
    found: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        used = row["settings"]
        found[used["train_images"], used.get("network", "")].append(row)
    return "\n".join(trial_table(each) for each in reversed(found.values()))


def trial_table(rows: list[dict[str, Any]]) -> str:
    """The trials with one network, the least NLL first."""
    lines = [
        "| | epochs | draws a step | augmentation | learning rates | initial sigma | prior "
        "| averaged | BatchNorm | top-1 % | NLL | ECE | OOD AUROC |",
        "| --- | ---: | ---: | --- | ---: | ---: | --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    seeds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        seeds[json.dumps([row["method"], row["settings"]])].append(row)
    for found in sorted(seeds.values(), key=lambda found: mean_of(found, "nll")):
        row, used = found[0], found[0]["settings"]
        sigma = "" if row["method"] in WITHOUT_SIGMA else f"{used['relative_std']:g}"
        rates = [used["lr"], used["logvar_lr"]] if sigma else [used["lr"]]
        if row["method"] == "IVON":
            rates = [used["ivon_lr"]]
        cells = [
            row["method"], str(used["epochs"]), str(used["draws_per_step"]) if sigma else "",
            used["augment"],
            ", ".join(f"{rate:g}" for rate in rates), sigma, prior_of(used) if sigma else "",
            f"{used.get('average', 0.0):.0%}",  # rows from before there was such a setting
            "kept" if used["freeze_batchnorm"] else "gathered",
            spread([100 * r["test"]["accuracy"] for r in found], 2),
            *(spread([r["test"][key] for r in found], 4) for key in ("nll", "ece")),
            spread([r["ood"]["auroc"] for r in found], 3),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    used = rows[0]["settings"]
    note = (
        f"{used['train_images']:,} training images, {used['test_images']:,} held out, "
        f"{used['ood_images']:,} OOD images, K = {used['samples']}; means ± standard deviation of "
        "what has several seeds. Of two learning rates the second is that of the log variances; "
        "w0 are the weights at the start."
    )
    return "\n".join([*lines, "", note, ""])


def mean_of(rows: list[dict[str, Any]], key: str) -> float:
    """Mean of a number of the clean images over the seeds."""
    return float(statistics.mean(row["test"][key] for row in rows))


def prior_of(used: dict[str, Any]) -> str:
    """The prior of ours; rows from before there was a choice have the one around 0."""
    anchor = used.get("anchor")
    return f"N(0, {used['prior_std']:g}^2)" if anchor is None else f"N(w0, ({anchor:g} RMS)^2)"


def tables(rows: list[dict[str, Any]]) -> str:
    """Two tables, of clean and of corrupted images, and what they were measured with."""
    methods = dict(sorted(by_method(rows).items(), key=lambda item: mean_of(item[1], "nll")))
    lines = [
        "| | seeds | top-1 % | NLL | ECE | Brier | OOD AUROC | fit, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method, found in methods.items():
        cells = [
            spread([100 * r["test"]["accuracy"] for r in found], 2),
            *(spread([r["test"][key] for r in found], 4) for key in ("nll", "ece", "brier")),
            spread([r["ood"]["auroc"] for r in found], 3),
            f"{statistics.mean(r['seconds']['fit'] for r in found):.0f}",
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
        for method, found in methods.items():
            cells = [spread([over(r, "nll", kind) for r in found], 3) for kind in kinds]
            cells += [spread([over(r, key) for r in found], 3) for key in ("nll", "ece")]
            cells.append(spread([100 * over(r, "accuracy") for r in found], 1))
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *source(rows), ""])


def by_method(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["method"]].append(row)
    return found


def short_table(rows: list[dict[str, Any]]) -> str:
    """The rows that a reader compares first."""
    lines = [
        "| | top-1 % | NLL | ECE | Brier | OOD AUROC | NLL, corrupted | ECE, corrupted |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    methods = by_method(rows)
    for method in SHOWN:
        found = methods[method]
        if not found:
            lines.append(f"| {method} | not run | | | | | | |")
            continue
        cells = [
            spread([100 * r["test"]["accuracy"] for r in found], 2),
            *(spread([r["test"][key] for r in found], 3) for key in ("nll", "ece", "brier")),
            spread([r["ood"]["auroc"] for r in found], 3),
            *(spread([over(r, key) for r in found], 3) for key in ("nll", "ece")),
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def target_table(rows: list[dict[str, Any]]) -> str:
    """What was aimed at, what ours reached, and the best of the packages beside it."""
    methods = by_method(rows)
    ours = methods[OURS]
    ends = [r["test"]["intervals"]["ece"] for r in ours]
    within = all(low <= ECE_AIM <= high for low, high in ends)
    lines = ["| aim | ours | reached |", "| --- | ---: | --- |"]
    for text, value, reached in (
        ("top-1 >= 91.6 %", 100 * mean_of(ours, "accuracy"), mean_of(ours, "accuracy") >= 0.916),
        ("NLL <= 0.240", mean_of(ours, "nll"), mean_of(ours, "nll") <= 0.24),
        (f"ECE <= {ECE_AIM} or intervals that hold it", mean_of(ours, "ece"),
         mean_of(ours, "ece") <= ECE_AIM or within),
        ("OOD AUROC >= 0.905", (auroc := statistics.mean(r["ood"]["auroc"] for r in ours)),
         auroc >= 0.905),
    ):  # fmt: skip
        lines.append(f"| {text} | {value:#.4g} | {'yes' if reached else 'no'} |")
    for key, name in (("nll", "NLL"), ("ece", "ECE")):
        means = {m: statistics.mean(over(r, key) for r in methods[m]) for m in (*PEERS, OURS)}
        best = min(PEERS, key=means.__getitem__)
        lines.append(
            f"| corrupted: {name} below the packages' (least: {best}, {means[best]:#.4g}) "
            f"| {means[OURS]:#.4g} | {'yes' if means[OURS] < means[best] else 'no'} |"
        )
    return "\n".join([*lines, ""])


def over(row: dict[str, Any], key: str, kind: str | None = None) -> float:
    """Mean over the severities of one kind of corruption, or of all."""
    corrupted = row["corrupted"]
    chosen = corrupted.values() if kind is None else [corrupted[kind]]
    return float(statistics.mean(at[key] for each in chosen for at in each))


def spread(values: list[float], digits: int) -> str:
    """Mean and, of several seeds, their standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def source(rows: list[dict[str, Any]]) -> list[str]:
    row = rows[0]
    used, where = row["settings"], row["machine"]
    share = used.get("average", 0.0)
    averaged = f"the last {share:.0%} of the steps averaged, " if share else ""
    commits = ", ".join(f"`{commit}`" for commit in dict.fromkeys(r["commit"] for r in rows))
    days = sorted({r["date"] for r in rows})
    when = " to ".join(dict.fromkeys((days[0], days[-1])))
    there = gpu_of(where) or row["device"]
    return [
        "The least NLL first; means ± standard deviation over the seeds. "
        f"{used['train_images']:,} training images, epochs: {used['epochs']}, "
        f"{used['test_images']:,} test images, {used['ood_images']:,} OOD images, "
        f"{used['corrupted_images']:,} images at each corruption, K = {used['samples']} draws; "
        f"augmentation {used['augment']}, learning rates {used['lr']:g} and "
        f"{used['logvar_lr']:g}, initial sigma {used['relative_std']:g} of each tensor's RMS, "
        f"prior {prior_of(used)}, {averaged}BatchNorm's statistics "
        f"{'kept' if used['freeze_batchnorm'] else 'gathered anew'}; trained and predicted in "
        f"{'bfloat16 autocast' if used['amp'] else 'float32'}.",
        f"*{where['processor']}, {where['cores']} cores, {there}, torch "
        f"{row['versions']['torch']}, commits {commits}, {when}.*",
    ]
