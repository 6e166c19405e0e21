"""The numbers of pruning, from the results of the runs at hand: at once, and in rounds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ..iterative import ONCE, ROUNDS, THEN
from .results import (
    Numbers,
    RunRecord,
    baselines,
    estimate,
    ordered,
    select,
    stamp,
    stamp_of_all,
)


def fig4(records: Sequence[RunRecord]) -> Numbers | None:
    """Top-1 over sparsity: criteria side by side, one panel a prior, BYOL's magnitude in each."""
    panels = []
    for name, group in ordered(records):
        members = [c for c in group if c.numbers("prune") and c.config.bayesian]
        if members and members[0].config.objective == "byol":
            byol = _same_encoder(records, members[0])
            panels.append(
                {
                    "run": name, "curves": _mean_curves(members), "gaps": _mean_gaps(members),
                    "byol": _mean_curves(byol), "byol_seeds": len(byol),
                    "logvar_spread": estimate(c.facts["logvar_spread"] for c in members),
                    "stamp": stamp(members),
                }
            )  # fmt: skip
    if not panels:
        return None
    return {"panels": panels, "stamp": stamp_of_all(panels)}


def _same_encoder(records: Sequence[RunRecord], like: RunRecord) -> list[RunRecord]:
    """Pruned runs of BYOL with the same encoder: the baseline, where that has it."""
    found = [c for c in baselines(records)["BYOL"] if c.config.encoder == like.config.encoder]
    found = found or select(
        records, conversion="none", objective="byol", encoder=like.config.encoder
    )
    return [c for c in found if c.numbers("prune")]


def _mean_curves(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if not records:
        return found
    for shape in records[0].results["prune"]["numbers"]["curves"]:
        same = [
            c["points"]
            for record in records
            for c in record.results["prune"]["numbers"]["curves"]
            if (c["criterion"], c["scope"]) == (shape["criterion"], shape["scope"])
            and len(c["points"]) == len(shape["points"])
        ]
        found.append(
            {
                "criterion": shape["criterion"],
                "scope": shape["scope"],
                "n": len(same),
                "points": [
                    {
                        "sparsity": rows[0]["sparsity"],
                        "top1": statistics.fmean(r["top1"] for r in rows),
                        "low": min(r["top1"] for r in rows),
                        "high": max(r["top1"] for r in rows),
                    }
                    for rows in zip(*same, strict=True)
                ],
            }
        )
    return found


def _mean_gaps(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    found = []
    for shape in records[0].results["prune"]["numbers"]["gaps"]:
        same = [
            g
            for record in records
            for g in record.results["prune"]["numbers"]["gaps"]
            if (g["over"], g["scope"]) == (shape["over"], shape["scope"])
        ]
        found.append(
            {"over": shape["over"], "scope": shape["scope"],
             **{k: estimate(g[k] for g in same) for k in ("points", "middle", "area", "sparser")}}
        )  # fmt: skip
    return found


def fig4rounds(records: Sequence[RunRecord]) -> Numbers | None:
    """Pruning in rounds of training beside pruning at once, with and without the same steps."""
    panels = []
    for name, group in ordered(records):
        members = [c for c in group if c.numbers("iterative")]
        if members:
            results = [c.results["iterative"] for c in members]
            panels.append(
                {
                    "run": name,
                    "arms": _mean_arms(results),
                    "gains": _gains(results),
                    "steps": results[0]["settings"]["steps"] * results[0]["settings"]["rounds"],
                    "rounds": results[0]["settings"]["rounds"],
                    "n": len(members),
                    "stamp": stamp(members),
                }
            )
    if not panels:
        return None
    return {"panels": panels, "stamp": stamp_of_all(panels)}


def _arm(result: dict[str, Any], way: str, criterion: str | None, share: float) -> Any:
    key = (way, criterion, share)
    arms = result["numbers"]["arms"]
    return next((a for a in arms if (a["way"], a["criterion"], a["sparsity"]) == key), None)


def _mean_arms(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for shape in results[0]["numbers"]["arms"]:
        key = (shape["way"], shape["criterion"], shape["sparsity"])
        same = [arm for r in results if (arm := _arm(r, *key)) is not None]
        shown = dict(zip(("way", "criterion", "sparsity"), key, strict=True))
        found.append({**shown, **{m: estimate(100 * a[m] for a in same) for m in ("top1", "anew")}})
    return found


def _gains(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Differences of two arms in points of top-1, paired by run: rounds, and SNR."""
    arms = results[0]["numbers"]["arms"]
    shares = sorted({a["sparsity"] for a in arms if a["criterion"] is not None})
    criteria = list(dict.fromkeys(a["criterion"] for a in arms if a["criterion"] is not None))
    pairs = [(f"{c}: iterative over one shot, then trained", (ROUNDS, c), (THEN, c))
             for c in criteria]  # fmt: skip
    if len(criteria) > 1:
        pairs += [(f"{way}: SNR over magnitude", (way, "SNR"), (way, "magnitude"))
                  for way in (ONCE, THEN, ROUNDS)]  # fmt: skip
    found = []
    for text, one, other in pairs:
        for share in shares:
            both = [(_arm(r, *one, share), _arm(r, *other, share)) for r in results]
            known = [(a, b) for a, b in both if a is not None and b is not None]
            found.append(
                {
                    "difference": text, "sparsity": share,
                    **{m: estimate(100 * (a[m] - b[m]) for a, b in known)
                       for m in ("top1", "anew")},
                }
            )  # fmt: skip
    return found
