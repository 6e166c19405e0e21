"""Sigma and SNR of every tensor over the epochs: the numbers of figures 3 and 6."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from ..evaluation.uncertainty import PARTS
from .results import PRIORS, Numbers, RunRecord, paper_like, stamp, stamp_of_all


def _layers(record: RunRecord) -> dict[str, Any] | None:
    epochs = [line for line in record.log if line["kind"] == "epoch" and line.get("layers")]
    if not epochs:
        return None
    names = list(epochs[0]["layers"])
    keys = ("mean_std", "max_std", "mean_snr", "max_snr")
    return {
        "epochs": [e["epoch"] for e in epochs],
        "tensors": [
            {
                "name": n, "part": part_of(n), "kind": kind_of(n),
                **{k: [e["layers"][n][k] for e in epochs] for k in keys},
            }
            for n in names
        ],
    }  # fmt: skip


def part_of(name: str) -> str:
    """Encoder, projector or predictor, by a parameter's name."""
    head = name.partition(".")[0]
    return head if head in PARTS else "encoder"


def kind_of(name: str) -> str:
    """Matrix, or vector: biases, norms and tokens, whose SNR is of another size."""
    last = name.rpartition(".")[2]
    small = last != "weight" or "norm" in name or name.startswith(("projector.1.", "predictor.1."))
    return "vector" if small else "matrix"


def trajectories(columns: dict[str, list[RunRecord]]) -> Numbers | None:
    """Sigma and SNR of every tensor over the epochs, one column of the figure each.

    Of one seed: the first at which every column has a posterior that moved, else the first.
    """
    known = {
        name: {
            record.seed: (stamp([record]), layers)
            for record in sorted(group, key=lambda c: c.seed)
            if (layers := _layers(record)) is not None
        }
        for name, group in columns.items()
    }
    known = {name: by_seed for name, by_seed in known.items() if by_seed}
    if not known:
        return None
    shared = sorted(set.intersection(*map(set, known.values())))
    moved = [seed for seed in shared if not any(each[seed][0] for each in known.values())]
    shown = {}
    for name, by_seed in known.items():
        seed = (moved or shared or list(by_seed))[0]
        stamped, layers = by_seed[seed]
        shown[name] = {"seed": seed, **layers, "heads_low": heads_low(layers), "stamp": stamped}
    return {"columns": shown, "apart": apart(shown), "stamp": stamp_of_all(shown.values())}


def fig3(records: Sequence[RunRecord]) -> Numbers | None:
    """By prior."""
    return trajectories({PRIORS[p]: paper_like(records, prior=p) for p in PRIORS})


def fig6(records: Sequence[RunRecord]) -> Numbers | None:
    """By beta_end, prior N(0, I)."""
    betas = sorted({c.config.beta_end for c in records if c.config.bayesian})
    groups = {f"beta 0 -> {b:g}": paper_like(records, beta_end=b) for b in betas}
    return trajectories({name: group for name, group in groups.items() if group})


def apart(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """How far two columns are apart at the end: median over the matrices of |log ratio|."""
    names, found = list(columns), []
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            theirs = {t["name"]: t for t in columns[other]["tensors"] if t["kind"] == "matrix"}
            mine = [t for t in columns[one]["tensors"] if t["name"] in theirs]

            def middle(key: str, mine: Any = mine, theirs: Any = theirs) -> float | None:
                ratios = [
                    abs(math.log(t[key][-1] / theirs[t["name"]][key][-1]))
                    for t in mine
                    if t[key][-1] > 0 and theirs[t["name"]][key][-1] > 0
                ]
                return statistics.median(ratios) if ratios else None

            found.append({"pair": [one, other], "sigma": middle("mean_std"),
                          "snr": middle("mean_snr")})  # fmt: skip
    return found


def heads_low(layers: dict[str, Any]) -> dict[str, float | None]:
    """Who is in the low bundle: median final SNR of matrices in the encoder and in the heads."""
    ends: dict[str, list[float]] = {part: [] for part in PARTS}
    for tensor in layers["tensors"]:
        if tensor["kind"] == "matrix":
            ends[tensor["part"]].append(tensor["mean_snr"][-1])
    return {part: statistics.median(v) if v else None for part, v in ends.items()}
