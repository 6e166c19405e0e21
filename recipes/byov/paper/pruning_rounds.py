"""The numbers of pruning in rounds and at once, from the results of the runs at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..iterative import ONCE, ROUNDS, THEN
from .results import RunRecord, estimate, stamp, stamp_of_all
from .tables import Numbers, ordered


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
