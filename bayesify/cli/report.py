"""``bayesify report``: one page on how far a posterior can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..settings import ReportSettings, Shown
from .options import (
    Data,
    Device,
    File,
    Force,
    ModelArgs,
    ModelName,
    Quiet,
    Split,
    resolve_device,
)
from .outputs import check_outputs


def report(
    file: File,
    data: Data,
    settings: ReportSettings,
    ood: Annotated[
        str | None, Shown(metavar="DATA", text="Images of another kind: is it uncertain of them?")
    ] = None,
    out: Annotated[Path, Shown(letter="-o", metavar="FILE", text="The page.")] = Path(
        "report.html"
    ),
    split: Split = "test",
    model: ModelName = None,
    model_args: ModelArgs = None,
    device: Device = "auto",
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page on the model in FILE, measured on DATA: it opens without a network.

    For example: bayesify report fitted.bbb.safetensors fashion-sample --ood folder/of/others

    Calibration and quality beside temperature scaling, entropies, accuracy when it may decline,
    the images of most and least uncertainty, sigma and signal-to-noise ratio of each tensor, and
    what can be pruned.
    """  # fmt: skip
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
    looking = settings.workers, settings.skip_unreadable
    images, unreadable = readable_images(images, *looking)
    if ood_data is not None:
        ood_data, more = readable_images(ood_data, *looking)
        unreadable += more
    left = [("left out", f"{unreadable:,} images that cannot be read")] if unreadable else []
    with render.progress("Measuring") as bar:
        found = gather(
            opened.model, images, ood=ood_data, model_config=opened.input, device=target_device,
            title=opened.spec.name,
            facts=[("file", str(file)), *left, *storage.describe(opened.header)],
            on_step=lambda what, done, total: bar.to(done, total, what),
            **vars(settings),
        )  # fmt: skip
    page = render_page(found)
    with storage.replacing(out, overwrite=force) as temporary:
        temporary.write_text(page, encoding="utf-8")
    if images.split == "all":
        render.note(f"{data} has no splits: was the model trained on these images?")
    if not quiet:
        render.text(f"Wrote {out} ({len(page.encode()) / 2**10:,.0f} KiB): open it in a browser.")
