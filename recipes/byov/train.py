"""The training loop of BYOV, of deterministic BYOL and of the supervised twin."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayesify import (
    ArgumentError,
    BayesifyError,
    input_config,
    kl_schedule,
    posteriors,
)

from . import checkpoint
from .augment import TwoViews, WorkerViews
from .board import Board
from .config import BYOVConfig, RunConfig
from .data import Source, Views, open_source, train_views
from .export import Results, export
from .health import (
    collapse_alarms,
    effective_rank,
    embedding_std,
    mean_stats,
    posterior_health,
)
from .journal import Journal
from .measure import Reading, configs_of, features, monitor_knn, refresh_batchnorm_, thinned
from .model import build_encoder
from .optimizer import lr_factor, set_lr
from .parallel import World, joined
from .step import Stepper
from .stopping import COLLAPSED, check_finite, collapse_message, interruptible
from .teacher import TauSchedule

MONITORED = 50_000
"""Training images in which the kNN of a running training is measured, at most."""


@dataclass(frozen=True)
class Progress:
    """Where a run is after a step."""

    step: int
    steps: int
    epoch: int
    values: dict[str, float]


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Args:
        step: Optimizer steps done.
        steps: Of the whole run.
        checkpoint: The newest one, None if the run wrote none.
        results: Files and final numbers; None if it was interrupted.
    """

    step: int
    steps: int
    checkpoint: Path | None
    results: Results | None


@dataclass
class Watcher:
    """What a caller wants to be told; nothing by default."""

    say: Callable[[str], None] = field(default=lambda line: None)
    on_step: Callable[[Progress], None] = field(default=lambda progress: None)
    on_epoch: Callable[[int, dict[str, Any]], None] = field(default=lambda step, values: None)


def train(
    config: BYOVConfig, run: RunConfig, *, resume: bool = False, watcher: Watcher | None = None
) -> Outcome:
    """Train an encoder without labels; write log, checkpoints and results into ``run.out``.

    The draw of the weights, the views and dropout are functions of (seed, step, index) alone,
    process r or micro-batch r having the index r. SIGTERM and Ctrl-C end the run after the present
    step with a checkpoint. Torch's global random state is as before.

    Args:
        config: What is trained.
        run: Where and how.
        resume: Go on from the newest checkpoint in ``run.out``, if there is one.
        watcher: What to tell whom.

    Raises:
        ArgumentError: Something in the configs cannot work with this data or these processes.
        CheckpointError: ``run.out`` holds a checkpoint of another run, or one and no ``resume``.
        DataError: The data cannot be read.
        BayesifyError: The loss is not finite any more, or the embeddings have collapsed.
    """
    watcher = watcher or Watcher()
    with joined(run.device) as world, interruptible() as stop_asked:
        devices = [world.device] if world.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            return _train(config, run, resume, watcher, world, stop_asked)


def _train(
    config: BYOVConfig,
    run: RunConfig,
    resume: bool,
    watcher: Watcher,
    world: World,
    stop_asked: Callable[[], bool],
) -> Outcome:
    # What is trained on
    source = open_images(config, run).to(world.device)
    steps_per_epoch = _steps_per_epoch(source, config, run, world)
    steps = config.epochs * steps_per_epoch
    folder = run.out / "checkpoints"
    started_from = _checkpoint_to_resume(folder, resume)

    # What is trained
    torch.manual_seed(config.seed)
    stepper = Stepper(
        config, run, world, num_classes=source.num_classes, num_images=source.num_images
    )
    model = stepper.model

    # What is measured on the way: some of the training images, at the means
    reading = Reading(world.device, run.amp, run.workers)
    monitored = thinned(source, MONITORED)

    # What changes from step to step, each a function of the step alone
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    tau = TauSchedule(config.tau_start, config.tau_end, steps)
    beta = kl_schedule(config.beta_shape, config.beta_start, config.beta_end, steps)

    # What a checkpoint holds
    layers: list[dict[str, dict[str, float]]] = []
    alarms = 0
    best: dict[str, Any] = {"knn": None, "step": None}
    identity = {
        **config.to_json(),
        "data": {"name": run.data, "images": source.num_images},
        "micro_batches": world.size * run.accumulate,
    }

    def state(step: int) -> dict[str, Any]:
        return {
            "step": step,
            "identity": identity,
            **stepper.state(),
            "layers": layers,
            "alarms": alarms,
            "best": best,
        }

    def save(step: int) -> Path:
        path = checkpoint.path_of(folder, step)
        held = state(step)
        if world.first:
            checkpoint.write(path, held)
            checkpoint.tidy(folder, keep_last=run.keep_last, best=best["step"])
        world.wait()
        return path

    start = 0
    if started_from is not None:
        saved = checkpoint.read(started_from)
        # a field younger than the checkpoint had its default then
        checkpoint.check_same(
            started_from, {**BYOVConfig().to_json(), **saved["identity"]}, identity
        )
        start, alarms, best = saved["step"], saved["alarms"], saved["best"]
        stepper.load_state(saved)
        layers = saved["layers"]
        watcher.say(f"Going on from {started_from}, step {start:,} of {steps:,}.")
    run.out.mkdir(parents=True, exist_ok=True)
    board = Board(run.out / "tensorboard", start) if run.tensorboard and world.first else None
    journal = Journal(run.out / "log.jsonl" if world.first else None, board)
    journal.cut(start)
    if start == 0:
        journal.add("start", 0, {"config": config.to_json(), "steps": steps,
                                "kl_scale": stepper.kl_scale})  # fmt: skip
    if config.bayesian:
        watcher.say(
            f"KL of {_weights(model):,} weights: s = {stepper.kl_scale:.3g} "
            f"({config.kl_reduction}), beta {config.beta_start:g} to {config.beta_end:g}, noise "
            f"budget beta*s*P/2 = {stepper.budget(config.beta_end):.3g} in units of the loss"
        )

    newest = started_from
    travel = sum(lr_factor(s, warmup_steps, steps) for s in range(start))
    pending: list[tuple[int, Tensor]] = []
    clock, images_since = time.perf_counter(), 0
    batches = batches_of(source, config, run, world, steps_per_epoch, start)
    for step, micro_batches in zip(range(start, steps), batches, strict=True):
        epoch = step // steps_per_epoch
        factor = lr_factor(step, warmup_steps, steps)
        travel += factor
        set_lr(stepper.optimizer, factor)
        weight = beta(step)
        done = step + 1
        logged = done % run.log_every == 0 or done == steps
        found = stepper.backward(step, micro_batches, weight, norm_wanted=logged)
        images_since += sum(len(views[0]) for views in micro_batches) * world.size
        pending.append((step, found.parts["loss"] + found.norm * 0.0))
        if world.device.type == "cpu" or logged:
            check_finite(pending, newest, stepper.optimizer)
            pending.clear()
        stepper.advance(tau(step))

        if logged:
            values = {name: world.mean(value).item() for name, value in found.parts.items()}
            elapsed, clock = time.perf_counter() - clock, time.perf_counter()
            values |= {
                "epoch": epoch,
                "beta": weight,
                "lr": config.peak_lr * factor,
                "grad_norm": found.norm.item(),
                "images_per_second": images_since / elapsed,
            }
            images_since = 0
            if stepper.teacher is not None:
                projection = found.seen["projection"]
                spread, rank = embedding_std(projection), effective_rank(projection)
                values |= {"tau": tau(step), "std": spread, "effective_rank": rank}
                alarmed = step >= warmup_steps and bool(collapse_alarms(std=spread, rank=rank))
                alarms = alarms + 1 if alarmed else 0
            if config.bayesian:
                logvar_lr = config.peak_lr * config.logvar_lr_ratio
                per_step = 1 if config.parameterization == "exp" else 2  # d logvar / d rho, at most
                health = posterior_health(model, initial_logvar=stepper.initial_logvar)
                layers.append(health.layers)
                values |= {
                    "logvar_lr": logvar_lr * factor,
                    "noise_budget": stepper.budget(weight),
                    "logvar_reach": per_step * logvar_lr * travel,  # the most that Adam can do
                    "logvar_travel": health.logvar_travel,
                    "logvar_spread": health.logvar_spread,
                    "prior_share": health.prior_share,
                }
            journal.add("step", done, values)
            watcher.on_step(Progress(done, steps, epoch, values))
            if run.stop_on_collapse and world.any(alarms >= COLLAPSED):
                raise BayesifyError(collapse_message(config, done, values, newest))

        epoch_ends = done % steps_per_epoch == 0
        finished = epoch + 1
        if epoch_ends:
            report: dict[str, Any] = {"epoch": finished}
            if layers:
                report["layers"], layers = mean_stats(layers), []
            if run.skip_broken:
                report["broken_images"] = len(source.broken)
            if (
                run.eval_every
                and source.num_classes
                and (finished % run.eval_every == 0 or done == steps)
            ):
                report["knn"] = _monitor(stepper.whole()[0], monitored, run, reading, world)
                if best["knn"] is None or report["knn"] > best["knn"]:
                    best = {"knn": report["knn"], "step": done}
            journal.add("epoch", done, report)
            watcher.on_epoch(done, report)
        due = epoch_ends and finished % run.checkpoint_every == 0
        stopped = world.any(stop_asked())
        if due or done == steps or stopped or best["step"] == done:
            check_finite(pending, newest, stepper.optimizer)
            pending.clear()
            newest = save(done)
        if stopped and done < steps:
            watcher.say(f"Stopped at step {done:,} of {steps:,}; the checkpoint is {newest}.")
            return Outcome(done, steps, newest, None)

    student, teacher = stepper.whole()
    if config.bayesian and world.first:
        refresh_batchnorm_(student, config, source, reading)
    results = export(config, run, student, teacher, stepper.probe, source, reading, world)
    journal.add("end", steps, results.numbers)
    return Outcome(steps, steps, newest, results)


def open_images(config: BYOVConfig, run: RunConfig) -> Source:
    """The data, to be normalised as the encoder's other users in bayesify do: as timm says."""
    with torch.device("meta"):
        encoder = build_encoder(config, None)
    shown = input_config(encoder, img_size=config.image_size, in_chans=config.channels)
    return open_source(
        run.data,
        image_size=config.image_size,
        channels=config.channels,
        mean=shown.mean,
        std=shown.std,
        skip_broken=run.skip_broken,
    )


def _steps_per_epoch(source: Source, config: BYOVConfig, run: RunConfig, world: World) -> int:
    parts = world.size * run.accumulate
    if config.batch_size % parts:
        raise ArgumentError(
            f"batch_size ({config.batch_size}) must be a multiple of the {parts} micro-batches: "
            f"{world.size} processes with accumulate={run.accumulate}."
        )
    if config.batch_size == parts and config.head_norm == "batch" and config.objective == "byol":
        raise ArgumentError(
            f"batch_size ({config.batch_size}) over {parts} micro-batches leaves BatchNorm one "
            "image each: take a larger one, or head_norm 'group', 'layer' or 'none'."
        )
    if source.num_images < config.batch_size:
        raise ArgumentError(
            f"batch_size ({config.batch_size}) must be at most the number of training images, "
            f"{source.num_images}."
        )
    return source.num_images // config.batch_size


def _checkpoint_to_resume(folder: Path, resume: bool) -> Path | None:
    newest = checkpoint.latest(folder)
    if newest is not None and not resume:
        raise ArgumentError(
            f"{newest} exists: go on from it with --resume, or give another folder with --out."
        )
    return newest


def _weights(model: nn.Module) -> int:
    return sum(posterior.mean.numel() for posterior in posteriors(model))


def batches_of(
    source: Source,
    config: BYOVConfig,
    run: RunConfig,
    world: World,
    steps_per_epoch: int,
    start: int,
) -> Iterator[list[Views]]:
    """The micro-batches of this process, step by step from ``start`` on."""
    configs = configs_of(config, source)
    views = WorkerViews(*configs) if run.workers and not source.resident else TwoViews(*configs)
    for epoch in range(start // steps_per_epoch, config.epochs):
        stream = train_views(
            source,
            batch_size=config.batch_size // (world.size * run.accumulate),
            seed=config.seed,
            epoch=epoch,
            views=views,
            start_step=max(0, start - epoch * steps_per_epoch),
            rank=world.rank,
            world_size=world.size,
            micro_batches=run.accumulate,
            device=world.device,
            workers=run.workers,
        )
        while micro := list(itertools.islice(stream, run.accumulate)):
            yield micro


def _monitor(
    model: nn.Module, source: Source, run: RunConfig, reading: Reading, world: World
) -> float:
    """kNN at the means, measured by the first process and told to all."""
    found = 0.0
    if world.first:
        x, y = features(model, source, "train", reading)
        found = monitor_knn(x, y, run.monitor_images)
    return world.mean(torch.tensor(found * world.size, device=world.device)).item()
