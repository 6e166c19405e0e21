"""``bayesify predict``: classes of images, and how sure the model is of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..settings import PredictSettings, Shown
from .guard import PARTIAL
from .options import (
    Device,
    File,
    Force,
    Json,
    ModelArgs,
    ModelName,
    Split,
    resolve_device,
)
from .outputs import check_outputs

if TYPE_CHECKING:
    import torch

    from .checkpoint import Opened
    from .images import Wanted


def predict(
    file: File,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Image files, folders or patterns of them, .txt files with a path on each line, "
            "- for such lines on stdin; or one data set. Of a table's model, one table.",
        ),
    ],
    settings: PredictSettings,
    out: Annotated[
        Path | None, Shown(letter="-o", metavar="FILE", text="Write a .csv or .json file instead.")
    ] = None,
    probabilities: Annotated[bool, Shown(text="Of all classes; with --out or --json.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="The first images or rows only.")] = None,
    split: Split = "test",
    model: ModelName = None,
    model_args: ModelArgs = None,
    device: Device = "auto",
    force: Force = False,
    json: Json = False,
) -> None:
    """Predict by K draws the classes of images, or the target of a table, and say how sure that is.

    Entropy (in nats) is the whole uncertainty; mutual information is the part of it about the
    weights, which more training data would remove. An image that cannot be read has the reason in
    its row, and the exit code is 3. Of a table whose target is a number, std is the whole
    uncertainty, epistemic_std the part of it about the weights; from q05 to q95 is the 90 %
    interval.
    """
    from .. import storage
    from ..errors import ArgumentError
    from . import render
    from .checkpoint import open_model
    from .images import wanted_images
    from .rows import written_rows
    from .tables import refuse_for_table, refuse_table

    if out is not None:
        _check_format(out)
    if probabilities and out is None and not json:
        raise ArgumentError("--probabilities needs --out or --json: a table has no room.")
    check_outputs({"--out": out}, {"FILE": file, "INPUT": inputs}, force=force)
    target_device = resolve_device(device)
    header = storage.read_header(file)
    kind = "rows" if "table" in header["info"] else "images"
    if kind == "rows":
        others = {"--model": model, "--model-args": model_args, "--split train": split == "train"}
        refuse_for_table(file, others)
        total, rows = _of_table(file, header, inputs, limit, settings, target_device, probabilities)
    else:
        for each in inputs:
            refuse_table(file, each)
        images = wanted_images(inputs, split)
        opened = open_model(file, model, model_args, target_device)
        total = min(limit or len(images.names), len(images.names))
        rows = _rows(opened, images, total, settings, target_device, probabilities)
    kept: list[dict[str, Any]] = []
    failed = done = 0
    with (
        nullcontext() if out is None else written_rows(out, overwrite=force) as write,
        render.progress("Predicting", total) as bar,
    ):
        for row in rows:
            failed += row.get("error") is not None
            done += 1
            if write is not None:
                write(row)
            if json or out is None:
                kept.append(row)
            bar.to(done)
    if json:
        render.as_json(kept)
    elif out is not None:
        render.text(f"Wrote {out} ({total:,} {kind}).")
    else:
        columns = [name for name in kept[0] if name != "error" or failed]
        render.table(columns, [[row[name] for name in columns] for row in kept])
    if failed:
        if not json:
            render.note(f"{failed:,} of {total:,} images could not be read.")
        raise typer.Exit(PARTIAL)


def _of_table(
    file: Path,
    header: dict[str, Any],
    inputs: list[str],
    limit: int | None,
    settings: PredictSettings,
    device: torch.device,
    probabilities: bool,
) -> tuple[int, Iterator[dict[str, Any]]]:
    """The number of rows of a table that are predicted, and the answers."""
    from ..errors import ArgumentError
    from .tables import open_table_model, predicted

    opened = open_table_model(file, header, device)
    if len(inputs) > 1:
        raise ArgumentError(f"INPUT must be one table, not {len(inputs)}.")
    known = opened.coding.classes
    if known is None and probabilities:
        raise ArgumentError(
            f"--probabilities are of classes, and the target {opened.coding.target!r} is a number: "
            "leave it out."
        )
    return predicted(
        opened, inputs[0], limit, settings, device,
        lambda summary: _described(summary, known or (), probabilities),
    )  # fmt: skip


def _rows(
    opened: Opened,
    images: Wanted,
    total: int,
    settings: PredictSettings,
    device: torch.device,
    probabilities: bool,
) -> Iterator[dict[str, Any]]:
    """One row for each image, in order."""
    import torch
    from torch.utils.data import Subset

    from ..inference import Predictor
    from ..loading import Loader
    from ..storage import classes_in
    from ..training.readable import Tried

    known = classes_in(opened.header)
    predictor = Predictor(
        opened.model, num_samples=settings.num_samples, seed=settings.seed, reduce="probabilities"
    )
    batches: Loader[Any] = Loader(
        Subset(Tried(images.data, opened.input), range(total)),
        settings.batch_size,
        collate_fn=list,
        generator=torch.Generator(),
        num_workers=settings.workers,
    )
    names = iter(images.names)
    for batch in batches:
        found: Iterator[dict[str, Any]] = iter(())
        read = [image for image, _, _ in batch if image is not None]
        if read:
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.amp):
                summary = predictor(torch.stack(read).to(device))
            found = _described(summary, known, probabilities)
        for image, label, error in batch:
            row: dict[str, Any] = {"image": next(names)}
            if images.labelled:
                row["label"] = None if image is None else images.data.classes[label]
            answer = dict.fromkeys(_ANSWER) if image is None else next(found)
            if probabilities:
                answer.setdefault("probabilities", None)
            yield {**row, **answer, "error": error}


_ANSWER = ("class", "probability", "entropy", "mutual information")


def _described(
    summary: Any, known: list[str] | tuple[str, ...], probabilities: bool
) -> Iterator[dict[str, Any]]:
    """The answer for each image of a batch."""
    classes = [str(number) for number in range(summary.mean.shape[1])]
    if len(known) == len(classes):
        classes = list(known)
    by_name = classes if len(set(classes)) == len(classes) else list(map(str, range(len(classes))))
    probability, predicted = summary.mean.max(dim=1)
    columns = (
        predicted, probability, summary.predictive_entropy, summary.mutual_information,
        summary.mean,
    )  # fmt: skip
    for number, p, entropy, information, all_p in zip(*(c.tolist() for c in columns), strict=True):
        row = dict(zip(_ANSWER, (classes[number], p, entropy, information), strict=True))
        if probabilities:
            row["probabilities"] = dict(zip(by_name, all_p, strict=True))
        yield row


def _check_format(out: Path) -> None:
    from ..errors import ArgumentError

    if out.suffix not in (".csv", ".json"):
        raise ArgumentError(f"--out must end in .csv or .json, not {out.name!r}.")
