"""The paper's claims as numbers, ours beside them, and whether they agree.

A claim of a sign agrees where our interval lies on its side of 0, disagrees where it lies on the
other, and is undecided between. Nothing is said of fewer than three seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..config import UNSEEN_SHIFTS
from ..evaluation.protocol import AVERAGE, MEANS, SCALED
from ..evaluation.uncertainty import PARTS
from ..presets import PRESETS
from .results import (
    ENOUGH,
    PRIORS,
    Estimate,
    RunRecord,
    against,
    baselines,
    estimate,
    paper_like,
)
from .tables import fig1b, fig4shift, fig5, fig7, spikes
from .trajectories import fig3

Verdict = Literal["agrees", "disagrees", "undecided", "n < 3", "not converged", "not run"]


@dataclass(frozen=True)
class Claim:
    """One statement of the paper.

    Args:
        where: In the paper.
        text: What is said, as a difference that is above 0 if it holds.
        paper: The paper's number; None where it gives a picture or a word.
        unit: Of both numbers.
        ours: From the runs at hand; None where they do not allow it.
        posterior: Whether it means nothing without a posterior that moved.
        wanted: What the runs that it speaks of have in place of the paper's configuration.
        low: Bounds between which our interval must lie, for a claim that is no sign.
        high: Likewise.
    """

    where: str
    text: str
    paper: float | None
    unit: str
    ours: Callable[[Sequence[RunRecord]], Estimate | None]
    posterior: bool = False
    low: float = 0.0
    high: float = float("inf")
    wanted: Mapping[str, Any] = field(default_factory=dict)


def _metric(prediction: str, metric: str) -> Callable[[RunRecord], float | None]:
    def read(record: RunRecord) -> float | None:
        row = record.row(prediction)
        return None if row is None else row[metric]

    return read


def _over_byol(
    metric: str, *, prediction: str = MEANS, control: str = "BYOL", base: str = MEANS, **wanted: Any
) -> Callable[[Sequence[RunRecord]], Estimate | None]:
    def ours(records: Sequence[RunRecord]) -> Estimate | None:
        return against(
            paper_like(records, **wanted), baselines(records)[control], _metric(prediction, metric),
            _metric(base, metric), metric,
        )  # fmt: skip

    return ours


def _between(
    metric: str, one: dict[str, Any], other: dict[str, Any], prediction: str = MEANS
) -> Callable[[Sequence[RunRecord]], Estimate | None]:
    def ours(records: Sequence[RunRecord]) -> Estimate | None:
        read = _metric(prediction, metric)
        return against(paper_like(records, **one), paper_like(records, **other), read, read, metric)

    return ours


def _average_gain(**wanted: Any) -> Callable[[Sequence[RunRecord]], Estimate | None]:
    """What the MC average gains in top-1 at beta_end 0.3, else at 1."""

    def ours(records: Sequence[RunRecord]) -> Estimate | None:
        group = paper_like(records, **(wanted | {"beta_end": 0.3})) or paper_like(records, **wanted)
        return against(group, group, _metric(AVERAGE, "top1"), _metric(MEANS, "top1"), "top1")

    return ours


def _rank_correlation(**wanted: Any) -> Callable[[Sequence[RunRecord]], Estimate | None]:
    def ours(records: Sequence[RunRecord]) -> Estimate | None:
        found = fig1b(records, **wanted)
        return None if found is None else found["spearman"]

    return ours


def _snr_alike(records: Sequence[RunRecord]) -> Estimate | None:
    """By how much more the priors' sigmas are apart than their SNRs, in natural logarithms."""
    seeds = sorted({c.seed for c in paper_like(records)})
    found = []
    for seed in seeds:
        trajectories = fig3([c for c in records if c.seed == seed])
        for pair in [] if trajectories is None else trajectories["apart"]:
            if pair["pair"] == [PRIORS["zero"], PRIORS["teacher"]] and pair["sigma"] is not None:
                found.append(pair["sigma"] - (pair["snr"] or 0.0))
    return estimate(found)


def _heads_below(records: Sequence[RunRecord]) -> Estimate | None:
    """Median SNR of the encoder's matrices over that of projector and predictor, as a log."""
    found = []
    for record in paper_like(records):
        trajectories = fig3([record])
        if trajectories is None:
            continue
        ends = next(iter(trajectories["columns"].values()))["heads_low"]
        heads = [ends[p] for p in ("projector", "predictor") if ends[p]]
        if ends["encoder"] and heads:
            found.append(math.log(ends["encoder"] / statistics.fmean(heads)))
    return estimate(found)


def _pruning(
    over: str, key: str, **wanted: Any
) -> Callable[[Sequence[RunRecord]], Estimate | None]:
    def ours(records: Sequence[RunRecord]) -> Estimate | None:
        found = []
        for record in paper_like(records, **wanted):
            gaps = (record.numbers("prune") or {"gaps": []})["gaps"]
            found += [g[key] for g in gaps if (g["over"], g["scope"]) == (over, "tensor")]
        return estimate(found)

    return ours


def _shift(
    kind: str, metric: str, sign: float = 1.0
) -> Callable[[Sequence[RunRecord]], Estimate | None]:
    def ours(records: Sequence[RunRecord]) -> Estimate | None:
        found = fig4shift(records)
        for row in [] if found is None else found["rows"]:
            if (row["kind"], row["metric"]) == (kind, metric) and row["delta"] is not None:
                mean, half, n = row["delta"]
                return Estimate(sign * mean, half, n)
        return None

    return ours


def _slope(key: str) -> Callable[[Sequence[RunRecord]], Estimate | None]:
    def ours(records: Sequence[RunRecord]) -> Estimate | None:
        by_seed: dict[int, list[float]] = {}
        for row in (fig5(records) or {"slopes": []})["slopes"]:
            if row[key] is not None:
                by_seed.setdefault(row["seed"], []).append(row[key])
        return estimate(statistics.fmean(values) for values in by_seed.values())

    return ours


def _latent(what: str) -> Callable[[Sequence[RunRecord]], Estimate | None]:
    def ours(records: Sequence[RunRecord]) -> Estimate | None:
        found = fig7(records)
        if found is None:
            return None
        rows = [r for r in found["summary"] if r["form"] == "unit"]
        if what == "together":
            pairs: dict[int, list[float]] = {}
            for row in rows:
                if "pair" in row and row["spearman"] is not None:
                    pairs.setdefault(row["seed"], []).append(row["spearman"])
            return estimate(min(values) for values in pairs.values())
        parts = [r for r in rows if r.get("part") == "encoder"]
        return estimate(
            r["relative_spread"][0] - r["relative_spread"][-1] for r in parts
            if r["relative_spread"][0] is not None and r["relative_spread"][-1] is not None
        )  # fmt: skip

    return ours


def _rise(
    part: str, most: float = math.inf, **wanted: Any
) -> Callable[[Sequence[RunRecord]], Estimate | None]:
    """What noise adds to the variance behind a part, as a share of that without noise.

    Args:
        part: Encoder, projector or predictor.
        most: Standard deviation of the noise, at most; the strongest that was measured below it.
        wanted: Of the runs.
    """

    def ours(records: Sequence[RunRecord]) -> Estimate | None:
        found = fig7(records, **wanted)
        if found is None:
            return None
        [curve] = [c for c in found["curves"] if c["part"] == part]
        known = zip(found["noises"], curve["over_none"], strict=True)
        below = [(noise, ratio) for noise, ratio in known if 0 < noise <= most]
        if not below:
            return None
        ratio: Estimate = max(below)[1]
        return ratio._replace(mean=ratio.mean - 1)

    return ours


def _flipout(records: Sequence[RunRecord]) -> Estimate | None:
    """Logarithm of the gradient's relative variance by weight draws over that by Flipout."""
    found = []
    for record in paper_like(records):
        rows = (record.numbers("gradients") or {"rows": []})["rows"]
        largest = max((r["batch"] for r in rows), default=0)
        ends = {r["estimator"]: r["relative"] for r in rows if r["batch"] == largest}
        if ends.get("weight") and ends.get("flipout"):
            found.append(math.log(ends["weight"] / ends["flipout"]))
    return estimate(found)


def _more_spikes(records: Sequence[RunRecord]) -> Estimate | None:
    """Share of steps with a spike of the gradient: softplus less exp, paired by seed."""
    exp = {c.seed: spikes(c) for c in paper_like(records)}
    found = []
    for record in paper_like(records, parameterization="softplus"):
        mine, other = spikes(record), exp.get(record.seed)
        found.append(None if mine is None or other is None else 100 * (mine - other))
    return estimate(found)


def _fully_best(records: Sequence[RunRecord]) -> Estimate | None:
    """Top-1 of the fully Bayesian model less that of the best partial one, means of the seeds."""
    partial = []
    for conversion in ("no-conv", "linear-only", "no-layernorm"):
        for prior in PRIORS:
            group = paper_like(records, conversion=conversion, prior=prior)
            value = estimate(_metric(MEANS, "top1")(c) for c in group)
            if value is not None:
                partial.append((value.mean, group))
    if not partial:
        return None
    best = max(partial, key=lambda pair: pair[0])[1]
    read = _metric(MEANS, "top1")
    return against(paper_like(records), best, read, read, "top1")


_VISIBLE = 0.3  # std of noise about as strong as that of figure 4 at its last severity, 0.26
_SEEN = {"skip": UNSEEN_SHIFTS}
_RESNET = {"encoder": PRESETS["cifar10-resnet18"].config.encoder}

CLAIMS: tuple[Claim, ...] = (
    Claim("Fig. 2", "top-1 over BYOL, N(0, I), at the means", -0.40, "points",
          _over_byol("top1"), low=-1.0, high=1.0),
    Claim("Fig. 2", "top-5 over BYOL", -0.22, "points", _over_byol("top5"), low=-1.0, high=1.0),
    Claim("Fig. 2, abstract", "ECE better than BYOL's", 2.83, "points", _over_byol("ece"), True),
    Claim("control", "ECE better than that of BYOL without weight decay", None, "points",
          _over_byol("ece", control="BYOL, no weight decay"), True),
    Claim("control", "ECE better than that of temperature-scaled BYOL", None, "points",
          _over_byol("ece", base=SCALED), True),
    Claim("Fig. 2, abstract", "Brier reliability better (\"Brier\" in the abstract)", 1.03,
          "points", _over_byol("reliability"), True),
    Claim("control", "Brier score better than BYOL's", None, "points", _over_byol("brier"), True),
    Claim("Fig. 2", "Brier resolution over BYOL", -0.57, "points", _over_byol("resolution"),
          low=float("-inf"), high=0.0),
    Claim("4.1", "MC average over the means, top-1, N(0, I), beta_end 0.3", 0.34, "points",
          _average_gain(), True),
    Claim("control", "MC average over the means, no posterior on unseen shifts", None, "points",
          _average_gain(**_SEEN), True, wanted=_SEEN),
    Claim("4.1", "N(0, I) over N(mu_T, Sigma_T), top-1", None, "points",
          _between("top1", {}, {"prior": "teacher"})),
    Claim("4.1", "N(0, I) near N(mu_T, I), top-1", None, "points",
          _between("top1", {}, {"prior": "teacher-mean"}), low=-1.0, high=1.0),
    Claim("Fig. 1b", "rank correlation of BYOV's std with supervised BBB's", None, "Spearman",
          _rank_correlation(), True),
    Claim("control", "rank correlation, no posterior on unseen shifts", None, "Spearman",
          _rank_correlation(**_SEEN), True, wanted=_SEEN),
    Claim("Fig. 3", "priors further apart in sigma than in SNR", None, "log ratio",
          _snr_alike, True),
    Claim("Fig. 6, E", "SNR of the heads below that of the encoder", None, "log ratio",
          _heads_below, True),
    Claim("Fig. 4 left", "SNR pruning over magnitude, mean over 50 to 90 % sparsity", None,
          "points", _pruning("magnitude", "middle"), True),
    Claim("abstract", "SNR pruning over magnitude, most there: 8 or more (\"up to 12 %\")", 12.0,
          "points", _pruning("magnitude", "points"), True, low=8.0),
    Claim("Fig. 4 left", "SNR pruning sparser than magnitude before it loses a point", 25.0,
          "points", _pruning("magnitude", "sparser"), True),
    Claim("control", "SNR pruning over SNR with sigma shuffled in a tensor, same mean", None,
          "points", _pruning("SNR, sigma shuffled", "middle"), True),
    Claim("control", "SNR pruning over magnitude, ResNet-18, mean over 50 to 90 % sparsity", None,
          "points", _pruning("magnitude", "middle", **_RESNET), True, wanted=_RESNET),
    Claim("abstract", "ECE better under salt and pepper", 2.4, "points",
          _shift("salt and pepper", "ece"), True),
    Claim("abstract", "reliability better under salt and pepper", 1.2, "points",
          _shift("salt and pepper", "reliability"), True),
    Claim("4.3", "ECE worse under shear", None, "points", _shift("shear", "ece", -1.0), True),
    Claim("4.3", "ECE worse under Gaussian noise", None, "points",
          _shift("gaussian noise", "ece", -1.0), True),
    Claim("Fig. 5", "exponent of K in the std of the average (-1/2 by independence)", -0.5, "",
          _slope("slope"), low=-0.56, high=-0.44),
    Claim("control", "exponent of K, groups that share no draws", None, "",
          _slope("disjoint_slope"), low=-0.65, high=-0.35),
    *(
        Claim("Fig. 7", f"variance behind the {part} rises with noise, to a std of {most:g}", None,
              "relative", _rise(part, most), True)
        for most in (_VISIBLE, 1.0)
        for part in PARTS
    ),
    Claim("Fig. 7", "relative spread of the encoder's over images shrinks", None, "relative",
          _latent("shrink"), True),
    Claim("Fig. 7", "variances of the three parts go together", None, "least Spearman",
          _latent("together"), True),
    Claim("Table 1", "fully Bayesian over the best partial model, top-1", 1.34, "points",
          _fully_best),
    Claim("Table 1", "beta 0 -> 1 over 1 -> 1, linear-only, N(0, I), top-1", 1.02, "points",
          _between("top1", {"conversion": "linear-only"},
                   {"conversion": "linear-only", "beta_start": 1.0})),
    Claim("App. B", "Flipout lowers no variance at the largest batch measured", None, "log ratio",
          _flipout, True, low=float("-inf"), high=math.log(1.5)),
    Claim("App. C", "no weight decay over weight decay, BYOV, top-1", None, "points",
          _between("top1", {}, {"weight_decay": 0.05})),
    Claim("App. C", "beta 0 -> 1 over 1 -> 1, BYOV, top-1", None, "points",
          _between("top1", {}, {"beta_start": 1.0})),
    Claim("App. C", "log variances from -10 over from -6, BYOV, top-1", None, "points",
          _between("top1", {}, {"logvar_init": -6.0})),
    Claim("App. C", "gradient spikes with softplus over those with exp", None, "% of steps",
          _more_spikes),
)  # fmt: skip


def by_beta(records: Sequence[RunRecord]) -> dict[str, Any] | None:
    """What hangs on the width of the posterior, for each final beta of BYOV with N(0, I).

    Percent and points, save for the spread of the log variances, the rank correlation of figure 1b
    and the rise of figure 7.
    """
    rows = []
    ways = {(c.config.skip, c.config.beta_end) for c in records}
    for skip, beta in sorted(ways, key=lambda way: (way[0], -way[1])):
        wanted: dict[str, Any] = {"skip": skip, "beta_end": beta}
        group = paper_like(records, **wanted)
        if not group:
            continue
        known = {
            MEANS: [_metric(MEANS, "top1")(c) for c in group],
            AVERAGE: [_metric(AVERAGE, "top1")(c) for c in group],
        }
        rows.append(
            {
                "beta": beta,
                "skip": group[0].config.left_out,
                "n": len(group),
                "logvar_spread": estimate(c.facts["logvar_spread"] for c in group),
                "top1": estimate(None if v is None else 100 * v for v in known[MEANS]),
                "average": estimate(None if v is None else 100 * v for v in known[AVERAGE]),
                "rank": _rank_correlation(**wanted)(records),
                "gap": _pruning("magnitude", "middle", **wanted)(records),
                "most": _pruning("magnitude", "points", **wanted)(records),
                "rise": _rise("encoder", **wanted)(records),
            }
        )
    return {"rows": rows, "stamp": None} if rows else None


def judge(claim: Claim, records: Sequence[RunRecord]) -> tuple[Estimate | None, Verdict]:
    """Our number and what it says of the claim."""
    found = claim.ours(records)
    if found is None:
        return None, "not run"
    still = [c for c in paper_like(records, **claim.wanted) if not c.facts["converged"]]
    if claim.posterior and still:
        return found, "not converged"
    if found.n < ENOUGH or found.half is None:
        return found, "n < 3"
    low, high = found.mean - found.half, found.mean + found.half
    if claim.low < low and high < claim.high:
        return found, "agrees"
    if high < claim.low or low > claim.high:
        return found, "disagrees"
    return found, "undecided"


def comparison(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Every claim with both numbers: what page and documentation show."""
    rows = []
    for claim in CLAIMS:
        found, verdict = judge(claim, records)
        rows.append(
            {
                "where": claim.where, "claim": claim.text, "unit": claim.unit,
                "paper": claim.paper, "ours": found, "verdict": verdict,
            }
        )  # fmt: skip
    return rows
