"""Signs that training goes wrong: embeddings that collapse, a posterior that does not move."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import bayesify as bb
from bayesify.posterior import full_tensor

_RANKME_EPS = 1e-7  # of the reference, in float32 there


def embedding_std(embeddings: Tensor) -> float:
    """Return how far normalised embeddings spread: 0 collapsed, 1 uniform on the sphere.

    Mean over the D dimensions of the standard deviation of ``z / |z|`` over the batch, times
    ``sqrt(D)``.

    Shape:
        embeddings (N, D) with N 2 or more.

    Reference:
        Chen and He 2020, arXiv 2011.10566, section 4.1.
    """
    z = functional.normalize(embeddings.detach().float(), dim=1)
    return float(z.std(dim=0).mean()) * math.sqrt(z.shape[1])


def effective_rank(embeddings: Tensor) -> float:
    """Return the RankMe of embeddings, from 1 (one direction) to min(N, D).

    ``exp(-sum_k p_k log p_k)`` with ``p_k = s_k / sum_j s_j + 1e-7`` and s the singular values.

    Args:
        embeddings: As they are, neither centred nor normalised; several times as many as
            dimensions, for fewer limit the rank.

    Shape:
        embeddings (N, D).

    Reference:
        Garrido, Balestriero, Najman, LeCun 2023, arXiv 2210.02885, equation 1.
    """
    values = torch.linalg.svdvals(embeddings.detach().double())
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny) + _RANKME_EPS
    return float((-(shares * shares.log()).sum()).exp())


@dataclass(frozen=True)
class CollapseLimits:
    """Below these an alarm is raised; each is a choice, no paper states one.

    Args:
        std: Of :func:`embedding_std`, which is near 1 in health.
        rank: Of :func:`effective_rank`: fewer directions than a line needs, and one more.
        knn_over_chance: kNN accuracy over that of guessing.
    """

    std: float = 0.2
    rank: float = 2.0
    knn_over_chance: float = 1.5


def collapse_alarms(
    *,
    std: float | None = None,
    rank: float | None = None,
    knn: float | None = None,
    num_classes: int | None = None,
    limits: CollapseLimits = CollapseLimits(),
) -> list[str]:
    """Return what points at a collapse, one sentence each; none is health.

    Args:
        std: What :func:`embedding_std` returned.
        rank: What :func:`effective_rank` returned.
        knn: kNN accuracy, in [0, 1].
        num_classes: Of the kNN.
        limits: When to raise an alarm.
    """
    found = []
    if std is not None and not std >= limits.std:
        found.append(
            f"embeddings collapse: their spread is {std:.3g}, below {limits.std:g} (1 is healthy)"
        )
    if rank is not None and not rank >= limits.rank:
        found.append(f"embeddings collapse: their effective rank is {rank:.3g}")
    if knn is not None and num_classes:
        least = limits.knn_over_chance / num_classes
        if not knn >= least:
            found.append(f"kNN accuracy {knn:.1%} is near chance ({1 / num_classes:.1%})")
    return found


@dataclass(frozen=True)
class PosteriorSummary:
    """How far a posterior has moved.

    Args:
        layers: For each tensor mean and max of sigma and of |mean| / sigma, as
            :func:`bayesify.posterior_stats` names them.
        logvar_travel: Mean over all weights of |logvar - its start|; Adam moves it by at most the
            sum of its learning rates.
        logvar_spread: Standard deviation of logvar inside a tensor, mean over the matrices by
            their weights. Below 0.3 or so the order by SNR is that by magnitude, and a pruning
            curve proves nothing.
        prior_share: Share of weights whose sigma is above half the prior's.
    """

    layers: dict[str, dict[str, float]]
    logvar_travel: float
    logvar_spread: float
    prior_share: float


@torch.no_grad()
def initial_logvars(model: nn.Module) -> dict[str, float]:
    """The one logvar of each tensor of a model that was converted just now, by name."""
    return {p.name: p.logvar.flatten()[0].item() for p in bb.posteriors(model)}


@torch.no_grad()
def posterior_summary(
    model: nn.Module, *, initial_logvar: Mapping[str, float], prior_std: float = 1.0
) -> PosteriorSummary:
    """Measure how far the posterior of a model has moved from where it started.

    Args:
        model: A converted model.
        initial_logvar: Where the logvar of each tensor started, as :func:`initial_logvars` has it.
        prior_std: Standard deviation of the prior that ``prior_share`` compares with.
    """
    travel = wide = spread = 0.0
    weights = in_matrices = 0
    for name, mean, sharded, _ in bb.posteriors(model):
        logvar = full_tensor(sharded).float()
        weights += logvar.numel()
        travel += float((logvar - initial_logvar[name]).abs().sum())
        wide += float((logvar > 2 * math.log(prior_std / 2)).sum())
        if mean.ndim > 1:
            in_matrices += logvar.numel()
            spread += float(logvar.std(correction=0)) * logvar.numel()
    return PosteriorSummary(
        bb.posterior_stats(model),
        logvar_travel=travel / max(1, weights),
        logvar_spread=spread / max(1, in_matrices),
        prior_share=wide / max(1, weights),
    )


def mean_stats(records: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Average what :func:`bayesify.posterior_stats` gave at several steps, as BYOV's figure 3.

    Args:
        records: One or more, of the same tensors.
    """
    first = records[0]
    return {
        name: {key: sum(r[name][key] for r in records) / len(records) for key in first[name]}
        for name in first
    }
