"""``bayesify recipe byov figures``: measure what is missing, draw it, set it beside the paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bayesify import ArgumentError

from . import arms, assemble, claims, plots
from .cards import Card, distinct, read_card
from .config import UNSEEN_SHIFTS
from .doubt import DoubtSettings, corrupted, draws_needed, latent_variance, spread
from .evaluate import EvalSettings, evaluate
from .gradients import gradient_noise
from .iterative import IterativeSettings, iterative_pruning
from .page import Section, page
from .pruning import SCOPES, SPARSITIES, Scope, prune_curves
from .runs import Run, open_run, write_json

Told = Callable[[str], None]


@dataclass(frozen=True)
class Figure:
    """One figure or table.

    Args:
        name: Of its files.
        title: As the page has it.
        says: What the paper says with it.
        needs: Measurements that it is made of.
        numbers: From the cards; None where they do not allow it.
    """

    name: str
    title: str
    says: str
    needs: tuple[str, ...]
    numbers: Callable[[Sequence[Card]], dict[str, Any] | None]


FIGURES: tuple[Figure, ...] = (
    Figure("fig1b", "Figure 1b: doubt with and without labels",
           "The predictive std of BYOV against that of a supervised BBB model is well captured by "
           "a Gaussian.", ("spread",), assemble.fig1b),
    Figure("fig1b-seen", "Figure 1b without posteriors on unseen shifts",
           "All weights have a posterior; what is left out here is ours.", ("spread",),
           partial(assemble.fig1b, skip=UNSEEN_SHIFTS)),
    Figure("fig2", "Figure 2: priors and beta",
           "The best BYOV models beat BYOL in ECE (+2.83) and reliability (+1.03) and are behind "
           "in top-1 (-0.4), top-5 (-0.22) and resolution (-0.57).", ("eval",), assemble.fig2),
    Figure("stability", "Figure 2, text: stability of the priors",
           "N(mu_T, Sigma_T) leads to training instabilities.", (), assemble.stability),
    Figure("fig3", "Figure 3: sigma and SNR by prior",
           "Sigma differs from prior to prior; SNR follows a similar trend.", (), assemble.fig3),
    Figure("fig4", "Figure 4, left: pruning without retraining",
           "SNR pruning is up to 12 % better with a 25 % sparser model than magnitude pruning.",
           ("prune",), assemble.fig4),
    Figure("fig4rounds", "Figure 4, further: pruning in rounds of training",
           "It prunes at once and trains no more; all else here is ours.", (), arms.fig4rounds),
    Figure("fig4shift", "Figure 4, centre and right: under augmentations",
           "Better than BYOL everywhere except under shear and Gaussian noise.", ("corrupted",),
           assemble.fig4shift),
    Figure("fig5", "Figure 5: how many draws",
           "The std of the average vanishes and its mean is stable.", ("draws",), assemble.fig5),
    Figure("fig6", "Figure 6: SNR by beta",
           "Alike for all three; the low bundle that grows with beta is projector and predictor.",
           (), assemble.fig6),
    Figure("fig7", "Figure 7: variance under noise",
           "It rises with noise, its spread shrinks, and the three parts go together.",
           ("latents",), assemble.fig7),
    Figure("width", "The width of the posterior, by beta and without unseen shifts",
           "Beta is from 0 to 1 at the most; what hangs on it beside figures 2 and 6 is ours.",
           ("eval", "prune", "latents"), claims.by_beta),
    Figure("appB", "Appendix B: variance of the gradient by estimator",
           "Large batches negate the need for Flipout.", ("gradients",), assemble.app_b),
    Figure("appC", "Appendix C: what BYOL and BBB needed to go together",
           "No weight decay and an annealed beta; for stability exp in place of softplus, and log "
           "variances that start at -10.", ("eval",), assemble.app_c),
    Figure("table1", "Table 1: what is Bayesian",
           "A fully Bayesian model is the best of its class.", ("eval",), assemble.table1),
)  # fmt: skip
_HEAD, _DOUBT, _ROUNDS = EvalSettings(), DoubtSettings(), IterativeSettings()

NAMES = tuple(f.name for f in FIGURES)


def measure(
    run: Run,
    needs: Sequence[str],
    *,
    head: EvalSettings,
    doubt: DoubtSettings,
    sparsities: Sequence[float] = SPARSITIES,
    scopes: Sequence[Scope] = SCOPES,
    rounds: IterativeSettings = _ROUNDS,
    told: Told = lambda line: None,
) -> None:
    """Make the measurements of a run that have sense for it; what lies in its folder is kept."""
    if "eval" in needs:
        told("linear probe")
        evaluate(run, "linear", head)
    byol, bayesian = run.config.objective == "byol", run.config.bayesian
    if "prune" in needs and byol:
        prune_curves(
            run, sparsities=sparsities, scopes=scopes, images=doubt.pruned_images, settings=head,
            told=told,
        )  # fmt: skip
    if "iterative" in needs and byol:
        iterative_pruning(run, rounds, head=head, told=told)
    if "spread" in needs and bayesian:
        told(f"{doubt.spread_draws} draws of every test image")
        spread(run, doubt, head)
    if "corrupted" in needs and byol:
        corrupted(run, doubt, head, told)
    if "draws" in needs and byol and bayesian:
        draws_needed(run, doubt, head, told)
    if "gradients" in needs and byol and bayesian:
        gradient_noise(run, told=told)
    if "latents" in needs and byol and bayesian:
        latent_variance(run, doubt, told)


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
    doubt: DoubtSettings = _DOUBT,
    sparsities: Sequence[float] = SPARSITIES,
    measured: bool = False,
    told: Told = lambda line: None,
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
        doubt: Of the other measurements.
        sparsities: Of figure 4.
        measured: Measure nothing: use what lies in the runs' folders.
        told: Gets a line before each piece of work.

    Returns:
        The page.

    Raises:
        ArgumentError: There is no such figure, a folder holds no run, or matplotlib is missing.
    """
    unknown = sorted(set(only) - set(NAMES))
    if unknown:
        raise ArgumentError(f"There is no figure {unknown[0]!r}: it must be of {', '.join(NAMES)}.")
    wanted = [f for f in FIGURES if not only or f.name in only]
    needs = list(dict.fromkeys(need for f in wanted for need in f.needs)) or ["eval"]
    if not measured:
        for folder in folders:
            told(f"{folder}")
            run = open_run(
                folder, data=data, encoder=encoder, encoder_args=encoder_args, device=device,
                workers=workers,
            )  # fmt: skip
            measure(run, needs, head=head, doubt=doubt, sparsities=sparsities, told=told)
    return publish([read_card(folder) for folder in folders], out, wanted, told)


def publish(
    cards: Sequence[Card], out: Path, wanted: Sequence[Figure] = FIGURES, told: Told = print
) -> Path:
    """Write the figures that the cards allow, and the page; the same run counts once."""
    cards = distinct(cards)
    out.mkdir(parents=True, exist_ok=True)
    sections = []
    for figure in wanted:
        told(f"drawing {figure.name}")
        numbers = figure.numbers(cards)
        shown = numbers if numbers is None else {**numbers, "title": figure.title}
        drawn = shown is not None and figure.name in plots.DRAWN
        if shown is not None:
            if drawn:
                plots.draw(figure.name, shown, out)
            runs = [{k: v for k, v in c.facts.items() if k != "config"} for c in cards]
            write_json(out / f"{figure.name}.json", {**shown, "runs": runs})
        sections.append(Section(figure.name, figure.title, figure.says, shown, drawn))
    path = out / "index.html"
    page(path, sections, claims.comparison(cards), assemble.overview(cards), cards)
    return path
