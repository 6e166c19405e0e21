"""``bayesify eval``: how good the predictions of a file are."""

from __future__ import annotations

from .guard import guard
from .options import (
    Amp,
    BatchSize,
    Data,
    Debug,
    Device,
    File,
    Json,
    ModelName,
    NumSamples,
    Seed,
    Split,
    Workers,
    resolve_device,
)


def evaluate(
    file: File,
    data: Data,
    num_samples: NumSamples = 20,
    split: Split = "test",
    batch_size: BatchSize = 256,
    model: ModelName = None,
    workers: Workers = 0,
    seed: Seed = 0,
    device: Device = "auto",
    amp: Amp = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure accuracy, NLL, ECE and Brier score on DATA, at the means and over K draws.

    NLL is in nats. ECE is the calibration error over 15 bins of confidence. The Brier score sums
    over the classes, from 0 to 2.
    """
    with guard(debug):
        from dataclasses import asdict

        from .. import training
        from ..data import load_dataset
        from . import render
        from .checkpoint import open_model

        target_device = resolve_device(device)
        images = load_dataset(data, split=split)
        opened = open_model(file, model, target_device)
        with render.progress("Measuring") as bar:
            rows = training.evaluate(
                opened.model,
                images,
                num_samples=num_samples,
                seed=seed,
                batch_size=batch_size,
                device=target_device,
                amp=amp,
                model_config=opened.input,
                workers=workers,
                on_step=bar.to,
            )
        if json:
            head = {"file": str(file), "data": data, "split": images.split, "images": len(images)}
            render.as_json({**head, "rows": [asdict(row) for row in rows]})
            return
        render.table(
            ("prediction", "draws", "accuracy", "NLL", "ECE", "Brier"),
            [
                (
                    row.prediction,
                    row.num_samples,
                    f"{row.accuracy:.2%}",
                    f"{row.nll:.4f}",
                    f"{row.ece:.4f}",
                    f"{row.brier:.4f}",
                )
                for row in rows
            ],
        )
        render.text(f"{len(images):,} images of {data} ({images.split}).")
        if images.split == "all":
            render.note(f"{data} has no splits: was the model trained on these images?")
