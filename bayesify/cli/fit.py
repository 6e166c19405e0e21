"""``bayesify fit``: train the posterior in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

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
    Json,
    ModelName,
    Quiet,
    Seed,
    Workers,
    resolve_device,
)


def fit(
    file: File,
    data: Data,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="Where the result is written.")
    ],
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 10,
    lr: Annotated[float, typer.Option(help="Highest learning rate of the means.")] = 1e-3,
    logvar_lr: Annotated[
        float | None, typer.Option(help="Highest learning rate of the log variances: 10 x lr.")
    ] = None,
    batch_size: BatchSize = 128,
    kl_weight: Annotated[
        float, typer.Option(help="Beta before the KL; below 1 the posterior is tempered.")
    ] = 1.0,
    kl_reduction: Annotated[
        Literal["num_data", "num_weights", "sum"],
        typer.Option(help="What the KL is divided by: images, weights, or nothing."),
    ] = "num_data",
    kl_warmup: Annotated[
        float, typer.Option(help="Share of the run in which beta rises from 0.")
    ] = 0.0,
    model: ModelName = None,
    workers: Workers = 0,
    seed: Seed = 0,
    device: Device = "auto",
    amp: Amp = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train the posterior in FILE on the training images of DATA.

    The loss is that of Bayes by Backprop: cross entropy plus beta times s times the KL to the
    prior, with one draw of the weights in every step.
    """
    with guard(debug):
        from dataclasses import asdict

        from .. import storage, training
        from ..data import load_dataset
        from . import render
        from .checkpoint import open_model

        storage.check_target(out, overwrite=force)
        target_device = resolve_device(device)
        train = load_dataset(data, split="train")
        opened = open_model(file, model, target_device)
        arguments = {
            "epochs": epochs, "batch_size": batch_size, "lr": lr, "logvar_lr": logvar_lr,
            "kl_weight": kl_weight, "kl_reduction": kl_reduction, "kl_warmup": kl_warmup,
            "seed": seed, "amp": amp,
        }  # fmt: skip
        with render.progress("Training") as bar:
            result = training.fit(
                opened.model,
                train,
                **arguments,  # type: ignore[arg-type]
                device=target_device,
                model_config=opened.input,
                workers=workers,
                on_start=(lambda line: None) if quiet else bar.say,
                on_step=lambda p: bar.to(p.step, p.steps, f"epoch {p.epoch + 1} loss {p.loss:.3f}"),
            )
        numbers = asdict(result)
        seconds = numbers.pop("seconds")  # the same run gives the same file
        info = {
            **opened.header["info"],
            "classes": list(train.classes),
            "fit": {"data": train.name, **arguments, **numbers},
        }
        storage.save(opened.model, out, spec=opened.spec, info=info, overwrite=force)
        if json:
            render.as_json({"file": str(out), **numbers, "seconds": seconds})
        elif not quiet:
            render.table(
                ("epoch", "loss", "KL in nats"),
                [
                    (epoch, loss, kl)
                    for epoch, (loss, kl) in enumerate(
                        zip(result.losses, result.kl, strict=True), 1
                    )
                ],
            )
            render.text(f"{result.steps:,} steps in {seconds:.0f} s. Wrote {out}.")
