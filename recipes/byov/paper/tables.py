"""The numbers of each figure and table, from the results of the runs at hand; pure functions."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..evaluation.protocol import AVERAGE, MEANS, SCALED, TEACHER
from ..evaluation.uncertainty import PARTS
from .correlations import correlations, spearman
from .results import (
    PRIORS,
    Estimate,
    Numbers,
    RunRecord,
    against,
    baselines,
    estimate,
    ordered,
    paper_like,
    select,
    stamp,
)

METRICS = ("top1", "top5", "ece", "brier", "reliability", "resolution")


def fig1b(records: Sequence[RunRecord], **wanted: Any) -> Numbers | None:
    """Predictive std of BYOV against that of the supervised baseline, image by image."""
    supervised = [c for c in select(records, objective="supervised") if c.config.bayesian]
    supervised_of = {c.seed: c for c in supervised if c.numbers("spread")}
    pairs = [
        (c, supervised_of[c.seed])
        for c in paper_like(records, **wanted)
        if c.numbers("spread") and c.seed in supervised_of
    ]
    if not pairs:
        return None
    found = []
    for mine, other in pairs:
        y, x = mine.results["spread"]["numbers"]["std"], other.results["spread"]["numbers"]["std"]
        found.append({"seed": mine.seed, **correlations(x, y)})
    mine, other = pairs[0]
    xs = torch.tensor(other.results["spread"]["numbers"]["std"], dtype=torch.float64)
    ys = torch.tensor(mine.results["spread"]["numbers"]["std"], dtype=torch.float64)
    return {
        "supervised_std": xs.tolist(),
        "byov_std": ys.tolist(),
        "gaussian": {
            "mean": [float(xs.mean()), float(ys.mean())],
            "covariance": torch.stack([xs, ys]).cov().tolist(),
        },
        "pairs": found,
        "draws": mine.results["spread"]["settings"]["draws"],
        "pearson": estimate(p["pearson"] for p in found),
        "spearman": estimate(p["spearman"] for p in found),
        "stamp": stamp([mine, other]),
    }


def _metric(prediction: str, metric: str) -> Callable[[RunRecord], float | None]:
    def read(record: RunRecord) -> float | None:
        row = record.row(prediction)
        return None if row is None else row[metric]

    return read


def fig2(records: Sequence[RunRecord]) -> Numbers | None:
    """Each metric against BYOL over beta_end, for three priors and three ways to predict."""
    base = baselines(records)["BYOL"]
    grid = []
    for prior in PRIORS:
        betas = sorted({c.config.beta_end for c in select(records, prior=prior, conversion="full")})
        for beta in betas:
            group = paper_like(records, prior=prior, beta_end=beta)
            for prediction in (MEANS, AVERAGE, SCALED, TEACHER):
                for metric in METRICS:
                    value = estimate(_metric(prediction, metric)(c) for c in group)
                    if value is not None:
                        grid.append(
                            {"prior": prior, "beta_end": beta, "prediction": prediction,
                             "metric": metric, "value": value,
                             "delta": against(group, base, _metric(prediction, metric),
                                              _metric(MEANS, metric), metric)}
                        )  # fmt: skip
    controls = []
    for name, group in baselines(records).items():
        for prediction in (MEANS, SCALED, TEACHER):
            for metric in METRICS:
                value = estimate(_metric(prediction, metric)(c) for c in group)
                if value is not None:
                    delta = against(group, base, _metric(prediction, metric),
                                    _metric(MEANS, metric), metric)  # fmt: skip
                    controls.append({"name": name, "prediction": prediction, "metric": metric,
                                     "value": value, "delta": delta})  # fmt: skip
    if not grid:
        return None
    return {"grid": grid, "controls": controls, "stamp": stamp(records)}


def stability(records: Sequence[RunRecord]) -> Numbers | None:
    """Loss and gradient norm over the steps, by prior: the spikes of N(mu_T, Sigma_T)."""
    shown: list[tuple[str, list[RunRecord]]] = [("BYOL", baselines(records)["BYOL"])]
    shown += [(f"BYOV {PRIORS[p]}", paper_like(records, prior=p)) for p in PRIORS]
    curves = []
    for name, group in shown:
        for record in group:
            steps = [line for line in record.log if line["kind"] == "step"]
            norms = [s["grad_norm"] for s in steps if s.get("grad_norm")]
            if len(steps) < 4 or not norms:
                continue
            losses = [s["loss"] for s in steps]
            jumps = [abs(b - a) for a, b in itertools.pairwise(losses)]
            curves.append(
                {
                    "run": name, "seed": record.seed, "step": [s["step"] for s in steps],
                    "loss": losses, "grad_norm": [s.get("grad_norm") for s in steps],
                    "spikes": spikes(record),
                    "roughness": statistics.median(jumps),
                }
            )  # fmt: skip
    return {"curves": curves, "stamp": None} if curves else None


def spikes(record: RunRecord) -> float | None:
    """Share of the logged steps whose gradient norm is above three times the run's median."""
    steps = [line for line in record.log if line["kind"] == "step"]
    norms: list[float] = [s["grad_norm"] for s in steps if s.get("grad_norm")]
    if not norms:
        return None
    limit = 3 * statistics.median(norms)
    return sum(n > limit for n in norms) / len(norms)


def fig4shift(records: Sequence[RunRecord]) -> Numbers | None:
    """ECE and reliability against BYOL under each augmentation, plus being better."""
    base = [c for c in baselines(records)["BYOL"] if c.numbers("corrupted")]
    mine = [c for c in paper_like(records) if c.numbers("corrupted")]
    if not base or not mine:
        return None
    kinds: dict[str, None] = {}
    for row in mine[0].results["corrupted"]["numbers"]["rows"]:
        kinds.setdefault(row["kind"])
    found = []
    for kind in kinds:
        for metric in ("ece", "reliability", "top1"):

            def mean_of(record: RunRecord, kind: str = kind, metric: str = metric) -> float | None:
                rows = record.results["corrupted"]["numbers"]["rows"]
                values = [r["means"][metric] for r in rows if r["kind"] == kind]
                return statistics.fmean(values) if values else None

            by_severity = []
            for severity in range(1, 6):

                def one(
                    record: RunRecord,
                    kind: str = kind,
                    metric: str = metric,
                    severity: int = severity,
                ) -> float | None:
                    rows = record.results["corrupted"]["numbers"]["rows"]
                    return next(
                        (r["means"][metric] for r in rows
                         if (r["kind"], r["severity"]) == (kind, severity)), None,
                    )  # fmt: skip

                if kind != "none":
                    by_severity.append(against(mine, base, one, one, metric))
            found.append({"kind": kind, "metric": metric, "severities": by_severity,
                          "delta": against(mine, base, mean_of, mean_of, metric)})  # fmt: skip
    return {"rows": found, "stamp": stamp(mine)}


def fig5(records: Sequence[RunRecord]) -> Numbers | None:
    """Mean and spread of the average over draws, by K and augmentation."""
    known = [c for c in paper_like(records) if c.numbers("draws")]
    if not known:
        return None
    first = known[0].results["draws"]
    slopes = [
        {"seed": c.seed, "kind": curve["kind"], "slope": curve["slope"],
         "disjoint_slope": curve["disjoint_slope"]}
        for c in known for curve in c.results["draws"]["numbers"]["curves"]
    ]  # fmt: skip
    return {
        "curves": first["numbers"]["curves"], "seed": known[0].seed,
        "pool": first["settings"]["pool"], "bootstraps": first["settings"]["bootstraps"],
        "images": first["numbers"]["images"], "slopes": slopes,
        "slope": estimate(s["disjoint_slope"] for s in slopes), "stamp": None,
    }  # fmt: skip


def fig7(records: Sequence[RunRecord], **wanted: Any) -> Numbers | None:
    """Variances behind the three parts, by noise, and how they go together."""
    known = [c for c in paper_like(records, **wanted) if c.numbers("latents")]
    if not known:
        return None
    summary: list[dict[str, Any]] = []
    for record in known:
        levels = record.results["latents"]["numbers"]["levels"]
        for form in ("raw", "unit"):
            together = {p: [v for lev in levels for v in lev[form][p]] for p in PARTS}
            for part in PARTS:
                means = [statistics.fmean(lev[form][part]) for lev in levels]
                widths = [
                    statistics.pstdev(lev[form][part]) / m if m else None
                    for lev, m in zip(levels, means, strict=True)
                ]
                summary.append({"seed": record.seed, "form": form, "part": part, "mean": means,
                                "relative_spread": widths})  # fmt: skip
            for i, one in enumerate(PARTS):
                for other in PARTS[i + 1 :]:
                    rank = spearman(together[one], together[other])
                    summary.append({"seed": record.seed, "form": form, "pair": [one, other],
                                    "spearman": rank})  # fmt: skip
    settings = known[0].results["latents"]["settings"]
    curves = []
    for part in PARTS:
        runs = [r["mean"] for r in summary if (r["form"], r.get("part")) == ("unit", part)]
        over_none = zip(*([m / run[0] for m in run] for run in runs if run[0]), strict=True)
        curves.append({"part": part, "over_none": [estimate(at) for at in over_none]})
    levels = known[0].results["latents"]["numbers"]["levels"]
    return {"levels": levels, "summary": summary, "curves": curves, "draws": settings["draws"],
            "noises": [level["noise"] for level in levels], "stamp": None}  # fmt: skip


def app_b(records: Sequence[RunRecord]) -> Numbers | None:
    """Relative variance of the gradient, by estimator and batch size, mean over the seeds."""
    known = [c for c in paper_like(records) if c.numbers("gradients")]
    if not known:
        return None
    rows = []
    for shape in known[0].results["gradients"]["numbers"]["rows"]:
        same = [
            r["relative"]
            for c in known
            for r in c.results["gradients"]["numbers"]["rows"]
            if (r["estimator"], r["batch"]) == (shape["estimator"], shape["batch"])
        ]
        rows.append({"estimator": shape["estimator"], "batch": shape["batch"],
                     "relative": estimate(same)})  # fmt: skip
    settings = known[0].results["gradients"]["settings"]
    return {"rows": rows, "draws": settings["draws"], "stamp": stamp(known)}


# The paper's table 1: conversion, prior, beta_start, top-1, top-5.
TABLE1 = (
    ("no-conv", "zero", 0.0, 73.68, 91.43),
    ("no-conv", "teacher-mean", 0.0, 73.97, 91.52),
    ("no-conv", "teacher", 0.0, 69.73, 88.74),
    ("linear-only", "zero", 0.0, 73.62, 91.12),
    ("linear-only", "teacher-mean", 0.0, 74.23, 91.48),
    ("linear-only", "zero", 1.0, 72.60, 90.92),
    ("linear-only", "teacher-mean", 1.0, 72.69, 91.03),
    ("none", "zero", 0.0, 75.97, 92.40),
    ("full", "zero", 0.0, 75.57, 92.18),  # BYOL's less the -0.4 and -0.22 of figure 2
    ("no-layernorm", "zero", 0.0, None, None),
)


def table1(records: Sequence[RunRecord]) -> Numbers:
    """Top-1 and top-5 at the means, beside the paper's; None where nothing was run."""
    rows = []
    for conversion, prior, start, top1, top5 in TABLE1:
        if conversion == "none":
            group = baselines(records)["BYOL"]
        else:
            group = paper_like(records, conversion=conversion, prior=prior, beta_start=start)
        found: dict[str, Estimate | None] = {}
        for metric in ("top1", "top5"):
            values = [_metric(MEANS, metric)(c) for c in group]
            found[metric] = estimate(None if v is None else 100 * v for v in values)
        rows.append(
            {
                "conversion": conversion,
                "prior": None if conversion == "none" else PRIORS[prior],
                "beta": None if conversion == "none" else f"{start:g} -> 1",
                "paper_top1": top1, "paper_top5": top5, **found,
            }
        )  # fmt: skip
    return {"rows": rows, "stamp": stamp(records)}


# What appendix C of the paper changed, each undone alone.
APPENDIX_C: tuple[tuple[str, dict[str, Any]], ...] = (
    ("as in the paper", {}),
    ("weight decay 0.05", {"weight_decay": 0.05}),
    ("beta 1 from the start", {"beta_start": 1.0}),
    ("softplus", {"parameterization": "softplus"}),
    ("log variances from -6", {"logvar_init": -6.0}),
    ("sigma from 1 % of each tensor's RMS", {"relative_std": 0.01}),
)


def app_c(records: Sequence[RunRecord]) -> Numbers:
    """Top-1, ECE and spikes of the gradient with one change of appendix C undone at a time."""
    base, rows = paper_like(records), []
    for change, wanted in APPENDIX_C:
        group = paper_like(records, **wanted)
        row: dict[str, Any] = {"change": change}
        for metric in ("top1", "ece"):
            read = _metric(MEANS, metric)
            values = [read(c) for c in group]
            row[metric] = estimate(None if v is None else 100 * v for v in values)
            row[f"{metric}_delta"] = against(group, base, read, read, metric) if wanted else None
        shares = [spikes(c) for c in group]
        row["spikes"] = estimate(None if v is None else 100 * v for v in shares)
        row["logvar_spread"] = estimate(c.facts["logvar_spread"] for c in group)
        rows.append(row)
    return {"rows": rows, "stamp": stamp(base)}


def overview(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Every family with its metrics in percent at the means, by the MC average, and controls."""
    rows = []
    for name, group in ordered(records):
        for prediction in (MEANS, AVERAGE, SCALED, TEACHER):
            values: dict[str, Any] = {
                metric: estimate(
                    None if v is None else 100 * v
                    for v in (_metric(prediction, metric)(c) for c in group)
                )
                for metric in METRICS
            }
            values["nll"] = estimate(_metric(prediction, "nll")(c) for c in group)
            if values["top1"] is not None:
                rows.append({"run": name, "prediction": prediction, **values})
    return rows
