"""Beyond BYOV's figure 4: pruning in rounds with training between, beside pruning at once.

The paper prunes in one shot and trains no more. Here a run goes on from its end with the pruned
weights held at 0, by the steps of training: same loss, prior, data and optimizer, beta and tau as
at its last step; the learning rate rises and falls once a round. Every arm sees the same batches in
the same order, so that arms differ in when their weights are pruned and by what, alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from bayesify import (
    ArgumentError,
    at_mean,
    posteriors,
    prune_,
    sparsity_schedule,
    to_bbb_,
)
from bayesify.optim import warmup_cosine

from .config import RunConfig
from .data.batches import Views
from .data.training import batches_of
from .evaluation.features import Reading, refresh_batchnorm_
from .evaluation.linear import frozen_head, probe_of
from .evaluation.monte_carlo import classify, labels_of, outputs
from .evaluation.protocol import EvalSettings, metrics_of
from .evaluation.pruning import matrices
from .evaluation.runs import Run, limited, logvar_spread, stored
from .model import Student
from .optimizer import set_lr
from .runtime import checkpoint
from .runtime.distributed import World
from .step import Stepper

CRITERIA: dict[str, Literal["snr", "magnitude"]] = {"SNR": "snr", "magnitude": "magnitude"}
"""Names of the scores of :func:`bayesify.prune_`."""

DENSE, LONGER = "dense", "dense, trained on"
ONCE, THEN, ROUNDS = "one shot", "one shot, then trained", "iterative"
_HEAD = EvalSettings()


@dataclass(frozen=True)
class IterativeSettings:
    """How a run is pruned and trained; nothing of it is in the paper.

    Args:
        rounds: Of pruning and training; the sparsities of the rounds are those of
            :func:`bayesify.sparsity_schedule`.
        epochs: Passes over the training images in each round.
        sparsities: Shares of each matrix of the encoder at the end, in (0, 1).
        lr_ratio: Highest learning rate of a round over that of the run.
        images: Test images, evenly spread; 0 is all.
    """

    rounds: int = 4
    epochs: float = 1.0
    sparsities: tuple[float, ...] = (0.5, 0.7, 0.9)
    lr_ratio: float = 0.3
    images: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 1 or not self.epochs > 0 or not self.lr_ratio > 0:
            raise ArgumentError(
                "rounds must be at least 1, epochs and lr_ratio above 0, not "
                f"{self.rounds}, {self.epochs:g} and {self.lr_ratio:g}."
            )
        if not self.sparsities or not all(0 < s < 1 for s in self.sparsities):
            raise ArgumentError(f"sparsities must be in (0, 1), not {[*self.sparsities]}.")


def iterative_pruning(
    run: Run,
    settings: IterativeSettings = IterativeSettings(),
    *,
    head: EvalSettings = _HEAD,
    on_progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Prune a run at once, at once and then trained, and in rounds; each by SNR and by magnitude.

    Measured at the means, by the run's own frozen classifier (``top1``, ``nll``) and by a linear
    classifier that is trained anew on the features of the pruned encoder (``anew``). The controls
    are the run as it is, and trained on without being pruned. Writes ``results/iterative.json``.

    Args:
        run: A run of BYOV, or of BYOL, which is pruned by magnitude alone.
        settings: How.
        head: Of the classifiers.
        on_progress: Gets a line before each piece of work.

    Raises:
        ArgumentError: The run is the supervised baseline.

    Reference:
        Zhu and Gupta, 2017, arXiv:1710.01878.
    """
    if not isinstance(run.model, Student):
        raise ArgumentError(
            f"{run.folder} is the supervised baseline; prune runs of BYOV and BYOL."
        )
    names = list(CRITERIA) if run.config.bayesian else ["magnitude"]
    steps = max(1, round(settings.epochs * _steps_per_epoch(run)))

    def measure() -> dict[str, Any]:
        classifier, info = frozen_head(run, head)
        arms: list[dict[str, Any]] = []

        def arm(way: str, criterion: str | None, schedule: Sequence[float], steps: int) -> None:
            by = "" if criterion is None else f" by {criterion}, {schedule[-1]:.0%}"
            on_progress(f"{way}{by}")
            few = limited(
                gone_on(run, criterion, schedule, steps, settings.lr_ratio), settings.images
            )
            found = metrics_of(outputs(few, classify(few, classifier)), labels_of(few))
            arms.append(
                {
                    "way": way, "criterion": criterion, "sparsity": schedule[-1],
                    "schedule": list(schedule), "steps": steps * len(schedule),
                    "top1": found["top1"], "nll": found["nll"],
                    "anew": probe_of(few, few.model, head).accuracy,
                }
            )  # fmt: skip

        arm(DENSE, None, [0.0], 0)
        arm(LONGER, None, [0.0] * settings.rounds, steps)
        for name in names:
            for share in settings.sparsities:
                arm(ONCE, name, [share], 0)
                arm(THEN, name, [share] * settings.rounds, steps)
                arm(ROUNDS, name, sparsity_schedule(share, settings.rounds), steps)
        spread = logvar_spread(run.encoder) if run.config.bayesian else None
        return {"arms": arms, "encoder_logvar_spread": spread, "classifier": info}

    kept = {
        "rounds": settings.rounds, "steps": steps, "lr_ratio": settings.lr_ratio,
        "sparsities": list(settings.sparsities), "images": settings.images, "seed": head.seed,
    }  # fmt: skip
    return stored(run, "iterative", kept, measure)


def gone_on(
    run: Run, criterion: str | None, schedule: Sequence[float], steps: int, lr_ratio: float
) -> Run:
    """The run after one round for each sparsity: prune the encoder's matrices, then train.

    Args:
        run: Left as it is. BYOL gets a posterior to hold its masks and is trained at the means.
        criterion: A key of :data:`CRITERIA`; None prunes nothing.
        schedule: Sparsities that do not fall.
        steps: Optimizer steps of a round.
        lr_ratio: Highest learning rate of a round over that of the run.
    """
    config, number = run.config, run.step
    devices = [run.device] if run.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        stepper, batches = _went_on(run, steps * len(schedule))
        model: Any = stepper.model
        bayesian = {p.name for p in posteriors(model.encoder)}
        only = [name for name in matrices(model.encoder) if name in bayesian]
        for sparsity in schedule:
            if criterion is not None:
                prune_(model.encoder, sparsity, score=CRITERIA[criterion], only=only)
            for step in range(steps):
                set_lr(stepper.optimizer, lr_ratio * warmup_cosine(step, steps // 10, steps))
                with nullcontext() if config.bayesian else at_mean(model):
                    stepper.backward(number, next(batches), config.beta_end, norm_wanted=False)
                stepper.advance(config.tau_end)
                number += 1
    model.eval()
    if steps and config.bayesian:
        refresh_batchnorm_(model, config, run.source, Reading(run.device, workers=run.workers))
    return replace(run, model=model)


def _went_on(run: Run, count: int) -> tuple[Stepper, Iterator[list[Views]]]:
    """All that training needs as it was at the run's end, and the ``count`` batches after it."""
    saved = checkpoint.read(checkpoint.path_of(run.folder / "checkpoints", run.step))
    config, images = run.config, run.source.num_images
    how = RunConfig(accumulate=saved["identity"]["micro_batches"], workers=run.workers)
    world = World(0, 1, run.device)
    stepper = Stepper(config, how, world, num_classes=run.source.num_classes, num_images=images)
    stepper.load_state(saved)
    stepper.model.load_state_dict(run.model.state_dict())  # BatchNorm's statistics at the means
    if not config.bayesian:
        to_bbb_(stepper.model, initial_std=math.exp(-5))
    per_epoch = _steps_per_epoch(run)
    longer = replace(config, epochs=max(config.epochs, math.ceil((run.step + count) / per_epoch)))
    return stepper, batches_of(run.source, longer, how, world, per_epoch, run.step)


def _steps_per_epoch(run: Run) -> int:
    return max(1, run.source.num_images // run.config.batch_size)
