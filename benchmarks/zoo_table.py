"""From the result file of `zoo.py`: `docs/zoo.md`, and the table that `bayesify models` shows."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import zoo_others_table

from bayesify.zoo import ASSET, Verified

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]


def outcome(check: Row | None) -> str:
    if check is None:
        return "not run"
    return "failed" if check["problems"] else "ok"


def verified(rows: dict[str, Row]) -> list[Verified]:
    """One entry a model, in order of the names."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, row in rows.items():
        if outcome(row.get("numeric")) == "ok":
            groups[row.get("group", "")].append(name)
    found = []
    for name in sorted(rows):
        row = rows[name]
        structural, numeric = row.get("structural"), row.get("numeric")
        number, of = outcome(numeric), name
        if number == "ok" and numeric is not None and numeric["options"]:
            number = "shallow"
        alike = [n for n in groups[row.get("group", "")] if n != name]
        if number == "not run" and alike:
            number, of = "alike", min(alike, key=lambda n: rows[n]["parameters"])
        last = numeric or structural or {}
        library = "torchvision" if name.startswith("torchvision:") else "timm"
        versions = last.get("versions", {})
        found.append(
            Verified(
                name=name,
                parameters=row.get("parameters", 0),
                tensors=row.get("tensors", 0),
                structural=outcome(structural),
                numeric=number,
                numeric_of=of if number not in ("failed", "not run") else "",
                graphs=share(structural),
                note=note(structural, numeric),
                date=last.get("date", ""),
                versions=", ".join(f"{p} {versions.get(p, '?')}" for p in ("torch", library)),
            )
        )
    return found


def share(structural: Row | None) -> float:
    if not structural or not structural.get("owners"):
        return 0.0
    return float(round(1 - structural["swap"] / structural["owners"], 4))


def note(structural: Row | None, numeric: Row | None) -> str:
    """Why something failed, else how the numbers were got, else what the original refuses."""
    for check in (structural, numeric):
        if check and check["problems"]:
            return str(check["problems"][0])
    if numeric and numeric["options"]:
        return "numbers with " + ", ".join(f"{k}={v}" for k, v in numeric["options"].items())
    return ""


def render(rows: dict[str, Row], groups: int | None = None) -> None:
    """Write both tables."""
    table = verified(rows)
    columns = [field.name for field in dataclasses.fields(Verified)]
    lines = ",\n".join(json.dumps([getattr(v, c) for c in columns]) for v in table)
    asset = f'{{"columns": {json.dumps(columns)},\n"rows": [\n{lines}\n]}}\n'
    (ROOT / "bayesify" / "assets" / ASSET).write_text(asset)
    (ROOT / "docs" / "zoo.md").write_text(page(rows, table))


def page(rows: dict[str, Row], table: list[Verified]) -> str:
    ok = [v for v in table if v.structural == "ok"]
    groups = {r["group"] for r in rows.values() if "group" in r}
    proven = {rows[v.name]["group"] for v in table if v.numeric in ("ok", "shallow")}
    numbers = [v for v in table if v.numeric in ("ok", "shallow")]
    alike = [v for v in table if v.numeric == "alike"]
    checks = [r["structural"] for r in rows.values() if r.get("structural", {}).get("owners")]
    owners = sum(c["owners"] for c in checks)
    graphs = sum(c["plain"] + c["guided"] for c in checks)
    both = [
        v for v in table if v.numeric in ("ok", "shallow", "failed") and v.structural != "not run"
    ]
    agree = [v for v in both if (v.structural == "failed") == (v.numeric == "failed")]
    small = [v for v in table if v.parameters < 30_000_000]
    small_done = [v for v in small if v.numeric in ("ok", "shallow", "failed")]
    used = sum(c["used"] for c in checks)
    drawn = sum(c["drawn"] for c in checks)
    seconds = sorted(c["first_call_s"] for c in checks)
    dates = sorted({c["date"] for c in checks})
    commits = sorted(
        {r[k]["commit"] for r in rows.values() for k in ("structural", "numeric") if k in r}
    )
    versions = {f"{p} {v}" for c in checks for p, v in c["versions"].items()}
    parts = [
        "# Which models convert\n",
        f"Of the {len(table):,} models of timm and torchvision, **{len(ok):,} pass the structural "
        f"check**. The numbers of {len(numbers):,} were compared one by one, at least one of "
        f"**{len(proven)} of the {len(groups)} structural groups**; {len(alike):,} more consist of "
        "the same modules as one of these.\n",
        "- *Structural*, without data: everything is converted and called in eval and train mode "
        "with batches of 1 and 3. Every parameter that the original uses is drawn, and the draw "
        "reaches an operation; no raw parameter does. Classes, methods and state_dict keys are "
        "kept, `forward_features` draws too, and converting back restores all. Twelve detectors "
        "run on the CPU, all others on torch's meta device.",
        "- *Numeric*, on the CPU with random weights, zeros perturbed: at the means and under a "
        "draw, in eval and train mode, with a batch of 3 (1 for MViT, which takes 16 frames) and "
        "where possible another size of image, "
        "the outputs and buffers are bit for bit those of the original with these weights, and "
        "random numbers are consumed alike. Gradients reach every mean and log variance in use, "
        "two draws differ, and converting back is exact.",
        "- A *structural group* is a set of models in which the same classes of modules occur, "
        "with the same names of own parameters, buffers and children; how many layers there are "
        "and how wide they are does not count. Of each group the smallest model is compared first, "
        f"then the others below 30 M parameters: so far {len(small_done)} of {len(small)} "
        "below 30 M. Where the smallest model of a group is large, one with fewer layers of the "
        "same modules is compared; its row says so. Detectors get the statistics of their own "
        "images first, so that they find boxes.\n",
        f"{graphs:,} of {owners:,} owners of parameters became torch.fx graphs "
        f"({100 * graphs / max(owners, 1):.2f} %); {drawn:,} of {used:,} parameter tensors in use "
        f"are drawn. Where both checks ran they agree on {len(agree):,} of {len(both):,} models. "
        f"The first call, which traces, took {median(seconds):.1f} s in the median and "
        f"{seconds[-1] if seconds else 0:.0f} s at most, several models being checked at a time on "
        "two cores.\n",
        f"Checked {' to '.join(dict.fromkeys([dates[0], dates[-1]])) if dates else 'never'} with "
        f"{', '.join(sorted(versions))} at {', '.join(f'`{c}`' for c in commits)}; "
        "`make zoo` does it again and writes this page. "
        "`bayesify models --failed` lists what does not pass.\n",
        *exceptions(table),
        *fallbacks(rows),
        *zoo_others_table.section(zoo_others_table.read()),
        "## All models\n",
        "*as X* in the last column: not compared itself, but X, which has the same modules, was.\n",
        "| model | parameters, M | Bayesian tensors | graphs, % | structural | numeric |",
        "| --- | ---: | ---: | ---: | --- | --- |",
        *(
            f"| `{v.name}` | {v.parameters / 1e6:.1f} | {v.tensors} | {100 * v.graphs:.4g} | "
            f"{v.structural} | {in_words(v)} |"
            for v in table
        ),
    ]
    return "\n".join(parts) + "\n"


def in_words(v: Verified) -> str:
    if v.numeric == "alike":
        return f"as `{v.numeric_of}`"
    if v.numeric == "shallow":
        return f"ok, {v.note.removeprefix('numbers ')}"
    return v.numeric


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def exceptions(table: Iterable[Verified]) -> list[str]:
    found = [v for v in table if v.failed or "not run" in (v.structural, v.numeric)]
    failed = [v for v in found if v.failed]
    missing = [v for v in found if not v.failed]
    lines = ["## What does not pass\n"]
    if failed:
        lines += ["| model | structural | numeric | why |", "| --- | --- | --- | --- |"]
        lines += [
            f"| `{v.name}` | {v.structural} | {v.numeric} | {v.note.replace('|', '/')} |"
            for v in failed
        ]
        lines.append("")
    else:
        lines.append("Nothing that was run fails.\n")
    if missing:
        lines.append(
            f"{len(missing)} models lack a check that was not run yet: their rows say which.\n"
        )
    return lines


def fallbacks(rows: dict[str, Row]) -> list[str]:
    """Which modules run by the fallback, by reason."""
    why: dict[str, list[str]] = defaultdict(list)
    for name, row in sorted(rows.items()):
        for reason in row.get("structural", {}).get("fallback", ()):
            why[reason].append(name)
    lines = ["## Who takes the fallback\n"]
    if not why:
        return [*lines, "No module.\n"]
    lines.append(
        "The original forward runs and its reads of parameters are exchanged for draws: the result "
        "is the same, there is no graph to look at. `--strict` makes it an error. *Owns none*: the "
        "module has no parameter of its own, only modules that do.\n"
    )
    lines += ["| module and reason | models |", "| --- | --- |"]
    for reason, names in sorted(why.items(), key=lambda item: (-len(item[1]), item[0])):
        shown = ", ".join(f"`{n}`" for n in names[:3])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"| {reason.replace('|', '/')} | {shown}{more} |")
    return [*lines, ""]
