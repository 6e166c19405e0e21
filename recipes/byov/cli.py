"""``bayesify recipe byov``: the commands of this recipe. Nothing here imports torch at its top."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayesify import ArgumentError
from bayesify.cli.guard import INTERRUPTED
from bayesify.cli.options import Given, command
from bayesify.cli.outputs import check_folder

from .commands import mount
from .config import RUN_FILE, BYOVConfig, RunConfig
from .presets import PRESETS
from .trust import check_config

if TYPE_CHECKING:
    from .train import Outcome
    from .train_log import Progress

app = typer.Typer(
    name="byov",
    help="BYOV: a Vision Transformer and its uncertainty, learnt from images without labels.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def _main() -> None:
    pass


def train(
    *,
    preset: Annotated[
        str, typer.Option("--preset", "-p", help=f"One of {', '.join(PRESETS)}.")
    ] = "demo",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")
    ] = False,
    given: Given,
    run: RunConfig,
    byov: BYOVConfig,
) -> None:
    """Train an encoder without labels; without any option, the demo.

    Writes into the folder of --out: log.jsonl, checkpoints, run.toml for --config,
    encoder.safetensors for the other commands of bayesify, student.safetensors and
    teacher.safetensors for timm. Ctrl-C saves and ends; --resume goes on. Every default is that of
    the preset.
    """
    if given.file is not None:
        check_config(given.file, byov, run, given.by_file)
        if not resume and given.file.resolve() == (run.out / RUN_FILE).resolve():
            raise ArgumentError(
                f"--config {given.file} is in --out, where a new run writes its own: give another "
                "folder, or --resume."
            )
    check_folder("--out", run.out, {"--data": run.data.removeprefix("wds:")})
    outcome = _train(byov, run, resume)
    if outcome.results is None:
        raise typer.Exit(INTERRUPTED)


def of_preset(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the options change.

    Raises:
        ArgumentError: There is no such preset.
    """
    name = arguments["preset"]
    if name not in PRESETS:
        raise ArgumentError(f"preset must be one of {', '.join(PRESETS)}, not {name!r}.")
    return {"byov": PRESETS[name].config, "run": PRESETS[name].run}


app.command("train")(command(train, base=of_preset))
mount(app)


@app.command("presets")
def presets() -> None:
    """List the presets."""
    from bayesify.cli import render

    for name, preset in PRESETS.items():
        render.text(f"{name}: {preset.doc}")


def _train(byov: BYOVConfig, run: RunConfig, resume: bool) -> Outcome:
    from bayesify.cli import render

    from .train import train as run_training
    from .train_log import Watcher

    with render.progress("Training") as bar:
        reporter = Reporter(bar)
        watcher = Watcher(log=reporter.log, on_step=reporter.step, on_epoch=reporter.epoch)
        outcome = run_training(byov, run, resume=resume, watcher=watcher)
    if outcome.results is not None and not reporter.quiet:
        _show_results(byov, run, outcome)
    return outcome


class Reporter:
    """Says on stderr what a run is doing; only the first of several processes speaks."""

    def __init__(self, bar: Any) -> None:
        import os

        self.bar = bar
        self.quiet = os.environ.get("RANK", "0") != "0"
        self.last: dict[str, float] = {}

    def log(self, line: str) -> None:
        if not self.quiet:
            self.bar.say(line)

    def step(self, progress: Progress) -> None:
        self.last = progress.values
        if self.quiet:
            return
        loss, speed = progress.values["loss"], progress.values["images_per_second"]
        self.bar.to(
            progress.step,
            progress.steps,
            f"epoch {progress.epoch + 1} loss {loss:.3f} {speed:,.0f} images/s",
        )

    def epoch(self, step: int, report: dict[str, Any]) -> None:
        if "knn" in report and self.last:
            beta = f" beta {self.last['beta']:.2f}" if self.last["kl"] else ""
            self.log(
                f"epoch {report['epoch']:>3}: loss {self.last['loss']:.3f}{beta}, "
                f"kNN on held-back training images {report['knn']:.1%}"
            )


_ROWS = {
    "knn_pixels": "raw pixels",
    "knn_untrained": "untrained encoder",
    "knn_trained": "trained encoder, posterior means",
}


def _show_results(byov: BYOVConfig, run: RunConfig, outcome: Outcome) -> None:
    from bayesify.cli import render

    from .export import timm_call

    results = outcome.results
    assert results is not None
    if results.numbers:
        render.table(
            ("features", "kNN accuracy on test images"),
            [
                (row, f"{results.numbers[key]:.2%}")
                for key, row in _ROWS.items()
                if key in results.numbers
            ],
        )
        render.text("")
    files = {
        "Bayesian encoder": results.encoder,
        "its means, for timm": results.student,
        "teacher, for timm": results.teacher,
        "log": run.out / "log.jsonl",
        "settings, for --config": run.out / RUN_FILE,
    }
    for what, path in files.items():
        if path is not None:
            render.text(f"{what + ':':24}{path}")
    render.text("\nNext:")
    if results.encoder is not None:
        data, fitted = shlex.quote(run.data), run.out / "fitted.bbb.safetensors"
        file = shlex.quote(str(results.encoder))
        render.text(f"  bayesify eval {file} {data}")
        render.text(f"  bayesify fit {file} {data} --out {shlex.quote(str(fitted))}")
        render.text(f"  bayesify prune {file} --sparsity 0.5")
    if ":" not in byov.encoder:
        render.text(f"  python -c 'import timm; {timm_call(byov, results.student)}'")
