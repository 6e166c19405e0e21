"""``bayesify models``: which models can be built, and what was verified of each."""

from __future__ import annotations

import dataclasses
import difflib
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from ..settings import Shown
from .options import Json


def models(
    pattern: Annotated[
        str,
        Shown(
            argument=True,
            text="A glob such as 'resnet*'; it also matches torchvision's names.",
        ),
    ] = "*",
    source: Annotated[
        Literal["all", "timm", "torchvision"], Shown(text="Whose models to list.")
    ] = "all",
    failed: Annotated[
        bool, Shown(text="Only models of which a check failed or was not run.")
    ] = False,
    json: Json = False,
) -> None:
    """List the models of timm and torchvision, and what was verified of each.

    structural: every parameter in use is drawn and none is read as it is. numeric: outputs and
    gradients are those of the plain model with the drawn weights, bit for bit ("as X": not
    compared itself, but X, which has the same modules, was).
    """
    from ..errors import ArgumentError
    from ..zoo import verified
    from . import render

    names = []
    with render.status("Asking timm and torchvision..."):
        if source in ("all", "timm"):
            import timm

            names += timm.list_models()
        if source in ("all", "torchvision"):
            from torchvision.models import list_models

            names += [f"torchvision:{name}" for name in list_models()]
    found = [n for n in names if fnmatchcase(n.removeprefix("torchvision:"), pattern)]
    if not found:
        close = difflib.get_close_matches(pattern.strip("*?"), names, n=3, cutoff=0.0)
        raise ArgumentError(f"No model matches {pattern!r}. Closest: {', '.join(close)}.")
    rows = [_row(name, verified().get(name)) for name in found]
    if failed:
        rows = [r for r in rows if not _passed(r["structural"]) or not _passed(r["numeric"])]
    if json:
        render.as_json(rows)
        return
    if rows:
        render.table(
            ("model", "parameters", "structural", "numeric", *(["why"] if failed else [])),
            [_cells(row, why=failed) for row in rows],
        )
    passed = sum(_passed(r["structural"]) and _passed(r["numeric"]) for r in rows)
    versions = sorted({r["versions"] for r in rows if r["versions"]})
    checked = f" Checked with {'; '.join(versions)}." if versions else ""
    render.note(
        f"{len(rows)} of {len(names)} models"
        + ("" if failed else f", {passed} of them verified")
        + f".{checked} docs/zoo.md says what the checks are."
    )


def _row(name: str, verified: Any) -> dict[str, Any]:
    source = "torchvision" if name.startswith("torchvision:") else "timm"
    if verified is None:  # another version of the library
        empty = {"parameters": None, "structural": "not run", "numeric": "not run", "versions": ""}
        return {"name": name, "source": source, **empty}
    return {"source": source, **dataclasses.asdict(verified)}


def _passed(outcome: str) -> bool:
    return outcome in ("ok", "shallow", "alike")


def _cells(row: dict[str, Any], *, why: bool) -> list[Any]:
    numeric = f"as {row['numeric_of']}" if row["numeric"] == "alike" else row["numeric"]
    cells = [row["name"], row["parameters"], row["structural"], numeric]
    return [*cells, row.get("note", "")] if why else cells
