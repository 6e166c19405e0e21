r"""The paper-scale run and its pruning experiment, or the same chain on Imagenette.

    torchrun --nproc-per-node 8 -m recipes.byov.paper.imagenet --data imagenet    # ViT-B/16, 224 px
    torchrun --nproc-per-node 8 -m recipes.byov.paper.imagenet --data wds:FOLDER
    python -m recipes.byov.paper.imagenet --data imagenette --path FOLDER         # ViT-S/16, 96 px
    python -m recipes.byov.paper.imagenet --data imagenette --path FOLDER --device cpu --epochs 1 \
        --encoder vit_tiny_patch16_224 --batch-size 128 --draws 20
    python -m recipes.byov.paper.pack_images FOLDER --size 96 --out imagenette96.safetensors
    python -m recipes.byov.paper.imagenet --data imagenette --path imagenette96.safetensors \
        --epochs 40 --logvar-lr-ratio 25 --no-compile --draws 100

Trains BYOL, BYOV and the supervised baseline, then measures the linear probe, ECE and Brier parts,
the pruning curve and figure 1b. What is interrupted (--minutes, Ctrl-C) goes on the next time.
Results are JSON in `benchmarks/results/byov/imagenet` or `.../imagenette`. The folder holds `train`
and `val` with one folder of images for each class. A short training needs a higher rate of the log
variances, for their way is at most the sum of it. The committed results of Imagenette are of the
last command, as three processes side by side on an H100, one with --only for each cell.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..evaluation.protocol import EvalSettings
from ..evaluation.pruning import SCOPES
from ..evaluation.uncertainty import UncertaintySettings
from ..presets import PRESETS
from .cells import CELLS, Scale, result_of, run_cell

_CHAIN = ("byol", "byov-zero", "supervised-bbb")
_KEPT: Any = {"stop_on_collapse": False, "eval_every": 0, "keep_last": 1, "baselines": False}


def scale_of(asked: argparse.Namespace) -> Scale:
    """The configuration of a data set, and what the options change of it."""
    if asked.data == "imagenette":
        preset = PRESETS["imagenette-vit-small"]
        config = replace(preset.config, image_size=96, min_crop=0.2)
        name = "imagenette"
        about = "Imagenette at 96 px, ViT-S/16."
    else:
        preset = PRESETS["imagenet-vit-b16"]
        config, name = preset.config, "imagenet"
        about = "ImageNet-1k, ViT-B/16, as far as the paper says it."
    if asked.epochs is not None:
        config = replace(config, epochs=asked.epochs,
                         warmup_epochs=min(config.warmup_epochs, 0.1 * asked.epochs))  # fmt: skip
    if asked.batch_size is not None:
        config = replace(config, batch_size=asked.batch_size)
    if asked.encoder is not None:
        config = replace(config, encoder=asked.encoder)
    if asked.logvar_lr_ratio is not None:
        config = replace(config, logvar_lr_ratio=asked.logvar_lr_ratio)
    cpu = asked.device == "cpu"
    run = replace(
        preset.run, data=asked.path or asked.data, accumulate=asked.accumulate,
        workers=asked.workers,
        amp=not cpu, compile=asked.compile and not cpu, device="cpu" if cpu else "cuda",
        log_every=5 if cpu else 50, checkpoint_every=max(1, config.epochs // 20), **_KEPT,
    )  # fmt: skip
    uncertainty = UncertaintySettings(spread_draws=asked.draws, pruned_images=500 if cpu else 0)
    head = EvalSettings(num_samples=min(30, asked.draws))
    return Scale(name, about, config, run, head, uncertainty, ("tensor",) if cpu else SCOPES)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", default="imagenet", help="imagenet, imagenette, wds:FOLDER")
    parser.add_argument("--path", help="folder of the images, if it is not called as the data set")
    parser.add_argument("--minutes", type=float, help="save and end after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--encoder")
    parser.add_argument("--logvar-lr-ratio", type=float)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--draws", type=int, default=1000, help="of figure 1b")
    parser.add_argument("--only", nargs="+", default=_CHAIN, help="cells")
    parser.add_argument("--work", type=Path, default=Path("runs") / "byov")
    asked = parser.parse_args()
    scale = scale_of(asked)
    first = os.environ.get("RANK", "0") == "0"
    if asked.minutes is not None:
        _limit(60 * asked.minutes)
    for cell in [c for c in CELLS if c.name in asked.only]:
        needs = tuple(n for n in cell.needs if n in ("eval", "prune", "spread"))
        if result_of(scale, cell, asked.seed).exists():
            continue
        if not run_cell(
            scale, replace(cell, needs=needs), asked.seed, work=asked.work, first=first
        ):
            raise SystemExit("Time is over; the same command goes on.")


def _limit(seconds: float) -> None:
    """Ask this process to end, as SIGTERM does: training then writes a checkpoint."""
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    main()
