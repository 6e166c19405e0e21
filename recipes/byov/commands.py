"""``bayesify recipe byov eval | prune | figures``. Nothing here imports torch at its top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bayesify import ArgumentError
from bayesify.cli.options import Json, command
from bayesify.cli.outputs import check_folder
from bayesify.settings import Shown
from bayesify.settings.fields import Whole, checked, refuse

from .evaluation.settings import EvalSettings, HeadSettings, UncertaintySettings

if TYPE_CHECKING:
    from .iterative import IterativeSettings

Folders = Annotated[
    list[Path], typer.Argument(metavar="RUN_DIR...", help="Folders that train wrote.")
]


@dataclass(frozen=True, kw_only=True)
class Where:
    """How runs are opened.

    Args:
        data: The runs' data set, where it lies now.
        encoder: The runs' encoder, if it is a factory of your own: no file chooses what is
            imported.
        encoder_args: What that factory was called with.
        device: cpu, cuda, cuda:1; auto takes what there is.
        workers: Processes that read training images.
    """

    data: Annotated[str | None, Shown(metavar="DATA")] = None
    encoder: Annotated[str | None, Shown(metavar="MODULE:FACTORY")] = None
    encoder_args: Annotated[Mapping[str, Any] | None, Shown(metavar="JSON")] = None
    device: str = "auto"
    workers: Whole = 0

    def __post_init__(self) -> None:
        refuse("These runs cannot be opened", checked(self))


def mount(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("eval")(command(evaluate))
    app.command("prune")(command(prune))
    app.command("figures")(command(figures))


def evaluate(
    folders: Folders,
    protocol: Annotated[
        Literal["linear", "knn", "semi", "finetune"],
        Shown(text="linear: all labels; semi: 1 and 10 % of them; finetune: all trained."),
    ] = "linear",
    ood: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DATA", help="Images of other classes, to be told from the test's. Repeatable."
        ),
    ] = None,
    *,
    where: Where,
    settings: EvalSettings,
    json: Json = False,
) -> None:
    """Measure runs on frozen features: accuracy, calibration, Brier score and its parts.

    Writes results/eval-PROTOCOL.json into each folder. Percent, NLL in nats.
    """
    from bayesify.cli import render

    from .evaluation.evaluate import evaluate as measure
    from .evaluation.ood import ood_detection, open_ood
    from .evaluation.runs import open_run

    _check_written(folders)
    made = []
    for folder in folders:
        with render.status(f"{folder}"):
            run = open_run(folder, **vars(where))
            others = [open_ood(run, name) for name in ood or ()]
            made.append(measure(run, protocol, settings))
            if others:
                made.append(ood_detection(run, others, settings))
        if not json:
            _show(folder, made[-2 if ood else -1])
            _show_ood(made[-1] if ood else None)
    if json:
        render.as_json(made)


_COLUMNS = ("top1", "top5", "ece", "brier", "reliability", "resolution", "residual")


def _show(folder: Path, made: dict[str, Any]) -> None:
    """The metrics of a run, within 80 columns."""
    from bayesify.cli import render

    facts = made["run"]
    moved = "" if facts["logvar_spread"] is None else f", std(logvar) {facts['logvar_spread']:.2f}"
    render.text(
        f"{folder}: {facts['run']}, seed {facts['seed']}, step {facts['step']:,} of "
        f"{facts['steps']:,}{moved}, {facts['test_images']:,} test images"
    )
    render.table(
        ("", "top-1", "top-5", "ECE", "Brier", "rel.", "res.", "resid.", "NLL"),
        [
            (row["prediction"], *(f"{100 * row[k]:.2f}" for k in _COLUMNS), f"{row['nll']:.3f}")
            for row in made["numbers"]["rows"]
        ],
    )
    if not facts["converged"]:
        render.note(
            "posterior not converged: std(logvar) within tensors is below 0.3, so that SNR ranks "
            "weights as magnitude does. Train longer or raise logvar_lr_ratio."
        )
    render.text("")


def _show_ood(made: dict[str, Any] | None) -> None:
    from bayesify.cli import render

    if made is not None:
        render.table(
            ("OOD data", "prediction", "score", "AUROC", "FPR95"),
            [
                (r["ood"], r["prediction"], r["score"], f"{r['auroc']:.3f}",
                 f"{r['fpr95']:.1%}")
                for r in made["numbers"]["rows"]
            ],
        )  # fmt: skip


def prune(
    folders: Folders,
    sparsity: Annotated[
        list[float] | None,
        typer.Option(help="Rising shares from 0 on. Repeatable; by default 0 to 95 %."),
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="tensor: the share of each, as in the paper; global: of all together; channels: "
            "whole outputs of each. Repeatable; all three by default."
        ),
    ] = None,
    iterative: Annotated[
        int,
        typer.Option(
            min=0, metavar="ROUNDS", help="In rounds, each with training, beside pruning at once."
        ),
    ] = 0,
    round_epochs: Annotated[
        float | None, typer.Option(help="Epochs of training in each round of --iterative; 1.")
    ] = None,
    out: Annotated[
        Path, Shown(letter="-o", text="Folder of the figure: PNG, SVG and JSON.")
    ] = Path("byov-figures"),
    *,
    where: Where,
    head: HeadSettings,
    json: Json = False,
) -> None:
    """Prune encoders by every criterion under one frozen classifier, without retraining.

    Give a run of BYOL too, for its magnitude. Writes results/prune.json into each folder. With
    --iterative, runs go on from their end, pruned at once and in rounds, with the same steps; every
    --sparsity is an end of its own, by default 50, 70 and 90 %. Writes results/iterative.json.
    """
    from bayesify.cli import render

    from .evaluation.pruning import SCOPES, SPARSITIES, prune_curves
    from .evaluation.runs import open_run
    from .iterative import iterative_pruning

    scopes: Any = scope or SCOPES
    if not set(scopes) <= set(SCOPES):
        raise ArgumentError(f"--scope must be of {', '.join(SCOPES)}, not {scopes}.")
    rounds = _rounds(iterative, round_epochs, sparsity, scope)
    _check_written(folders, out, where.data)
    settings = EvalSettings(num_samples=0, **vars(head))
    made = []
    for folder in folders:
        with render.progress(f"{folder}") as bar:
            run = open_run(folder, **vars(where))
            if rounds is not None:
                made.append(iterative_pruning(run, rounds, head=settings, on_progress=bar.say))
            else:
                made.append(
                    prune_curves(
                        run, sparsities=sparsity or SPARSITIES, scopes=scopes, seed=head.seed,
                        settings=settings, on_progress=bar.say,
                    )
                )  # fmt: skip
        if not json:
            (_show_curves if rounds is None else _show_arms)(folder, made[-1])
    if json:
        render.as_json(made)
    _draw("fig4" if rounds is None else "fig4rounds", folders, out, json)


def _rounds(
    rounds: int, epochs: float | None, sparsities: Sequence[float] | None, scope: object
) -> IterativeSettings | None:
    """The settings of ``--iterative``, if it was given."""
    from .iterative import IterativeSettings

    if not rounds:
        if epochs is not None:
            raise ArgumentError("--round-epochs is for --iterative, which was not given.")
        return None
    if scope:
        raise ArgumentError("--iterative prunes the share of each tensor: leave --scope out.")
    start = IterativeSettings()
    return replace(
        start,
        rounds=rounds,
        epochs=start.epochs if epochs is None else epochs,
        sparsities=tuple(sparsities or start.sparsities),
    )


def _draw(name: str, folders: list[Path], out: Path, json: bool) -> None:
    """Make one figure of what was measured."""
    from bayesify.cli import render

    try:
        _paper().make(folders, out, only=[name], measured=True)
    except ArgumentError as error:
        render.note(f"No figure was drawn. {error}")
    else:
        if not json:
            render.text(f"Figure: {out / name}.png")


def _show_arms(folder: Path, made: dict[str, Any]) -> None:
    from bayesify.cli import render

    steps = made["settings"]["steps"] * made["settings"]["rounds"]
    rounds = made["settings"]["rounds"]
    render.text(f"{folder}: top-1 in %, {steps:,} steps of training in {rounds} rounds")
    render.table(
        ("", "by", "pruned", "frozen probe", "probe anew"),
        [
            (a["way"], a["criterion"] or "", f"{a['sparsity']:.0%}", f"{100 * a['top1']:.1f}",
             f"{100 * a['anew']:.1f}")
            for a in made["numbers"]["arms"]
        ],
    )  # fmt: skip
    _show_standing(made["run"])


_SHORT = {"SNR, sigma shuffled": "SNR, shuffled", "magnitude x mean 1 / sigma": "mean 1 / sigma"}


def _show_curves(folder: Path, made: dict[str, Any]) -> None:
    from bayesify.cli import render

    curves = made["numbers"]["curves"]
    for scope in dict.fromkeys(c["scope"] for c in curves):
        shown = [c for c in curves if c["scope"] == scope]
        render.text(f"{folder}: top-1 in %, pruned per {scope}")
        render.table(
            ("pruned", *(_SHORT.get(c["criterion"], c["criterion"]) for c in shown)),
            [
                (f"{row[0]['sparsity']:.0%}", *(f"{100 * p['top1']:.1f}" for p in row))
                for row in zip(*(c["points"] for c in shown), strict=True)
            ],
        )
    _show_standing(made["run"])


def _show_standing(facts: dict[str, Any]) -> None:
    from bayesify.cli import render

    if not facts["converged"]:
        render.note("posterior not converged: this supports no claim on SNR.")
    render.text("")


def figures(
    folders: Folders,
    only: Annotated[
        list[str] | None, typer.Option(help="A figure, such as fig4 or table1. Repeatable.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every figure: the default.")] = False,
    measured: Annotated[
        bool, Shown(text="Draw from the results at hand; measure nothing.")
    ] = False,
    out: Annotated[Path, Shown(letter="-o", text="Folder of the figures and index.html.")] = Path(
        "byov-figures"
    ),
    *,
    uncertainty: UncertaintySettings,
    where: Where,
    head: EvalSettings,
) -> None:
    """Measure what is missing and make the paper's figures from any runs: PNG, SVG, JSON, HTML."""
    from bayesify.cli import render

    if everything and only:
        raise ArgumentError("--all and --only exclude each other.")
    _check_written([] if measured else folders, out, where.data)
    make = _paper().make
    with render.progress("Figures") as bar:
        page = make(
            folders, out, only=only or (), head=head, uncertainty=uncertainty, measured=measured,
            on_progress=bar.say, **vars(where),
        )  # fmt: skip
    render.text(f"{page}")


def _paper() -> Any:
    """What draws figures: a checkout has it, the package has not.

    Raises:
        ArgumentError: It is not there.
    """
    try:
        from .paper import figures
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}.paper":
            raise
        raise ArgumentError(
            "Figures are drawn by recipes/byov/paper, which compares runs with the paper and is in "
            "bayesify's repository alone: clone it, and take `python -m recipes.byov` there in "
            "place of `bayesify recipe byov`."
        ) from error
    return figures


def _check_written(folders: list[Path], out: Path | None = None, data: str | None = None) -> None:
    """Whether there are runs, and results can be written, before anything is measured."""
    from .evaluation.runs import newest_of

    for folder in folders:
        newest_of(folder)
        check_folder("RUN_DIR", folder / "results", {})
    if out is not None:
        check_folder("--out", out, {"--data": data})
