"""How the pictures look: colours, names, and what several of them show alike."""

from __future__ import annotations

from typing import Any

from .results import ENOUGH, Numbers

# Okabe and Ito's colours, which colour-blind readers tell apart.
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    "#1a1a1a", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7",
)  # fmt: skip
GREY = "#8c8c8c"
STYLE: Any = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": "#555555",
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelcolor": "#1a1a1a",
    "ytick.labelcolor": "#1a1a1a",
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.7,
    "svg.fonttype": "none",
    "svg.hashsalt": "byov",  # the same numbers are the same file
}
PRIOR_LOOK = {"zero": (BLUE, "o"), "teacher-mean": (GREEN, "s"), "teacher": (RED, "^")}
PRIOR_NAME = {"zero": r"$N(0, I)$", "teacher-mean": r"$N(\mu_T, I)$",
               "teacher": r"$N(\mu_T, \Sigma_T)$"}  # fmt: skip
PART_COLOUR = {"encoder": BLUE, "projector": ORANGE, "predictor": RED}


def half_of(value: Any) -> float:
    """An interval of fewer seeds says nothing that an eye should see."""
    return (value.half or 0.0) if value.n >= ENOUGH else 0.0


def pretty(name: str) -> str:
    return (
        name.replace("N(0, I)", PRIOR_NAME["zero"])
        .replace("N(mu_T, I)", PRIOR_NAME["teacher-mean"])
        .replace("N(mu_T, Sigma_T)", PRIOR_NAME["teacher"])
        .replace("beta", r"$\beta$")
        .replace("->", r"$\rightarrow$")
    )


def stamp_on(axes: Any, panel: Numbers) -> None:
    if panel["stamp"]:
        axes.text(0.5, 0.06, panel["stamp"], transform=axes.transAxes, color=RED, ha="center",
                  fontsize=9, weight="bold")  # fmt: skip
