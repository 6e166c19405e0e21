"""From the result file of `zoo_others.py`: its section in `docs/zoo.md`."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from zoo_libraries import rule

RESULT = Path(__file__).parent / "results" / "zoo_others.jsonl"
Row = dict[str, Any]

_METADATA = (
    "beside its tensors its state dict holds `_metadata`, the arguments that built it: tuples, "
    "functions, classes. `save` writes no pickle and refuses it by name; all else holds"
)
REASONS: dict[str, str] = {
    "kornia:DeDoDe": "`copy.deepcopy` of the original raises the same: it holds a view of a "
    "dict. `to_bbb` says so and names `to_bbb_`, which converts in place",
    "neuralop:FNO": _METADATA,
    "neuralop:FNOGNO": _METADATA,
    "neuralop:TFNO": _METADATA,
    "neuralop:UQNO": _METADATA,
}
"""Why a model does not pass, in words, where its problem does not say it."""


def read() -> dict[str, Row]:
    if not RESULT.exists():
        return {}
    rows = (json.loads(line) for line in RESULT.read_text().splitlines())
    return {row["name"]: row for row in rows}


def library(name: str) -> str:
    return name.partition(":")[0]


def outcome(row: Row | None) -> str:
    if row is None:
        return "not run"
    return "failed" if row["problems"] else "ok"


def passing(rows: dict[str, Row], names: list[str]) -> int:
    return sum(outcome(rows.get(name)) == "ok" for name in names)


def section(rows: dict[str, Row]) -> list[str]:
    """The lines of the section."""
    listed = rule.keys()
    by_hand = sorted(set(rows) - set(listed))
    tables = rule.read()
    libraries = list(dict.fromkeys(map(library, listed)))
    ok, ok_by_hand = passing(rows, listed), passing(rows, by_hand)
    checked = [row for row in rows.values() if row.get("all_owners")]
    owners, swapped = (sum(row[k] for row in checked) for k in ("all_owners", "all_swapped"))
    own, own_swapped = (sum(row[k] for row in checked) for k in ("owners", "swap"))
    first = [row["first_call_s"] for row in checked]
    commits = sorted({row["commit"] for row in rows.values()})
    versions = sorted({f"{k} {v}" for row in rows.values() for k, v in row["versions"].items()})
    return [
        "## Other libraries\n",
        f"**{ok} of {len(listed)} models of {len(libraries)} other libraries pass the numeric "
        f"check** ({100 * ok / max(len(listed), 1):.1f} %); of {len(by_hand)} more that were "
        f"chosen by hand, {ok_by_hand}.\n",
        "- *Which models*: a rule fixed the list before anything ran. Of each library's own table "
        "of models (for transformers, of each of its tables by task) the names are sorted, "
        "shuffled by a seed that is the table's name, and the first few taken. A name that the "
        "library cannot run here by itself, or that has no parameter, is passed over and stands "
        "below with its reason. What was chosen by hand is counted apart.\n"
        "- *What is checked*: every model is built at a tiny configuration with random weights, "
        "in a process of its own. In eval and in train mode, at the means and under a draw, "
        "outputs and buffers are those of the original with these weights, bit for bit; the "
        "gradients of all means and log variances are those of `torch.func.functional_call`; "
        "converting back is exact; a state dict and a file of `save`, each loaded into a model "
        "built anew, give the same draw.\n"
        f"- *Graphs*: an owner is a module with parameters of its own or below it. "
        f"{owners - swapped:,} of {owners:,} owners that were called became torch.fx graphs "
        f"({100 * (owners - swapped) / max(owners, 1):.1f} %), of those that hold parameters "
        f"themselves {own - own_swapped:,} of {own:,} "
        f"({100 * (own - own_swapped) / max(own, 1):.1f} %); the others take the fallback, with "
        "the same result.\n"
        f"- *First call*: the first call that draws, which traces, took "
        f"{statistics.median(first) if first else 0:.2f} s in the median and "
        f"{max(first, default=0):.0f} s at most, on a busy machine.\n",
        f"Checked with {', '.join(versions)} at {', '.join(f'`{c}`' for c in commits)}; "
        "`make zoo-others` does it again and writes this section.\n",
        "*Names* is how many the library's own tables have; *owners* and *fallback* count those "
        "of the models checked.\n",
        "| library | version | names | by the rule: ok | by hand: ok | owners | fallback |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        *(_library(name, tables, rows, listed, by_hand) for name in libraries),
        "",
        *_failures(rows, listed, by_hand),
        *_fallback(rows),
        *_passed_over(tables),
        "### All of them\n",
        "| model | parameters | Bayesian tensors | graphs, % | first call, s | numeric |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
        *(_model(name, rows.get(name)) for name in listed),
        *(_model(name, rows.get(name), " (by hand)") for name in by_hand),
        "",
    ]


def _library(
    name: str, tables: dict[str, Any], rows: dict[str, Row], listed: list[str], by_hand: list[str]
) -> str:
    own = {key: table for key, table in tables.items() if library(key) == name}
    chosen = [n for n in listed if library(n) == name]
    more = [n for n in by_hand if library(n) == name]
    checked = [rows[n] for n in (*chosen, *more) if rows.get(n, {}).get("all_owners")]
    version = next(iter(own.values()))["version"]
    return (
        f"| {name} | {version} | {sum(t['names'] for t in own.values())} | "
        f"{passing(rows, chosen)} of {len(chosen)} | "
        f"{f'{passing(rows, more)} of {len(more)}' if more else ''} | "
        f"{sum(r['all_owners'] for r in checked)} | {sum(r['all_swapped'] for r in checked)} |"
    )


def _failures(rows: dict[str, Row], listed: list[str], by_hand: list[str]) -> list[str]:
    failed = [n for n in (*listed, *by_hand) if outcome(rows.get(n)) == "failed"]
    missing = [n for n in listed if n not in rows]
    lines = ["### What does not pass\n"]
    if not failed:
        lines.append("Nothing that was run fails.\n")
    else:
        lines += ["| model | problem | why |", "| --- | --- | --- |"]
        for name in failed:
            problem = str(rows[name]["problems"][0]).replace("|", "/")
            lines.append(f"| `{name}` | {problem} | {REASONS.get(name, '')} |")
        lines.append("")
    if missing:
        lines.append(f"{len(missing)} of the list were not run yet.\n")
    return lines


def _fallback(rows: dict[str, Row]) -> list[str]:
    own: dict[str, list[str]] = defaultdict(list)
    others: dict[str, list[str]] = defaultdict(list)
    for name, row in sorted(rows.items()):
        for line in row.get("fallback", ()):
            reason = line.partition(": ")[2]
            if "(owns none)" in line.partition(": ")[0]:
                others[reason].append(name)
            else:
                own[line].append(name)
    lines = ["### Who takes the fallback\n"]
    lines += ["Modules that hold parameters themselves:\n", *_reasons("module and reason", own)]
    lines += ["Modules that hold none, only modules that do:\n", *_reasons("reason", others)]
    return lines


def _reasons(title: str, why: dict[str, list[str]]) -> list[str]:
    lines = [f"| {title} | models |", "| --- | --- |"]
    sets = {reason: sorted(set(names)) for reason, names in why.items()}
    for reason, names in sorted(sets.items(), key=lambda item: (-len(item[1]), item[0])):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        shown = ", ".join(f"`{n}`" for n in names[:3])
        lines.append(f"| {reason.replace('|', '/')} | {shown}{more} |")
    return [*lines, ""]


def _passed_over(tables: dict[str, Any]) -> list[str]:
    lines = ["### Passed over by the rule\n", "| name | why |", "| --- | --- |"]
    for table, row in tables.items():
        lines += [f"| `{table}:{name}` | {why} |" for name, why in row["passed_over"].items()]
    return [*lines, ""]


def _model(name: str, row: Row | None, note: str = "") -> str:
    if row is None or "parameters" not in row:
        return f"| `{name}`{note} | | | | | {outcome(row)} |"
    owners = row.get("all_owners", 0)
    graphs = f"{100 * (1 - row['all_swapped'] / owners):.4g}" if owners else ""
    return (
        f"| `{name}`{note} | {row['parameters']:,} | {row.get('tensors', '')} | {graphs} | "
        f"{row.get('first_call_s', '')} | {outcome(row)} |"
    )
