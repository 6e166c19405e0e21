"""Options that several commands have, so that they read and mean the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..devices import resolve_device as resolve_device

File = Annotated[Path, typer.Argument(metavar="FILE", help="A file that bayesify has written.")]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="The function package.module:factory that builds the model, if the file is of one: "
        "a file does not choose which code runs.",
    ),
]
ModelArgs = Annotated[
    str | None,
    typer.Option("--model-args", metavar="JSON", help="What that function is called with, if any."),
]
Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="fashion-sample, a folder with one folder of images for each class, timm:NAME@ROOT, "
        "or a safetensors file with images and labels.",
    ),
]
NumSamples = Annotated[
    int, typer.Option("--num-samples", "-k", metavar="K", help="Draws of the weights.")
]
Split = Annotated[
    Literal["train", "test"], typer.Option("--split", help="Which part of the data set.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", help="Images in a batch.")]
Workers = Annotated[int, typer.Option("--workers", help="Processes that read images.")]
SkipUnreadable = Annotated[
    bool,
    typer.Option(
        "--skip-unreadable", help="Leave out images that cannot be read, which are an error else."
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of all that is random.")]
Device = Annotated[
    str, typer.Option("--device", help="cpu, cuda, cuda:1, mps; auto takes what there is.")
]
Amp = Annotated[bool, typer.Option("--amp", help="Compute in bfloat16 where that is safe.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Overwrite the file of --out.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print warnings and errors only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
