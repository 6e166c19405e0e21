"""The training loop of BYOV, of deterministic BYOL and of the supervised twin."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesify import (
    ArgumentError,
    BayesifyError,
    input_config,
    kl_divergence,
    kl_scale,
    kl_schedule,
    noise_budget,
    one_draw,
    posteriors,
)

from . import checkpoint
from .augment import TwoViews, WorkerViews, view_configs
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
from .measure import Reading, features, monitor_knn, refresh_batchnorm_, thinned
from .model import Student, batch_optimal, build_encoder, build_student, convert_
from .objective import byol_loss, negatives_loss
from .optimizer import lr_factor, make_optimizer, set_lr
from .parallel import World, joined
from .probe import OnlineProbe
from .stopping import COLLAPSED, check_finite, collapse_message, interruptible
from .teacher import TauSchedule, Teacher, set_prior_of

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

    # What is trained: the teacher is a copy of the student before it becomes Bayesian
    torch.manual_seed(config.seed)
    model = build_student(config, source.num_classes or None)
    if run.checkpoint_activations:
        _encoder(model).set_grad_checkpointing(True)
    if run.sync_batchnorm and world.size > 1 and world.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    teacher: Teacher | None = None
    if isinstance(model, Student):
        teacher = Teacher(model, second_moment=config.prior == "teacher")
        teacher.to(world.device)
    convert_(model, config).to(world.device).train()
    set_prior_of(config, model, teacher)
    optimizer = make_optimizer(model, config)
    probe = None
    if teacher is not None and source.num_classes:
        probe = OnlineProbe(_width(model), source.num_classes, device=world.device)
    stepped = _parallel(model, run, world)

    # What is measured on the way: some of the training images, at the means
    reading = Reading(world.device, run.amp, run.workers)
    monitored = thinned(source, MONITORED)

    # What changes from step to step, each a function of the step alone
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    tau = TauSchedule(config.tau_start, config.tau_end, steps)
    beta = kl_schedule(config.beta_shape, config.beta_start, config.beta_end, steps)
    reduced: dict[str, Any] = {"kl_reduction": config.kl_reduction}
    if config.kl_reduction == "num_data":
        reduced["num_data"] = source.num_images
    scale = kl_scale(model, **reduced) if config.bayesian else 0.0

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
            "student": model.state_dict(),
            "teacher": None if teacher is None else teacher.tensors(),
            "optimizer": optimizer.state_dict(),
            "probe": None if probe is None else probe.state_dict(),
            "layers": layers,
            "alarms": alarms,
            "best": best,
        }

    def save(step: int) -> Path:
        path = checkpoint.path_of(folder, step)
        if world.first:
            checkpoint.write(path, state(step))
            checkpoint.tidy(folder, keep_last=run.keep_last, best=best["step"])
        world.wait()
        return path

    start = 0
    if started_from is not None:
        saved = checkpoint.read(started_from)
        checkpoint.check_same(started_from, saved["identity"], identity)
        start, alarms, best = saved["step"], saved["alarms"], saved["best"]
        model.load_state_dict(saved["student"])
        optimizer.load_state_dict(saved["optimizer"])
        layers = saved["layers"]
        if teacher is not None:
            checkpoint.copy_into(teacher.tensors(), saved["teacher"])
        if probe is not None:
            probe.load_state_dict(saved["probe"])
        watcher.say(f"Going on from {started_from}, step {start:,} of {steps:,}.")
    run.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(run.out / "log.jsonl" if world.first else None)
    journal.cut(start)
    if start == 0:
        journal.add("start", 0, {"config": config.to_json(), "steps": steps, "kl_scale": scale})
    if config.bayesian:
        budget = noise_budget(model, config.beta_end, **reduced)
        watcher.say(
            f"KL of {_weights(model):,} weights: s = {scale:.3g} ({config.kl_reduction}), beta "
            f"{config.beta_start:g} to {config.beta_end:g}, noise budget beta*s*P/2 = {budget:.3g} "
            "in units of the loss"
        )

    newest = started_from
    travel = sum(lr_factor(s, warmup_steps, steps) for s in range(start))
    pending: list[tuple[int, Tensor]] = []
    clock, images_since = time.perf_counter(), 0
    batches = _batches(source, config, run, world, steps_per_epoch, start)
    for step, micro_batches in zip(range(start, steps), batches, strict=True):
        epoch = step // steps_per_epoch
        factor = lr_factor(step, warmup_steps, steps)
        travel += factor
        set_lr(optimizer, factor)
        weight = beta(step)
        done = step + 1
        logged = done % run.log_every == 0 or done == steps
        parts: dict[str, Tensor] = {}
        for micro, (view1, view2, labels) in enumerate(micro_batches):
            index = micro * world.size + world.rank
            key = key_of(config.seed, step, index)
            torch.manual_seed(key)
            last = micro == run.accumulate - 1
            with _synchronised(stepped, last):
                drawn = one_draw(model, key) if config.bayesian else nullcontext()
                with drawn, torch.autocast(world.device.type, torch.bfloat16, enabled=run.amp):
                    data_loss, seen = _loss(stepped, teacher, config, view1, view2, labels)
                kl = kl_divergence(model) if config.bayesian else data_loss.new_zeros(())
                ((data_loss + weight * scale * kl) / run.accumulate).backward()
            for name, value in (("loss", data_loss), ("kl", kl)):
                parts[name] = parts.get(name, 0.0) + value.detach().float() / run.accumulate
            if probe is not None and labels is not None:
                parts["probe_loss"], parts["probe_accuracy"] = probe.step(seen["features"], labels)
            images_since += len(view1) * world.size

        norm = _clip(model, config.clip_norm, wanted=logged)
        pending.append((step, parts["loss"] + norm * 0.0))
        if world.device.type == "cpu" or logged:
            check_finite(pending, newest, optimizer)
            pending.clear()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if teacher is not None:
            teacher.update(model, tau(step))

        if logged:
            values = {name: world.mean(value).item() for name, value in parts.items()}
            elapsed, clock = time.perf_counter() - clock, time.perf_counter()
            values |= {
                "epoch": epoch,
                "beta": weight,
                "lr": config.peak_lr * factor,
                "grad_norm": norm.item(),
                "images_per_second": images_since / elapsed,
            }
            images_since = 0
            if teacher is not None:
                spread = embedding_std(seen["projection"])
                rank = effective_rank(seen["projection"])
                values |= {"tau": tau(step), "std": spread, "effective_rank": rank}
                alarmed = step >= warmup_steps and bool(collapse_alarms(std=spread, rank=rank))
                alarms = alarms + 1 if alarmed else 0
            if config.bayesian:
                logvar_lr = config.peak_lr * config.logvar_lr_ratio
                health = posterior_health(model, initial_logvar=config.logvar_init)
                layers.append(health.layers)
                values |= {
                    "logvar_lr": logvar_lr * factor,
                    "noise_budget": noise_budget(model, weight, **reduced),
                    "logvar_reach": logvar_lr * travel,  # the most that Adam can have moved it
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
                report["knn"] = _monitor(model, monitored, run, reading, world)
                if best["knn"] is None or report["knn"] > best["knn"]:
                    best = {"knn": report["knn"], "step": done}
            journal.add("epoch", done, report)
            watcher.on_epoch(done, report)
        due = epoch_ends and finished % run.checkpoint_every == 0
        stopped = world.any(stop_asked())
        if due or done == steps or stopped or best["step"] == done:
            check_finite(pending, newest, optimizer)
            pending.clear()
            newest = save(done)
        if stopped and done < steps:
            watcher.say(f"Stopped at step {done:,} of {steps:,}; the checkpoint is {newest}.")
            return Outcome(done, steps, newest, None)

    if config.bayesian:
        refresh_batchnorm_(model, source, reading)
    results = export(config, run, model, teacher, probe, source, reading, world)
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


def key_of(seed: int, step: int, index: int) -> int:
    """The seed of all that is random in one micro-batch of one step, in [0, 2**63)."""
    digest = hashlib.blake2b(f"{seed}/{step}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


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


def _encoder(model: nn.Module) -> Any:
    return model.encoder if isinstance(model, Student) else model


def _width(model: nn.Module) -> int:
    encoder = _encoder(model)
    return int(getattr(encoder, "head_hidden_size", None) or encoder.num_features)


def _weights(model: nn.Module) -> int:
    return sum(posterior.mean.numel() for posterior in posteriors(model))


def _parallel(model: nn.Module, run: RunConfig, world: World) -> nn.Module:
    """What is called in a step: the model, compiled or inside DistributedDataParallel."""
    called: Any = torch.compile(model) if run.compile else model
    if world.size > 1:
        called = nn.parallel.DistributedDataParallel(called, gradient_as_bucket_view=True)
    return called  # type: ignore[no-any-return]


def _synchronised(called: nn.Module, last: bool) -> Any:
    """Processes exchange gradients once a step, in the last micro-batch."""
    if isinstance(called, nn.parallel.DistributedDataParallel) and not last:
        return called.no_sync()
    return nullcontext()


def _batches(
    source: Source,
    config: BYOVConfig,
    run: RunConfig,
    world: World,
    steps_per_epoch: int,
    start: int,
) -> Iterator[list[Views]]:
    """The micro-batches of this process, step by step from ``start`` on."""
    configs = view_configs(
        config.augmentation,
        size=config.image_size,
        mean=source.mean,
        std=source.std,
        grey=source.grey,
        min_crop=config.min_crop,
        strength=config.augmentation_strength,
    )
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


def _loss(
    called: nn.Module,
    teacher: Teacher | None,
    config: BYOVConfig,
    view1: Tensor,
    view2: Tensor,
    labels: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro-batch at the present draw, and what is looked at beside it."""
    if teacher is None:
        if labels is None:
            raise ArgumentError("objective 'supervised' needs labels, which this data has not.")
        return F.cross_entropy(called(view1).float(), labels), {}
    target1, target2 = teacher(view1, view2)
    first, second = called(view1, view2)
    q1, q2 = first.prediction, second.prediction
    if config.predictor == "batch-optimal":
        q1 = batch_optimal(first.projection, target2)
        q2 = batch_optimal(second.projection, target1)
    loss = byol_loss(q1, q2, target1, target2)
    if config.negatives_weight:
        loss = loss + config.negatives_weight * negatives_loss(q1, q2, target1, target2)
    return loss, {"features": first.features.detach(), "projection": first.projection}


def _clip(model: nn.Module, most: float, *, wanted: bool) -> Tensor:
    """Scale the gradients down to a norm; give the norm before, or 0 where nobody wants it."""
    trained = [p for p in model.parameters() if p.grad is not None]
    if most > 0:
        return nn.utils.clip_grad_norm_(trained, most)
    if wanted:
        return nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    return torch.zeros((), device=trained[0].device)


def _monitor(
    model: nn.Module, source: Source, run: RunConfig, reading: Reading, world: World
) -> float:
    """kNN at the means, measured by the first process and told to all."""
    found = 0.0
    if world.first:
        x, y = features(model, source, "train", reading)
        found = monitor_knn(x, y, run.monitor_images)
    return world.mean(torch.tensor(found * world.size, device=world.device)).item()
