"""Results of many runs side by side: families of seeds, estimates, differences in points."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from bayesify import ArgumentError

from ..config import BYOVConfig
from ..evaluation.runs import PRIORS as PRIORS
from ..evaluation.runs import family, label

Numbers = dict[str, Any]
"""What a figure or table is made of."""

HIGHER = ("top1", "top5", "resolution")
"""Metrics of which more is better; less is better of the others."""

ENOUGH = 3
"""Seeds below which there is no claim."""

# Quantiles 0.975 of Student's t by degrees of freedom; the last one serves for more.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Estimate(NamedTuple):
    """A mean over n seeds and half of its 95 % interval, None of a single seed."""

    mean: float
    half: float | None
    n: int

    @property
    def text(self) -> str:
        """``1.23 ± 0.45 (n 3)``."""
        spread = "" if self.half is None else f" ± {self.half:.2f}"
        return f"{self.mean:.2f}{spread} (n {self.n})"


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """Mean and Student's 95 % interval; None of no values."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    n = len(known)
    half = None
    if n > 1:
        half = _T[min(n - 2, len(_T) - 1)] * statistics.stdev(known) / math.sqrt(n)
    return Estimate(statistics.fmean(known), half, n)


@dataclass(frozen=True)
class RunRecord:
    """What is known of one run.

    Args:
        config: What was trained.
        facts: As :meth:`recipes.byov.runs.Run.facts` has them.
        log: Its log's lines; empty where only results are at hand.
        results: Measurements by their names, each with ``settings`` and ``numbers``.
    """

    config: BYOVConfig
    facts: dict[str, Any]
    log: list[dict[str, Any]]
    results: dict[str, dict[str, Any]]

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.config.seed

    def numbers(self, name: str) -> dict[str, Any] | None:
        """A measurement's numbers; None if it was not made."""
        found = self.results.get(name)
        return None if found is None else found["numbers"]

    def row(self, prediction: str, protocol: str = "linear") -> dict[str, Any] | None:
        """The metrics of one way to predict."""
        rows = (self.numbers(f"eval-{protocol}") or {"rows": []})["rows"]
        return next((r for r in rows if r["prediction"] == prediction), None)


def distinct(records: Iterable[RunRecord]) -> list[RunRecord]:
    """One record for each config, seed and data set: that with the most measurements.

    A run that is given twice, or trained twice, would else pass for two seeds.
    """
    found: dict[str, RunRecord] = {}
    for record in records:
        key = json.dumps([record.config.to_json(), record.facts.get("data")], sort_keys=True)
        if key not in found or len(record.results) > len(found[key].results):
            found[key] = record
    return list(found.values())


def read_record(folder: Path) -> RunRecord:
    """The results that lie in the folder of a run.

    Raises:
        ArgumentError: There are none.
    """
    from ..runtime.log import read_log

    results = {}
    for path in sorted((folder / "results").glob("*.json")):
        value = json.loads(path.read_text("utf-8"))
        results[value["measurement"]] = value
    if not results:
        raise ArgumentError(
            f"{folder} holds no results: measure it with `bayesify recipe byov eval {folder}`."
        )
    facts = next(iter(results.values()))["run"]
    log = read_log(folder / "log.jsonl") if (folder / "log.jsonl").exists() else []
    return record_of(facts, log, results)


_EARLIER = {"strangers": "ood"}
"""Measurements by the names that they had in results of before."""


def record_of(
    facts: dict[str, Any], log: list[dict[str, Any]], results: dict[str, dict[str, Any]]
) -> RunRecord:
    """A record from its parts; what this version does not know of a config is left out."""
    known = {f.name for f in fields(BYOVConfig)}
    config = BYOVConfig.from_json({k: v for k, v in facts["config"].items() if k in known})
    named = {_EARLIER[k]: v for k, v in results.items() if k in _EARLIER}
    named |= {k: v for k, v in results.items() if k not in _EARLIER}
    return RunRecord(config, facts, log, named)


def families(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs that differ in their seed alone, by a name that no other family has."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        groups.setdefault(family(record.config), []).append(record)
    named: dict[str, list[str]] = {}
    for key, members in groups.items():
        named.setdefault(label(members[0].config), []).append(key)
    usual = _usual_values(records)
    found = {}
    for name, keys in named.items():
        configs = [groups[key][0].config.to_json() for key in keys]
        differing = [f for f in configs[0] if f != "seed" and len({str(c[f]) for c in configs}) > 1]
        for key, config in zip(keys, configs, strict=True):
            odd = [f for f in differing if json.dumps(config[f]) != usual[f]]
            if "encoder" in odd:  # which brings its own optimizer and rates
                odd = ["encoder"]
            more = ", ".join(f"{f} {str(config[f]).rpartition(':')[2]}" for f in odd)
            full = f"{name}, {more}" if more else name
            if full in found:  # as unusual as another one
                full = f"{name}, " + ", ".join(f"{f} {config[f]}" for f in differing)
            found[full] = groups[key]
    return found


def points(ours: float, reference: float, metric: str) -> float:
    """A difference in percentage points, plus being better."""
    difference = 100 * (ours - reference)
    return difference if metric in HIGHER else -difference


def against(
    mine: Sequence[RunRecord],
    reference: Sequence[RunRecord],
    of: Callable[[RunRecord], float | None],
    reference_of: Callable[[RunRecord], float | None],
    metric: str,
) -> Estimate | None:
    """A metric of a family against that of another: paired by seed where they share seeds."""
    other = {c.seed: reference_of(c) for c in reference}
    known = [v for v in other.values() if v is not None]
    if not known:
        return None
    shared = {c.seed for c in mine} & {seed for seed, v in other.items() if v is not None}
    found: list[float | None] = []
    for record in mine:
        value = of(record)
        if value is None or (shared and record.seed not in shared):
            continue
        base = other[record.seed] if shared else statistics.fmean(known)
        found.append(None if base is None else points(value, base, metric))
    return estimate(found)


def select(records: Sequence[RunRecord], **wanted: Any) -> list[RunRecord]:
    """Records whose configs have these values."""
    return [c for c in records if all(getattr(c.config, k) == v for k, v in wanted.items())]


def baselines(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Deterministic BYOL: as its recipe has it, with weight decay, and without, as BYOV."""
    plain = _usual(records, select(records, conversion="none", objective="byol"))
    decayed = [c for c in plain if c.config.weight_decay > 0]
    free = [c for c in plain if c.config.weight_decay == 0]
    return {"BYOL": decayed or free, "BYOL, no weight decay": free}


_OF_ENCODER = ("encoder_args", "optimizer", "lr", "trust_coefficient", "logvar_lr_ratio",
               "clip_norm")  # fmt: skip


def paper_like(records: Sequence[RunRecord], **wanted: Any) -> list[RunRecord]:
    """BYOV as the paper has it: annealed beta, all else untouched, save for what is wanted.

    Another encoder than most records have comes with its own optimizer.
    """
    paper = {"objective": "byol", "conversion": "full", "beta_start": 0.0, "beta_end": 1.0,
             "prior": "zero", "weight_decay": 0.0}  # fmt: skip
    but = {*wanted, *(_OF_ENCODER if "encoder" in wanted else ())}
    return _usual(records, select(records, **(paper | wanted)), but=but)


# What the table of priors and betas varies; all else makes a run an ablation.
_VARIED = {"seed", "objective", "conversion", "prior", "beta_start", "beta_end", "beta_shape",
           "weight_decay"}  # fmt: skip


def _usual(
    records: Sequence[RunRecord], of: Sequence[RunRecord], but: Collection[str] = ()
) -> list[RunRecord]:
    """Those that are no ablation: in every other field they have what most of the records have."""
    usual = {f: v for f, v in _usual_values(records).items() if f not in _VARIED.union(but)}

    def common(record: RunRecord) -> bool:
        config = record.config.to_json()
        return all(json.dumps(config[f]) == value for f, value in usual.items())

    return [record for record in of if common(record)]


def _usual_values(records: Sequence[RunRecord]) -> dict[str, str]:
    """What most of the records have in each field, as JSON."""
    configs = [c.config.to_json() for c in records]
    if not configs:
        return {}
    return {f: statistics.mode(json.dumps(c[f]) for c in configs) for f in configs[0]}


def stamp(records: Iterable[RunRecord]) -> str | None:
    """What is written over a figure whose posterior did not move far enough."""
    still = [c for c in records if c.config.bayesian and not c.facts["converged"]]
    return "posterior not converged" if still else None


def stamp_of_all(panels: Iterable[Mapping[str, Any]]) -> str | None:
    """What is written over a figure whose panels have stamps: theirs where each has one."""
    stamps = [panel["stamp"] for panel in panels]
    return stamps[0] if all(stamps) else None


def ordered(records: Sequence[RunRecord]) -> list[tuple[str, list[RunRecord]]]:
    """Families: BYOL, then BYOV by prior, then all else."""
    first = [id(c) for group in baselines(records).values() for c in group]
    first += [id(c) for prior in PRIORS for c in paper_like(records, prior=prior)]

    def place(item: tuple[str, list[RunRecord]]) -> int:
        here = id(item[1][0])
        return first.index(here) if here in first else len(first)

    return sorted(families(records).items(), key=place)
