"""``bayesify fit``: train the posterior in a file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import ArgumentError
from ..json_numbers import finite
from ..settings import FitSettings, LaplaceSettings, Reading, Shown, TableSettings
from ..settings.fields import checked, plain, refuse
from ..settings.files import check_data, config_text
from .options import (
    By,
    DataOrNone,
    Device,
    Force,
    Given,
    Json,
    ModelArgs,
    ModelName,
    Quiet,
    resolve_device,
)
from .outputs import check_outputs

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch.utils.data import TensorDataset

    from ..data import ImageData
    from ..training import FitResult, LaplaceResult
    from .checkpoint import Opened
    from .render import Bar
    from .tables import NewModel

Fitted = Annotated[
    Path,
    Shown(
        argument=True,
        metavar="FILE",
        text="A file that bayesify has written; or a table, .csv, .tsv or .parquet, with --target "
        "and without DATA.",
    ),
]
_METHODS = {"vi": FitSettings, "laplace-diag": LaplaceSettings}


@dataclass(frozen=True, kw_only=True)
class FitRun:
    """What is fitted to what, and where.

    Args:
        out: Where the result is written; its settings beside it, in OUT.toml for --config.
        method: vi: variational training. laplace-diag: every log variance from one pass of Fisher
            information, the means stay.
    """

    file: Fitted
    data: DataOrNone = None
    out: Annotated[Path, Shown(letter="-o", metavar="FILE")]
    method: Literal["vi", "laplace-diag"] = "vi"
    device: Device = "auto"

    def __post_init__(self) -> None:
        refuse("fit", checked(self))

    @property
    def config(self) -> Path:
        """The file of the settings: ``net.bbb.toml`` for ``net.bbb.safetensors``."""
        return self.out.with_name(self.out.name.removesuffix(".safetensors") + ".toml")


def fit(
    run: FitRun,
    fit: Annotated[FitSettings | LaplaceSettings, By("method", _METHODS)],
    reading: Reading,
    table: TableSettings,
    given: Given,
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
    model: ModelName = None,
    model_args: ModelArgs = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train the posterior in FILE on the training images of DATA, or that of a network for a table.

    For example: bayesify fit train.csv --target price --epochs 200 --lr 0.01 -o price.safetensors

    The loss is that of Bayes by Backprop: cross entropy plus beta times s times the KL to the
    prior. Ctrl-C, SIGTERM and SIGHUP end the fit after the step that it is in; --resume goes on
    as if nothing had happened.
    """
    from . import render
    from .tables import draw_weights_, new_model

    of_table = _is_table(run, table, {"--model": model, "--model-args": model_args})
    if given.file is not None and "data" in given.by_file and run.data is not None:
        check_data(given.file, run.data, "DATA")
    if run.method != "vi" and (resume or checkpoint is not None):
        raise ArgumentError(
            f"--checkpoint and --resume do nothing with --method {run.method}: leave them out."
        )
    state = checkpoint or run.out.with_name(run.out.name + ".resume")
    check_outputs(
        {"--out": run.out, "OUT.toml": run.config},
        {"FILE": run.file, "DATA": run.data, "--config": given.file}, force=force,
        in_place={"OUT.toml": "--config"} | ({} if of_table else {"--out": "FILE"}),
        state={"--checkpoint": state} if run.method == "vi" else {},
    )  # fmt: skip
    target = resolve_device(run.device)
    train: ImageData | TensorDataset
    opened: Opened | NewModel
    if of_table:
        opened, train = new_model(run.file, table, fit.seed)
    else:
        opened, train = _opened(run, target, model, model_args)
    common: dict[str, Any] = {
        "device": target, "model_config": opened.input, **vars(reading),
    }  # fmt: skip
    result: FitResult | LaplaceResult
    if isinstance(fit, LaplaceSettings):
        result = _laplace(opened, train, fit, common)
    else:
        common |= {"checkpoint": state, "resume": resume}
        result = _variational(opened, train, fit, common, quiet)
    if of_table:
        draw_weights_(opened.model)
    numbers = asdict(result)
    seconds = numbers.pop("seconds")  # the same run gives the same file
    groups = {"run": run, "fit": fit, "reading": reading} | ({"table": table} if of_table else {})
    _write(opened, groups, getattr(train, "name", str(run.file)), numbers, force=force)
    if run.method == "vi":
        state.unlink(missing_ok=True)
    if json:
        about = {"file": str(run.out), "config": str(run.config), **numbers}
        render.as_json({**about, "seconds": seconds})
    elif not quiet:
        _print(result, f"in {seconds:.0f} s. Wrote {run.out}, and its settings in {run.config}.")


def _is_table(run: FitRun, table: TableSettings, model: dict[str, str | None]) -> bool:
    """Whether FILE is a table; refuses what does not go with one, or with none."""
    from ..data import is_table
    from .tables import refuse_for_table, refuse_table

    if is_table(run.file):
        refuse_for_table(run.file, {"DATA": run.data, **model})
        if run.method != "vi":
            raise ArgumentError(
                f"--method {run.method} needs a trained network, and {run.file} is a table: leave "
                "it out."
            )
        return True
    if table != TableSettings():
        raise ArgumentError(
            f"--target and the options beside it are for a table (.csv, .tsv, .parquet), and FILE "
            f"is {run.file}: leave them out, or give the table as FILE."
        )
    if run.data is not None:
        refuse_table(run.file, run.data)
    return False


def _opened(
    run: FitRun, device: torch.device, model: str | None, model_args: str | None
) -> tuple[Opened, ImageData]:
    """The model in FILE and the training images of DATA."""
    from ..data import load_dataset
    from .checkpoint import open_model

    if run.data is None:
        raise ArgumentError("DATA is missing: give it, or a --config that has it.")
    train = load_dataset(run.data, split="train")
    return open_model(run.file, model, model_args, device), train


def _write(
    opened: Opened | NewModel, groups: dict[str, Any], data: str, numbers: Any, *, force: bool
) -> None:
    """Write the model, and the settings that repeat the fit."""
    from .. import storage
    from ..classes import classes_of

    run: FitRun = groups["run"]
    info = {
        **opened.header["info"],
        "classes": list(classes_of(opened.model) or ()),
        "fit": finite({"method": run.method, "data": data, **plain(groups["fit"]), **numbers}),
    }
    storage.save(opened.model, run.out, spec=opened.spec, info=info, overwrite=force)
    with storage.replacing(run.config, overwrite=force) as temporary:
        title = f"bayesify fit --config {run.config.name} --out ANOTHER repeats it."
        temporary.write_text(config_text(title, groups), "utf-8")


def _variational(
    opened: Opened | NewModel,
    train: ImageData | TensorDataset,
    settings: FitSettings,
    common: dict[str, Any],
    quiet: bool,
) -> FitResult:
    from .. import training
    from . import render

    with render.progress("Training") as bar:
        return training.fit(
            opened.model, train, **vars(settings), **common, on_look=looking(bar),
            on_start=(lambda line: None) if quiet else bar.say,
            on_step=lambda p: bar.to(p.step, p.steps, f"epoch {p.epoch + 1} loss {p.loss:.3f}"),
        )  # fmt: skip


def _laplace(
    opened: Opened | NewModel,
    train: ImageData | TensorDataset,
    settings: LaplaceSettings,
    common: dict[str, Any],
) -> LaplaceResult:
    from .. import training
    from . import render

    with render.progress("Fisher information") as bar:
        return training.fit_laplace_(
            opened.model, train, **vars(settings), **common, on_look=looking(bar), on_step=bar.to
        )


def looking(bar: Bar) -> Callable[[int, int], None]:
    """Say on a bar how many images were looked at before the work."""
    return lambda done, total: bar.to(done, total, "Looking at the images")


def _print(result: FitResult | LaplaceResult, end: str) -> None:
    from .. import training
    from . import render

    if isinstance(result, training.FitResult):
        render.table(*_epochs(result))
        render.text(_travel(result))
        render.text(f"{result.steps:,} steps {end}")
        return
    if result.tried:
        render.table(("prior precision", "held-out NLL"), result.tried)
    render.text(
        f"Fisher information of {result.examples:,} images for {result.num_data:,}. Prior "
        f"precision times {result.prior_precision:.4g}, mean sigma {result.mean_std:.3g}."
    )
    render.text(f"Done {end}")


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
