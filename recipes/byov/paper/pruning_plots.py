"""The pictures of pruning: figure 4, left, and what goes beyond it."""

from __future__ import annotations

from typing import Any

from .look import BLACK, BLUE, GREY, ORANGE, PURPLE, RED, SKY, half_of, pretty, stamp_on
from .results import Numbers

_PRUNE_LOOK = {
    "SNR": (BLUE, "-", "o"),
    "magnitude": (RED, "-", "s"),
    "SNR, sigma shuffled": (SKY, "--", "v"),
    "magnitude x mean 1 / sigma": (ORANGE, ":", "D"),
    "1 / sigma": (PURPLE, "-", "^"),
    "random": (GREY, ":", None),
}


def fig4(figure: Any, numbers: Numbers) -> None:
    panels = numbers["panels"]
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure.set_size_inches(1.0 + 3.9 * columns, 0.9 + 3.3 * lines)
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        for curve in panel["curves"]:
            if curve["scope"] != "tensor":
                continue
            colour, line, marker = _PRUNE_LOOK[curve["criterion"]]
            _pruned(axes, curve, colour, line, marker, curve["criterion"])
        for curve in panel["byol"]:
            if curve["criterion"] == "magnitude" and curve["scope"] == "tensor":
                _pruned(axes, curve, BLACK, "--", "x", "BYOL, magnitude")
        title = pretty(panel["run"])
        n = panel["curves"][0]["n"]
        spread = panel["logvar_spread"]
        axes.set_title(f"{title}\n{n} seed{'s' * (n > 1)}, std(logvar) {spread.mean:.2f}")
        stamp_on(axes, panel)
        axes.set_xlabel("pruned in each tensor, %")
        axes.set_xlim(-2, 100)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for row in range(lines):
        grid[row * columns].set_ylabel("top-1 of the frozen probe, %")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, 1 + columns))


def _pruned(axes: Any, curve: Any, colour: str, line: str, marker: str | None, name: str) -> None:
    x = [100 * p["sparsity"] for p in curve["points"]]
    axes.plot(x, [100 * p["top1"] for p in curve["points"]], color=colour, linestyle=line,
              marker=marker, markersize=4, label=name)  # fmt: skip
    if curve["n"] > 1:
        axes.fill_between(x, [100 * p["low"] for p in curve["points"]],
                          [100 * p["high"] for p in curve["points"]], color=colour, alpha=0.12,
                          linewidth=0)  # fmt: skip


def fig4rounds(figure: Any, numbers: Numbers) -> None:
    panels = numbers["panels"]
    ways = ("one shot", "one shot, then trained", "iterative")
    figure.set_size_inches(1.4 + 3.6 * len(panels), 6.6)
    grid = figure.subplots(2, len(panels), sharex=True, sharey="row", squeeze=False)
    heads = (("top1", "frozen probe"), ("anew", "probe trained anew"))
    for column, panel in enumerate(panels):
        arms = {(a["way"], a["criterion"], a["sparsity"]): a for a in panel["arms"]}
        shares = sorted({share for _, criterion, share in arms if criterion})
        for axes, (key, title) in zip(grid[:, column], heads, strict=True):
            for (way, criterion, _), arm in arms.items():
                if criterion is None:
                    dense = way == "dense"
                    axes.axhline(arm[key].mean, color=BLACK if dense else GREY, linewidth=1.1,
                                 linestyle=":" if dense else "--", label=way)  # fmt: skip
            for criterion in ("SNR", "magnitude"):
                colour, _, marker = _PRUNE_LOOK[criterion]
                for i, share in enumerate(shares):
                    shown = [arms.get((way, criterion, share)) for way in ways]
                    known = [(x, arm[key]) for x, arm in enumerate(shown) if arm is not None]
                    if known:
                        axes.errorbar(
                            [x for x, _ in known], [value.mean for _, value in known],
                            [half_of(value) for _, value in known], color=colour,
                            linestyle=("-", "--", ":", "-.")[i % 4], marker=marker, markersize=4,
                            capsize=2.5, elinewidth=0.9, label=f"{criterion}, {share:.0%} pruned",
                        )  # fmt: skip
            if column == 0:
                axes.set_ylabel(f"top-1 of the {title}, %")
            axes.set_xlim(-0.3, 2.3)
            stamp_on(axes, panel)
        n = panel["n"]
        grid[0, column].set_title(
            f"{pretty(panel['run'])}\n{panel['rounds']} rounds, {panel['steps']:,} steps in all, "
            f"{n} seed{'s' * (n > 1)}"
        )
        grid[1, column].set_xticks(range(3), [way.replace(", ", ",\n") for way in ways])
    keys = max((a.get_legend_handles_labels() for a in grid[0]), key=lambda pair: len(pair[1]))
    figure.legend(*keys, loc="outside lower center", ncols=min(4, 1 + len(panels)))
