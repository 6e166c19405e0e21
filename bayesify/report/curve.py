"""Quality of the predictions against sparsity."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from .. import evaluate
from ..data import ImageData
from ..storage import replacing
from ..training.readable import readable
from .figure import figure_class

Prune = Callable[[nn.Module, float, Any], object]
"""Prunes a model in place: of the model, the share, and the score."""

COLUMNS = ("prediction", "accuracy", "nll", "ece")


def pruning_curve(
    model: nn.Module,
    data: ImageData | Dataset[Any],
    prune: Prune,
    shares: Sequence[float],
    scores: Iterable[str],
    *,
    on_step: Callable[[int], None] | None = None,
    **measured: Any,
) -> list[dict[str, Any]]:
    """Prune copies of ``model`` further and further, and measure each.

    Args:
        model: A converted model; it is left as it is.
        data: As in :func:`bayesify.evaluate`.
        prune: What prunes, in place.
        shares: Sparsities in [0, 1), rising: what is pruned stays so.
        scores: Scores that ``prune`` knows.
        on_step: Gets the number of sparsities done.
        **measured: Further arguments of :func:`bayesify.evaluate`.

    Raises:
        DataError: An image of ``data`` cannot be read; all are looked at first, and once.

    Returns:
        One row for each score, sparsity and kind of prediction: ``score``, ``sparsity``,
        ``prediction``, ``accuracy``, ``nll`` and ``ece``.
    """
    skip = bool(measured.pop("skip_unreadable", False))
    data, _ = readable(data, workers=int(measured.get("workers", 0)), skip=skip)
    rows: list[dict[str, Any]] = []
    done = 0
    for score in scores:
        pruned = copy.deepcopy(model)
        for share in shares:
            prune(pruned, share, score)
            for row in evaluate(pruned, data, **measured):
                values = {column: getattr(row, column) for column in COLUMNS}
                rows.append({"score": score, "sparsity": share, **values})
            done += 1
            if on_step is not None:
                on_step(done)
    return rows


def draw_curve(rows: list[dict[str, Any]], path: Any, *, overwrite: bool = False) -> None:
    """Draw accuracy, NLL and ECE into a PNG, one line for each score and kind of prediction."""
    figure = figure_class()(figsize=(12, 3.6), layout="constrained")
    colours = {by: f"C{i}" for i, by in enumerate(dict.fromkeys(row["score"] for row in rows))}
    names = {"accuracy": "accuracy", "nll": "NLL in nats", "ece": "ECE"}
    for axes, (key, name) in zip(figure.subplots(1, 3), names.items(), strict=True):
        for by, colour in colours.items():
            for kind, style in (("MC average", "-"), ("at the means", ":")):
                line = [r for r in rows if r["score"] == by and r["prediction"] == kind]
                axes.plot([r["sparsity"] for r in line], [r[key] for r in line], style,
                          color=colour, marker=".", label=f"{by}, {kind}")  # fmt: skip
        axes.set_xlabel("sparsity")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with replacing(path, overwrite=overwrite) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
