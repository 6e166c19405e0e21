"""Pruning of single weights: by score, per tensor or over all, and N out of M."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .. import gaussian
from ..errors import ArgumentError
from ..kernels.noise import noise
from ..numeric import real, whole
from ..posterior import Site, bayesian_sites, fixed_elements, pruned_elements
from ..rewriter import caches
from ..scope import as_seed
from ..seeds import fold
from ..selection import Pattern, parse_patterns, select
from ..settings.fields import documented, taken
from ..settings.pruning import SCORE, NofMSettings, PruneSettings, ScoreName
from ..settings.pruning import Scope as Scope
from .masks import prune_site

Score = ScoreName | Callable[[Site], Tensor]

_SCORES = ("snr", "magnitude", "variance", "random")
_RANDOM = 1 << 40  # the scores of a seed are not the noise of the draw of that seed


@documented(PruneSettings)
def prune_(  # noqa: D417 - the others are fields of PruneSettings
    model: nn.Module,
    sparsity: float,
    *,
    score: Score = SCORE,
    scope: Scope = PruneSettings.scope,
    only: Pattern | Sequence[Pattern] = PruneSettings.only,
    skip: Pattern | Sequence[Pattern] = PruneSettings.skip,
    min_dim: int = PruneSettings.min_dim,
    seed: int = PruneSettings.seed,
) -> nn.Module:
    r"""Prune the weights of the lowest score: mean and sigma become exactly 0 and stay it.

    What is pruned already counts towards ``sparsity`` and is never revived, so that a model can
    be pruned further step by step (:func:`sparsity_schedule`). What is fixed
    (:func:`bayesify.fix_`), or has a score of infinity, is not pruned.

    Args:
        model: A converted model, changed in place. Upon an error it is as it was.
        sparsity: Share of the chosen weights that are pruned afterwards, in [0, 1). As in
            ``torch.nn.utils.prune`` it is rounded to whole weights, of each tensor or of all.
        score: ``"snr"``: :math:`|\mu| / \sigma`; ``"magnitude"``: :math:`|\mu|`; ``"variance"``:
            :math:`-\sigma`, the widest go first; ``"random"``; or a function of a
            :class:`bayesify.posterior.Site` (``name``, ``mean``, ``std``) that gives a tensor of
            the mean's shape.

    Returns:
        ``model``.

    Raises:
        ArgumentError: An argument has a value that cannot work, nothing is chosen, or a score has
            another shape or is NaN.
        NoMatchError: A pattern matches nothing.
        UnsupportedModuleError: ``model`` has no posterior.

    Reference:
        Graves, 2011, Practical Variational Inference for Neural Networks, section 5; Blundell et
        al., 2015, arXiv:1505.05424, section 5.

    >>> import torch, bayesify
    >>> model = prune_(bayesify.to_bbb(torch.nn.Linear(8, 5)), 0.8)
    >>> int((model.weight == 0).sum())
    32
    """
    settings = taken(PruneSettings, locals())
    sparsity = check_share(sparsity)
    found = chosen(model, settings, settings.min_dim)
    with torch.no_grad():
        scores = [scores_of(site, score, settings.seed).flatten() for site in found]
        masks = [
            mask.view_as(site.mean)
            for site, mask in zip(found, lowest(scores, sparsity, settings.scope), strict=True)
        ]
        apply_masks(model, found, masks)
    return model


@documented(NofMSettings)
def prune_n_of_m_(  # noqa: D417 - the others are fields of NofMSettings
    model: nn.Module,
    n: int = 2,
    m: int = 4,
    *,
    score: Score = SCORE,
    only: Pattern | Sequence[Pattern] = NofMSettings.only,
    skip: Pattern | Sequence[Pattern] = NofMSettings.skip,
    seed: int = NofMSettings.seed,
) -> nn.Module:
    """Keep the n weights of the highest score in every m neighbours along the input dimension.

    Weights of ``Linear`` and of convolutions are pruned; those whose input dimension (for a
    convolution, the channels in its group) is no multiple of m are left, and named in a warning.
    2 of 4 is the pattern of NVIDIA's sparse tensor cores: :func:`to_semi_structured` packs it.

    Args:
        model: A converted model, changed in place. Upon an error it is as it was.
        n: Weights that are kept, at least 1.
        m: Neighbours, above n.
        score: As in :func:`prune_`.

    Returns:
        ``model``.

    Raises:
        ArgumentError: As :func:`prune_`; or no tensor has a fitting input dimension.
        NoMatchError: A pattern matches nothing.
        UnsupportedModuleError: ``model`` has no posterior.

    Reference:
        Mishra et al., 2021, arXiv:2104.08378.

    >>> import torch, bayesify
    >>> model = prune_n_of_m_(bayesify.to_bbb(torch.nn.Linear(8, 1)))
    >>> (model.weight.view(-1, 4) == 0).sum(1).tolist()
    [2, 2]
    """
    settings = taken(NofMSettings, locals())
    m = whole("prune_n_of_m_: m", m, "an integer above 1", least=2)
    n = whole("prune_n_of_m_: n", n, "an integer with 1 <= n < m", below=m)
    layers = [
        site
        for site in chosen(model, settings)
        if isinstance(site.module, LAYERS) and site.attribute == "weight"
    ]
    found = [site for site in layers if site.mean.shape[1] % m == 0]
    left = [site.name for site in layers if site.mean.shape[1] % m]
    if not found:
        why = f"their input dimensions are no multiples of {m}" if layers else "there is none"
        raise ArgumentError(
            f"prune_n_of_m_ finds no weight of a Linear or a convolution to prune: {why}."
        )
    with torch.no_grad():
        masks = []
        for site in found:
            scores = scores_of(site, score, settings.seed).movedim(1, -1)
            groups = scores.reshape(*scores.shape[:-1], -1, m)
            order = groups.argsort(dim=-1, stable=True)[..., : m - n]
            mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True)
            masks.append(mask.view(scores.shape).movedim(-1, 1))
        apply_masks(model, found, masks)
    if left:
        warnings.warn(
            f"{len(left)} tensors are not pruned, since their input dimension is no multiple of "
            f"{m}: {', '.join(left[:5])}{', ...' if len(left) > 5 else ''}.",
            UserWarning,
            stacklevel=2,
        )
    return model


def sparsity_schedule(final: float, rounds: int, *, initial: float = 0.0) -> list[float]:
    r"""The sparsities of iterative pruning: prune, fine-tune, and again, in ``rounds`` rounds.

    .. math:: s_t = s_f + (s_i - s_f) (1 - t/n)^3, \quad t = 1, \dots, n

    Args:
        final: Sparsity of the last round, in [0, 1).
        rounds: Number of rounds n, at least 1; 1 is pruning in one shot.
        initial: Sparsity before the first round, in [0, final].

    Returns:
        ``rounds`` sparsities, for :func:`prune_` before each round of fine-tuning.

    Raises:
        ArgumentError: A value is out of its range.

    Reference:
        Zhu and Gupta, 2017, arXiv:1710.01878, equation 1.

    >>> sparsity_schedule(0.5, 2)
    [0.4375, 0.5]
    """
    final, initial = check_share(final), check_share(initial)
    if initial > final:
        raise ArgumentError(f"initial must be at most final, got {initial!r} and {final!r}.")
    rounds = whole("rounds", rounds, "an integer of at least 1")
    return [final + (initial - final) * (1.0 - t / rounds) ** 3 for t in range(1, rounds + 1)]


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weight has the outputs in its first dimension and the inputs in its second."""


def check_share(sparsity: float) -> float:
    """Refuse what is no sparsity."""
    return real("sparsity", sparsity, "a number in [0, 1)", lambda value: 0.0 <= value < 1.0)


def chosen(
    model: nn.Module, settings: NofMSettings, min_dim: int = 2, further: Sequence[Pattern] = ()
) -> list[Site]:
    """The Bayesian tensors that the patterns take, ``further`` ones skipped; at least one."""
    found = bayesian_sites(model)
    skip = (*parse_patterns(settings.skip), *further)
    skipped = select(model, only=settings.only, skip=skip, strict=True).skipped
    left = [site for site in found if site.name not in skipped]
    result = [site for site in left if site.mean.dim() >= min_dim]
    if not result:
        raise ArgumentError(
            f"No tensor of {type(model).__name__} is chosen for pruning: of {len(found)} Bayesian "
            f"ones, {len(found) - len(left)} are left out by only and skip, and {len(left)} "
            f"have fewer than {min_dim} dimensions."
        )
    return result


def scores_of(site: Site, score: Score, seed: int) -> Tensor:
    """The score of each weight; -inf of what is pruned already, inf of what is fixed."""
    if callable(score):
        values = score(site)
        if not isinstance(values, Tensor) or values.shape != site.mean.shape:
            given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ArgumentError(
                f"The score of {site.name!r} must be a tensor of the shape "
                f"{tuple(site.mean.shape)}, got {given}."
            )
        wide = torch.promote_types(values.dtype, torch.float32)
        values = values.detach().to(site.mean.device, wide)
    else:
        values = _named_score(site, score, seed)
    values = values.masked_fill(pruned_elements(site.raw), -math.inf)
    values = values.masked_fill(fixed_elements(site.raw), math.inf)
    if bool(values.isnan().any()):
        raise ArgumentError(
            f"The score of {site.name!r} is NaN for {int(values.isnan().sum())} weights: "
            + (
                "correct the function that was given as score."
                if callable(score)
                else "its mean or sigma is NaN. Has the training diverged?"
            )
        )
    return values


def _named_score(site: Site, score: str, seed: int) -> Tensor:
    if score not in _SCORES:
        raise ArgumentError(
            f"score must be one of {', '.join(map(repr, _SCORES))}, or a function of a Site, got "
            f"{score!r}."
        )
    wide = torch.promote_types(site.mean.dtype, torch.float32)
    mean = site.mean.detach().to(wide)
    if score == "magnitude":
        return mean.abs()
    if score == "random":
        return random_scores(site, tuple(mean.shape), seed)
    std = site.std.detach().to(wide)
    if score == "variance":
        return -std
    return gaussian.signal_to_noise(mean, std)


def random_scores(site: Site, shape: tuple[int, ...], seed: int) -> Tensor:
    """Independent scores that are a function of the seed and the parameter's name."""
    key = fold(site.slot.key, _RANDOM)
    return noise(as_seed(seed), key, shape, torch.float32, site.mean.device)


def lowest(scores: list[Tensor], share: float, scope: Scope) -> list[Tensor]:
    """A mask of the lowest ``share`` of the scores, of each tensor or of all together."""
    if scope == "tensor":
        return [_lowest(s, round(share * s.numel())) for s in scores]
    joined = torch.cat([s.to(scores[0].device) for s in scores])
    mask = _lowest(joined, round(share * joined.numel()))
    parts = mask.split([s.numel() for s in scores])
    return [part.to(s.device) for part, s in zip(parts, scores, strict=True)]


def _lowest(scores: Tensor, count: int) -> Tensor:
    """A mask of exactly ``count`` lowest, if so many are finite; among equals the first ones."""
    count = min(count, int((scores < math.inf).sum()))
    # torch.quantile takes no more than 16 million elements
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count).values
    mask = scores < threshold
    equal = (scores == threshold).nonzero().flatten()
    mask[equal[: count - int(mask.sum())]] = True
    return mask


def apply_masks(model: nn.Module, found: Sequence[Site], masks: Sequence[Tensor]) -> None:
    """Prune, now that nothing can fail any more."""
    for site, mask in zip(found, masks, strict=True):
        if bool(mask.any()):
            prune_site(site, mask)
    caches.drop(model)
