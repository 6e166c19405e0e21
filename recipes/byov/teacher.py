"""The teacher: moving averages of the posterior means, and the priors that read them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from bayesify import GaussianPrior, LivePrior, set_prior_, torch_private

from .config import BYOVConfig, PriorName
from .runtime.distributed import World
from .runtime.fsdp import shard_


class Teacher(nn.Module):
    r"""A deterministic copy of the student whose weights are the EMA m of the student's means.

    After an optimizer step that left the means :math:`\mu`,

    .. math:: v \leftarrow \tau (v + (1-\tau)(\mu - m)^2), \qquad
              m \leftarrow \tau m + (1-\tau) \mu,

    so that :math:`v = \mathrm{EMA}(\mu^2) - \mathrm{EMA}(\mu)^2` exactly and never negative; the
    difference of the two would cancel in float32. All of it is float32. The predictor is averaged
    too: its forward is not used, but priors around the teacher need its means. Buffers are not
    averaged: BatchNorm has the teacher's own statistics.

    Args:
        student: Before its conversion; copied.
        second_moment: Keep v as well.

    Reference:
        Turishcheva et al., 2023, arXiv:2312.03213, section 3; choices 9 to 17 of the README.
    """

    def __init__(self, student: nn.Module, *, second_moment: bool) -> None:
        super().__init__()
        self.network = copy.deepcopy(student).float().requires_grad_(False)
        self.var = {
            name: torch.zeros_like(mean) if second_moment else None
            for name, mean in self.network.named_parameters()
        }

    @torch.no_grad()
    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
        """Projections (B, out) of both views, each BatchNorm with the statistics of one view."""
        network: Any = self.network
        first, second = network.encode(view1, view2)
        return network.projector(first), network.projector(second)

    @torch.no_grad()
    def update(self, student: nn.Module, tau: float) -> None:
        """Take one step towards the means of ``student``."""
        present = dict(student.named_parameters())
        means: list[Tensor] = []
        targets: list[Tensor] = []
        for name, mean in self.network.named_parameters():
            means.append(mean)
            targets.append(present[name].detach().to(mean.dtype))
        variances = [v for v in self.var.values() if v is not None]
        if variances:
            moved = torch_private.foreach_sub(targets, means)
            torch_private.foreach_addcmul_(variances, moved, moved, 1.0 - tau)
            torch_private.foreach_mul_(variances, tau)
        torch_private.foreach_lerp_(means, targets, 1.0 - tau)

    def shard_(self, world: World) -> None:
        """Shard the averages as a student's means are; before the first update."""
        # a student calls its parts one by one: each is a root
        shard_(self.network.children(), world)
        means = dict(self.network.named_parameters())
        self.var = {
            k: None if v is None else torch.zeros_like(means[k]) for k, v in self.var.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must hold, to be read or written in place."""
        found = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        return found | {f"var.{k}": v for k, v in self.var.items() if v is not None}

    def _apply(self, fn: Any, recurse: bool = True) -> Teacher:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.var = {k: None if v is None else fn(v) for k, v in self.var.items()}
        return self


def set_prior_of(config: BYOVConfig, student: nn.Module, teacher: Teacher | None) -> None:
    """Give the student the prior of the config: N(0, I), or one that reads the teacher."""
    if not config.bayesian:
        return
    if teacher is None or config.prior == "zero":
        set_prior_(student, GaussianPrior())
    else:
        set_prior_(student, live_prior(teacher, config.prior, config.prior_var_floor))


def live_prior(teacher: Teacher, prior: PriorName, floor: float) -> LivePrior:
    """N(mu_T, I) or N(mu_T, Sigma_T), Sigma_T with a least variance of ``floor``."""
    means = dict(teacher.network.named_parameters())

    def source(name: str) -> tuple[Tensor, Tensor | float]:
        var = teacher.var[name]
        if prior == "teacher-mean" or var is None:
            return means[name], 1.0
        return means[name], var.clamp(floor)  # clamp_min of sharded ones needs a later torch

    return LivePrior(source)
