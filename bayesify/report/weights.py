"""How wide the posterior of each tensor is, and what has none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..convert import to_deterministic
from ..gaussian import signal_to_noise
from ..planning import make_plan
from ..posterior import Site, bayesian_sites, owner_state, pruned_elements, root_mean_square

SIGMA_EDGES = torch.linspace(-6.0, 2.0, 65, dtype=torch.float64)
SNR_EDGES = torch.linspace(-2.0, 4.0, 49, dtype=torch.float64)
"""Of the histograms of log10 sigma and log10 SNR; what is outside counts in the outer bins."""


@dataclass(frozen=True)
class Layer:
    """One Bayesian tensor; sigma and SNR as histograms of their logarithms.

    Pruned and fixed weights are left out of all but ``elements``.
    """

    name: str
    owner: str
    shape: tuple[int, ...]
    elements: int
    rms: float
    sigma: float
    snr: float
    below_one: float
    pruned: float
    sigma_counts: Tensor
    snr_counts: Tensor


@torch.no_grad()
def measure(site: Site) -> Layer:
    """Sigma and SNR of one tensor."""
    mean, std = site.mean.detach().float().flatten(), site.std.detach().float().flatten()
    held = site.held
    live = torch.ones_like(std, dtype=torch.bool) if held is None else ~held.flatten()
    mean, std = mean[live], std[live]
    snr = signal_to_noise(mean, std)
    elements = live.numel()
    return Layer(
        name=site.name,
        owner=type(site.module).__name__,
        shape=tuple(site.mean.shape),
        elements=elements,
        rms=root_mean_square(mean),
        sigma=float(std.mean()) if len(std) else 0.0,
        snr=float(snr.median()) if len(snr) else 0.0,
        below_one=float((snr < 1.0).float().mean()) if len(snr) else 0.0,
        pruned=int(pruned_elements(site.raw).sum()) / max(1, elements),
        sigma_counts=_counts(std, SIGMA_EDGES),
        snr_counts=_counts(snr, SNR_EDGES),
    )


def _counts(values: Tensor, edges: Tensor) -> Tensor:
    """Histogram of log10, (len(edges) - 1,), which sums to 1."""
    logs = values.cpu().double().log10().clamp(float(edges[0]), float(edges[-1]))
    counts = torch.histogram(logs, edges).hist
    return counts / max(1, len(logs))


def left_out(model: nn.Module) -> tuple[tuple[str, int, int], ...]:
    """(reason, tensors, weights) of what the plan gave no posterior."""
    state = owner_state(model)
    if state is None or state.spec is None:
        return ()
    planned = make_plan(to_deterministic(model), state.spec, strict=False).plan
    bayesian = {site.name for site in bayesian_sites(model)}
    found: dict[str, tuple[int, int]] = {}
    for row in planned.rows:
        if row.name in bayesian or bayesian & set(row.aliases):
            continue
        reason = "no posterior" if row.bayes else row.action
        tensors, weights = found.get(reason, (0, 0))
        found[reason] = tensors + 1, weights + row.elements
    return tuple((reason, *counts) for reason, counts in found.items())
