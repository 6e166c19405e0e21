"""One optimizer step: what is trained, its gradients, and the move that they lead to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesify import ArgumentError, kl_divergence, kl_scale, noise_budget, one_draw
from bayesify.posterior import full_tensor

from .config import BYOVConfig, RunConfig
from .data.batches import Views
from .model import Student, batch_optimal, build_student, convert_
from .objective import byol_loss, negatives_loss
from .optimizer import make_optimizer
from .runtime.checkpoint import copy_into
from .runtime.distributed import World
from .runtime.fsdp import gathered_state, placed_state, shard_
from .runtime.monitors import initial_logvars
from .runtime.online_probe import OnlineProbe
from .runtime.seeds import Stream, seed_of
from .teacher import Teacher, set_prior_of


@dataclass(frozen=True)
class Gradients:
    """What a step computed before it moved anything.

    Args:
        parts: Means over the micro-batches of this process: loss, kl, and those of the probe.
        seen: Features and projections of the last micro-batch.
        norm: Of all gradients before clipping; 0 where nobody wants it.
    """

    parts: dict[str, Tensor]
    seen: dict[str, Tensor]
    norm: Tensor


class Stepper:
    """Student, teacher, optimizer and online probe of a run, and how they take one step.

    The student draws its weights once for each micro-batch, by a seed that is a function of (seed,
    step, index) alone, process r or micro-batch r having the index r. Random numbers of the
    initial weights come from torch's global generator.

    Args:
        config: What is trained.
        run: How.
        world: Of the processes.
        num_classes: Of the labels; 0 without any.
        num_images: Images in an epoch.

    Raises:
        ArgumentError: A setting does not fit the encoder or the processes.
    """

    def __init__(
        self,
        config: BYOVConfig,
        run: RunConfig,
        world: World,
        *,
        num_classes: int,
        num_images: int,
    ) -> None:
        self.config, self.run, self.world = config, run, world
        self._num_classes = num_classes
        self.model, self.teacher = self._built()
        self.initial_logvar = initial_logvars(self.model) if config.bayesian else {}
        if run.shard:
            shard_([self.model], world)
            if self.teacher is not None:
                self.teacher.shard_(world)
        set_prior_of(config, self.model, self.teacher)
        self.optimizer = make_optimizer(self.model, config)
        self.probe: OnlineProbe | None = None
        if self.teacher is not None and num_classes:
            self.probe = OnlineProbe(_width(self.model), num_classes, device=world.device)
        self._called = self._parallel()
        compiled = run.compile and self.teacher is not None
        self._targets: Any = torch.compile(self.teacher) if compiled else self.teacher
        self._reduced: dict[str, Any] = {"kl_reduction": config.kl_reduction}
        if config.kl_reduction == "num_data":
            self._reduced["num_data"] = num_images
        self.kl_scale = kl_scale(self.model, **self._reduced) if config.bayesian else 0.0

    def _built(self) -> tuple[nn.Module, Teacher | None]:
        """Student and teacher; the teacher is a copy of the student before it is Bayesian."""
        config, world = self.config, self.world
        model = build_student(config, self._num_classes or None)
        if self.run.checkpoint_activations:
            _encoder(model).set_grad_checkpointing(True)
        if self.run.sync_batchnorm and world.size > 1 and world.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        teacher = None
        if isinstance(model, Student):
            teacher = Teacher(model, second_moment=config.prior == "teacher").to(world.device)
        return convert_(model, config).to(world.device).train(), teacher

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint must hold, whole; every process must call it."""
        found = {
            "student": self.model.state_dict(),
            "teacher": None if self.teacher is None else self.teacher.tensors(),
            "optimizer": self.optimizer.state_dict(),
            "probe": None if self.probe is None else self.probe.state_dict(),
            "initial_logvar": self.initial_logvar,
        }
        return gathered_state(found, keep=self.world.first) if self.run.shard else found

    def load_state(self, saved: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave.

        Raises:
            CheckpointError: A name or a shape differs.
        """
        self.initial_logvar = saved.get("initial_logvar", self.initial_logvar)
        copy_into(self.model.state_dict(), saved["student"])
        self.optimizer.load_state_dict(placed_state(saved["optimizer"], self.optimizer))
        if self.teacher is not None:
            copy_into(self.teacher.tensors(), saved["teacher"])
        if self.probe is not None:
            self.probe.load_state_dict(saved["probe"])

    def full_models(self) -> tuple[nn.Module, Teacher | None]:
        """Student and teacher as one process can use them alone; every process must call it.

        Sharded ones are put together in the first process, which then holds them as well; the
        others get their shards.
        """
        if not self.run.shard:
            return self.model, self.teacher
        saved = self.state()
        if not self.world.first:
            return self.model, self.teacher
        with torch.random.fork_rng():
            model, teacher = self._built()
        copy_into(model.state_dict(), saved["student"])
        if teacher is not None:
            copy_into(teacher.tensors(), saved["teacher"])
        set_prior_of(self.config, model, teacher)
        return model, teacher

    def budget(self, beta: float) -> float:
        """The noise budget beta * s * P / 2, in units of the loss."""
        return noise_budget(self.model, beta, **self._reduced)

    def backward(
        self, step: int, micro_batches: Sequence[Views], beta: float, *, norm_wanted: bool
    ) -> Gradients:
        """The gradients of a step; nothing but them, BatchNorm's buffers and the probe changes."""
        config, world = self.config, self.world
        parts: dict[str, Tensor] = {}
        seen: dict[str, Tensor] = {}
        count = len(micro_batches)
        for micro, (view1, view2, labels) in enumerate(micro_batches):
            seed = seed_of(Stream.STEP, config.seed, step, micro * world.size + world.rank)
            torch.manual_seed(seed)
            with self._synchronised(micro == count - 1):
                drawn = one_draw(self.model, seed) if config.bayesian else nullcontext()
                with drawn, torch.autocast(world.device.type, torch.bfloat16, enabled=self.run.amp):
                    data_loss, seen = self._loss(view1, view2, labels)
                kl = kl_divergence(self.model) if config.bayesian else data_loss.new_zeros(())
                ((data_loss + beta * self.kl_scale * kl) / count).backward()
            for name, value in (("loss", data_loss), ("kl", kl)):
                parts[name] = parts.get(name, 0.0) + value.detach().float() / count
            if self.probe is not None and labels is not None:
                found = self.probe.step(seen["features"], labels)
                parts["probe_loss"], parts["probe_accuracy"] = found
        return Gradients(parts, seen, self._clip(norm_wanted))

    def advance(self, tau: float) -> None:
        """Move student and teacher by the gradients at hand, and forget these."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.teacher is not None:
            self.teacher.update(self.model, tau)

    def _parallel(self) -> nn.Module:
        """What is called in a step: the model, compiled or inside DistributedDataParallel."""
        called: Any = torch.compile(self.model) if self.run.compile else self.model
        if self.world.size > 1 and not self.run.shard:
            called = nn.parallel.DistributedDataParallel(called, gradient_as_bucket_view=True)
        return called  # type: ignore[no-any-return]

    def _synchronised(self, last: bool) -> Any:
        """Processes exchange gradients once a step, in the last micro-batch."""
        if self.run.shard:
            sharded: Any = self.model
            sharded.set_requires_gradient_sync(last)
        elif isinstance(self._called, nn.parallel.DistributedDataParallel) and not last:
            return self._called.no_sync()
        return nullcontext()

    def _loss(
        self, view1: Tensor, view2: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch at the present draw, and what is looked at beside it."""
        config = self.config
        if self.teacher is None:
            if labels is None:
                raise ArgumentError("objective 'supervised' needs labels, which this data has not.")
            return F.cross_entropy(self._called(view1).float(), labels), {}
        target1, target2 = self._targets(view1, view2)
        first, second = self._called(view1, view2)
        q1, q2 = first.prediction, second.prediction
        if config.predictor == "batch-optimal":
            q1 = batch_optimal(first.projection, target2)
            q2 = batch_optimal(second.projection, target1)
        loss = byol_loss(q1, q2, target1, target2)
        if config.negatives_weight:
            loss = loss + config.negatives_weight * negatives_loss(q1, q2, target1, target2)
        return loss, {"features": first.features.detach(), "projection": first.projection}

    def _clip(self, wanted: bool) -> Tensor:
        """Scale the gradients down to a norm; give the norm before, or 0 where nobody wants it."""
        trained = [p for p in self.model.parameters() if p.grad is not None]
        if self.config.clip_norm > 0:
            return full_tensor(nn.utils.clip_grad_norm_(trained, self.config.clip_norm))
        if wanted:
            grads = [p.grad for p in trained if p.grad is not None]
            return full_tensor(nn.utils.get_total_norm(grads))
        return torch.zeros((), device=self.world.device)


def _encoder(model: nn.Module) -> Any:
    return model.encoder if isinstance(model, Student) else model


def _width(model: nn.Module) -> int:
    encoder = _encoder(model)
    return int(getattr(encoder, "head_hidden_size", None) or encoder.num_features)
