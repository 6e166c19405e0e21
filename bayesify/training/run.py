"""One fit from its first step to its last, with a state that can be kept and resumed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..divergence import kl_divergence
from ..errors import ArgumentError, BayesifyError
from ..inference import Given
from ..models import InputConfig
from ..objective import kl_scale, kl_schedule, noise_budget
from ..optim import check_optimizer, likelihood_groups, posterior_groups, warmup_cosine
from ..own_lists import trained_parameters
from ..posterior import is_bayesian, sites
from ..pruning import keep_pruned_
from ..settings.fields import plain
from ..settings.training import FitSettings, Reading
from ..signals import Signals
from ..storage import left_as_it_was
from ..storage.layout import LIKELIHOOD
from ..storage.state import ADAM, check_moments, write_state
from .averaging import TailAverage
from .batches import Data, config_for
from .diagnosis import not_finite_in
from .examples import Batch, Inputs, read_batch
from .feeds import feed_of
from .holdout import held_out_loss, likelihood_tensors, named_tensors, put_back, snapshot
from .progress import FitResult, Progress, travel
from .randomness import RandomState, current, restore, torch_state
from .resume import FIT, Interrupted, check_names, check_same, check_values, like
from .running_statistics import RunningStatistics
from .task import Task

_SAVE_EVERY = 600.0
"""Seconds after which the state is written also within an epoch."""


class Run:
    """A fit and its state: a resumed one starts from what :meth:`state` gave."""

    def __init__(
        self,
        model: nn.Module,
        train: Data | DataLoader[Any],
        settings: FitSettings,
        task: Task,
        device: torch.device,
        model_config: InputConfig | None,
        reading: Reading,
        path: Path | None,
        unreadable: list[int],
        on_start: Callable[[str], None],
        on_step: Callable[[Progress], None] | None,
        inputs: Inputs | None,
        num_data: int | None,
    ) -> None:
        self.model, self.settings, self.task = model, settings, task
        self.device, self.path, self.on_step = device, path, on_step
        self.on_start, self.inputs = on_start, inputs
        self.unreadable = unreadable
        self.feed, self.held_batches = feed_of(
            train, settings, reading, num_data, config_for(train, model, model_config), device
        )
        self.num_data = self.feed.num_data
        self.epoch_steps = self.feed.batches // settings.accumulate
        self.steps = settings.epochs * self.epoch_steps

        model.to(device)
        self.bayesian = is_bayesian(model)
        scaled_by = self.num_data if settings.kl_reduction == "num_data" else None
        self.scale: float | None = None
        self.budget: float | None = None
        """In nats an example."""
        if self.bayesian:
            keep_pruned_(model)
            reduction = settings.kl_reduction
            self.scale = kl_scale(model, num_data=scaled_by, kl_reduction=reduction)
            self.budget = noise_budget(
                model, settings.kl_weight, num_data=scaled_by, kl_reduction=reduction
            )
        self.parameters = trained_parameters(model)
        self.optimizer = self._optimizer()
        last = round(settings.average * self.steps)
        self.average = TailAverage(self.parameters, self.steps - last)
        rising = max(1, round(settings.kl_warmup * self.steps))
        self.beta = kl_schedule(settings.kl_shape, 0.0, settings.kl_weight, rising)
        if settings.kl_warmup == 0.0:
            self.beta = kl_schedule("constant", settings.kl_weight, settings.kl_weight, 1)
        self.statistics = RunningStatistics(model)
        self.start = [site.logvar.detach().clone() for site in sites(model)]
        self.step = 0
        self.bound = 0.0
        self.epoch_loss = 0.0
        self.losses: list[float] = []
        self.kls: list[float] = []
        self.held_losses: list[float] = []
        self.best: dict[str, Tensor] = {}
        self.earlier_seconds = 0.0
        self.started = self.saved_at = time.perf_counter()
        if task.settled:
            self._begin(None)

    def _optimizer(self) -> torch.optim.Optimizer:
        settings = self.settings
        fused = self.device.type in ("cpu", "cuda")  # one kernel for all parameters
        if not self.bayesian:
            return torch.optim.AdamW(
                self.parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=fused
            )
        groups = posterior_groups(
            self.model, settings.lr, settings.logvar_rate, settings.weight_decay
        )
        return torch.optim.AdamW(groups, fused=fused)

    def _begin(self, guessed: str | None) -> None:
        """What waits for the first output: the noise that is learnt, and what is said of it all."""
        for group in likelihood_groups(self.model, self.settings.lr):
            self.optimizer.add_param_group(group)
            self.parameters += group["params"]
            self.average.parameters += group["params"]
        if self.bayesian:
            check_optimizer(self.model, self.optimizer)
        lines = ([guessed[:1].upper() + guessed[1:]] if guessed else []) + (
            [self._line_on_kl()] if self.bayesian else []
        )
        if lines:
            self.on_start(". ".join(lines))

    def _line_on_kl(self) -> str:
        weights = sum(site.weights for site in sites(self.model))
        settings = self.settings
        assert self.budget is not None
        targets, many = self.task.per_example, ""
        if targets != 1:
            many = f" a target ({targets:.4g} targets an example)"
        return (
            f"KL of {weights:,} weights: s = {self.scale:.3g} ({settings.kl_reduction}, "
            f"N = {self.num_data:,}), beta = {settings.kl_weight:g}, noise budget beta*s*P/2 = "
            f"{self.budget / targets:.3g} nats{many}"
        )

    # -- the loop ------------------------------------------------------------------------------

    def train(self, signals: Signals) -> None:
        while self.step < self.steps and not self._out_of_patience():
            epoch, inside = divmod(self.step, self.epoch_steps)
            batches = self.feed.epoch(epoch, inside * self.settings.accumulate)
            self.model.train()
            if self.settings.freeze_batchnorm:
                self.statistics.freeze()
            before = self.step
            for group in self._grouped(batches):
                self._take_step(group)
                if self.step % self.epoch_steps == 0:
                    with self.average.in_place():
                        self._end_epoch()
                if signals.requested:
                    self._interrupt()
                if time.perf_counter() - self.saved_at > _SAVE_EVERY:
                    self.save()
            if self.step == before:
                raise ArgumentError(
                    "The data loader gave too few batches for one step of an epoch."
                )
            self.save()

    def _grouped(self, batches: Iterator[Any]) -> Iterator[list[Batch]]:
        """The batches of one step at a time."""
        group = []
        for batch in batches:
            group.append(read_batch(batch, self.inputs))
            if len(group) == self.settings.accumulate:
                yield group
                group = []

    def _take_step(self, group: list[Batch]) -> None:
        settings, model = self.settings, self.model
        beta = self.beta(self.step)
        rising = max(1, round(settings.warmup * self.steps))
        factor = warmup_cosine(self.step, rising, self.steps)
        for held in self.optimizer.param_groups:
            held["lr"] = factor * self._highest(held)
        before = torch_state(self.device)
        self.statistics.keep()

        self.optimizer.zero_grad()
        draws, full = settings.draws_per_step, self.feed.batch_size or group[0].size
        self.feed.batch_size = full
        # a smaller batch has its share of a step: else its examples would weigh more
        share = sum(batch.size for batch in group) / (full * len(group))
        divisors = [
            len(group) * draws * (1 if batch.size == full else full / batch.size)
            for batch in group
            for _ in range(draws)
        ]
        data_loss = torch.zeros((), device=self.device)
        kl = torch.zeros((), device=self.device)
        for number, (part, divisor) in enumerate(
            zip(self._passes(group), divisors, strict=True), 1
        ):
            part = part / divisor
            data_loss = data_loss + part.detach()
            if number == len(divisors) and self.scale is not None and beta * self.scale > 0.0:
                weight = beta * self.scale * share
                term = weight * kl_divergence(model)  # beside the last of the draws
                kl = term.detach()
                part = part + term.to(part.device)
            part.backward()
        for batch in group:
            self.task.count(batch)
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        values = torch.stack([v.to(self.device).double() for v in (data_loss, kl, norm)]).tolist()
        if not all(map(math.isfinite, values)):
            self._stop(values, group, before)
        # gradients of what is shown: of a loss for each target
        limit = settings.max_grad_norm * self.task.per_example
        if math.isfinite(limit):
            nn.utils.clip_grads_with_norm_(self.parameters, limit, norm)
        self.optimizer.step()

        lr = self.optimizer.param_groups[0]["lr"]
        self.bound += self._posterior_groups()[-1]["lr"]
        loss = values[0] / (share * self.task.per_example)
        self.epoch_loss += loss / self.epoch_steps
        epoch = self.step // self.epoch_steps
        self.step += 1
        self.average.look(self.step)
        if self.on_step is not None:
            self.on_step(Progress(self.step, self.steps, epoch, loss, beta, lr))

    def _passes(self, group: list[Batch]) -> Iterator[Tensor]:
        """The loss of each batch at each draw; the weights are drawn when it is asked for."""
        for batch in group:
            given = Given(*batch.arguments(self.device))
            for _ in range(self.settings.draws_per_step):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp):
                    outputs = given.call(self.model)
                    if not self.task.settled:
                        self._begin(self.task.settle(outputs, batch))
                    loss = self.task(outputs, batch, self.device)
                yield loss

    def _posterior_groups(self) -> list[dict[str, Any]]:
        return [g for g in self.optimizer.param_groups if g.get("name") != "likelihood"]

    def _highest(self, group: dict[str, Any]) -> float:
        return self.settings.logvar_rate if group.get("name") == "logvars" else self.settings.lr

    def _end_epoch(self) -> None:
        self.task.end_of_epoch()
        self.losses.append(self.epoch_loss)
        self.epoch_loss = 0.0
        if self.bayesian:
            with torch.no_grad():
                self.kls.append(float(kl_divergence(self.model)))
        if self.held_batches is not None:
            settings = self.settings
            found = held_out_loss(
                self.model, self.held_batches, self.task.measure, self.device, settings.amp,
                settings.seed, self.inputs,
            )  # fmt: skip
            if found < min(self.held_losses, default=math.inf) or not self.best:
                self.best = snapshot(self.model)
            self.held_losses.append(found)

    def _best_epoch(self) -> int | None:
        """From 1; the first of equal ones."""
        held = self.held_losses
        return held.index(min(held)) + 1 if held else None

    def _out_of_patience(self) -> bool:
        best, patience = self._best_epoch(), self.settings.patience
        return best is not None and patience is not None and len(self.losses) - best >= patience

    def finish(self) -> FitResult:
        self.average.put()
        if self.best:
            put_back(self.model, self.best)
        if not self.settings.freeze_batchnorm:
            batches = (read_batch(b, self.inputs) for b in self.feed.epoch(self.settings.epochs))
            calls = (batch.arguments(self.device) for batch in batches)
            averaged = bool(self.average.mean)
            self.statistics.gather(calls, bayesian=self.bayesian, averaged=averaged)
        self.model.eval()
        logvars = None
        if self.bayesian:
            end = [site.logvar.detach() for site in sites(self.model)]
            trained = any(g.get("name") == "logvars" for g in self.optimizer.param_groups)
            logvars = travel(self.start, end, self.bound if trained else 0.0)
        return FitResult(
            losses=tuple(self.losses),
            kl=tuple(self.kls),
            steps=self.step,
            seconds=self._seconds(),
            num_data=self.num_data,
            kl_scale=self.scale,
            noise_budget=None if self.budget is None else self.budget / self.task.per_example,
            logvars=logvars,
            holdout_losses=tuple(self.held_losses),
            best_epoch=self._best_epoch(),
            unreadable=len(self.unreadable),
        )

    # -- what can go wrong ----------------------------------------------------------------------

    def _stop(
        self,
        values: list[float],
        group: list[Batch],
        before: dict[str, Tensor],
    ) -> None:
        """Leave the model as it was before the step, and say where the bad number came from."""
        loss, kl, norm = values
        again = current(self.device)._replace(tensors=before)
        restore(again, self.device)

        def run() -> None:
            for _ in self._passes(group):
                pass

        inputs = (tensor for batch in group for tensor in batch.inputs)
        where = not_finite_in(self.model, inputs, run)
        if where is None:
            where = "the model's outputs are finite, so look at the loss and the targets"
            if not math.isfinite(kl):
                where = "the KL divergence is not finite, so look at the prior"
        self.statistics.put_back()
        restore(again, self.device)
        self.optimizer.zero_grad()
        self.model.eval()
        self.save()
        resumed = "" if self.path is None else f", and so does {self.path}: resume with a lower lr"
        raise BayesifyError(
            f"fit stopped at step {self.step + 1} of {self.steps}: loss {loss:.4g}, with the KL "
            f"{loss + kl:.4g}, gradient norm {norm:.4g}; {where}. The model holds the weights "
            f"before that step{resumed}. Lower lr (now {self.settings.lr:g}) or logvar_lr, start "
            "from a smaller sigma, or look for NaN in the data."
        )

    def _interrupt(self) -> None:
        self.save()
        self.model.eval()
        raise Interrupted(
            f"Interrupted after step {self.step:,} of {self.steps:,}. The fit goes on from "
            f"{self.path} with resume=True (--resume)."
        )

    # -- the state ------------------------------------------------------------------------------

    def save(self) -> None:
        if self.path is not None:
            write_state(self.path, self.state(), FIT)
            self.saved_at = time.perf_counter()

    def state(self) -> dict[str, Any]:
        random = current(self.device)
        return {
            "settings": self._identity(),
            "step": self.step,
            "bound": self.bound,
            "epoch_loss": self.epoch_loss,
            "losses": self.losses,
            "kl": self.kls,
            "holdout_losses": self.held_losses,
            "seconds": self._seconds(),
            "unreadable": self.unreadable,
            "model": self._named(),
            "best": self.best,
            "start": self.start,
            "average": self.average.mean,
            "optimizer": self.optimizer.state_dict()["state"],
            "likelihood": likelihood_tensors(self.model) if self.task.settled else {},
            "task": self.task.state(),
            "random": {**random.others, "torch": random.tensors},
        }

    def check_resumable(self, saved: dict[str, Any]) -> None:
        assert self.path is not None
        check_values(self.path, saved, self.steps)
        check_same(self.path, saved["settings"], self._identity())
        check_names(self.path, saved["model"], self._named())
        best = {k: v for k, v in saved["best"].items() if not k.startswith(LIKELIHOOD)}
        if best:
            check_names(self.path, best, self._named())

    def load(self, saved: dict[str, Any]) -> None:
        assert self.path is not None
        try:
            with left_as_it_was(self.model):
                self._load(saved)
        except Exception as error:  # of torch, of its generators, of Python's and numpy's
            raise FIT.damaged(self.path, error) from error

    def _load(self, saved: dict[str, Any]) -> None:
        assert self.path is not None
        put_back(self.model, saved["model"])
        if "task" in saved and not self.task.settled:  # else a state of before
            self.task.load(saved["task"], saved["likelihood"], self.device)
            self._begin(None)
            if saved["best"]:
                check_names(self.path, saved["best"], named_tensors(self.model))
        self.best = {k: v.to(self.device) for k, v in saved["best"].items()}
        self.start = [like(own, v) for own, v in zip(self.start, saved["start"], strict=True)]
        averaged = zip(self.average.parameters, saved["average"], strict=bool(saved["average"]))
        self.average.mean = [like(own, v).to(self.device) for own, v in averaged]
        stepped = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, moments in saved["optimizer"].items():
            check_moments(stepped[index], moments, ADAM)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": saved["optimizer"], "param_groups": groups})
        self.step, self.bound, self.epoch_loss = saved["step"], saved["bound"], saved["epoch_loss"]
        self.task.labels.first_epoch = self.step == 0
        self.losses, self.kls = saved["losses"], saved["kl"]
        self.held_losses = saved["holdout_losses"]
        self.earlier_seconds = saved["seconds"]
        restore(RandomState(saved["random"]["torch"], saved["random"]), self.device)

    def _identity(self) -> dict[str, Any]:
        """What the fit is, for a comparison with the one in the file."""
        infinite = math.isinf(self.settings.max_grad_norm)
        return {
            **plain(self.settings),
            "max_grad_norm": None if infinite else self.settings.max_grad_norm,
            "num_data": self.num_data,
            "likelihood": self.task.given,
        }

    def _named(self) -> dict[str, Tensor]:
        return dict([*nn.Module.named_parameters(self.model), *self.model.named_buffers()])

    def _seconds(self) -> float:
        return self.earlier_seconds + time.perf_counter() - self.started
