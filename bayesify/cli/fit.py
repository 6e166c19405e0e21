"""``bayesify fit``: train the posterior in a file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..json_numbers import finite
from .guard import guard
from .options import (
    Amp,
    BatchSize,
    Data,
    Debug,
    Device,
    File,
    Force,
    Json,
    ModelArgs,
    ModelName,
    Quiet,
    Seed,
    SkipUnreadable,
    Workers,
    resolve_device,
)
from .outputs import check_outputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..training import FitResult, LaplaceResult
    from .render import Bar

_SCHEDULE = "Learning rates and KL"
_DATA = "Data and draws"
_LAPLACE = "With --method laplace-diag"
_LAPLACE_ONLY = {"fisher", "prior_precision", "temperature", "max_examples"}
_VI_ONLY = {
    "epochs", "lr", "logvar_lr", "kl_weight", "kl_reduction", "kl_warmup", "kl_shape", "warmup",
    "weight_decay", "max_grad_norm", "average", "draws_per_step", "accumulate", "patience",
    "freeze_batchnorm", "checkpoint", "resume", "amp",
}  # fmt: skip


def fit(
    context: typer.Context,
    file: File,
    data: Data,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="Where the result is written.")
    ],
    method: Annotated[
        Literal["vi", "laplace-diag"],
        typer.Option(
            help="vi: variational training. laplace-diag: every log variance from one pass of "
            "Fisher information, the means stay."
        ),
    ] = "vi",
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 10,
    lr: Annotated[
        float, typer.Option(help="Highest learning rate of the means.", rich_help_panel=_SCHEDULE)
    ] = 1e-3,
    logvar_lr: Annotated[
        float | None,
        typer.Option(
            help="Highest learning rate of the log variances: 10 x lr.", rich_help_panel=_SCHEDULE
        ),
    ] = None,
    batch_size: BatchSize = 128,
    kl_weight: Annotated[
        float,
        typer.Option(
            help="Beta before the KL; below 1 the posterior is tempered.",
            rich_help_panel=_SCHEDULE,
        ),
    ] = 1.0,
    kl_reduction: Annotated[
        Literal["num_data", "num_weights", "sum"],
        typer.Option(
            help="What the KL is divided by: images, weights, or nothing.",
            rich_help_panel=_SCHEDULE,
        ),
    ] = "num_data",
    kl_warmup: Annotated[
        float,
        typer.Option(
            help="Share of the run in which beta rises from 0.", rich_help_panel=_SCHEDULE
        ),
    ] = 0.0,
    kl_shape: Annotated[
        Literal["linear", "cosine"],
        typer.Option(help="How beta rises.", rich_help_panel=_SCHEDULE),
    ] = "linear",
    warmup: Annotated[
        float,
        typer.Option(
            help="Share of the run in which the learning rates rise; then they fall as a cosine.",
            rich_help_panel=_SCHEDULE,
        ),
    ] = 0.05,
    weight_decay: Annotated[
        float,
        typer.Option(help="Of the means; the prior pulls too.", rich_help_panel=_SCHEDULE),
    ] = 0.0,
    max_grad_norm: Annotated[
        float,
        typer.Option(help="Gradients are scaled down to it.", rich_help_panel=_SCHEDULE),
    ] = 1.0,
    average: Annotated[
        float,
        typer.Option(
            help="Share of the run, at its end, over whose steps the weights are averaged.",
            rich_help_panel=_SCHEDULE,
        ),
    ] = 0.0,
    draws_per_step: Annotated[
        int, typer.Option(help="Draws that a step averages.", rich_help_panel=_DATA)
    ] = 1,
    accumulate: Annotated[
        int, typer.Option(help="Batches that a step averages.", rich_help_panel=_DATA)
    ] = 1,
    augment: Annotated[
        Literal["none", "flip-crop", "resized-crop", "rand-augment"],
        typer.Option(help="Random changes of the images.", rich_help_panel=_DATA),
    ] = "none",
    holdout: Annotated[
        float | None,
        typer.Option(
            help="Share of the training images that is held out; the best epoch there is kept, "
            "or chooses the prior. Images that the given weights have seen test nothing.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many epochs without a better held-out loss.", rich_help_panel=_DATA
        ),
    ] = None,
    freeze_batchnorm: Annotated[
        bool,
        typer.Option(
            "--freeze-batchnorm",
            help="BatchNorm keeps and uses its running statistics.",
            rich_help_panel=_DATA,
        ),
    ] = False,
    fisher: Annotated[
        Literal["mc", "exact", "empirical"],
        typer.Option(
            help="mc: a label drawn from the model for each image; exact: all classes, C times as "
            "slow; empirical: the true labels.",
            rich_help_panel=_LAPLACE,
        ),
    ] = "mc",
    prior_precision: Annotated[
        str,
        typer.Option(
            metavar="X",
            help="Factor on the prior's precision: a number, holdout (by the NLL of draws on "
            "held-out training images, changed by --augment) or marglik (marginal likelihood).",
            rich_help_panel=_LAPLACE,
        ),
    ] = "holdout",
    temperature: Annotated[
        float, typer.Option(help="Factor on every variance.", rich_help_panel=_LAPLACE)
    ] = 1.0,
    max_examples: Annotated[
        int | None,
        typer.Option(help="Images that stand for all of them.", rich_help_panel=_LAPLACE),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="State of an unfinished fit; default: OUT.resume, removed at the end.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a fit that was interrupted.")
    ] = False,
    skip_unreadable: SkipUnreadable = False,
    model: ModelName = None,
    model_args: ModelArgs = None,
    workers: Workers = 0,
    seed: Seed = 0,
    device: Device = "auto",
    amp: Amp = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train the posterior in FILE on the training images of DATA.

    The loss is that of Bayes by Backprop: cross entropy plus beta times s times the KL to the
    prior. Ctrl-C, SIGTERM and SIGHUP end the fit after the step that it is in; --resume goes on
    as if nothing had happened.
    """
    with guard(debug, json=json):
        from .. import storage, training
        from ..classes import classes_of
        from ..data import load_dataset
        from . import render
        from .checkpoint import open_model

        _check_options(context, method)
        state = checkpoint or out.with_name(out.name + ".resume")
        check_outputs(
            {"--out": out}, {"FILE": file, "DATA": data}, force=force, in_place="FILE",
            state={"--checkpoint": state} if method == "vi" else {},
        )  # fmt: skip
        target_device = resolve_device(device)
        train = load_dataset(data, split="train")
        opened = open_model(file, model, model_args, target_device)
        common: dict[str, Any] = {
            "device": target_device, "model_config": opened.input, "workers": workers,
            "skip_unreadable": skip_unreadable,
        }  # fmt: skip
        arguments: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
        result: FitResult | LaplaceResult
        if method == "laplace-diag":
            arguments |= {
                "fisher": fisher, "prior_precision": _precision(prior_precision),
                "temperature": temperature, "max_examples": max_examples, "augment": augment,
                "holdout": 0.02 if holdout is None else holdout,
            }  # fmt: skip
            with render.progress("Fisher information") as bar:
                result = training.fit_laplace_(
                    opened.model, train, **arguments, **common,
                    on_look=looking(bar), on_step=bar.to,
                )  # fmt: skip
        else:
            arguments |= {
                "epochs": epochs, "lr": lr, "logvar_lr": logvar_lr, "kl_weight": kl_weight,
                "kl_reduction": kl_reduction, "kl_warmup": kl_warmup, "kl_shape": kl_shape,
                "warmup": warmup, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm,
                "average": average, "draws_per_step": draws_per_step, "accumulate": accumulate,
                "augment": augment, "holdout": holdout or 0.0, "patience": patience,
                "freeze_batchnorm": freeze_batchnorm, "amp": amp,
            }  # fmt: skip
            with render.progress("Training") as bar:
                result = training.fit(
                    opened.model,
                    train,
                    **arguments,
                    **common,
                    checkpoint=state,
                    resume=resume,
                    on_look=looking(bar),
                    on_start=(lambda line: None) if quiet else bar.say,
                    on_step=lambda p: bar.to(
                        p.step, p.steps, f"epoch {p.epoch + 1} loss {p.loss:.3f}"
                    ),
                )
        numbers = asdict(result)
        seconds = numbers.pop("seconds")  # the same run gives the same file
        info = {
            **opened.header["info"],
            "classes": list(classes_of(opened.model) or ()),
            "fit": finite({"method": method, "data": train.name, **arguments, **numbers}),
        }
        storage.save(opened.model, out, spec=opened.spec, info=info, overwrite=force)
        if method == "vi":
            state.unlink(missing_ok=True)
        if json:
            render.as_json({"file": str(out), **numbers, "seconds": seconds})
        elif not quiet:
            if isinstance(result, training.FitResult):
                render.table(*_epochs(result))
                render.text(_travel(result))
                render.text(f"{result.steps:,} steps in {seconds:.0f} s. Wrote {out}.")
            else:
                _print_laplace(result)
                render.text(f"{seconds:.0f} s. Wrote {out}.")


def looking(bar: Bar) -> Callable[[int, int], None]:
    """Say on a bar how many images were looked at before the work."""
    return lambda done, total: bar.to(done, total, "Looking at the images")


def _check_options(context: typer.Context, method: str) -> None:
    """Refuse an option of the other method, which would do nothing."""
    from ..errors import ArgumentError

    other = _VI_ONLY if method == "laplace-diag" else _LAPLACE_ONLY
    sources = {name: context.get_parameter_source(name) for name in context.params if name in other}
    given = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ArgumentError(f"{names} does nothing with --method {method}: leave it out.")


def _precision(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _print_laplace(result: LaplaceResult) -> None:
    from . import render

    if result.tried:
        render.table(("prior precision", "held-out NLL"), result.tried)
    render.text(
        f"Fisher information of {result.examples:,} images for {result.num_data:,}. Prior "
        f"precision times {result.prior_precision:.4g}, mean sigma {result.mean_std:.3g}."
    )


def _epochs(result: FitResult) -> tuple[tuple[str, ...], list[tuple[float | int | str, ...]]]:
    """The table of the epochs."""
    columns: tuple[str, ...] = ("epoch", "loss", "KL in nats")
    rows: list[tuple[float | int | str, ...]] = [
        (epoch, *numbers)
        for epoch, numbers in enumerate(zip(result.losses, result.kl, strict=True), 1)
    ]
    if result.holdout_losses:
        columns = (*columns, "held-out loss", "")
        rows = [
            (*row, held, "kept" if row[0] == result.best_epoch else "")
            for row, held in zip(rows, result.holdout_losses, strict=True)
        ]
    return columns, rows


def _travel(result: FitResult) -> str:
    assert result.logvars is not None
    found = result.logvars
    verdict = ""
    if found.bound > 0 and found.moved < 0.01:
        verdict = (
            " So the posterior is the initial one, whatever the data said: raise --logvar-lr or "
            "train longer (docs/fit.md)."
        )
    return (
        f"Log variances moved by {found.mean:.3g} on average and {found.largest:.3g} at most, "
        f"{found.moved:.1%} of them by more than 0.1; their learning rates add up to "
        f"{found.bound:.3g}.{verdict}"
    )
