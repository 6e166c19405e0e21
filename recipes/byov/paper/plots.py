"""The pictures: each draws the numbers of one figure, and nothing that is not in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bayesify.storage import replacing

from ..evaluation.uncertainty import PARTS
from .look import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PART_COLOUR,
    PRIOR_LOOK,
    PRIOR_NAME,
    PURPLE,
    RED,
    SKY,
    STYLE,
    half_of,
    pretty,
    stamp_on,
)
from .pruning_plots import fig4, fig4rounds
from .results import Numbers


def draw(name: str, numbers: Numbers, folder: Path) -> list[Path]:
    """Write a figure as PNG and SVG.

    Args:
        name: A key of :data:`DRAWN`.
        numbers: What :mod:`.tables` made.
        folder: Where to.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    written = []
    with rc_context(rc=STYLE):
        figure = Figure(layout="constrained")
        DRAWN[name](figure, numbers)
        if numbers.get("stamp"):
            figure.text(0.5, 0.5, numbers["stamp"].upper(), color=RED, alpha=0.22, fontsize=26,
                        rotation=18, ha="center", va="center", weight="bold",
                        zorder=50)  # fmt: skip
        for ending in (".png", ".svg"):
            path = folder / f"{name}{ending}"
            nothing = {"Date": None} if ending == ".svg" else {}
            with replacing(path, overwrite=True) as temporary:
                figure.savefig(temporary, format=ending[1:], dpi=160, metadata=nothing)
            figure.set_layout_engine("none")  # it is laid out, and the work is long
            written.append(path)
    return written


def _fig1b(figure: Any, numbers: Numbers) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Ellipse

    figure.set_size_inches(5.4, 4.8)
    axes = figure.subplots()
    x, y = np.asarray(numbers["supervised_std"]), np.asarray(numbers["byov_std"])
    dense = axes.hexbin(x, y, gridsize=38, mincnt=1, cmap="Blues", linewidths=0.2,
                        norm=LogNorm(vmin=0.3), rasterized=True)  # fmt: skip
    figure.colorbar(dense, ax=axes, label="images", pad=0.01, shrink=0.9)
    values, vectors = np.linalg.eigh(np.asarray(numbers["gaussian"]["covariance"]))
    angle = np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1]))
    for k in (1, 2):
        width, height = 2 * k * np.sqrt(np.maximum(values[::-1], 0))
        axes.add_patch(
            Ellipse(numbers["gaussian"]["mean"], width, height, angle=angle, fill=False,
                    edgecolor=RED, linewidth=1.5, linestyle="-" if k == 1 else "--",
                    label=f"Gaussian fit, {k} sd")
        )  # fmt: skip
    first = numbers["pairs"][0]
    axes.set(
        xlabel="predictive std, supervised BBB", ylabel="predictive std, BYOV",
        title=f"{len(x):,} test images, {numbers['draws']} draws, seed {first['seed']}",
        xlim=_margin(x), ylim=_margin(y),
    )  # fmt: skip
    axes.locator_params(nbins=6)
    text = "\n".join(
        f"{title} {first[key]:.2f}"
        for title, key in (("Pearson", "pearson"), ("Spearman", "spearman"),
                           ("residual KS", "ks"), ("5 % limit", "ks_limit"))
        if first.get(key) is not None
    )  # fmt: skip
    axes.text(0.98, 0.03, text, transform=axes.transAxes, ha="right", va="bottom", fontsize=8.5,
              bbox={"facecolor": "white", "edgecolor": "#cccccc", "alpha": 0.85})  # fmt: skip
    axes.legend(loc="upper left")


def _margin(values: Any) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    room = 0.12 * (high - low) or 1e-3
    return max(0.0, low - room), high + room


_METRIC_TITLE = {
    "top1": "top-1", "top5": "top-5", "ece": "ECE", "brier": "Brier score",
    "reliability": "Brier reliability", "resolution": "Brier resolution",
}  # fmt: skip
_PREDICTION_LOOK = {
    "at the means": ("-", True), "MC average": ("--", False),
}  # fmt: skip


def _fig2(figure: Any, numbers: Numbers) -> None:
    figure.set_size_inches(10.5, 6.2)
    betas = sorted({g["beta_end"] for g in numbers["grid"]})
    place = {beta: i for i, beta in enumerate(betas)}
    for axes, metric in zip(figure.subplots(2, 3).flat, _METRIC_TITLE, strict=True):
        axes.axhline(0, color=BLACK, linewidth=1.2, label="BYOL, at the means")
        for control in numbers["controls"]:
            if control["metric"] != metric or control["delta"] is None:
                continue
            scaled = control["prediction"] == "means, scaled"
            free = "no weight" in control["name"]
            if control["prediction"] == "teacher" or not (scaled or free) or (scaled and free):
                continue
            name = "BYOL, temperature scaled" if scaled else "BYOL, no weight decay"
            axes.axhline(control["delta"].mean, color=GREY, linewidth=1.2,
                         linestyle=":" if scaled else "--", label=name)  # fmt: skip
        for i, (prior, (colour, marker)) in enumerate(PRIOR_LOOK.items()):
            for prediction, (line, filled) in _PREDICTION_LOOK.items():
                rows = [g for g in numbers["grid"] if g["metric"] == metric and g["prior"] == prior
                        and g["prediction"] == prediction and g["delta"] is not None]  # fmt: skip
                if not rows:
                    continue
                shift = 0.09 * (i - 1) + (0.0 if filled else 0.03)
                x = [place[r["beta_end"]] + shift for r in rows]
                half = [half_of(r["delta"]) for r in rows]
                axes.errorbar(x, [r["delta"].mean for r in rows], half, color=colour,
                              linestyle=line, linewidth=1.3, marker=marker, markersize=5.5,
                              markerfacecolor=colour if filled else "white", capsize=2.5,
                              elinewidth=0.9,
                              label=f"{PRIOR_NAME[prior]}, {prediction}")  # fmt: skip
        axes.set(title=_METRIC_TITLE[metric], xlim=(-0.4, len(betas) - 0.6))
        axes.set_xticks(range(len(betas)), [f"{b:g}" for b in betas])
        axes.set_xlabel(r"$\beta_{end}$")
        axes.set_ylabel("points against BYOL, + better")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)


def _stability(figure: Any, numbers: Numbers) -> None:
    figure.set_size_inches(8.6, 3.4)
    colours = {"BYOL": BLACK, "BYOV N(0, I)": BLUE, "BYOV N(mu_T, I)": GREEN,
               "BYOV N(mu_T, Sigma_T)": RED}  # fmt: skip
    for axes, key, title in zip(
        figure.subplots(1, 2), ("loss", "grad_norm"), ("loss, 0 to 8", "gradient norm"),
        strict=True,
    ):  # fmt: skip
        seen = set()
        for curve in numbers["curves"]:
            name = curve["run"]
            axes.plot(curve["step"], [np.nan if v is None else v for v in curve[key]],
                      color=colours.get(name, GREY), linewidth=1.1,
                      alpha=0.9 if name not in seen else 0.4,
                      label=name if name not in seen else None)  # fmt: skip
            seen.add(name)
        axes.set(xlabel="optimizer step", title=title)
        if key == "grad_norm":
            axes.set_yscale("log")
    figure.axes[0].legend()


def _trajectories(figure: Any, numbers: Numbers, rows: tuple[tuple[str, str], ...]) -> None:
    columns = numbers["columns"]
    figure.set_size_inches(0.9 + 3.1 * len(columns), 0.8 + 2.1 * len(rows))
    grid = figure.subplots(len(rows), len(columns), sharex=True, sharey="row", squeeze=False)
    for column, (name, shown) in enumerate(columns.items()):
        for row, (key, title) in enumerate(rows):
            axes = grid[row, column]
            for tensor in sorted(shown["tensors"], key=lambda t: t["kind"] == "matrix"):
                matrix = tensor["kind"] == "matrix"
                axes.plot(shown["epochs"], tensor[key], color=PART_COLOUR[tensor["part"]],
                          linewidth=1.1 if matrix else 0.7, alpha=0.85 if matrix else 0.25,
                          marker="." if len(shown["epochs"]) < 4 else None)  # fmt: skip
            axes.set_yscale("log")
            axes.xaxis.get_major_locator().set_params(integer=True)
            if row == 0:
                axes.set_title(pretty(name) + f"  (seed {shown['seed']})")
                stamp_on(axes, shown)
            if row == len(rows) - 1:
                axes.set_xlabel("epoch")
            if column == 0:
                axes.set_ylabel(title)
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=c, label=p) for p, c in PART_COLOUR.items()]
    handles.append(Line2D([], [], color=GREY, linewidth=0.8, alpha=0.6,
                          label="pale: biases, norms, tokens"))  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, 2 * len(columns)))


def _fig3(figure: Any, numbers: Numbers) -> None:
    _trajectories(
        figure, numbers,
        (("mean_std", r"$\sigma$, mean of a tensor"), ("max_std", r"$\sigma$, maximum"),
         ("mean_snr", "SNR, mean of a tensor"), ("max_snr", "SNR, maximum")),
    )  # fmt: skip


def _fig6(figure: Any, numbers: Numbers) -> None:
    _trajectories(
        figure, numbers, (("mean_snr", "SNR, mean of a tensor"), ("max_snr", "SNR, maximum"))
    )


def _fig4shift(figure: Any, numbers: Numbers) -> None:
    rows = numbers["rows"]
    kinds = list(dict.fromkeys(r["kind"] for r in rows))
    order = {(r["kind"], r["metric"]): r for r in rows}

    def height(kind: str) -> float:
        delta = order[kind, "reliability"]["delta"]
        return -1e9 if delta is None else delta.mean

    shown = sorted((k for k in kinds if k != "none"), key=height)
    shown = [*shown, "none"] if "none" in kinds else shown
    figure.set_size_inches(9.2, 0.9 + 0.33 * len(shown))
    for axes, metric, title in zip(
        figure.subplots(1, 2, sharey=True), ("reliability", "ece"),
        ("Brier reliability", "ECE"), strict=True,
    ):  # fmt: skip
        for y, kind in enumerate(shown):
            row = order[kind, metric]
            if row["delta"] is None:
                continue
            value, half = row["delta"].mean, half_of(row["delta"]) or None
            axes.barh(y, value, height=0.62, color=GREEN if value >= 0 else RED, alpha=0.75,
                      xerr=half, error_kw={"elinewidth": 1.0, "capsize": 2.5})  # fmt: skip
            points = [s.mean for s in row["severities"] if s is not None]
            axes.scatter(points, [y] * len(points), s=9, color=BLACK, alpha=0.45, zorder=4)
        axes.axvline(0, color=BLACK, linewidth=1)
        axes.set(title=title, xlabel="points against BYOL, + better")
        axes.grid(axis="y", visible=False)
    names = ["in distribution" if k == "none" else k for k in shown]
    figure.axes[0].set_yticks(range(len(shown)), names)


def _fig5(figure: Any, numbers: Numbers) -> None:
    figure.set_size_inches(9.0, 3.7)
    left, right = figure.subplots(1, 2)
    palette = [BLACK, BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY]
    for colour, curve in zip(palette, numbers["curves"], strict=False):
        name = "no augmentation" if curve["kind"] == "none" else curve["kind"]
        k = np.array([r["k"] for r in curve["rows"]])
        mean, std = (np.array([r[key] for r in curve["rows"]]) for key in ("mean", "std"))
        left.plot(k, mean, color=colour, label=name)
        if curve["kind"] == "none":
            left.fill_between(k, mean - std, mean + std, color=colour, alpha=0.12, linewidth=0)
        right.plot(k, std, color=colour)
        right.plot(k, [r["disjoint"] for r in curve["rows"]], ".", color=colour, markersize=3)
        if colour == BLACK:
            right.plot(k, std[0] / np.sqrt(k), "--", color=GREY, linewidth=1.3,
                       label=r"$\propto 1 / \sqrt{K}$")  # fmt: skip
    left.set(ylim=(max(0.0, left.get_ylim()[0]), min(1.0, left.get_ylim()[1])))
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set(xlabel="draws K", ylabel="probability of the predicted class",
             title="mean; band: ± std without augmentation")  # fmt: skip
    right.set(xlabel="draws K", xscale="log", yscale="log", ylabel="std of the average",
              title="std: lines bootstrap, dots disjoint draws")  # fmt: skip
    right.legend(loc="lower left")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6)


def _fig7(figure: Any, numbers: Numbers) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    figure.set_size_inches(12.4, 3.5)
    panels = figure.subplots(1, 4)
    levels = numbers["levels"]
    colours = colormaps["viridis"]
    scale = Normalize(0, max(lev["noise"] for lev in levels) or 1.0)
    for axes, (one, other) in zip(panels, ((0, 1), (0, 2), (1, 2)), strict=False):
        for lev in levels:
            axes.scatter(lev["unit"][PARTS[one]], lev["unit"][PARTS[other]], s=5, alpha=0.5,
                         color=colours(scale(lev["noise"])), linewidths=0,
                         rasterized=True)  # fmt: skip
        axes.set(xlabel=f"variance, {PARTS[one]}", ylabel=f"variance, {PARTS[other]}")
        axes.locator_params(nbins=5)
        axes.ticklabel_format(style="sci", scilimits=(-2, 2), useMathText=True)
    last = panels[3]
    noise = [lev["noise"] for lev in levels]
    for part, colour in PART_COLOUR.items():
        values = [np.asarray(lev["unit"][part]) for lev in levels]
        first = values[0].mean() or 1.0
        mean = np.array([v.mean() / first for v in values])
        low, high = (np.array([np.quantile(v, q) / first for v in values]) for q in (0.1, 0.9))
        last.plot(noise, mean, color=colour, marker="o", markersize=4, label=part)
        last.fill_between(noise, low, high, color=colour, alpha=0.15, linewidth=0)
    last.set(xlabel="std of the noise", ylabel="over that without noise",
             title="mean, 10 to 90 % of images")  # fmt: skip
    last.legend()
    from matplotlib.cm import ScalarMappable

    figure.colorbar(ScalarMappable(scale, colours), ax=panels[2], label="std of the noise")
    figure.suptitle(f"Vectors of unit length, {numbers['draws']} draws; each point is an image",
                    fontsize=9.5, weight="bold", x=0.4)  # fmt: skip


def _app_b(figure: Any, numbers: Numbers) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    figure.set_size_inches(4.8, 3.5)
    axes = figure.subplots()
    looks = {"weight": (BLUE, "o"), "local": (GREEN, "s"), "flipout": (RED, "^")}
    for name, (colour, marker) in looks.items():
        rows = [r for r in numbers["rows"] if r["estimator"] == name and r["relative"] is not None]
        axes.plot([r["batch"] for r in rows], [r["relative"].mean for r in rows], color=colour,
                  marker=marker, label=name)  # fmt: skip
    seeds = max((r["relative"].n for r in numbers["rows"] if r["relative"] is not None), default=0)
    axes.set(xscale="log", yscale="log", xlabel="images in a batch",
             ylabel="variance of the gradient\nover its squared mean",
             title=f"{numbers['draws']} draws, same images; mean of {seeds} "
             f"{'seed' if seeds == 1 else 'seeds'}")  # fmt: skip
    sizes = sorted({r["batch"] for r in numbers["rows"]})
    axes.set_xticks(sizes, [str(s) for s in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(),
                   major_formatter=StrMethodFormatter("{x:g}"))  # fmt: skip
    axes.legend(title="one draw of each")


DRAWN: dict[str, Callable[[Any, Numbers], None]] = {
    "fig1b": _fig1b,
    "fig1b-seen": _fig1b,
    "fig2": _fig2,
    "stability": _stability,
    "fig3": _fig3,
    "fig4": fig4,
    "fig4rounds": fig4rounds,
    "fig4shift": _fig4shift,
    "fig5": _fig5,
    "fig6": _fig6,
    "fig7": _fig7,
    "appB": _app_b,
}
"""How each figure is drawn."""
