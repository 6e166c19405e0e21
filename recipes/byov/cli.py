"""``bayesify recipe byov``: the commands of this recipe. Nothing here imports torch at its top."""

from __future__ import annotations

import inspect
import shlex
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from bayesify.cli.guard import INTERRUPTED, guard
from bayesify.cli.outputs import check_folder

from .commands import mount
from .config import BYOVConfig, RunConfig, described
from .presets import PRESETS, Preset
from .trust import read_arguments

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


def train(preset: str, resume: bool, debug: bool, **given: Any) -> None:
    """Train an encoder without labels; without any option, the demo.

    Writes into the folder of --out: log.jsonl, checkpoints, encoder.safetensors for the other
    commands of bayesify, student.safetensors and teacher.safetensors for timm. Ctrl-C saves and
    ends; --resume goes on. Every default is that of the preset.
    """
    with guard(debug):
        chosen = settings(preset, given)
        check_folder("--out", chosen.run.out, {"--data": chosen.run.data.removeprefix("wds:")})
        outcome = _train(chosen, resume)
    if outcome.results is None:
        raise typer.Exit(INTERRUPTED)


def settings(preset: str, given: dict[str, Any]) -> Preset:
    """A preset with the options that were given in place of its own.

    Raises:
        ArgumentError: There is no such preset, or a value cannot work.
    """
    from bayesify import ArgumentError

    if preset not in PRESETS:
        raise ArgumentError(f"preset must be one of {', '.join(PRESETS)}, not {preset!r}.")
    base = PRESETS[preset]
    changed = {name: value for name, value in given.items() if value is not None}
    if "encoder_args" in changed:
        changed["encoder_args"] = read_arguments(changed["encoder_args"])
    own = {f.name for f in fields(BYOVConfig)}
    return replace(
        base,
        config=replace(base.config, **{k: v for k, v in changed.items() if k in own}),
        run=replace(base.run, **{k: v for k, v in changed.items() if k not in own}),
    )


def _options(cls: type) -> list[inspect.Parameter]:
    """One option for each field of a dataclass, whose text is that of the docstring."""
    texts, hints = described(cls), get_type_hints(cls)
    made = []
    for each in fields(cls):
        hint = hints[each.name]
        if each.name == "encoder_args":
            hint = str
        elif hint == tuple[str, ...]:
            hint = list[str]  # may be given several times
        names = [f"--{each.name.replace('_', '-')}"]
        if hint is bool:
            names = [f"{names[0]}/--no-{each.name.replace('_', '-')}"]
        option = typer.Option(*names, help=texts[each.name], show_default=False)
        kind: Any = Annotated[hint | None, option]
        made.append(
            inspect.Parameter(
                each.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind
            )
        )
    return made


def _with_options(function: Any) -> Any:
    """``train`` with the fields of both configs as its options: one list, that of the fields."""
    first = [
        inspect.Parameter(
            "preset",
            inspect.Parameter.KEYWORD_ONLY,
            default="demo",
            annotation=Annotated[
                str, typer.Option("--preset", "-p", help=f"One of {', '.join(PRESETS)}.")
            ],
        ),
        inspect.Parameter(
            "resume",
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[
                bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")
            ],
        ),
    ]
    last = inspect.Parameter(
        "debug",
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")],
    )

    def command(**arguments: Any) -> None:
        function(**arguments)

    command.__doc__ = function.__doc__
    parameters = [*first, *_options(RunConfig), *_options(BYOVConfig), last]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


app.command("train")(_with_options(train))
mount(app)


@app.command("presets")
def presets() -> None:
    """List the presets."""
    from bayesify.cli import render

    for name, preset in PRESETS.items():
        render.text(f"{name}: {preset.doc}")


def _train(chosen: Preset, resume: bool) -> Outcome:
    from bayesify.cli import render

    from .train import train as run_training
    from .train_log import Watcher

    with render.progress("Training") as bar:
        reporter = Reporter(bar)
        watcher = Watcher(log=reporter.log, on_step=reporter.step, on_epoch=reporter.epoch)
        outcome = run_training(chosen.config, chosen.run, resume=resume, watcher=watcher)
    if outcome.results is not None and not reporter.quiet:
        _show_results(chosen, outcome)
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


def _show_results(chosen: Preset, outcome: Outcome) -> None:
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
        "log": chosen.run.out / "log.jsonl",
    }
    for what, path in files.items():
        if path is not None:
            render.text(f"{what + ':':21}{path}")
    render.text("\nNext:")
    if results.encoder is not None:
        data, fitted = shlex.quote(chosen.run.data), chosen.run.out / "fitted.bbb.safetensors"
        file = shlex.quote(str(results.encoder))
        render.text(f"  bayesify eval {file} {data}")
        render.text(f"  bayesify fit {file} {data} --out {shlex.quote(str(fitted))}")
        render.text(f"  bayesify prune {file} --sparsity 0.5")
    if ":" not in chosen.config.encoder:
        render.text(f"  python -c 'import timm; {timm_call(chosen.config, results.student)}'")
