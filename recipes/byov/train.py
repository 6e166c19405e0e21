"""The training loop of BYOV, of deterministic BYOL and of the supervised baseline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from bayesify import kl_schedule
from bayesify.optim import warmup_cosine
from bayesify.signals import Signals, waiting_signals

from .config import BYOVConfig, RunConfig
from .data.training import batches_of, open_images, steps_of_epoch
from .evaluation.features import Reading, refresh_batchnorm_
from .export import Results, check_files, export
from .optimizer import set_lr
from .runtime.distributed import World, alone, joined
from .step import Stepper
from .train_log import TrainLog, Watcher, checkpoint_to_resume


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


def train(
    config: BYOVConfig, run: RunConfig, *, resume: bool = False, watcher: Watcher | None = None
) -> Outcome:
    """Train an encoder without labels; write log, checkpoints and results into ``run.out``.

    The draw of the weights, the views and dropout are functions of (seed, step, index) alone,
    process r or micro-batch r having the index r. Ctrl-C, SIGTERM and SIGHUP end the run after the
    present step with a checkpoint. Torch's global random state is as before.

    Args:
        config: What is trained.
        run: Where and how.
        resume: Go on from the newest checkpoint in ``run.out``, if there is one.
        watcher: What to tell whom.

    Raises:
        ArgumentError: Something in the configs cannot work with this data or these processes.
        CheckpointError: ``run.out`` holds a checkpoint of another run, or one and no ``resume``; is
            in use by another run; or a result could not be written there.
        DataError: The data cannot be read.
        BayesifyError: The loss is not finite any more, or the embeddings have collapsed.
    """
    watcher = watcher or Watcher()
    with joined(run.device) as world, waiting_signals() as signals:
        devices = [world.device] if world.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), alone(run.out, world):
            check_files(run.out)
            return _train(config, run, resume, watcher, world, signals)


def _train(
    config: BYOVConfig,
    run: RunConfig,
    resume: bool,
    watcher: Watcher,
    world: World,
    signals: Signals,
) -> Outcome:
    # What is trained on
    source = open_images(config, run).to(world.device)
    steps_per_epoch = steps_of_epoch(source, config, run, world)
    steps = config.epochs * steps_per_epoch
    resumed = checkpoint_to_resume(run.out, resume)

    # What is trained
    torch.manual_seed(config.seed)
    stepper = Stepper(
        config, run, world, num_classes=source.num_classes, num_images=source.num_images
    )

    # What changes from step to step, each a function of the step alone
    warmup = round(config.warmup_epochs * steps_per_epoch)
    rates = [warmup_cosine(step, warmup, steps) for step in range(steps)]
    tau = kl_schedule("cosine", config.tau_start, config.tau_end, steps)  # of [BYOL], section 3.2
    beta = kl_schedule(config.beta_shape, config.beta_start, config.beta_end, steps)

    log = TrainLog(config, run, world, watcher, stepper, source, steps_per_epoch)
    start = log.begin(resumed, rates)
    batches = batches_of(source, config, run, world, steps_per_epoch, start)
    for step, micro_batches in zip(range(start, steps), batches, strict=True):
        set_lr(stepper.optimizer, rates[step])
        gradients = stepper.backward(step, micro_batches, beta(step), norm_wanted=log.is_due(step))
        log.check(step, gradients)
        stepper.advance(tau(step))
        log.add(step, gradients, rates[step], beta(step), tau(step), warming_up=step < warmup)
        stopped = log.end_step(step, signals)
        if stopped and step + 1 < steps:
            return Outcome(step + 1, steps, log.newest, None)

    student, teacher = stepper.full_models()
    reading = Reading(world.device, run.amp, run.workers)
    if config.bayesian and world.first:
        refresh_batchnorm_(student, config, source, reading)
    results = export(config, run, student, teacher, stepper.probe, source, reading, world)
    log.end(results.numbers)
    return Outcome(steps, steps, log.newest, results)
