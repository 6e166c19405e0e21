"""``bayesify predict``: classes of images, and how sure the model is of them."""

from __future__ import annotations

import csv
import json as json_format
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .guard import guard
from .options import (
    Amp,
    BatchSize,
    Debug,
    Device,
    File,
    Force,
    Json,
    ModelArgs,
    ModelName,
    NumSamples,
    Seed,
    Split,
    Workers,
    resolve_device,
)
from .outputs import check_outputs

if TYPE_CHECKING:
    import torch

    from ..data import ImageData
    from .checkpoint import Opened


def predict(
    file: File,
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="Image files, or one data set.")
    ],
    num_samples: NumSamples = 20,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Write a .csv or .json file instead."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first images only.")] = None,
    split: Split = "test",
    batch_size: BatchSize = 64,
    model: ModelName = None,
    model_args: ModelArgs = None,
    workers: Workers = 0,
    seed: Seed = 0,
    device: Device = "auto",
    amp: Amp = False,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Classify images by the mean of K draws, and say how sure the model is.

    Entropy (in nats) is the whole uncertainty; mutual information is the part of it about the
    weights, which more training data would remove.
    """
    with guard(debug):
        from . import render
        from .checkpoint import open_model

        if out is not None:
            _check_format(out)
        check_outputs({"--out": out}, {"FILE": file, "INPUT": inputs}, force=force)
        target_device = resolve_device(device)
        images, names = _images(inputs, split)
        opened = open_model(file, model, model_args, target_device)
        total = min(limit or len(images), len(images))
        rows = []
        with render.progress("Predicting", total) as bar:
            for row in _rows(opened, images, names, total, num_samples, batch_size, workers, seed,
                             target_device, amp):  # fmt: skip
                rows.append(row)
                bar.to(len(rows))
        if out is not None:
            _write(rows, out, force)
        if json:
            render.as_json(rows)
        elif out is not None:
            render.text(f"Wrote {out} ({len(rows):,} images).")
        else:
            render.table(list(rows[0]), [list(row.values()) for row in rows])


def _images(inputs: list[str], split: Any) -> tuple[ImageData, list[str] | None]:
    """The images that were named, and their names if they are files."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    from ..data import Files, ImageData, load_dataset
    from ..errors import DataError

    if len(inputs) == 1 and not inputs[0].lower().endswith(IMG_EXTENSIONS):
        return load_dataset(inputs[0], split=split), None
    missing = [name for name in inputs if not Path(name).is_file()]
    if missing:
        raise DataError(
            f"There is no image file {missing[0]!r}. Give image files, or the name of one data set."
        )
    return ImageData("images", "all", ("",), Files([(name, 0) for name in inputs])), inputs


def _rows(
    opened: Opened,
    images: ImageData,
    names: list[str] | None,
    total: int,
    num_samples: int,
    batch_size: int,
    workers: int,
    seed: int,
    device: torch.device,
    amp: bool,
) -> Iterator[dict[str, Any]]:
    """One row for each image, in order."""
    import torch

    from ..data import loader
    from ..inference import Predictor
    from ..storage import classes_in

    known = classes_in(opened.header)
    index = 0
    predictor = Predictor(opened.model, num_samples=num_samples, seed=seed, reduce="probabilities")
    for batch, labels in loader(images, batch_size, model_config=opened.input, workers=workers):
        batch, labels = batch[: total - index], labels[: total - index]
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            summary = predictor(batch.to(device))
        classes = known if len(known) == summary.mean.shape[1] else ()
        probability, predicted = summary.mean.max(dim=1)
        columns = (predicted, probability, summary.predictive_entropy, summary.mutual_information)
        for number, p, entropy, information in zip(*(c.tolist() for c in columns), strict=True):
            row = {"image": str(index) if names is None else names[index]}
            if names is None:
                row["label"] = images.classes[int(labels[index % batch_size])]
            yield {
                **row,
                "class": classes[number] if classes else str(number),
                "probability": p,
                "entropy": entropy,
                "mutual information": information,
            }
            index += 1
        if index == total:
            return


def _check_format(out: Path) -> None:
    from ..errors import ArgumentError

    if out.suffix not in (".csv", ".json"):
        raise ArgumentError(f"--out must end in .csv or .json, not {out.name!r}.")


def _write(rows: list[dict[str, Any]], out: Path, force: bool) -> None:
    from ..storage import replacing

    with (
        replacing(out, overwrite=force) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        if out.suffix == ".json":
            json_format.dump(rows, file, indent=2)
        else:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
