"""The cells of the BYOV grid in order of importance, and how one of them is run and kept.

A cell is a change of the scale's configuration, a seed, and what is measured of it. Its result is
one JSON in `benchmarks/results/byov/SCALE`: facts, subsampled log, measurements, and where it ran.
"""

from __future__ import annotations

import fnmatch
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bayesify.provenance import machine, provenance

from ..config import UNSEEN_SHIFTS, BYOVConfig, RunConfig
from ..evaluation.evaluate import evaluate
from ..evaluation.ood import ood_detection, open_ood
from ..evaluation.protocol import EvalSettings
from ..evaluation.pruning import SCOPES, Scope
from ..evaluation.runs import open_run, write_json
from ..evaluation.uncertainty import UncertaintySettings
from ..iterative import IterativeSettings
from ..presets import PRESETS
from ..runtime.monitors import collapse_alarms
from ..train import train
from ..train_log import Watcher
from .figures import measure
from .results import RunRecord, record_of

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "byov"
BYOL = {"conversion": "none"}
_DECAY = 0.05  # of BYOL, as ViT recipes have it
_STEPS_KEPT = 200
_LAYERS_KEPT = ("core", "beta", "unseen shifts")  # groups
_OOD_GROUPS = ("core", "unseen shifts")  # groups
_EVERYTHING = ("eval", "prune", "iterative", "spread", "corrupted", "draws", "latents", "gradients")


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Args:
        name: Of its files.
        group: Where the docs show it.
        changes: Fields of the config that differ from the scale's.
        needs: What is measured of it.
        source: What the paper, or the talk of BYOL's authors, says of it, in their numbers.
    """

    name: str
    group: str
    changes: dict[str, Any]
    needs: tuple[str, ...] = ("eval",)
    source: str = ""


_RESNET = {"encoder": PRESETS["cifar10-resnet18"].config.encoder, "encoder_args": {}}
_RESNETS = ("byol-resnet18", "byov-zero-resnet18")


def _ablation(name: str, source: str, **changes: Any) -> Cell:
    return Cell(name, "BYOL ablations", {**BYOL, "weight_decay": _DECAY, **changes}, source=source)


CELLS: tuple[Cell, ...] = (
    Cell("byol", "core", {**BYOL, "weight_decay": _DECAY}, ("eval", "prune", "corrupted"), "75.97"),
    Cell("byol-no-wd", "core", {**BYOL}, ("eval", "prune", "corrupted")),
    Cell("byov-zero", "core", {}, _EVERYTHING, "-0.4 points"),
    Cell("supervised-bbb", "core", {"objective": "supervised"}, ("eval", "spread")),
    Cell("byov-teacher-mean", "core", {"prior": "teacher-mean"}, ("eval", "prune")),
    Cell("byov-teacher", "core", {"prior": "teacher"}, ("eval", "prune"), "worst of the priors"),
    Cell("byov-zero-b0.3", "beta", {"beta_end": 0.3}, ("eval", "prune", "latents"),
         "MC average +0.34 points"),
    Cell("byov-zero-b0.1", "beta", {"beta_end": 0.1}, ("eval", "prune", "latents")),
    Cell("byov-zero-no-shift", "unseen shifts", {"skip": UNSEEN_SHIFTS},
         ("eval", "prune", "latents", "spread")),
    Cell("byov-zero-no-shift-b0.3", "unseen shifts", {"skip": UNSEEN_SHIFTS, "beta_end": 0.3},
         ("eval", "prune", "latents", "spread")),
    Cell("byov-teacher-mean-b0.3", "beta", {"prior": "teacher-mean", "beta_end": 0.3}),
    Cell("byov-teacher-b0.3", "beta", {"prior": "teacher", "beta_end": 0.3}),
    Cell("no-conv-zero", "table 1", {"conversion": "no-conv"}, source="73.68"),
    Cell("no-conv-teacher-mean", "table 1", {"conversion": "no-conv", "prior": "teacher-mean"},
         source="73.97"),
    Cell("no-conv-teacher", "table 1", {"conversion": "no-conv", "prior": "teacher"},
         source="69.73"),
    Cell("linear-only-zero", "table 1", {"conversion": "linear-only"}, source="73.62"),
    Cell("linear-only-teacher-mean", "table 1",
         {"conversion": "linear-only", "prior": "teacher-mean"}, source="74.23"),
    Cell("linear-only-zero-b1-1", "table 1",
         {"conversion": "linear-only", "beta_start": 1.0, "beta_shape": "constant"},
         source="72.60"),
    Cell("linear-only-teacher-mean-b1-1", "table 1",
         {"conversion": "linear-only", "prior": "teacher-mean", "beta_start": 1.0,
          "beta_shape": "constant"}, source="72.69"),
    Cell("no-layernorm-zero", "table 1", {"conversion": "no-layernorm"}),
    Cell("byol-resnet18", "ResNet", {**BYOL, **_RESNET}, ("eval", "prune")),
    Cell("byov-zero-resnet18", "ResNet", _RESNET, ("eval", "prune")),
    Cell("byov-wd", "appendix C", {"weight_decay": _DECAY}, source="interferes"),
    Cell("byov-b1-1", "appendix C", {"beta_start": 1.0, "beta_shape": "constant"},
         source="annealed is better"),
    Cell("byov-softplus", "appendix C", {"parameterization": "softplus"}, source="exp is chosen"),
    Cell("byov-logvar-6", "appendix C", {"logvar_init": -6.0}),
    Cell("byov-rms-1", "appendix C", {"relative_std": 0.01}),
    Cell("byov-flipout", "appendix B", {"estimator": "flipout"}, source="needless at large batch"),
    Cell("byov-local", "appendix B", {"estimator": "local"}),
    _ablation("byol-no-predictor", "collapse", predictor="none", predictor_lr_ratio=1.0),
    _ablation("byol-no-ema", "barely learns", tau_base=0.0, tau_end=0.0),
    _ablation("byol-tau-1", "18.8", tau_base=1.0),
    _ablation("byol-tau-0.9", "works", tau_base=0.9),
    _ablation("byol-tau-0.999", "works", tau_base=0.999),
    _ablation("byol-no-bn", "0.1", head_norm="none"),
    _ablation("byol-no-bn-better-init", "65.7", head_norm="none", head_init="modified"),
    _ablation("byol-layernorm", "collapse (replication)", head_norm="layer"),
    _ablation("byol-gn-ws", "73.9 of 74.3", head_norm="group"),
    _ablation("byol-predictor-x0", "0.01, without target", tau_base=0.0, tau_end=0.0,
              predictor_lr_ratio=0.0),
    _ablation("byol-predictor-x1", "5.5, without target", tau_base=0.0, tau_end=0.0,
              predictor_lr_ratio=1.0),
    _ablation("byol-predictor-x2", "62.8, without target", tau_base=0.0, tau_end=0.0,
              predictor_lr_ratio=2.0),
    _ablation("byol-predictor-x10", "66.6, without target", tau_base=0.0, tau_end=0.0,
              predictor_lr_ratio=10.0),
    _ablation("byol-predictor-x20", "66.3, without target", tau_base=0.0, tau_end=0.0,
              predictor_lr_ratio=20.0),
    _ablation("byol-batch-optimal", "45, without target", tau_base=0.0, tau_end=0.0,
              predictor="batch-optimal", predictor_lr_ratio=1.0),
    _ablation("byol-negatives", "72.7 of 72.5", negatives_weight=1.0),
    _ablation("byol-no-colour", "-13 points", augmentation_strength=0.0),
    *(_ablation(f"byol-batch-{size}", "stable from 256 to 4096", batch_size=size)
      for size in (64, 128, 256, 1024)),
    Cell("byov-augment-0", "augmentation", {"augmentation_strength": 0.0}, ("eval", "spread")),
    Cell("byov-augment-0.5", "augmentation", {"augmentation_strength": 0.5}, ("eval", "spread")),
    Cell("byov-augment-1.5", "augmentation", {"augmentation_strength": 1.5}, ("eval", "spread")),
    Cell("byov-negatives", "augmentation", {"negatives_weight": 1.0}, ("eval", "spread")),
)  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """How large the runs of a grid are.

    Args:
        name: Of its folder.
        about: One line for the docs.
        config: What every cell starts from.
        run: Where and how.
        head: Of classifiers and averages.
        uncertainty: Of the other measurements.
        scopes: Of pruning.
        changes: Of single cells, where the scale needs others than the grid has.
        rounds: Of pruning in rounds.
    """

    name: str
    about: str
    config: BYOVConfig
    run: RunConfig
    head: EvalSettings
    uncertainty: UncertaintySettings
    scopes: tuple[Scope, ...] = SCOPES
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    rounds: IterativeSettings = field(default_factory=IterativeSettings)


_QUIET: Any = {"stop_on_collapse": False, "baselines": False, "eval_every": 0, "keep_last": 1}
_DEMO, _CIFAR = PRESETS["demo"], PRESETS["cifar10-vit-tiny"]
SCALES = {
    "cpu": Scale(
        "cpu",
        "6,000 training and 2,000 test images of Fashion-MNIST, 28 x 28 grey, a ViT of two layers "
        "and 64 dimensions, 12 epochs; the log variances learn 15 times as fast as the means, so "
        "that the posterior moves. ResNet-18 has an eighth of its width. BYOL's ablations and the "
        "cells of augmentation have three seeds, byov-zero, on which most claims rest, ten, all "
        "others six. BYOV's results of ResNet-18, of the commits `591dc6b346`, `f96c2f82d7` and "
        "`b57c5e9d26`, were measured with BatchNorm's statistics of images as they are. They are "
        "gathered from views as in training since, as BYOL's are: without the files "
        "`byov-zero-resnet18-s*.json`, `python -m recipes.byov.paper.cifar10 --scale cpu --only "
        "byov-zero-resnet18 --seeds 6 --minutes 180 --jobs 2` measures them anew, in 45 minutes of "
        "two free cores.",
        replace(_DEMO.config, epochs=12, logvar_lr_ratio=15.0),
        replace(_DEMO.run, **_QUIET, checkpoint_every=3),
        EvalSettings(num_samples=30),
        UncertaintySettings(spread_draws=100, pool=500, latent_draws=50, images=300,
                      shifted=("salt and pepper",)),
        changes={name: {"encoder_args": {"channels": [8, 16, 32, 64]}} for name in _RESNETS},
        rounds=IterativeSettings(epochs=0.25, sparsities=(0.9,)),
    ),
    "gpu": Scale(
        "gpu",
        "CIFAR-10, ViT-Tiny/4, batch 512, 100 epochs; the log variances learn 10 times as fast as "
        "the means.",
        _CIFAR.config,
        replace(_CIFAR.run, **_QUIET, checkpoint_every=5),
        EvalSettings(num_samples=30),
        UncertaintySettings(spread_draws=1000, pool=500, latent_draws=50, images=2000),
        changes={
            name: {
                key: getattr(PRESETS["cifar10-resnet18"].config, key)
                for key in ("optimizer", "lr", "trust_coefficient", "logvar_lr_ratio",
                              "clip_norm")
            }
            for name in _RESNETS
        },
        rounds=IterativeSettings(sparsities=(0.9,)),
    ),
}  # fmt: skip


def wanted(
    only: Sequence[str] = (), seeds: int = 3, groups: Sequence[str] = ()
) -> list[tuple[Cell, int]]:
    """Cells with their seeds in the order they are run in: the first seed of all, then the second.

    Args:
        only: Globs on names; all if empty.
        seeds: How many.
        groups: Groups; all if empty.
    """
    kept = [
        cell
        for cell in CELLS
        if (not only or any(fnmatch.fnmatch(cell.name, glob) for glob in only))
        and (not groups or cell.group in groups)
    ]
    return [(cell, seed) for seed in range(seeds) for cell in kept]


def result_of(scale: Scale, cell: Cell, seed: int) -> Path:
    """The file of a cell's result."""
    return RESULTS / scale.name / f"{cell.name}-s{seed}.json"


def config_of(scale: Scale, cell: Cell, seed: int) -> BYOVConfig:
    """What a cell trains."""
    changes = {**cell.changes, **scale.changes.get(cell.name, {})}
    return replace(scale.config, seed=seed, **changes)


def run_cell(
    scale: Scale,
    cell: Cell,
    seed: int,
    *,
    work: Path,
    data: str | None = None,
    device: str | None = None,
    ood: Sequence[str] = (),
    first: bool = True,
    on_progress: Callable[[str], None] = print,
) -> bool:
    """Train, or go on with, a cell, measure it and write its result.

    Args:
        scale: The scale.
        cell: The cell.
        seed: Its seed.
        work: Folder of checkpoints, one folder a cell.
        data: In place of the scale's.
        device: In place of the scale's.
        ood: OOD data sets, for the cells of the core and those without unseen shifts.
        first: Whether this process is the one of several that measures.
        on_progress: Gets a line now and then.

    Returns:
        Whether it is finished; False if training was interrupted, to go on another time.
    """
    folder = work / scale.name / f"{cell.name}-s{seed}"
    run = replace(
        scale.run, out=folder, data=data or scale.run.data, device=device or scale.run.device
    )
    clock = folder / "seconds.json"
    if not (folder / "student.safetensors").exists():
        spent = json.loads(clock.read_text())["train"] if clock.exists() else 0.0
        started = time.perf_counter()
        on_progress(f"{cell.name}, seed {seed}: training")
        config = config_of(scale, cell, seed)
        outcome = train(config, run, resume=True, watcher=Watcher(log=on_progress))
        if first:
            write_json(clock, {"train": spent + time.perf_counter() - started})
        if outcome.results is None:
            return False
    if first:
        _measure_cell(scale, cell, seed, run, ood, on_progress)
    return True


def _measure_cell(
    scale: Scale,
    cell: Cell,
    seed: int,
    run: RunConfig,
    ood: Sequence[str],
    on_progress: Callable[[str], None],
) -> None:
    """Measure a trained cell and write its result."""
    folder = run.out
    clock = folder / "seconds.json"
    spent = json.loads(clock.read_text())["train"] if clock.exists() else 0.0
    started = time.perf_counter()
    opened = open_run(folder, data=run.data, device=run.device, workers=run.workers)

    def said(line: str) -> None:
        on_progress(f"{cell.name}, seed {seed}: {line}")

    measure(
        opened, cell.needs, head=scale.head, uncertainty=scale.uncertainty, scopes=scale.scopes,
        rounds=scale.rounds, on_progress=said,
    )  # fmt: skip
    if "eval" in cell.needs:
        evaluate(opened, "knn", scale.head)
    if ood and cell.group in _OOD_GROUPS:
        ood_detection(opened, [open_ood(opened, name) for name in ood], scale.head)
    results = {
        path.stem: json.loads(path.read_text("utf-8"))
        for path in sorted((folder / "results").glob("*.json"))
    }
    for value in results.values():
        del value["run"]
    write_json(
        result_of(scale, cell, seed),
        {
            "cell": cell.name,
            "group": cell.group,
            "seed": seed,
            "facts": opened.facts(),
            "collapse": collapse(opened.log),
            "log": list(subsample(opened.log, layers=cell.group in _LAYERS_KEPT)),
            "results": results,
            "seconds": {"train": spent, "measure": time.perf_counter() - started},
            "machine": machine(opened.device),
            **provenance("torch", "timm"),
        },
    )  # fmt: skip


def subsample(log: list[dict[str, Any]], *, layers: bool) -> Iterator[dict[str, Any]]:
    """What figures 3 and 6 and the curves of the loss need of a log."""
    steps = [line for line in log if line["kind"] == "step"]
    stride = max(1, len(steps) // _STEPS_KEPT)
    for line in steps[::stride]:
        kept = ("kind", "step", "loss", "kl", "grad_norm", "std", "effective_rank",
                "logvar_travel", "logvar_spread")  # fmt: skip
        yield {key: line[key] for key in kept if key in line}
    for line in log:
        if line["kind"] == "epoch" and layers:
            yield {key: line[key] for key in ("kind", "step", "epoch", "layers") if key in line}


def collapse(log: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Spread and rank of the embeddings at the end, and the alarms that they raise."""
    last = next((s for s in reversed(log) if s["kind"] == "step" and "std" in s), None)
    if last is None:
        return None
    std, rank = last["std"], last["effective_rank"]
    return {"std": std, "effective_rank": rank, "alarms": collapse_alarms(std=std, rank=rank)}


def records_of(scale: Scale) -> list[tuple[dict[str, Any], RunRecord]]:
    """Every result of a scale, and the record of it."""
    found = []
    for path in sorted((RESULTS / scale.name).glob("*.json")):
        value = json.loads(path.read_text("utf-8"))
        found.append((value, record_of(value["facts"], value["log"], value["results"])))
    return found
