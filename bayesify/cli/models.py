"""``bayesify models``: the names of models that can be built."""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase
from typing import Annotated, Literal

import typer

from .guard import guard
from .options import Debug, Json


def models(
    pattern: Annotated[
        str, typer.Argument(help="A glob such as 'resnet*'; it also matches torchvision's names.")
    ] = "*",
    source: Annotated[
        Literal["all", "timm", "torchvision"], typer.Option(help="Whose models to list.")
    ] = "all",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the models of timm and torchvision by name.

    What was verified of each model is not recorded yet; bayesify convert NAME --dry-run shows what
    of a model becomes Bayesian.
    """
    with guard(debug):
        from ..errors import ArgumentError
        from . import render

        known = []
        with render.status("Asking timm and torchvision..."):
            if source in ("all", "timm"):
                import timm

                known += [{"name": name, "source": "timm"} for name in timm.list_models()]
            if source in ("all", "torchvision"):
                from torchvision.models import list_models

                known += [
                    {"name": f"torchvision:{name}", "source": "torchvision"}
                    for name in list_models()
                ]
        found = [m for m in known if fnmatchcase(m["name"].removeprefix("torchvision:"), pattern)]
        if not found:
            names = [m["name"] for m in known]
            close = difflib.get_close_matches(pattern.strip("*?"), names, n=3, cutoff=0.0)
            raise ArgumentError(f"No model matches {pattern!r}. Closest: {', '.join(close)}.")
        if json:
            render.as_json(found)
            return
        for model in found:
            render.text(model["name"])
        render.note(
            f"{len(found)} of {len(known)} names. What was verified of each is not recorded yet: "
            "bayesify convert NAME --dry-run shows what becomes Bayesian."
        )
