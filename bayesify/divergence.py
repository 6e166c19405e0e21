"""The KL divergence from the posterior to the prior: in closed form, or at a draw."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import gaussian, torch_private, torch_support
from .kernels import compiled, grouped
from .kernels.noise import noise
from .numeric import real
from .posterior import (
    Site,
    bayesian_sites,
    full_tensor,
    gaussian_prior,
    held_elements,
    owner_state,
    tensors_of,
)
from .priors import LEAST_STD, MEAN_RANGE, MOST_STD, ScaleMixturePrior, may_be_mean, may_be_std
from .rewriter.active import ACTIVE
from .rewriter.values import TraceFailure
from .scope import LOCAL, new_seed, open_modes

_VAR_RANGE = f"a number from {LEAST_STD**2:g} to {MOST_STD**2:g}"


def kl_divergence(model: nn.Module) -> Tensor:
    r"""KL divergence from the posterior to the prior, summed over all weights, tied ones once.

    .. math:: \mathrm{KL} = \sum_i \mathbb{E}_{q(w_i)} [\log q(w_i) - \log p(w_i)]

    Gaussian and live priors have a closed form. A scale mixture has none: its term is
    ``log q(w) - log p(w)`` at one draw ``w``, that of the enclosing ``one_draw`` or a fresh one,
    and its expectation over draws is the KL divergence. Pruned and fixed weights are left out.

    Args:
        model: A converted model, or a module that holds one.

    Returns:
        A scalar in nats, differentiable in the means and log variances, in float32 or in float64
        if a mean is; on the device of the first Bayesian parameter. It is the sum over the whole
        model also where FSDP2 has sharded it.

    Raises:
        UnsupportedModuleError: ``model`` has no posterior.
        ArgumentError: A live prior gives values that are no mean and variance of the tensor.

    Reference:
        Blundell et al., 2015, arXiv:1505.05424, equations 1 and 2.

    >>> import torch, bayesify
    >>> model = bayesify.to_bbb(torch.nn.Linear(2, 1), initial_std=1.0)
    >>> kl = kl_divergence(model)  # sigma is the prior's: only the means differ from it
    >>> torch.isclose(kl, 0.5 * sum(p.mean.square().sum() for p in bayesify.posteriors(model)))
    tensor(True)
    """
    return kl_beside(None, model)


def kl_beside(loss: Tensor | None, model: nn.Module) -> Tensor:
    """As :func:`kl_divergence`, to be added to ``loss``.

    The backward of a compiled call can run only once: the KL divergence may hang on it where the
    loss comes of that call, so that both have one backward.
    """
    if ACTIVE.tracer is not None:
        raise TraceFailure("it computes a KL divergence, which reads means and not draws")
    if torch.compiler.is_dynamo_compiling():
        torch_support.check_compile()
    found = bayesian_sites(model)
    # a forward that calls this may run with its reads of parameters exchanged for draws
    with torch_private.DisableTorchFunction():
        seed: Tensor | None = None
        terms = []
        partial: dict[Any, list[Tensor]] = {}  # FSDP2: sums over the shards of this process
        hanging: list[tuple[grouped.Hook, Tensor | float, Tensor | float]] = []
        together: list[tuple[Site, tuple[Tensor | float, Tensor | float]]] = []
        tracing = torch.compiler.is_dynamo_compiling()
        may_group = tracing or grouped.possible()
        may_hang = torch.is_grad_enabled() and may_group and not tracing
        for site in found:
            if isinstance(site.slot.prior, ScaleMixturePrior):
                if seed is None:
                    seed = _seed_of(found)
                term = _drawn_term(site, site.slot.prior, seed)
            else:
                prior = _closed_prior(site)
                hook = _hook(site, prior) if may_hang else None
                if hook is not None:
                    hanging.append((hook, *prior))
                    site.slot.drawn = None
                    continue
                if may_group and _suits_group(site, prior):
                    together.append((site, prior))
                    continue
                term = _closed_term(site, prior)
            mesh = _mesh(_tensors(site)[0])
            if mesh is None:
                terms.append(term)
            else:
                partial.setdefault(mesh, []).append(term)
        if hanging:
            terms.append(grouped.gaussian_kl(hanging))
        if may_hang and loss is not None and together:
            hung, together = _on_compiled_draws(model, loss, together)
            terms += hung
        terms += _together(together)
        terms += [_over_processes(torch.stack(each).sum(), *mesh) for mesh, each in partial.items()]
        device = _tensors(found[0])[0].device
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in terms) else torch.float32
        return torch.stack([t.to(device, dtype) for t in terms]).sum()


def _seed_of(found: list[Site]) -> Tensor:
    """The seed of the draw that the model is in now, or a new one."""
    running = LOCAL.scope
    if running is not None and running.seed is not None:
        return running.seed
    module = id(found[0].module)
    for mode in reversed(open_modes()):
        if mode.scope is not None and mode.scope.seed is not None and module in mode.modules:
            return mode.scope.seed
    return new_seed()


def _tensors(site: Site) -> tuple[Tensor, Tensor]:
    """Mean and trained spread, by no property: torch.compile of torch 2.10 cannot follow one."""
    return tensors_of(site.module, site.attribute, site.slot)


def _closed_prior(site: Site) -> tuple[Tensor | float, Tensor | float]:
    mean, _ = _tensors(site)
    prior_mean, prior_var = (_beside(value, mean) for value in gaussian_prior(site))
    if not isinstance(prior_mean, Tensor):
        prior_mean = real(f"The prior mean of {site.name!r}", prior_mean, MEAN_RANGE, may_be_mean)
    if not isinstance(prior_var, Tensor):
        prior_var = real(
            f"The prior variance of {site.name!r}", prior_var, _VAR_RANGE,
            lambda var: var > 0.0 and may_be_std(math.sqrt(var)),
        )  # fmt: skip
    return prior_mean, prior_var


def _closed_term(site: Site, prior: tuple[Tensor | float, Tensor | float]) -> Tensor:
    whole, raw = _tensors(site)
    held = _shard(_beside(held_elements(raw), whole)) if site.slot.has_held else None
    mean, raw = _shard(whole), _shard(_wide(raw, whole))
    prior_mean, prior_var = map(_shard, prior)
    if held is not None:
        raw = raw.masked_fill(held, 0.0)  # at a sigma of 0 its logarithm has no gradient
        if isinstance(prior_var, Tensor):  # of another model, whose weights may be held as well
            prior_var = prior_var.masked_fill(held, 1.0)
    logvar = gaussian.logvar_from_raw(raw, site.slot.parameterization)
    return gaussian.kl_divergence(mean, logvar, prior_mean, prior_var, held=held)


def _hook(site: Site, prior: tuple[Tensor | float, Tensor | float]) -> grouped.Hook | None:
    """The backward of the site's last draw, if it can add the gradient of the KL divergence."""
    hook = site.slot.drawn
    if hook is None:
        return None
    mean, raw = site.tensors
    if not hook.node.may_carry(mean, raw) or hook.node.item.held != site.slot.has_held:
        return None
    if any(isinstance(v, Tensor) and v.dtype != mean.dtype for v in prior):
        return None
    return hook


def _suits_group(site: Site, prior: tuple[Tensor | float, Tensor | float]) -> bool:
    """Whether :mod:`.kernels.compiled` can compute this term."""
    mean, raw = _tensors(site)
    return (
        site.slot.parameterization == "exp"
        and grouped.suits(mean, raw)
        and mean.dtype == raw.dtype
        and all(
            not isinstance(v, Tensor)
            or (v.dtype == mean.dtype and v.device == mean.device and v.shape in ((), mean.shape))
            for v in prior
        )
    )


_Terms = list[tuple[Site, tuple[Tensor | float, Tensor | float]]]


def _together(rows: _Terms) -> list[Tensor]:
    """The sums of the terms, one for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], _Terms] = {}
    for row in rows:
        mean, _ = _tensors(row[0])
        groups.setdefault((mean.device, mean.dtype), []).append(row)
    return [
        compiled.kl(
            [_tensors(site) for site, _ in rows],
            [prior for _, prior in rows],
            [site.slot.has_held for site, _ in rows],
        )
        for rows in groups.values()
    ]


def _on_compiled_draws(model: nn.Module, loss: Tensor, rows: _Terms) -> tuple[list[Tensor], _Terms]:
    """Terms whose gradient is computed with that of what a compiled call drew, and the others."""
    terms: list[Tensor] = []
    for module in model.modules():
        state = owner_state(module)
        drawn = None if state is None else state.drawn
        if state is None or drawn is None:
            continue
        by_uid = {site.slot.uid: (site, prior) for site, prior in rows}
        own = [by_uid[uid] for uid in drawn.slots if uid in by_uid]
        if len(own) < len(drawn.slots) or not compiled.comes_of(loss, drawn):
            continue  # a part of the model, or a prior of another kind, or another call's loss
        state.drawn = None
        value = compiled.hung_kl(
            drawn,
            [_tensors(site) for site, _ in own],
            [prior for _, prior in own],
            [site.slot.has_held for site, _ in own],
        )
        if value is not None:
            terms.append(value)
            rows = [row for row in rows if row[0].slot.uid not in drawn.slots]
    return terms, rows


def _drawn_term(site: Site, prior: ScaleMixturePrior, seed: Tensor) -> Tensor:
    full, raw = _tensors(site)
    std = gaussian.std_from_raw(raw, site.slot.parameterization)
    mean, std = _shard(full), _shard(_wide(std, full))
    held = _shard(_beside(held_elements(raw), full)) if site.slot.has_held else None
    if held is not None:
        std = std.masked_fill(held, 1.0)
    epsilon = _shard(_beside(noise(seed, site.slot.key, full.shape, std.dtype, full.device), full))
    # From the noise itself: (w - mean) / std would lose it where w has been rounded to bfloat16.
    log_q = gaussian.log_density(epsilon, 0.0, 1.0) - torch.log(std)
    value = gaussian.draw(mean.to(std.dtype), std, epsilon)
    terms = log_q - prior.log_density(value)
    return (terms if held is None else terms.masked_fill(held, 0.0)).sum()


def _wide(tensor: Tensor, mean: Tensor) -> Tensor:
    return tensor.double() if mean.dtype == torch.float64 else tensor.float()


def _mesh(mean: Tensor) -> tuple[Any, tuple[Any, ...]] | None:
    """Where FSDP2 has sharded a tensor: the mesh and the placements; None if it has not."""
    sharded: Any = mean
    return (sharded.device_mesh, sharded.placements) if hasattr(mean, "placements") else None


def _shard(value: Any) -> Any:
    """The part of this process. An operation on a whole DTensor may give a gradient that is placed
    in another way than its parameter, where a dimension has fewer rows than there are processes.
    """
    return value.to_local() if hasattr(value, "placements") else value


def _over_processes(part: Tensor, mesh: Any, placements: tuple[Any, ...]) -> Tensor:
    """The sum of what every process has of its shards."""
    from torch.distributed.tensor import DTensor, Partial

    summed = [Partial() if placement.is_shard() else placement for placement in placements]
    full: Tensor = DTensor.from_local(part, mesh, summed, run_check=False).full_tensor()
    return full


def _beside(value: Tensor | float, mean: Tensor) -> Tensor | float:
    """``value`` on the device of ``mean``, and sharded as it is under FSDP2."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(mean.device)
    sharded: Any = mean
    if not hasattr(mean, "placements"):
        return full_tensor(value)  # FSDP2 leaves the root's parameters whole after a forward
    if hasattr(value, "placements") or value.dim() == 0:
        return value
    from torch.distributed.tensor import DTensor, Replicate

    # every rank holds the whole value, so that nothing is sent
    mesh = sharded.device_mesh
    here: Any = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return here.redistribute(placements=sharded.placements)  # type: ignore[no-any-return]
