"""What a training leaves behind while it runs: its log, its alarms and its checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayesify import ArgumentError, BayesifyError, posteriors
from bayesify.signals import Signals
from bayesify.storage import replacing

from .config import RUN_FILE, BYOVConfig, RunConfig, run_text
from .data.dataset import Source
from .evaluation.features import Reading, features, monitor_knn, subsample
from .runtime import checkpoint
from .runtime.distributed import World
from .runtime.failures import COLLAPSED, check_finite, collapse_message
from .runtime.log import RunLog
from .runtime.monitors import (
    collapse_alarms,
    effective_rank,
    embedding_std,
    mean_stats,
    posterior_summary,
)
from .runtime.tensorboard import TensorBoardWriter
from .step import Gradients, Stepper

MONITORED = 50_000
"""Training images in which the kNN of a running training is measured, at most."""


@dataclass(frozen=True)
class Progress:
    """Where a run is after a step."""

    step: int
    steps: int
    epoch: int
    values: dict[str, float]


@dataclass
class Watcher:
    """What a caller wants to be told; nothing by default."""

    log: Callable[[str], None] = field(default=lambda line: None)
    on_step: Callable[[Progress], None] = field(default=lambda progress: None)
    on_epoch: Callable[[int, dict[str, Any]], None] = field(default=lambda step, values: None)


class TrainLog:
    """Log, alarms and checkpoints of one training, in the folder ``run.out``.

    Args:
        config: What is trained.
        run: Where and how.
        world: The processes. The first alone writes.
        watcher: What to tell whom.
        stepper: What is trained.
        source: The images.
        steps_per_epoch: Optimizer steps of one pass over them.
    """

    def __init__(
        self,
        config: BYOVConfig,
        run: RunConfig,
        world: World,
        watcher: Watcher,
        stepper: Stepper,
        source: Source,
        steps_per_epoch: int,
    ) -> None:
        self.config, self.run, self.world, self.watcher = config, run, world, watcher
        self.stepper, self.source = stepper, source
        self.steps_per_epoch = steps_per_epoch
        self.steps = config.epochs * steps_per_epoch
        self.reading = Reading(world.device, run.amp, run.workers)
        self.monitored = subsample(source, MONITORED)
        self.folder = run.out / "checkpoints"
        self.identity = {
            **config.to_json(),
            "data": {"name": run.data, "images": source.num_images},
            "micro_batches": world.size * run.accumulate,
        }
        self.newest: Path | None = None
        self.layers: list[dict[str, dict[str, float]]] = []
        self.alarms = 0
        self.best: dict[str, Any] = {"knn": None, "step": None}
        self._unchecked: list[tuple[int, Tensor]] = []
        self._images = 0
        self._travel = 0.0

    def begin(self, resumed: Path | None, rates: Sequence[float]) -> int:
        """Load the checkpoint to go on from, open the log, and give the step to start at.

        Args:
            resumed: The checkpoint; None: start anew.
            rates: Factor of the learning rate at every step of the run.

        Raises:
            CheckpointError: The checkpoint is of another run.
        """
        config, run, world = self.config, self.run, self.world
        start = 0
        if resumed is not None:
            saved = checkpoint.read(resumed)
            checkpoint.check_run(resumed, saved)
            # a field younger than the checkpoint had its default then
            checkpoint.check_same(
                resumed, {**BYOVConfig().to_json(), **saved["identity"]}, self.identity
            )
            try:
                start, self.alarms, self.best = saved["step"], saved["alarms"], saved["best"]
                self.stepper.load_state(saved)
                self.layers = saved["layers"]
            except BayesifyError:
                raise
            except Exception as error:  # of torch's optimizers, and of what is missing
                raise checkpoint.KIND.damaged(resumed, error) from error
            self.watcher.log(f"Going on from {resumed}, step {start:,} of {self.steps:,}.")
        self.newest = resumed
        self._travel = sum(rates[:start])
        run.out.mkdir(parents=True, exist_ok=True)
        if world.first:
            with replacing(run.out / RUN_FILE, overwrite=True) as temporary:
                temporary.write_text(run_text(config, run), "utf-8")
        wanted = run.tensorboard and world.first
        tensorboard = TensorBoardWriter(run.out / "tensorboard", start) if wanted else None
        self.log = RunLog(run.out / "log.jsonl" if world.first else None, tensorboard)
        self.log.cut(start)
        if start == 0:
            self.log.add("start", 0, {"config": config.to_json(), "steps": self.steps,
                                      "kl_scale": self.stepper.kl_scale})  # fmt: skip
        if config.bayesian:
            self.watcher.log(
                f"KL of {_weights(self.stepper.model):,} weights: s = {self.stepper.kl_scale:.3g} "
                f"({config.kl_reduction}), beta {config.beta_start:g} to {config.beta_end:g}, "
                f"noise budget beta*s*P/2 = {self.stepper.budget(config.beta_end):.3g} in units of "
                "the loss"
            )
        self._clock = time.perf_counter()
        return start

    def is_due(self, step: int) -> bool:
        """Whether a step is logged."""
        return (step + 1) % self.run.log_every == 0 or step + 1 == self.steps

    def check(self, step: int, gradients: Gradients) -> None:
        """Refuse a loss or gradient that is not finite; on a GPU only where it waits anyway."""
        self._unchecked.append((step, gradients.parts["loss"] + gradients.norm * 0.0))
        if self.world.device.type == "cpu" or self.is_due(step):
            self._check_all()

    def add(
        self, step: int, gradients: Gradients, factor: float, beta: float, tau: float, *,
        warming_up: bool,
    ) -> None:  # fmt: skip
        """Count a step that was taken, and log it if it is due.

        Raises:
            BayesifyError: The embeddings have collapsed.
        """
        self._travel += factor
        self._images += self.config.batch_size
        if not self.is_due(step):
            return
        done, epoch = step + 1, step // self.steps_per_epoch
        values = {name: self.world.mean(v).item() for name, v in gradients.parts.items()}
        elapsed, self._clock = time.perf_counter() - self._clock, time.perf_counter()
        values |= {
            "epoch": epoch,
            "beta": beta,
            "lr": self.config.peak_lr * factor,
            "grad_norm": gradients.norm.item(),
            "images_per_second": self._images / elapsed,
        }
        self._images = 0
        if self.stepper.teacher is not None:
            projection = gradients.seen["projection"]
            spread, rank = embedding_std(projection), effective_rank(projection)
            values |= {"tau": tau, "std": spread, "effective_rank": rank}
            alarmed = not warming_up and bool(collapse_alarms(std=spread, rank=rank))
            self.alarms = self.alarms + 1 if alarmed else 0
        if self.config.bayesian:
            values |= self._posterior(factor, beta)
        self.log.add("step", done, values)
        self.watcher.on_step(Progress(done, self.steps, epoch, values))
        if self.run.stop_on_collapse and self.world.any(self.alarms >= COLLAPSED):
            raise BayesifyError(collapse_message(self.config, done, values, self.newest))

    def end_step(self, step: int, signals: Signals) -> bool:
        """Close an epoch that ends here, and write a checkpoint where one is due.

        Returns:
            Whether the run was asked to stop, of which a checkpoint was written.
        """
        done = step + 1
        ends = done % self.steps_per_epoch == 0
        finished = done // self.steps_per_epoch
        if ends:
            self._end_epoch(finished, done)
        due = ends and finished % self.run.checkpoint_every == 0
        stopped = self.world.any(signals.requested)
        if due or done == self.steps or stopped or self.best["step"] == done:
            self._check_all()
            self.newest = self._save(done)
        if stopped and done < self.steps:
            self.watcher.log(
                f"Stopped at step {done:,} of {self.steps:,}; the checkpoint is {self.newest}."
            )
        return stopped

    def end(self, numbers: dict[str, Any]) -> None:
        """Log the final numbers."""
        self.log.add("end", self.steps, numbers)

    def _posterior(self, factor: float, beta: float) -> dict[str, float]:
        """How far the posterior has moved, and could have."""
        config, stepper = self.config, self.stepper
        logvar_lr = config.peak_lr * config.logvar_lr_ratio
        per_step = 1 if config.parameterization == "exp" else 2  # d logvar / d rho, at most
        summary = posterior_summary(stepper.model, initial_logvar=stepper.initial_logvar)
        self.layers.append(summary.layers)
        return {
            "logvar_lr": logvar_lr * factor,
            "noise_budget": stepper.budget(beta),
            "logvar_reach": per_step * logvar_lr * self._travel,  # the most that Adam can do
            "logvar_travel": summary.logvar_travel,
            "logvar_spread": summary.logvar_spread,
            "prior_share": summary.prior_share,
        }

    def _end_epoch(self, finished: int, done: int) -> None:
        run, best = self.run, self.best
        report: dict[str, Any] = {"epoch": finished}
        if self.layers:
            report["layers"], self.layers = mean_stats(self.layers), []
        if run.skip_broken:
            report["broken_images"] = len(self.source.broken)
        measured = run.eval_every and self.source.num_classes
        if measured and (finished % run.eval_every == 0 or done == self.steps):
            report["knn"] = self._knn()
            if best["knn"] is None or report["knn"] > best["knn"]:
                self.best = {"knn": report["knn"], "step": done}
        self.log.add("epoch", done, report)
        self.watcher.on_epoch(done, report)

    def _knn(self) -> float:
        """Accuracy of kNN at the means, measured by the first process and sent to all."""
        found = 0.0
        model = self.stepper.full_models()[0]  # by all processes: a sharded model is gathered
        if self.world.first:
            x, y = features(model, self.monitored, "train", self.reading)
            found = monitor_knn(x, y, self.run.monitor_images)
        return self.world.mean(
            torch.tensor(found * self.world.size, device=self.world.device)
        ).item()

    def _save(self, step: int) -> Path:
        path = checkpoint.path_of(self.folder, step)
        state = {  # by all processes: what is sharded is gathered
            "step": step,
            "identity": self.identity,
            **self.stepper.state(),
            "layers": self.layers,
            "alarms": self.alarms,
            "best": self.best,
            "classes": list(self.source.classes),
        }
        if self.world.first:
            checkpoint.write(path, state)
            checkpoint.tidy(self.folder, keep_last=self.run.keep_last, best=self.best["step"])
        self.world.wait()
        return path

    def _check_all(self) -> None:
        check_finite(self._unchecked, self.newest, self.stepper.optimizer)
        self._unchecked.clear()


def checkpoint_to_resume(out: Path, resume: bool) -> Path | None:
    """The newest checkpoint in a run's folder.

    Raises:
        ArgumentError: There is one, and the run is not to go on from it.
    """
    newest = checkpoint.latest(out / "checkpoints")
    if newest is not None and not resume:
        raise ArgumentError(
            f"{newest} exists: go on from it with --resume, or give another folder with --out."
        )
    return newest


def _weights(model: nn.Module) -> int:
    return sum(posterior.mean.numel() for posterior in posteriors(model))
