"""``bayesify recipe byov figures``: measure what is missing, draw it, set it beside the paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bayesify import ArgumentError
from bayesify.report import check_installed

from ..config import UNSEEN_SHIFTS
from ..evaluation.evaluate import evaluate
from ..evaluation.protocol import EvalSettings
from ..evaluation.pruning import SCOPES, SPARSITIES, Scope, prune_curves
from ..evaluation.runs import Run, open_run, write_json
from ..evaluation.uncertainty import (
    UncertaintySettings,
    corrupted,
    draws_needed,
    latent_variance,
    spread,
)
from ..iterative import IterativeSettings, iterative_pruning
from . import claims, plots, pruning_tables, tables, trajectories
from .gradients import gradient_noise
from .page import Section, page
from .results import RunRecord, distinct, read_record

OnProgress = Callable[[str], None]


@dataclass(frozen=True)
class Figure:
    """One figure or table.

    Args:
        name: Of its files.
        title: As the page has it.
        says: What the paper says with it.
        needs: Measurements that it is made of.
        numbers: From the records; None where they do not allow it.
    """

    name: str
    title: str
    says: str
    needs: tuple[str, ...]
    numbers: Callable[[Sequence[RunRecord]], dict[str, Any] | None]


FIGURES: tuple[Figure, ...] = (
    Figure("fig1b", "Figure 1b: uncertainty with and without labels",
           "The predictive std of BYOV against that of a supervised BBB model is well captured by "
           "a Gaussian.", ("spread",), tables.fig1b),
    Figure("fig1b-seen", "Figure 1b without posteriors on unseen shifts",
           "All weights have a posterior; what is left out here is ours.", ("spread",),
           partial(tables.fig1b, skip=UNSEEN_SHIFTS)),
    Figure("fig2", "Figure 2: priors and beta",
           "The best BYOV models beat BYOL in ECE (+2.83) and reliability (+1.03) and are behind "
           "in top-1 (-0.4), top-5 (-0.22) and resolution (-0.57).", ("eval",), tables.fig2),
    Figure("stability", "Figure 2, text: stability of the priors",
           "N(mu_T, Sigma_T) leads to training instabilities.", (), tables.stability),
    Figure("fig3", "Figure 3: sigma and SNR by prior",
           "Sigma differs from prior to prior; SNR follows a similar trend.", (),
           trajectories.fig3),
    Figure("fig4", "Figure 4, left: pruning without retraining",
           "SNR pruning is up to 12 % better with a 25 % sparser model than magnitude pruning.",
           ("prune",), pruning_tables.fig4),
    Figure("fig4rounds", "Figure 4, further: pruning in rounds of training",
           "It prunes at once and trains no more; all else here is ours.", (),
           pruning_tables.fig4rounds),
    Figure("fig4shift", "Figure 4, centre and right: under augmentations",
           "Better than BYOL everywhere except under shear and Gaussian noise.", ("corrupted",),
           tables.fig4shift),
    Figure("fig5", "Figure 5: how many draws",
           "The std of the average vanishes and its mean is stable.", ("draws",), tables.fig5),
    Figure("fig6", "Figure 6: SNR by beta",
           "Alike for all three; the low bundle that grows with beta is projector and predictor.",
           (), trajectories.fig6),
    Figure("fig7", "Figure 7: variance under noise",
           "It rises with noise, its spread shrinks, and the three parts go together.",
           ("latents",), tables.fig7),
    Figure("width", "The width of the posterior, by beta and without unseen shifts",
           "Beta is from 0 to 1 at the most; what hangs on it beside figures 2 and 6 is ours.",
           ("eval", "prune", "latents"), claims.by_beta),
    Figure("appB", "Appendix B: variance of the gradient by estimator",
           "Large batches negate the need for Flipout.", ("gradients",), tables.app_b),
    Figure("appC", "Appendix C: what BYOL and BBB needed to go together",
           "No weight decay and an annealed beta; for stability exp in place of softplus, and log "
           "variances that start at -10.", ("eval",), tables.app_c),
    Figure("table1", "Table 1: what is Bayesian",
           "A fully Bayesian model is the best of its class.", ("eval",), tables.table1),
)  # fmt: skip
_HEAD, _UNCERTAINTY, _ROUNDS = EvalSettings(), UncertaintySettings(), IterativeSettings()

NAMES = tuple(f.name for f in FIGURES)


def measure(
    run: Run,
    needs: Sequence[str],
    *,
    head: EvalSettings,
    uncertainty: UncertaintySettings,
    sparsities: Sequence[float] = SPARSITIES,
    scopes: Sequence[Scope] = SCOPES,
    rounds: IterativeSettings = _ROUNDS,
    on_progress: OnProgress = lambda line: None,
) -> None:
    """Make the measurements of a run that have sense for it; what lies in its folder is kept."""
    if "eval" in needs:
        on_progress("linear probe")
        evaluate(run, "linear", head)
    byol, bayesian = run.config.objective == "byol", run.config.bayesian
    if "prune" in needs and byol:
        prune_curves(
            run, sparsities=sparsities, scopes=scopes, images=uncertainty.pruned_images,
            settings=head, on_progress=on_progress,
        )  # fmt: skip
    if "iterative" in needs and byol:
        iterative_pruning(run, rounds, head=head, on_progress=on_progress)
    if "spread" in needs and bayesian:
        on_progress(f"{uncertainty.spread_draws} draws of every test image")
        spread(run, uncertainty, head)
    if "corrupted" in needs and byol:
        corrupted(run, uncertainty, head, on_progress)
    if "draws" in needs and byol and bayesian:
        draws_needed(run, uncertainty, head, on_progress)
    if "gradients" in needs and byol and bayesian:
        gradient_noise(run, on_progress=on_progress)
    if "latents" in needs and byol and bayesian:
        latent_variance(run, uncertainty, on_progress)


def make(
    folders: Sequence[Path],
    out: Path,
    *,
    only: Sequence[str] = (),
    data: str | None = None,
    encoder: str | None = None,
    encoder_args: Mapping[str, Any] | None = None,
    device: str = "auto",
    workers: int = 0,
    head: EvalSettings = _HEAD,
    uncertainty: UncertaintySettings = _UNCERTAINTY,
    sparsities: Sequence[float] = SPARSITIES,
    measured: bool = False,
    on_progress: OnProgress = lambda line: None,
) -> Path:
    """Measure what is missing, write every figure as PNG, SVG and JSON, and one HTML page.

    Args:
        folders: Runs.
        out: Folder of figures and ``index.html``.
        only: Names of figures; all if empty.
        data: The runs' data set, where it lies elsewhere now.
        encoder: The runs' encoder, if it is a factory of your own.
        encoder_args: What that factory was called with.
        device: To measure on.
        workers: Processes that read training images.
        head: Of the classifier and the average.
        uncertainty: Of the other measurements.
        sparsities: Of figure 4.
        measured: Measure nothing: use what lies in the runs' folders.
        on_progress: Gets a line before each piece of work.

    Returns:
        The page.

    Raises:
        ArgumentError: There is no such figure, a folder holds no run, or jinja2, matplotlib or
            scipy is missing.
    """
    unknown = sorted(set(only) - set(NAMES))
    if unknown:
        raise ArgumentError(f"There is no figure {unknown[0]!r}: it must be of {', '.join(NAMES)}.")
    check_installed("scipy")
    wanted = [f for f in FIGURES if not only or f.name in only]
    needs = list(dict.fromkeys(need for f in wanted for need in f.needs)) or ["eval"]
    if not measured:
        for folder in folders:
            on_progress(f"{folder}")
            run = open_run(
                folder, data=data, encoder=encoder, encoder_args=encoder_args, device=device,
                workers=workers,
            )  # fmt: skip
            measure(
                run, needs, head=head, uncertainty=uncertainty, sparsities=sparsities,
                on_progress=on_progress,
            )  # fmt: skip
    return publish([read_record(folder) for folder in folders], out, wanted, on_progress)


def publish(
    records: Sequence[RunRecord],
    out: Path,
    wanted: Sequence[Figure] = FIGURES,
    on_progress: OnProgress = print,
) -> Path:
    """Write the figures that the records allow, and the page; the same run counts once."""
    records = distinct(records)
    out.mkdir(parents=True, exist_ok=True)
    sections = []
    for figure in wanted:
        on_progress(f"drawing {figure.name}")
        numbers = figure.numbers(records)
        shown = numbers if numbers is None else {**numbers, "title": figure.title}
        drawn = shown is not None and figure.name in plots.DRAWN
        if shown is not None:
            if drawn:
                plots.draw(figure.name, shown, out)
            runs = [{k: v for k, v in c.facts.items() if k != "config"} for c in records]
            write_json(out / f"{figure.name}.json", {**shown, "runs": runs})
        sections.append(Section(figure.name, figure.title, figure.says, shown, drawn))
    path = out / "index.html"
    page(path, sections, claims.comparison(records), tables.overview(records), records)
    return path
