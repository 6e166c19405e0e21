"""The ``bayesify`` command: what it is made of. Nothing here imports torch or rich."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from . import convert, doctor, evaluate, export, fit, inspect, models, predict, prune, report
from .options import command

RECIPES = "bayesify.recipes"
"""Entry points of this group are typer apps, each a sub-command of ``bayesify recipe``."""

app = typer.Typer(
    name="bayesify",
    help="Turn PyTorch models into Bayesian ones: convert, train, measure and predict.",
    epilog="A file of one command is the next one's input: convert, then fit, eval, predict.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bayesify {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


app.command("convert")(command(convert.convert))
app.command("inspect")(command(inspect.inspect))
app.command("fit")(command(fit.fit))
app.command("eval")(command(evaluate.evaluate))
app.command("predict")(command(predict.predict))
app.command("prune")(command(prune.prune))
app.command("export")(command(export.export))
app.command("report")(command(report.report))
app.command("models")(command(models.models))
app.command("doctor")(command(doctor.doctor))


class _Recipes(TyperGroup):
    """The installed recipes, each imported only when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(metadata.entry_points(group=RECIPES).names)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        for found in metadata.entry_points(group=RECIPES, name=cmd_name):
            command = typer.main.get_command(found.load())
            command.name = cmd_name
            return command
        return None


def _mount_recipes() -> None:
    if metadata.entry_points(group=RECIPES):
        recipes = typer.Typer(cls=_Recipes, no_args_is_help=True)
        recipes.callback()(lambda: None)
        app.add_typer(recipes, name="recipe", help="Train a published method, paper in hand.")


_mount_recipes()


def main() -> None:
    """Run the command line; the console script ``bayesify``."""
    # A script's folder is searched for modules, not the one it is called in. At the end, so that
    # no file of the user's takes the place of a library.
    sys.path.append(os.getcwd())
    if "--json" not in sys.argv:
        app(prog_name="bayesify")
        return
    try:
        code = app(prog_name="bayesify", standalone_mode=False)
    except Exception as error:  # of typer's own, which is of wrong usage
        if not hasattr(error, "format_message") or not hasattr(error, "exit_code"):
            raise
        from . import render

        kind, message = type(error).__name__, error.format_message()
        about = {"kind": kind, "message": message, "exit_code": error.exit_code}
        render.as_json({"error": about})
        code = error.exit_code
    sys.exit(code or 0)
