"""``bayesify prune``: set the weights to 0 whose posterior says little."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    Quiet,
    Seed,
    SkipUnreadable,
    Split,
    Workers,
    resolve_device,
)
from .outputs import check_outputs

if TYPE_CHECKING:
    from torch import nn

_CURVE = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)


def prune(
    file: File,
    sparsity: Annotated[
        list[float] | None,
        typer.Option(help="Share that is pruned, in [0, 1). Repeatable with --curve."),
    ] = None,
    score: Annotated[
        list[str] | None,
        typer.Option(
            help="The lowest go first: snr (|mean| / sigma, the default), magnitude, variance "
            "(the widest first), random. Repeatable with --curve."
        ),
    ] = None,
    scope: Annotated[
        Literal["tensor", "global"], typer.Option(help="The share of each tensor, or of all.")
    ] = "tensor",
    unit: Annotated[
        Literal["weights", "channels", "heads", "2:4"],
        typer.Option(help="What is pruned; 2:4 keeps the best two of every four inputs."),
    ] = "weights",
    only: Annotated[
        list[str] | None, typer.Option(help="Only this, by the patterns of convert. Repeatable.")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="But not this. Repeatable.")] = None,
    min_dim: Annotated[
        int, typer.Option(help="Leave tensors of fewer dimensions; 1 prunes biases and norms too.")
    ] = 2,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Default: ./NAME.pruned.bbb.safetensors."),
    ] = None,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic", help="Write the means alone, as the original model loads them."
        ),
    ] = False,
    curve: Annotated[
        bool, typer.Option("--curve", help="Write nothing: measure on --data at many sparsities.")
    ] = False,
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="For --curve: a data set as eval takes it.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --curve: draw it into a .png.")
    ] = None,
    num_samples: NumSamples = 20,
    split: Split = "test",
    batch_size: BatchSize = 256,
    model: ModelName = None,
    model_args: ModelArgs = None,
    workers: Workers = 0,
    skip_unreadable: SkipUnreadable = False,
    seed: Seed = 0,
    device: Device = "auto",
    amp: Amp = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Prune the weights in FILE of the lowest signal-to-noise ratio: mean and sigma become 0.

    For example: bayesify prune resnet50.bbb.safetensors --sparsity 0.8
    """
    with guard(debug, json=json):
        from .. import storage
        from . import render
        from .checkpoint import note_on_classes, open_model

        shares, scores = sparsity or [], score or ["snr"]
        _check(curve, data, plot, out, deterministic, unit, shares, scores)

        def apply(pruned: nn.Module, share: float, by: Any) -> None:
            from ..pruning import prune_, prune_n_of_m_, prune_units_

            chosen: dict[str, Any] = {
                "score": by, "only": only or (), "skip": skip or (), "seed": seed
            }  # fmt: skip
            if unit == "2:4":
                prune_n_of_m_(pruned, **chosen)
            elif unit == "weights":
                prune_(pruned, share, scope=scope, min_dim=min_dim, **chosen)
            else:
                prune_units_(pruned, share, unit=unit, scope=scope, **chosen)

        if curve:
            from ..data import load_dataset
            from ..pruning import sparsity as sparsity_of
            from ..report.curve import draw_curve, pruning_curve
            from .images import readable_images

            check_outputs({"--plot": plot}, {"FILE": file, "--data": data}, force=force)
            target_device = resolve_device(device)
            images = load_dataset(str(data), split=split)
            opened = open_model(file, model, model_args, target_device)
            note_on_classes(opened, file, str(data))
            images, unreadable = readable_images(images, workers, skip_unreadable)
            if sparsity_of(opened.model).pruned:
                render.note("The file has pruned weights already: they stay pruned throughout.")
            swept = sorted(shares or _CURVE)
            with render.progress("Measuring", len(scores) * len(swept)) as bar:
                rows = pruning_curve(
                    opened.model, images, apply, swept, scores, on_step=bar.to,
                    num_samples=num_samples, seed=seed, batch_size=batch_size, workers=workers,
                    amp=amp, device=target_device, model_config=opened.input,
                )  # fmt: skip
            if plot is not None:
                draw_curve(rows, plot, overwrite=force)
            if json:
                about = {"file": str(file), "data": data, "unreadable": unreadable}
                render.as_json({**about, "rows": rows})
            else:
                render.table(
                    ("score", "sparsity", "prediction", "accuracy", "NLL", "ECE"),
                    [
                        (
                            row["score"],
                            f"{row['sparsity']:.0%}",
                            row["prediction"],
                            f"{row['accuracy']:.2%}",
                            f"{row['nll']:.4f}",
                            f"{row['ece']:.4f}",
                        )
                        for row in rows
                    ],
                )
            return

        target = out or Path(default_name(file, deterministic=deterministic))
        check_outputs(
            {"--out": target}, {"FILE": file}, force=force,
            in_place=None if deterministic else "FILE",
        )  # fmt: skip
        opened = open_model(file, model, model_args, resolve_device("cpu"))
        share = shares[0] if shares else 0.0
        apply(opened.model, share, scores[0])
        if deterministic:
            from ..export import export_safetensors

            export_safetensors(opened.model, target, overwrite=force)
        else:
            asked = {
                "score": scores[0], "unit": unit, "only": only or [], "skip": skip or [],
                **({} if unit == "2:4" else {"sparsity": share, "scope": scope}),
            }  # fmt: skip
            info = {**opened.header["info"], "pruned": asked}
            storage.save(opened.model, target, spec=opened.spec, info=info, overwrite=force)
        _report(opened.model, target, json, quiet)


def default_name(file: Path, *, deterministic: bool) -> str:
    """``net.bbb.safetensors`` becomes ``net.pruned.bbb.safetensors``."""
    stem = file.name.removesuffix(".safetensors").removesuffix(".bbb")
    return f"{stem}.pruned{'' if deterministic else '.bbb'}.safetensors"


def _check(
    curve: bool, data: str | None, plot: Path | None, out: Path | None, deterministic: bool,
    unit: str, shares: list[float], scores: list[str],
) -> None:  # fmt: skip
    """Refuse options that contradict each other."""
    from ..errors import ArgumentError

    if curve and data is None:
        raise ArgumentError("--curve measures on a data set: give --data DATA.")
    if curve and (out is not None or deterministic):
        raise ArgumentError("--curve writes no model: leave out --out and --deterministic.")
    if curve and unit == "2:4":
        raise ArgumentError("--unit 2:4 has one sparsity and no curve: write it, and use eval.")
    if curve and plot is not None and plot.suffix != ".png":
        raise ArgumentError(f"--plot must end in .png, not {plot.name!r}.")
    if curve:
        return
    if data is not None or plot is not None:
        raise ArgumentError("--data and --plot belong to --curve.")
    if len(scores) > 1 or len(shares) > 1:
        raise ArgumentError("More than one --sparsity or --score needs --curve.")
    if unit == "2:4" and shares:
        raise ArgumentError("--unit 2:4 prunes half of the weights: leave out --sparsity.")
    if unit != "2:4" and not shares:
        raise ArgumentError("Say how much to prune: --sparsity 0.8 for 80 %.")


def _report(model: nn.Module, target: Path, json: bool, quiet: bool) -> None:
    from dataclasses import asdict

    from ..pruning import sparsity
    from . import render

    found = sparsity(model)
    if json:
        total = {"elements": found.elements, "pruned": found.pruned, "share": found.share}
        sizes = {"dense_bytes": found.dense_bytes, "sparse_bytes": found.sparse_bytes}
        rows = [{**asdict(row), "share": row.share} for row in found.rows]
        render.as_json({"file": str(target), **total, **sizes, "rows": rows})
        return
    if quiet:
        return
    render.table(
        ("parameter", "elements", "pruned", "share", "outputs pruned"),
        [
            (r.name, r.elements, r.pruned, f"{r.share:.1%}", f"{r.dead_outputs} of {r.outputs}")
            for r in found.rows
            if r.pruned
        ],
    )
    render.text(
        f"{found.pruned:,} of {found.elements:,} weights are 0 ({found.share:.2%}): "
        f"{found.dense_bytes / 2**20:.2f} MiB of means, {found.sparse_bytes / 2**20:.2f} MiB where "
        f"zeros are left out. Wrote {target}, with the zeros in it."
    )
