"""``bayesify recipe byov eval | prune | figures``. Nothing here imports torch at its top."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bayesify.cli.guard import guard
from bayesify.cli.outputs import check_folder

if TYPE_CHECKING:
    from .evaluation.protocol import EvalSettings

Folders = Annotated[
    list[Path], typer.Argument(metavar="RUN_DIR...", help="Folders that train wrote.")
]
Data = Annotated[
    str | None, typer.Option(metavar="DATA", help="The runs' data set, where it lies now.")
]
Encoder = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:FACTORY",
        help="The runs' encoder, if it is a factory of your own: no file chooses what is imported.",
    ),
]
EncoderArgs = Annotated[
    str | None, typer.Option(metavar="JSON", help="What that factory was called with.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes what there is.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read training images.")]
Draws = Annotated[
    int,
    typer.Option("--num-samples", "-k", min=0, help="Draws of the MC average; 0 leaves it out."),
]
Epochs = Annotated[int, typer.Option(min=1, help="Of the linear classifier.")]
Seed = Annotated[int, typer.Option(min=0, help="Of draws, classifiers and what is held out.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def mount(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("eval")(evaluate)
    app.command("prune")(prune)
    app.command("figures")(figures)


def evaluate(
    folders: Folders,
    protocol: Annotated[
        Literal["linear", "knn", "semi", "finetune"],
        typer.Option(help="linear: all labels; semi: 1 and 10 % of them; finetune: all trained."),
    ] = "linear",
    data: Data = None,
    encoder: Encoder = None,
    encoder_args: EncoderArgs = None,
    ood: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DATA", help="Images of other classes, to be told from the test's. Repeatable."
        ),
    ] = None,
    num_samples: Draws = 30,
    epochs: Epochs = 80,
    seed: Seed = 0,
    device: Device = "auto",
    workers: Workers = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure runs on frozen features: accuracy, calibration, Brier score and its parts.

    Writes results/eval-PROTOCOL.json into each folder. Percent, NLL in nats.
    """
    with guard(debug, json=json):
        from bayesify.cli import render

        from .evaluation.evaluate import evaluate as measure
        from .evaluation.ood import ood_detection, open_ood
        from .evaluation.runs import open_run

        settings = _settings(num_samples, seed, epochs)
        where = _where(data, encoder, encoder_args, device, workers)
        _check_written(folders)
        made = []
        for folder in folders:
            with render.status(f"{folder}"):
                run = open_run(folder, **where)
                made.append(measure(run, protocol, settings))
                if ood:
                    others = [open_ood(run, name) for name in ood]
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
        Path, typer.Option("--out", "-o", help="Folder of the figure: PNG, SVG and JSON.")
    ] = Path("byov-figures"),
    data: Data = None,
    encoder: Encoder = None,
    encoder_args: EncoderArgs = None,
    epochs: Epochs = 80,
    seed: Seed = 0,
    device: Device = "auto",
    workers: Workers = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Prune encoders by every criterion under one frozen classifier, without retraining.

    Give a run of BYOL too, for its magnitude. Writes results/prune.json into each folder. With
    --iterative, runs go on from their end, pruned at once and in rounds, with the same steps; every
    --sparsity is an end of its own, by default 50, 70 and 90 %. Writes results/iterative.json.
    """
    with guard(debug, json=json):
        from bayesify import ArgumentError
        from bayesify.cli import render

        from .evaluation.pruning import SCOPES, SPARSITIES, prune_curves
        from .evaluation.runs import open_run
        from .iterative import IterativeSettings, iterative_pruning

        scopes: Any = scope or SCOPES
        if not set(scopes) <= set(SCOPES):
            raise ArgumentError(f"--scope must be of {', '.join(SCOPES)}, not {scopes}.")
        if iterative and scope:
            raise ArgumentError("--iterative prunes the share of each tensor: leave --scope out.")
        if round_epochs is not None and not iterative:
            raise ArgumentError("--round-epochs is for --iterative, which was not given.")
        _check_written(folders, out, data)
        head = _settings(0, seed, epochs)
        rounds = IterativeSettings()
        if iterative:
            rounds = replace(
                rounds,
                rounds=iterative,
                epochs=rounds.epochs if round_epochs is None else round_epochs,
                sparsities=tuple(sparsity or rounds.sparsities),
            )
        where = _where(data, encoder, encoder_args, device, workers)
        made = []
        for folder in folders:
            with render.progress(f"{folder}") as bar:
                run = open_run(folder, **where)
                if iterative:
                    made.append(iterative_pruning(run, rounds, head=head, on_progress=bar.say))
                else:
                    made.append(
                        prune_curves(
                            run, sparsities=sparsity or SPARSITIES, scopes=scopes, seed=seed,
                            settings=head, on_progress=bar.say,
                        )
                    )  # fmt: skip
            if not json:
                (_show_arms if iterative else _show_curves)(folder, made[-1])
        if json:
            render.as_json(made)
        name = "fig4rounds" if iterative else "fig4"
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
        bool, typer.Option("--measured", help="Draw from the results at hand; measure nothing.")
    ] = False,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the figures and index.html.")
    ] = Path("byov-figures"),
    num_samples: Draws = 30,
    spread_draws: Annotated[int, typer.Option(min=2, help="Draws of figure 1b.")] = 1000,
    pool: Annotated[int, typer.Option(min=2, help="Draws that figure 5 samples from.")] = 1000,
    most: Annotated[int, typer.Option(min=2, help="Largest K of figure 5.")] = 50,
    latent_draws: Annotated[int, typer.Option(min=2, help="Draws of figure 7.")] = 50,
    images: Annotated[
        int, typer.Option(min=0, help="Test images of figures 4, 5 and 7; 0 is all.")
    ] = 0,
    data: Data = None,
    encoder: Encoder = None,
    encoder_args: EncoderArgs = None,
    epochs: Epochs = 80,
    seed: Seed = 0,
    device: Device = "auto",
    workers: Workers = 0,
    debug: Debug = False,
) -> None:
    """Measure what is missing and make the paper's figures from any runs: PNG, SVG, JSON, HTML."""
    with guard(debug):
        from bayesify import ArgumentError
        from bayesify.cli import render

        from .evaluation.uncertainty import UncertaintySettings

        if everything and only:
            raise ArgumentError("--all and --only exclude each other.")
        _check_written([] if measured else folders, out, data)
        uncertainty = UncertaintySettings(
            spread_draws=spread_draws, pool=pool, most=most, latent_draws=latent_draws,
            images=images, seed=seed,
        )  # fmt: skip
        make = _paper().make
        with render.progress("Figures") as bar:
            page = make(
                folders, out, only=only or (), head=_settings(num_samples, seed, epochs),
                uncertainty=uncertainty, measured=measured, on_progress=bar.say,
                **_where(data, encoder, encoder_args, device, workers),
            )  # fmt: skip
        render.text(f"{page}")


def _paper() -> Any:
    """What draws figures: a checkout has it, the package has not.

    Raises:
        ArgumentError: It is not there.
    """
    from bayesify import ArgumentError

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


def _where(
    data: str | None, encoder: str | None, encoder_args: str | None, device: str, workers: int
) -> dict[str, Any]:
    """How runs are opened."""
    from .trust import read_arguments

    return {
        "data": data,
        "encoder": encoder,
        "encoder_args": None if encoder_args is None else read_arguments(encoder_args),
        "device": device,
        "workers": workers,
    }


def _check_written(folders: list[Path], out: Path | None = None, data: str | None = None) -> None:
    """Whether there are runs, and results can be written, before anything is measured."""
    from .evaluation.runs import newest_of

    for folder in folders:
        newest_of(folder)
        check_folder("RUN_DIR", folder / "results", {})
    if out is not None:
        check_folder("--out", out, {"--data": data})


def _settings(num_samples: int, seed: int, epochs: int) -> EvalSettings:
    from .evaluation.protocol import EvalSettings

    return replace(EvalSettings(), num_samples=num_samples, seed=seed, epochs=epochs)
