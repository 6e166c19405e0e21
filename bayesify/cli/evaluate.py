"""``bayesify eval``: how good the predictions of a file are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from ..settings import EvaluateSettings, Shown
from .options import Device, File, Json, Measured, ModelArgs, ModelName, Split, resolve_device

if TYPE_CHECKING:
    from ..training import Evaluation
    from ..training.measures import RegressionEvaluation


def evaluate(
    file: File,
    data: Measured,
    settings: EvaluateSettings,
    split: Split = "test",
    ood: Annotated[
        str | None,
        Shown(metavar="DATA", text="Images of none of the classes: how well are they told apart?"),
    ] = None,
    model: ModelName = None,
    model_args: ModelArgs = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure accuracy, NLL, calibration and Brier score on DATA, at the means and over K draws.

    Between them stands a control that a posterior must beat: the logits at the means divided by one
    temperature, fitted on other images of DATA (five-fold).

    NLL, entropy and mutual information (MI) are in nats. ECE is the calibration error over 15 bins
    of confidence, AURC the mean error rate over all coverages when the least sure are left out
    first. The Brier score sums over the classes, from 0 to 2; its parts by predicted class add up:
    UNC - RES + REL + rest. Higher is better for top-1, top-5, RES and AUROC.

    Of a table's model whose target is a number: NLL of a target, RMSE, MAE, CRPS, and of the 90 %
    intervals the share that hold the target and the mean width.
    """
    from dataclasses import asdict

    from .. import storage, training
    from ..classes import classes_of
    from ..data import load_dataset
    from . import render
    from .checkpoint import note_on_classes, open_model
    from .images import readable_images
    from .tables import measured, open_table_model, refuse_for_table, refuse_table

    target_device = resolve_device(device)
    header = storage.read_header(file)
    if "table" in header["info"]:
        others: dict[str, Any] = {"--ood": ood, "--model": model, "--model-args": model_args}
        others |= {"--split train": split == "train", "--skip-unreadable": settings.skip_unreadable}
        refuse_for_table(file, others)
        table = open_table_model(file, header, target_device)
        count, rows = measured(table, data, settings, target_device)
        if json:
            about = {"file": str(file), "data": data, "target": table.coding.target}
            render.as_json({**about, "examples": count, "rows": [asdict(row) for row in rows]})
            return
        _show(rows)
        render.text(f"{count:,} rows of {data}, target {table.coding.target!r}.")
        return
    refuse_table(file, data)
    images = load_dataset(data, split=split)
    ood_data = None if ood is None else load_dataset(ood, split=split)
    opened = open_model(file, model, model_args, target_device)
    note_on_classes(opened, file, data)
    looking = settings.workers, settings.skip_unreadable
    images, unreadable = readable_images(images, *looking)
    ood_unreadable = 0
    if ood_data is not None:
        ood_data, ood_unreadable = readable_images(ood_data, *looking)
    with render.progress("Measuring") as bar:
        rows = training.evaluate(
            opened.model, images, ood=ood_data, device=target_device, model_config=opened.input,
            control=len(images) > 1, on_step=bar.to, **vars(settings),
        )  # fmt: skip
    if json:
        head = {"file": str(file), "data": data, "split": images.split, "images": len(images)}
        head["unreadable"] = unreadable
        if ood_data is not None:
            head |= {"ood": ood, "ood_images": len(ood_data), "ood_unreadable": ood_unreadable}
        render.as_json({**head, "rows": [asdict(row) for row in rows]})
        return
    _show(rows)
    known, part = classes_of(opened.model) or (), len(images.classes)
    render.text(
        f"{len(images):,} images of {data} ({images.split})"
        + (f", {part} of the {len(known)} classes." if part < len(known) else ".")
    )
    if ood_data is not None:
        render.text(f"Out of distribution: {len(ood_data):,} images of {ood}.")
    if images.split == "all":
        render.note(f"{data} has no splits: was the model trained on these images?")


Table = tuple[tuple[str, ...], list[tuple[str | int, ...]]]


def _show(rows: list[Any]) -> None:
    """Print the tables, and the temperature of the control."""
    from . import render

    if not hasattr(rows[0], "accuracy"):
        render.table(*_regression(rows))
        return
    render.table(*_main(rows))
    for table in (_uncertainty(rows), _parts(rows), _ood(rows), _intervals(rows)):
        if table[1]:
            render.text("")
            render.table(*table)
    for row in rows:
        if row.temperature is not None:
            render.text(f"Temperature {row.temperature:.3f}: a control, not a posterior.")


def _regression(rows: list[RegressionEvaluation]) -> Table:
    columns = ("prediction", "K", "NLL", "RMSE", "MAE", "CRPS", "in 90 % interval", "its width")
    lines: list[tuple[str | int, ...]] = []
    for row in rows:
        errors = (f"{n:.4g}" for n in (row.nll, row.rmse, row.mae, row.crps))
        share, width = f"{row.coverage['0.9']:.1%}", f"{row.width['0.9']:.4g}"
        lines.append((row.prediction, row.num_samples, *errors, share, width))
    return columns, lines


def _main(rows: list[Evaluation]) -> Table:
    columns = ("prediction", "K", "top-1", "top-5", "NLL", "ECE", "Brier", "AURC")
    return columns, [
        (
            row.prediction,
            row.num_samples,
            f"{row.accuracy:.2%}",
            f"{row.top5:.2%}",
            f"{row.nll:.4f}",
            f"{row.ece:.4f}",
            f"{row.brier:.4f}",
            f"{row.aurc:.4f}",
        )
        for row in rows
    ]


def _uncertainty(rows: list[Evaluation]) -> Table:
    lines: list[tuple[str | int, ...]] = []
    for row in rows:
        numbers = row.adaptive_ece, row.classwise_ece, row.mce, row.entropy, row.mutual_information
        lines.append((row.prediction, *("" if n is None else f"{n:.4f}" for n in numbers)))
    return ("calibration, uncertainty", "adaptive ECE", "class-wise", "MCE", "entropy", "MI"), lines


def _parts(rows: list[Evaluation]) -> Table:
    lines: list[tuple[str | int, ...]] = []
    for row in rows:
        if row.parts is not None:
            found = row.parts
            parts = found.uncertainty, found.resolution, found.reliability, found.residual
            lines.append((row.prediction, *(f"{part:.4f}" for part in parts)))
    return ("Brier, in parts", "UNC", "RES", "REL", "rest"), lines


def _ood(rows: list[Evaluation]) -> Table:
    lines: list[tuple[str | int, ...]] = []
    for row in rows:
        for score, found in (row.ood or {}).items():
            numbers = (found[key] for key in ("auroc", "aupr_out", "aupr_in", "fpr95"))
            lines.append((row.prediction, score, *(f"{n:.4f}" for n in numbers)))
    return ("OOD data", "by", "AUROC", "AUPR out", "AUPR in", "FPR95"), lines


def _intervals(rows: list[Evaluation]) -> Table:
    lines: list[tuple[str | int, ...]] = []
    for row in rows:
        if row.intervals is not None:
            low, high = row.intervals["accuracy"]
            others = [row.intervals[name] for name in ("nll", "ece", "brier")]
            shown = [f"{ends.low:.4f}-{ends.high:.4f}" for ends in others]
            lines.append((row.prediction, f"{100 * low:.1f}-{100 * high:.1f}", *shown))
    return ("95 % intervals", "top-1 %", "NLL", "ECE", "Brier"), lines
