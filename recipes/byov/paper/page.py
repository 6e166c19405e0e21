"""One HTML page: the paper's numbers beside ours, then every figure. No script, no request."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from bayesify.report import html_page
from bayesify.storage import replacing

from .results import ENOUGH, Estimate, RunRecord

METRICS = (
    ("top1", "top-1"), ("top5", "top-5"), ("ece", "ECE"), ("brier", "Brier"),
    ("reliability", "rel."), ("resolution", "res."), ("nll", "NLL"),
)  # fmt: skip
NOT_RUN = "not run"
_CSS = """
:root { --ink: #1c2024; --muted: #667; --line: #e3e6ea; --panel: #fff; --page: #f6f7f9;
  --good: #00734f; --bad: #b03a00; --open: #80600a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --muted: #9aa3ad; --line: #333a42;
  --panel: #1b1f24; --page: #121519; --good: #4cc79a; --bad: #ff8a50; --open: #e0b94a; } }
* { box-sizing: border-box } body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; } main { max-width: 68rem; margin: 0 auto;
  padding: 2rem 1rem 4rem; } h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 0 0 .3rem; } p { margin: .3rem 0 .8rem; max-width: 46rem; }
section { background: var(--panel); border: 1px solid var(--line); border-radius: .6rem;
  padding: 1.1rem 1.2rem; margin: 1.2rem 0; } .says { color: var(--muted); }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; } th, td { text-align: left; padding: .35rem .7rem .35rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; } th { color: var(--muted);
  font-weight: 600; } td.n, th.n { text-align: right; white-space: nowrap; }
img { width: 100%; height: auto; background: #fff; border-radius: .4rem; margin-top: .4rem; }
.agrees { color: var(--good); font-weight: 600 } .disagrees, .stamp { color: var(--bad);
  font-weight: 600 } .undecided, .few { color: var(--open) } .not-run { color: var(--muted) }
footer { color: var(--muted); font-size: .85rem; }
"""


class Section(NamedTuple):
    """A figure on the page."""

    name: str
    title: str
    says: str
    numbers: dict[str, Any] | None
    drawn: bool


def page(
    path: Path,
    sections: Sequence[Section],
    comparison: Sequence[dict[str, Any]],
    overview: Sequence[dict[str, Any]],
    records: Sequence[RunRecord],
) -> None:
    """Write the page.

    Args:
        path: Its file, beside the figures' files.
        sections: The figures.
        comparison: As :func:`recipes.byov.claims.comparison` gives it.
        overview: As :func:`recipes.byov.tables.overview` gives it.
        records: The runs.
    """
    body = [_head(records), _claims(comparison), _overview(overview)]
    body += [_section(section, path.parent) for section in sections]
    body.append(_runs(records))
    content = f"<main>{''.join(body)}</main>"
    text = html_page("Bootstrap Your Own Variance, remade", _CSS, content)
    with replacing(path, overwrite=True) as temporary:
        temporary.write_text(text, "utf-8")


def number(value: Estimate | None, digits: int = 2) -> str:
    """``1.23 ± 0.45``, without an interval below three seeds; "not run" of none."""
    if value is None:
        return NOT_RUN
    shown = f"{value.mean:.{digits}f}"
    return f"{shown} ± {value.half:.{digits}f}" if value.half and value.n >= ENOUGH else shown


def paper_number(row: dict[str, Any]) -> str:
    """The paper's number with its sign, or that it is a picture or a word."""
    if row["paper"] is None:
        return "-" if row["where"] == "control" else "in words"
    return f"{row['paper']:+g}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int]) -> str:
    """An HTML table; cells are HTML already."""
    mark = ["n" if i in numeric else "" for i in range(len(columns))]

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="{m}">{c}</{tag}>' if m else f"<{tag}>{c}</{tag}>"
            for c, m in zip(cells, mark, strict=True)
        )

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    head = line("th", columns)
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{whole}</div>'


def _head(records: Sequence[RunRecord]) -> str:
    data = ", ".join(sorted({c.facts["data"] for c in records}))
    seeds = len({c.seed for c in records})
    return (
        "<h1>Bootstrap Your Own Variance, remade</h1>"
        f"<p>{len(records)} runs on {escape(data)}, {seeds} seed{'s' * (seeds != 1)}, beside the "
        'numbers of <a href="https://arxiv.org/abs/2312.03213">arXiv:2312.03213</a>, which are on '
        "ImageNet-1k. Differences are percentage points, plus being better; intervals are 95 % "
        f"over seeds (Student's t). Fewer than {ENOUGH} seeds support no claim.</p>"
    )


def _claims(comparison: Sequence[dict[str, Any]]) -> str:
    rows = []
    for row in comparison:
        verdict = row["verdict"]
        kind = {"agrees": "agrees", "disagrees": "disagrees", "not run": "not-run",
                "not converged": "stamp"}.get(verdict, "few")  # fmt: skip
        ours = row["ours"]
        rows.append(
            (
                escape(row["where"]), escape(row["claim"]), escape(paper_number(row)),
                escape(number(ours)), "" if ours is None else str(ours.n), escape(row["unit"]),
                f'<span class="{kind}">{escape(verdict)}</span>',
            )
        )  # fmt: skip
    columns = ("paper", "claim", "paper's number", "ours", "n", "unit", "verdict")
    return (
        "<section><h2>The paper's claims</h2>"
        f"{table(columns, rows, (2, 3, 4))}"
        "<p class='says'>Each difference is above 0 where the claim holds, or lies in the bounds "
        "that its words give. Not converged: the posterior hardly moved (median std of logvar "
        "within a tensor below 0.3), so that SNR ranks as magnitude does.</p></section>"
    )


def _overview(rows: Sequence[dict[str, Any]]) -> str:
    shown = [
        (
            escape(row["run"]), escape(row["prediction"]), str(row["top1"].n),
            *(escape(number(row[key])) for key, _ in METRICS),
        )
        for row in rows
    ]  # fmt: skip
    columns = ("run", "prediction", "n", *(title for _, title in METRICS))
    return (
        "<section><h2>All runs</h2><p class='says'>Linear probe on frozen means, in percent; NLL "
        "in nats. The same probe and grid of learning rates for all.</p>"
        f"{table(columns, shown, range(2, len(columns)))}</section>"
    )


def _section(section: Section, folder: Path) -> str:
    parts = [f"<section id='{section.name}'><h2>{escape(section.title)}</h2>"]
    parts.append(f"<p class='says'>Paper: {escape(section.says)}</p>")
    if section.numbers is None:
        parts.append("<p class='not-run'>not run</p>")
    else:
        if section.numbers.get("stamp"):
            parts.append(f"<p class='stamp'>{escape(section.numbers['stamp'])}</p>")
        else:
            stamps = [(p["run"], p["stamp"]) for p in section.numbers.get("panels", ())]
            shown = section.numbers.get("columns", {})
            stamps += [(name, column["stamp"]) for name, column in shown.items()]
            parts += [
                f"<p class='stamp'>{escape(of)}: {escape(text)}</p>" for of, text in stamps if text
            ]
        if section.drawn:
            svg = base64.b64encode((folder / f"{section.name}.svg").read_bytes()).decode("ascii")
            parts.append(
                f'<img alt="{escape(section.title)}" src="data:image/svg+xml;base64,{svg}">'
            )
        if section.name == "table1":
            parts.append(_table1(section.numbers))
        if section.name == "appC":
            parts.append(table(APP_C, appendix_c(section.numbers), range(1, len(APP_C))))
        if section.name == "width":
            parts.append(f"<p>{escape(SHIFTS)}</p>")
            parts.append(table(WIDTH, width(section.numbers), range(len(WIDTH))))
        if section.name == "fig7":
            columns = (RISES, *noise_levels(section.numbers))
            parts.append(table(columns, rises(section.numbers), range(1, len(columns))))
        if section.name == "fig4":
            parts.append(_gaps(section.numbers))
        if section.name == "fig4rounds":
            parts.append(_gains(section.numbers))
    return "".join([*parts, "</section>"])


def _table1(numbers: dict[str, Any]) -> str:
    rows = [
        (
            escape(r["conversion"]), escape(r["prior"] or "no BBB"), escape(r["beta"] or ""),
            *("-" if r[key] is None else f"{r[key]:.2f}" for key in ("paper_top1", "paper_top5")),
            escape(number(r["top1"])), escape(number(r["top5"])),
            "" if r["top1"] is None else str(r["top1"].n),
        )
        for r in numbers["rows"]
    ]  # fmt: skip
    columns = (
        "Bayesian",
        "prior",
        "beta",
        "paper top-1",
        "paper top-5",
        "our top-1",
        "our top-5",
        "n",
    )
    return table(columns, rows, range(3, 8))


APP_C = ("BYOV, N(0, I)", "top-1", "against the paper's", "ECE", "against the paper's",
         "spikes, % of steps", "std(logvar)", "n")  # fmt: skip


def appendix_c(numbers: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of appendix C's table: percent, and differences in points, plus being better."""
    keys = ("top1_delta", "ece", "ece_delta", "spikes", "logvar_spread")
    rows = []
    for r in numbers["rows"]:
        shown = ["" if r[key] is None else number(r[key]) for key in keys]
        n = "" if r["top1"] is None else str(r["top1"].n)
        rows.append((r["change"], number(r["top1"]), *shown, n))
    return rows


SHIFTS = (
    "Unseen shifts are the biases of the encoder's last norm and of the projector's last layer: "
    "the BatchNorm behind the next layer subtracts what they add, so that no loss depends on "
    "them and their posterior becomes the prior. A probe has no such BatchNorm: each draw moves "
    "all its inputs by one random vector."
)
WIDTH = ("without posterior", "final beta", "std(logvar)", "top-1", "top-1, MC average",
         "figure 1b: Spearman", "SNR pruning over magnitude", "most there", "figure 7: rise",
         "n")  # fmt: skip


def width(numbers: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of the table by final beta: percent and points, but for std(logvar) and rise."""
    keys = ("logvar_spread", "top1", "average", "rank", "gap", "most", "rise")
    return [
        (r["skip"] or "none", f"{r['beta']:g}",
         *("" if r[key] is None else number(r[key]) for key in keys), str(r["n"]))
        for r in numbers["rows"]
    ]  # fmt: skip


RISES = "variance over that without noise, behind the"


def noise_levels(numbers: dict[str, Any]) -> list[str]:
    """The columns of figure 7's table: standard deviations of the noise, of pixels in [0, 1]."""
    return [f"noise {noise:g}" for noise in numbers["noises"]]


def rises(numbers: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of figure 7's table: mean variance at each noise, as a share of that at none."""
    return [(c["part"], *map(number, c["over_none"])) for c in numbers["curves"]]


def _gaps(numbers: dict[str, Any]) -> str:
    rows = [
        (
            escape(panel["run"]), escape(gap["over"]), escape(gap["scope"]),
            *(escape(number(gap[key], 1)) for key in ("middle", "points", "sparser")),
            str(gap["points"].n),
        )
        for panel in numbers["panels"]
        for gap in panel["gaps"]
    ]  # fmt: skip
    columns = ("run", "SNR over", "share of", "mean, 50-90 %", "most there", "sparser by", "n")
    return table(columns, rows, range(3, 7))


def _gains(numbers: dict[str, Any]) -> str:
    rows = [
        (
            escape(panel["run"]), escape(gain["difference"]), f"{gain['sparsity']:.0%}",
            *(escape(number(gain[key], 1)) for key in ("top1", "anew")), str(gain["top1"].n),
        )
        for panel in numbers["panels"]
        for gain in panel["gains"]
    ]  # fmt: skip
    columns = ("run", "difference in points", "pruned", "frozen probe", "probe anew", "n")
    return table(columns, rows, range(2, 6))


def _runs(records: Sequence[RunRecord]) -> str:
    rows = [
        (
            escape(c.facts["run"]), str(c.seed), f"{c.facts['step']:,} of {c.facts['steps']:,}",
            "" if c.facts["logvar_travel"] is None else f"{c.facts['logvar_travel']:.2f}",
            "" if c.facts["logvar_spread"] is None else f"{c.facts['logvar_spread']:.2f}",
            f"{c.facts['test_images']:,}", escape(c.facts["device"]),
            escape(str(c.facts["commit"])),
        )
        for c in records
    ]  # fmt: skip
    columns = (
        "run",
        "seed",
        "steps",
        "logvar travel",
        "std(logvar)",
        "test images",
        "device",
        "commit",
    )
    return f"<section><h2>The runs</h2>{table(columns, rows, range(1, 6))}</section>"
