"""The figures of a report, as SVG that takes its colours and its font from the page.

matplotlib draws each with stand-in colours, one a role; they are exchanged for CSS variables, so
that one figure serves a light page and a dark one.
"""

from __future__ import annotations

import io
import math
import re
from typing import Any

import numpy as np
from torch import Tensor

from .content import Report, Row
from .figure import figure_class
from .weights import SIGMA_EDGES, SNR_EDGES

# Roles. No colour of matplotlib's own may be among them.
INK, MUTED, GRID, PAPER = "#0000a1", "#0000a2", "#0000a3", "#0000a4"
DRAWS, MEANS, CONTROL = "#0000b1", "#0000b2", "#0000b3"
RIGHT, WRONG, OOD = "#0000c1", "#0000c2", "#0000c3"
_VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--line", PAPER: "--card", DRAWS: "--draws",
    MEANS: "--means", CONTROL: "--control", RIGHT: "--right", WRONG: "--wrong",
    OOD: "--ood",
}  # fmt: skip
_COLOUR_OF = {"MC average": DRAWS, "at the means": MEANS, "temperature scaled": CONTROL}
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, found and copied
    "svg.hashsalt": "bayesify",  # the same figure is the same file
    "font.size": 10.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "lines.linewidth": 1.8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
_WIDTH = 4.6  # inches of 72 points; on a phone the figure is as wide as the screen
_HUE = (0.31, 0.5, 0.88)  # of an image, which knows no variables: it must show on light and on dark
_POINTS = 300  # of a curve: more cannot be told apart


def figures(report: Report) -> dict[str, str]:
    """SVG text of each figure that the report has data for, by its name."""
    Figure = figure_class()
    from matplotlib import rc_context

    drawn: dict[str, str] = {}
    with rc_context(_STYLE):
        for name, (width, height), draw in (
            ("reliability", (_WIDTH, 4.7), _reliability),
            ("entropies", (_WIDTH, 3.3), _entropies),
            ("rejection", (_WIDTH, 4.7), _rejection),
            ("weights", (max(7.2, 2.0 + 0.14 * len(report.layers)), 4.6), _weights),
            ("pruned_accuracy", (_WIDTH, 3.1), _pruned_accuracy),
            ("pruned_nll", (_WIDTH, 3.1), _pruned_nll),
        ):
            if name.startswith("pruned") and not report.curve:
                continue
            figure = Figure(figsize=(width, height), layout="constrained")
            draw(figure, report)
            drawn[name] = _themed(figure, name)
    return drawn


def _reliability(figure: Any, report: Report) -> None:
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
    above.plot([0, 1], [0, 1], "--", color=MUTED, linewidth=1, label="says what it is worth")
    for row in report.rows:
        colour = _COLOUR_OF[row.prediction]
        if row.prediction == "temperature scaled":
            continue  # two are enough to look at; its numbers are in the table
        x, y = [b.confidence for b in row.bins], [b.accuracy for b in row.bins]
        if row.prediction == "MC average":
            low = [max(0.0, b.accuracy - b.interval.low) for b in row.bins]
            high = [max(0.0, b.interval.high - b.accuracy) for b in row.bins]
            above.errorbar(x, y, [low, high], color=colour, marker="o", markersize=4.5,
                           capsize=2.5, elinewidth=1.2, label=row.prediction, zorder=4)  # fmt: skip
        else:
            above.plot(x, y, color=colour, marker="s", markersize=4, markerfacecolor=PAPER,
                       linewidth=1.3, label=row.prediction, zorder=3)  # fmt: skip
        heights, edges = np.histogram(row.examples.confidence.numpy(), 15, (0.0, 1.0))
        below.stairs(heights / heights.sum(), edges, color=colour, linewidth=1.4,
                     fill=row.prediction == "MC average",
                     alpha=0.55 if row.prediction == "MC average" else 1.0)  # fmt: skip
    above.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="share that was right")
    above.legend(loc="upper left")
    below.set(xlabel="largest probability that it gave", ylabel="share of images")
    _percent(above.yaxis, below.yaxis, below.xaxis)


def _entropies(figure: Any, report: Report) -> None:
    axes = figure.subplots()
    average = report.rows[-1].examples
    right = average.hit.bool()
    edges = np.linspace(0.0, math.log(report.classes), 31)
    groups: list[tuple[Tensor, str, str]] = [
        (average.entropy[right], "predicted right", RIGHT),
        (average.entropy[~right], "predicted wrong", WRONG),
    ]
    if report.ood is not None:
        groups.append((report.ood.entropy, "out of distribution", OOD))
    for values, label, colour in groups:
        if not len(values):
            continue
        heights, _ = np.histogram(values.double().clamp(0.0, edges[-1]).numpy(), edges)
        shares = heights / len(values)
        axes.stairs(shares, edges, fill=True, color=colour, alpha=0.22)
        axes.stairs(shares, edges, color=colour, linewidth=1.6, label=f"{label} ({len(values):,})")
    axes.set(xlim=(0, edges[-1]), ylim=(0, None), xlabel="entropy of the average, nats",
             ylabel="share of the group")  # fmt: skip
    axes.legend()
    _percent(axes.yaxis)


def _rejection(figure: Any, report: Report) -> None:
    from ..metrics import risk_coverage

    axes = figure.subplots()
    lowest = 1.0
    for row in report.rows:
        if row.prediction == "temperature scaled":
            continue
        coverage, risk = risk_coverage(row.examples.confidence, row.examples.hit)
        x, y = _thinned(1.0 - coverage.numpy(), 1.0 - risk.numpy())
        lowest = min(lowest, float(y[x <= 0.9].min()))
        axes.plot(x, y, color=_COLOUR_OF[row.prediction], label=row.prediction)
    hits = report.rows[-1].examples.hit
    _, risk = risk_coverage(hits, hits)  # as if it knew which are wrong
    x, y = _thinned(1.0 - np.arange(1, len(hits) + 1) / len(hits), 1.0 - risk.numpy())
    axes.plot(x, y, ":", color=MUTED, linewidth=1.3, label="best possible order")
    bottom = max(0.0, lowest - 0.35 * (1.0 - lowest) - 0.005)
    axes.set(xlim=(0, 1), ylim=(bottom, 1.0 + 0.03 * (1.0 - bottom)),
             xlabel="share left unanswered, least sure first",
             ylabel="right among the answered")  # fmt: skip
    axes.legend(loc="lower right")
    _percent(axes.xaxis, axes.yaxis)


def _thinned(x: Any, y: Any) -> tuple[Any, Any]:
    kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), _POINTS)).round().astype(int))
    return x[kept], y[kept]


def _weights(figure: Any, report: Report) -> None:
    layers = report.layers
    number = np.arange(1, len(layers) + 1)
    for axes, name, edges, counts, middle in zip(
        figure.subplots(2, 1, sharex=True),
        ("sigma", "|mean| / sigma"),
        (SIGMA_EDGES.numpy(), SNR_EDGES.numpy()),
        (
            np.stack([layer.sigma_counts.numpy() for layer in layers]),
            np.stack([layer.snr_counts.numpy() for layer in layers]),
        ),
        ([layer.sigma for layer in layers], [layer.snr for layer in layers]),
        strict=True,
    ):
        used = np.flatnonzero(counts.sum(0) > 1e-3)
        low, high = (used.min(), used.max() + 1) if len(used) else (0, counts.shape[1])
        shown = np.sqrt(counts / counts.max(1, keepdims=True).clip(1e-12)).T[low:high]
        pixels = np.empty((*shown.shape, 4))
        pixels[..., :3], pixels[..., 3] = _HUE, 0.9 * shown
        axes.imshow(pixels, origin="lower", aspect="auto", interpolation="none",
                    extent=(0.5, len(layers) + 0.5, edges[low], edges[high]))  # fmt: skip
        with np.errstate(divide="ignore"):
            axes.plot(
                number,
                np.log10(middle).clip(edges[0]),
                "_",
                color=INK,
                markersize=7,
                markeredgewidth=1.6,
            )
        bottom, top = math.floor(edges[low]), math.ceil(edges[high])
        axes.set(xlim=(0.4, len(layers) + 0.6), ylim=(bottom - 0.05, top + 0.05), ylabel=name)
        axes.set_yticks(range(bottom, top + 1, 1 + (top - bottom) // 6))  # whole decades
        axes.yaxis.set_major_formatter(lambda value, _: f"{10.0**value:g}")
        axes.grid(axis="x", visible=False)
    axes.axhline(0.0, color=WRONG, linewidth=1.1, linestyle="--")
    axes.xaxis.set_major_locator(_ticker().MaxNLocator(12, integer=True, min_n_ticks=1))
    axes.set_xlabel("number of the tensor in the table, from the input on")


def _pruned_accuracy(figure: Any, report: Report) -> None:
    _pruned(figure, report, "accuracy", "accuracy")
    _percent(figure.axes[0].yaxis)


def _pruned_nll(figure: Any, report: Report) -> None:
    _pruned(figure, report, "nll", "NLL, nats")
    axes = figure.axes[0]
    guessing = math.log(report.classes)  # of a model that knows nothing; worse is off the figure
    axes.set_ylim(0, min(axes.get_ylim()[1], 1.25 * guessing))
    if axes.get_ylim()[1] > guessing:
        axes.axhline(guessing, color=MUTED, linewidth=1, linestyle="--")
        axes.text(0.01, guessing, "guessing", color=MUTED, fontsize=8, va="bottom")


def _pruned(figure: Any, report: Report, key: str, name: str) -> None:
    axes = figure.subplots()
    looks = {"snr": (DRAWS, "o"), "magnitude": (MEANS, "s"), "random": (CONTROL, "^")}
    labels = {"snr": "least |mean| / sigma", "magnitude": "least |mean|", "random": "at random"}
    for score, (colour, marker) in looks.items():
        rows = [
            r for r in report.curve if r["score"] == score and r["prediction"] == "MC average"
        ]  # fmt: skip
        axes.plot([r["sparsity"] for r in rows], [r[key] for r in rows], color=colour,
                  marker=marker, markersize=4, label=labels[score])  # fmt: skip
    axes.set(xlabel="share of the weights that is pruned", ylabel=name, xlim=(-0.02, 1.0))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handlelength=1.4,
                columnspacing=1.2)  # fmt: skip
    _percent(axes.xaxis)


def _percent(*scales: Any) -> None:
    for scale in scales:
        scale.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")


def _ticker() -> Any:
    from matplotlib import ticker

    return ticker


def _themed(figure: Any, name: str) -> str:
    """The figure as an inline SVG with colours and font of the page, and ids of its own."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(["Creator", "Date", "Format", "Type"])
    figure.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--sans)", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)
    head = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert head is not None
    opening = (
        f'<svg viewBox="0 0 {head[1]} {head[2]}" style="--width: {float(head[1]) / 16:.2f}rem" '
        f'role="img" aria-labelledby="{name}-title" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return re.sub(r"<svg.*?>", lambda _: opening, svg, count=1, flags=re.DOTALL)


def row_colour(row: Row) -> str:
    """The CSS variable of a kind of prediction, also for the page's own keys."""
    return _VARIABLES[_COLOUR_OF[row.prediction]]
