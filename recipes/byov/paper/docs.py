"""`docs/byov.md` and its figures, from the results of `cifar10.py` and `imagenet.py`.

python -m recipes.byov.paper.docs
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bayesify.storage import replacing

from ..config import UNSEEN_SHIFTS
from ..evaluation.protocol import MEANS
from .cells import CELLS, RESULTS, SCALES, Scale, records_of
from .claims import by_beta, comparison
from .correlations import spearman
from .figures import FIGURES, publish
from .page import (
    APP_C,
    METRICS,
    NOT_RUN,
    RISES,
    SHIFTS,
    WIDTH,
    appendix_c,
    noise_levels,
    number,
    paper_number,
    rises,
    width,
)
from .results import ENOUGH, Estimate, RunRecord, distinct, estimate
from .tables import app_c, fig7, overview

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "byov.md"
IMAGES = ROOT / "docs" / "images" / "byov"
OTHERS = {
    "imagenette": Scale(
        "imagenette", "Imagenette: real photographs of ten of ImageNet's classes.",
        SCALES["gpu"].config, SCALES["gpu"].run, SCALES["gpu"].head, SCALES["gpu"].uncertainty,
    ),
    "imagenet": Scale(
        "imagenet", "ImageNet-1k, ViT-B/16: the paper's scale.",
        SCALES["gpu"].config, SCALES["gpu"].run, SCALES["gpu"].head, SCALES["gpu"].uncertainty,
    ),
}  # fmt: skip
TRAINED = (
    "encoder", "pixels", "batch", "epochs", "steps", "rate of log variances over means'", "results",
)  # fmt: skip
_INTRO = """# Bootstrap Your Own Variance, remade

Every claim of [arXiv:2312.03213](https://arxiv.org/abs/2312.03213) that has a number or a sign,
beside what this repository measures. The paper's numbers are on ImageNet-1k; ours are on what each
part says. Differences are percentage points, plus being better; intervals are 95 % over seeds
(Student's t), and fewer than {enough} seeds support no claim. BYOL and BYOV have the same linear
probe with the same grid of learning rates, chosen on held-out training images. BYOL is shown with
weight decay, as its recipe has it, without, as BYOV has it, and scaled by a temperature. "Not
converged" stands where the posterior hardly moved: with a median std(logvar) within tensors below
0.3, SNR ranks weights as magnitude does.

This page is written by `python -m recipes.byov.paper.docs` from `benchmarks/results/byov`.

## Commands
"""
_COMMANDS = (
    ("CIFAR-10 on a GPU, a few cells at a time; by estimate 20 minutes a cell on an H100",
     "python -m recipes.byov.paper.cifar10 --data DATA --minutes 9 --jobs 4"),
    ("the same grid on a CPU",
     "python -m recipes.byov.paper.cifar10 --scale cpu --minutes 60 --jobs 2"),
    ("what is missing", "python -m recipes.byov.paper.cifar10 --list"),
    ("Imagenette: BYOL, BYOV and the supervised baseline, 300 epochs",
     "python -m recipes.byov.paper.imagenet --data imagenette --path FOLDER"),
    ("the same, shortened, as below",
     "python -m recipes.byov.paper.imagenet --data imagenette --path imagenette96.safetensors "
     "--epochs 40 --logvar-lr-ratio 25 --no-compile --draws 100"),
    ("the file of it", "python -m recipes.byov.paper.pack_images FOLDER --size 96 --out "
     "imagenette96.safetensors"),
    ("ImageNet-1k, the paper's scale",
     "torchrun --nproc-per-node 8 -m recipes.byov.paper.imagenet --data imagenet"),
    ("pruning in rounds of training", "bayesify recipe byov prune RUN_DIR... --iterative 4"),
    ("one artefact of any runs", "bayesify recipe byov figures RUN_DIR... --only fig4"),
)  # fmt: skip


TRIED = (
    "What was tried, in the tables below: smaller final betas and posteriors left out (the width "
    "of the posterior), weaker noise (variance under noise), other starts and forms of sigma "
    "(appendix C), other estimators and strengths of augmentation (cells)."
)
OOD = (
    "Images of other data sets, sized and coloured as the run's, told from its test images by a "
    "score of uncertainty. In percent. Chance is 50 for AUROC and 95 for FPR95, the share of test "
    "images that is flagged where 95 % of the OOD images are."
)


def main() -> None:
    rows = ((what, f"`{command}`") for what, command in _COMMANDS)
    parts = [_INTRO.format(enough=ENOUGH), *table(("what", "command"), rows)]
    parts.append("\nIn the folder of the repository.\n")
    parts.append("## In short\n")
    scales = [(scale, records_of(scale)) for scale in (*SCALES.values(), *OTHERS.values())]
    parts += [f"- {scale.name}: {_short(found)}" for scale, found in scales]
    parts.append("")
    for scale, found in scales:
        parts.append(part(scale, found) if found else f"## Scale: {scale.name}\n\nNot run.\n")
    PAGE.parent.mkdir(exist_ok=True)
    with replacing(PAGE, overwrite=True) as temporary:
        temporary.write_text("\n".join(parts), "utf-8")
    print(f"{PAGE.relative_to(ROOT)} of {len(list(RESULTS.rglob('*.json')))} results")


def part(scale: Scale, found: Sequence[tuple[dict[str, Any], RunRecord]]) -> str:
    """One scale: hardware, claims, tables, figures, what did not reproduce, what was not run."""
    records = distinct(
        record for _, record in found
    )  # an ablation can be what the scale has anyway
    folder = IMAGES / scale.name
    folder.mkdir(parents=True, exist_ok=True)
    publish(records, folder, on_progress=lambda line: None)
    (folder / "index.html").unlink()  # the page is this one
    claims = comparison(records)
    machines = sorted({_machine(value) for value, _ in found})
    lines = [
        f"## Scale: {scale.name}", "", scale.about, "",
        f"{len(found)} results, commits {', '.join(sorted({v['commit'] for v, _ in found}))}, "
        f"{'; '.join(machines)}. {_hours(found)}", "",
        *table(TRAINED, _trained(found)), "",
        "### Claims", "", _verdicts(claims), "",
        *table(
            ("paper", "claim", "paper's number", "ours", "n", "unit", "verdict"),
            ((r["where"], r["claim"], paper_number(r), number(r["ours"]),
              "" if r["ours"] is None else r["ours"].n, r["unit"], r["verdict"]) for r in claims),
        ),
        "", "### What did not reproduce", "", *_failures(claims),
        "", "### The width of the posterior", "",
        "BYOV, N(0, I), by its final beta. Pruning: SNR over magnitude in points, from 50 to 90 % "
        "sparsity. Figure 1b: rank correlation of the predictive std with the supervised one's. "
        f"Rise: of the variance behind the encoder from no noise to the most, as a share. {SHIFTS}",
        "", *table(WIDTH, width(by_beta(records) or {"rows": []})),
        "", "### Variance under noise", "",
        "Figure 7, vectors of unit length: means over the images, relative to those without noise. "
        "Figure 4's Gaussian noise goes up to a std of 0.26; at 1 most pixels are black or white.",
        "", *_variances(records),
        "", "### Metrics", "", "In percent, NLL in nats.", "",
        *table(
            ("run", "prediction", "n", *(title for _, title in METRICS)),
            ((r["run"], r["prediction"], r["top1"].n, *(number(r[k]) for k, _ in METRICS))
             for r in overview(records)),
        ),
        "", "### Appendix C", "", "One change undone at a time. A spike is a gradient of more than "
        "three times the run's median norm.", "", *table(APP_C, appendix_c(app_c(records))),
        "", "### Cells", "", *_cells(found, scale.name in SCALES), "",
        "### Out-of-distribution images", "", OOD, "", *_ood(found), "", "### Figures", "",
    ]  # fmt: skip
    for figure in FIGURES:
        image = folder / f"{figure.name}.png"
        if image.exists():
            relative = image.relative_to(PAGE.parent)
            lines += [f"**{figure.title}.** Paper: {figure.says}", "",
                      f"![{figure.title}]({relative.as_posix()})", ""]  # fmt: skip
    return "\n".join(lines)


def _short(found: Sequence[tuple[dict[str, Any], RunRecord]]) -> str:
    """What agrees and what does not, of all claims."""
    if not found:
        return "not run."
    claims = comparison(distinct(record for _, record in found))
    by_verdict: dict[str, list[str]] = {}
    for claim in claims:
        text = f"{claim['claim']} ({claim['where']})"
        by_verdict.setdefault(claim["verdict"], []).append(text)
    told = [
        f"{verdict}: {'; '.join(by_verdict.pop(verdict))}."
        for verdict in ("agrees", "disagrees")
        if verdict in by_verdict
    ]
    told += [f"{verdict}: {len(texts)} claims." for verdict, texts in by_verdict.items()]
    return " ".join(f"**{text.replace(':', '**:', 1)}" for text in told)


def _hours(found: Sequence[tuple[dict[str, Any], RunRecord]]) -> str:
    """What all of it took, run by run."""
    train, after = (sum(v["seconds"][k] for v, _ in found) / 3600 for k in ("train", "measure"))
    return f"Trained for {train:.1f} hours and measured for {after:.1f}, one run after the other."


def _verdicts(claims: Sequence[dict[str, Any]]) -> str:
    """How often each verdict was given, the most frequent first."""
    counts = Counter(r["verdict"] for r in claims)
    return f"{len(claims)} in all. " + ", ".join(f"{v}: {n}" for v, n in counts.most_common()) + "."


def _failures(claims: Sequence[dict[str, Any]]) -> list[str]:
    shown = {
        "disagrees": "The interval lies on the other side",
        "undecided": "The interval holds both sides",
        "not converged": "The posterior did not move far enough",
    }
    lines = [
        f"- {r['claim']} ({r['where']}): {number(r['ours'])} {r['unit']}. {shown[r['verdict']]}."
        for r in claims
        if r["verdict"] in shown
    ]
    if not lines:
        return ["Nothing that was run with enough seeds."]
    return [*lines, "", TRIED]


def _trained(found: Sequence[tuple[dict[str, Any], RunRecord]]) -> list[tuple[Any, ...]]:
    """What was trained and for how long, the most frequent first."""
    ways: Counter[tuple[Any, ...]] = Counter()
    for _, record in found:
        config = record.config
        changed = ", ".join(f"{name}={value}" for name, value in config.encoder_args.items())
        ways[
            f"{config.encoder} ({changed})" if changed else config.encoder,
            config.image_size, config.batch_size, config.epochs, f"{record.facts['steps']:,}",
            f"{config.logvar_lr_ratio:g}",
        ] += 1  # fmt: skip
    return [(*way, count) for way, count in ways.most_common()]


def _cells(found: Sequence[tuple[dict[str, Any], RunRecord]], grid: bool) -> list[str]:
    """Every cell of the grid, or those that were run: seeds, top-1, health, the source's words."""
    rows = []
    for cell in CELLS:
        mine = [(v, c) for v, c in found if v["cell"] == cell.name]
        if not mine and not grid:
            continue
        top1 = estimate(_top1(record) for _, record in mine)
        spread = estimate(c.facts["logvar_spread"] for _, c in mine)
        embedding = estimate((v["collapse"] or {}).get("std") for v, _ in mine)
        alarms = sum(bool((v["collapse"] or {}).get("alarms")) for v, _ in mine)
        ranks = estimate(_rank_correlation(record, found) for _, record in mine)
        minutes = estimate(v["seconds"]["train"] / 60 for v, _ in mine)
        rows.append(
            (
                cell.group, cell.name, len(mine) or NOT_RUN, number(top1) if top1 else "",
                cell.source, _plain(spread), _plain(ranks), _plain(embedding),
                "" if not mine else f"{alarms} of {len(mine)}", _plain(minutes, 1),
            )
        )  # fmt: skip
    columns = ("group", "cell", "n", "top-1", "source says", "std(logvar)", "rank with supervised",
               "embedding std",
               "collapse alarms", "minutes")  # fmt: skip
    return table(columns, rows)


def _top1(record: RunRecord) -> float | None:
    row = record.row(MEANS)
    return None if row is None else 100 * row["top1"]


def _rank_correlation(
    record: RunRecord, found: Sequence[tuple[dict[str, Any], RunRecord]]
) -> float | None:
    """Spearman's correlation of the predictive std with the supervised baseline's of that seed."""
    supervised = [c for v, c in found if v["cell"] == "supervised-bbb" and c.seed == record.seed]
    mine = record.numbers("spread")
    if not supervised or mine is None or supervised[0] is record:
        return None
    return spearman(supervised[0].results["spread"]["numbers"]["std"], mine["std"])


def _variances(records: Sequence[RunRecord]) -> list[str]:
    """Figure 7 in numbers, with all posteriors and without those on unseen shifts."""
    columns: list[str] = []
    rows: list[tuple[str, ...]] = []
    for left_out, skip in (("none", ()), ("unseen shifts", UNSEEN_SHIFTS)):
        numbers = fig7(records, skip=skip)
        if numbers is not None:
            columns = ["without posterior", RISES, *noise_levels(numbers), "n"]
            n = str(numbers["curves"][0]["over_none"][0].n)
            rows += [(left_out, *cells, n) for cells in rises(numbers)]
    return table(columns, rows) if rows else [NOT_RUN]


def _ood_data(row: dict[str, Any]) -> str:
    """The OOD data set of a row; results of before have it under another name."""
    name: str = row["ood"] if "ood" in row else row["strangers"]
    return name


def _ood(found: Sequence[tuple[dict[str, Any], RunRecord]]) -> list[str]:
    """AUROC and FPR95 of each cell with OOD images, mean over the seeds."""
    by_cell = {
        cell.name: [
            row
            for v, c in found
            if v["cell"] == cell.name
            for row in (c.numbers("ood") or {"rows": []})["rows"]
        ]
        for cell in CELLS
    }
    sets = sorted({_ood_data(row) for rows in by_cell.values() for row in rows})
    lines = []
    for name, rows in by_cell.items():
        for prediction, score in dict.fromkeys((r["prediction"], r["score"]) for r in rows):
            same = [r for r in rows if (r["prediction"], r["score"]) == (prediction, score)]
            numbers = [
                estimate(100 * r[key] for r in same if _ood_data(r) == each)
                for each in sets
                for key in ("auroc", "fpr95")
            ]
            n = max(0 if e is None else e.n for e in numbers)
            lines.append((name, prediction, score, n, *map(number, numbers)))
    if not lines:
        return [NOT_RUN]
    heads = [f"{Path(each).stem}: {of}" for each in sets for of in ("AUROC", "FPR95")]
    return table(("cell", "prediction", "score", "n", *heads), lines)


def _plain(value: Estimate | None, digits: int = 2) -> str:
    return "" if value is None else f"{value.mean:.{digits}f}"


def _machine(value: dict[str, Any]) -> str:
    m = value["machine"]
    name = m["processor"] if m["device"] == "cpu" else m["device"]
    torch = value["versions"]["torch"]
    return f"{name} ({m['cores']} cores, {m['threads']} threads a run), torch {torch}"


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return [*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)]


if __name__ == "__main__":
    main()
