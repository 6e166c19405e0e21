"""``bayesify report``: one page on how far a posterior can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .guard import guard
from .options import (
    Amp,
    BatchSize,
    Data,
    Debug,
    Device,
    File,
    Force,
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


def report(
    file: File,
    data: Data,
    ood: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Images of another kind: is it uncertain of them?"),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The page.")] = Path(
        "report.html"
    ),
    num_samples: NumSamples = 20,
    pruning: Annotated[
        bool,
        typer.Option(help="Measure a pruning curve too, on 1,000 images and 5 draws at most."),
    ] = True,
    resamples: Annotated[
        int, typer.Option(min=2, metavar="N", help="Resamples of the bootstrap intervals.")
    ] = 1000,
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
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write one HTML page on the model in FILE, measured on DATA: it opens without a network.

    For example: bayesify report fitted.bbb.safetensors fashion-sample --ood folder/of/others

    Calibration and quality beside temperature scaling, entropies, accuracy when it may decline,
    the images of most and least uncertainty, sigma and signal-to-noise ratio of each tensor, and
    what can be pruned.
    """  # fmt: skip
    with guard(debug):
        from .. import storage
        from ..data import load_dataset
        from ..report import check_installed, gather
        from ..report import render as render_page
        from . import render
        from .checkpoint import note_on_classes, open_model
        from .images import readable_images

        check_installed()
        check_outputs({"--out": out}, {"FILE": file, "DATA": data, "--ood": ood}, force=force)
        target_device = resolve_device(device)
        images = load_dataset(data, split=split)
        ood_data = None if ood is None else load_dataset(ood, split=split)
        opened = open_model(file, model, model_args, target_device)
        note_on_classes(opened, file, data)
        images, unreadable = readable_images(images, workers, skip_unreadable)
        if ood_data is not None:
            ood_data, more = readable_images(ood_data, workers, skip_unreadable)
            unreadable += more
        left = [("left out", f"{unreadable:,} images that cannot be read")] if unreadable else []
        with render.progress("Measuring") as bar:
            found = gather(
                opened.model, images, ood=ood_data, num_samples=num_samples, seed=seed,
                batch_size=batch_size, resamples=resamples, pruning=pruning,
                model_config=opened.input, device=target_device, amp=amp, workers=workers,
                title=opened.spec.name,
                facts=[("file", str(file)), *left, *storage.describe(opened.header)],
                on_step=lambda what, done, total: bar.to(done, total, what),
            )  # fmt: skip
        page = render_page(found)
        with storage.replacing(out, overwrite=force) as temporary:
            temporary.write_text(page, encoding="utf-8")
        if images.split == "all":
            render.note(f"{data} has no splits: was the model trained on these images?")
        if not quiet:
            render.text(
                f"Wrote {out} ({len(page.encode()) / 2**10:,.0f} KiB): open it in a browser."
            )
