"""AdamW or LARS over the right groups, and the learning rate of every step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from bayesify import check_optimizer, param_groups

from .config import BYOVConfig

_LOGVAR_EPS = 1e-12


def make_optimizer(model: nn.Module, config: BYOVConfig) -> torch.optim.Optimizer:
    """The optimizer of a run, checked to leave the posterior whole.

    Every group has its highest rate under ``peak_lr``. Weight decay and the trust ratio of LARS
    are for matrices alone, never for biases, norms and log variances. The log variances have a
    smaller epsilon in AdamW: with the KL over the number of weights their gradient is of the size
    of 1 / P, below the usual 1e-8.

    Args:
        model: The student, converted or not.
        config: Of the run.
    """
    if config.bayesian and config.weight_decay:
        warnings.warn(
            f"weight_decay {config.weight_decay:g} on the means of a posterior: the KL already "
            "pulls them, and the paper removed it (appendix C). Log variances are not decayed.",
            UserWarning,
            stacklevel=2,
        )
    groups = list(_groups(model, config))
    optimizer: torch.optim.Optimizer
    if config.optimizer == "lars":
        from timm.optim.lars import Lars

        optimizer = Lars(
            groups, lr=0.0, momentum=config.momentum, trust_coeff=config.trust_coefficient
        )
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=True)
    if config.bayesian:
        check_optimizer(model, optimizer)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to ``factor`` of its highest."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def _groups(model: nn.Module, config: BYOVConfig) -> Iterator[dict[str, Any]]:
    lr, decay = config.peak_lr, config.weight_decay
    predictor = {id(p) for n, p in model.named_parameters() if n.startswith("predictor.")}
    base: list[dict[str, Any]]
    if config.bayesian:
        base = param_groups(model, lr=lr, logvar_lr=lr * config.logvar_lr_ratio)
    else:
        trained = [p for p in model.parameters() if p.requires_grad]
        base = [{"name": "deterministic", "params": trained, "lr": lr}]
    for group in base:
        logvars = group["name"] == "logvars"
        for head in (False, True):
            for matrix in (True, False):
                params = [
                    p for p in group["params"]
                    if (id(p) in predictor) == head and (p.ndim > 1) == matrix
                ]  # fmt: skip
                if not params:
                    continue
                rate = group["lr"] * (config.predictor_lr_ratio if head else 1.0)
                made: dict[str, Any] = {
                    "params": params,
                    "name": group["name"],
                    "peak_lr": rate,
                    "lr": rate,
                    "weight_decay": decay if matrix and not logvars else 0.0,
                }
                if config.optimizer == "lars":
                    made["always_adapt"] = matrix and not logvars
                elif logvars:
                    made["eps"] = _LOGVAR_EPS
                yield made
