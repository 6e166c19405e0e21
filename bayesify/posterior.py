"""Which parameters of a model are Bayesian, by slot: names, initial values, priors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import gaussian
from .errors import ArgumentError, UnsupportedModuleError
from .gaussian import Parameterization
from .kernels.buffers import Buffers
from .kernels.compiled import Drawn
from .kernels.grouped import Hook
from .priors import STD_RANGE, GaussianPrior, LivePrior, Prior, may_be_std
from .seeds import key_of

Estimator = str  # "weight" or what bayesify.estimators knows
STATE = "_bayesify"
RAW_SUFFIX: dict[str, str] = {"exp": "_logvar", "softplus": "_rho"}
PRIOR_MEAN_SUFFIX = "_prior_mean"
PRUNED_RAW = -4096.0
"""Trained spread of a pruned weight, far enough below ``HELD`` for an optimizer to move it.

It is finite, for what looks for NaN and infinity, and exact in bfloat16.
"""
FIXED_RAW = -(2.0**30)
"""Trained spread of a fixed weight: its sigma is 0 as well, and its mean stays what it is.

So far below :data:`PRUNED_RAW` that weight decay does not make it a pruned one.
"""
_uids = itertools.count()


class Slot:
    """One Bayesian parameter; tied parameters share one slot.

    The slot holds neither mean nor trained spread: they are read from the module that owns them
    whenever they are needed, so that sharding, ``to_empty`` and ``load_state_dict(assign=True)``
    may replace them.
    """

    __slots__ = (
        "buffers", "drawn", "estimator", "has_held", "key", "name", "parameterization", "prior",
        "prior_scale", "uid",
    )  # fmt: skip

    def __init__(
        self, name: str, prior: Prior, parameterization: Parameterization,
        prior_scale: float = 1.0, estimator: Estimator = "weight", has_held: bool = False,
    ) -> None:  # fmt: skip
        self.uid = next(_uids)
        self.name = name
        self.key = key_of(name)
        self.prior = prior
        self.prior_scale = prior_scale
        self.parameterization = parameterization
        self.estimator = estimator
        self.has_held = has_held  # whether weights may be pruned or fixed
        self.buffers = Buffers()
        self.drawn: Hook | None = None  # the last draw that had a gradient

    @property
    def settings(self) -> tuple[Any, ...]:
        """The arguments that make such a slot anew."""
        return (
            self.name, self.prior, self.parameterization, self.prior_scale, self.estimator,
            self.has_held,
        )  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy is another parameter: it must not share a draw with this one
        return Slot, self.settings


@dataclass(eq=False)
class OwnerState:
    """What the toolkit keeps on a converted module, under ``module.__dict__['_bayesify']``.

    ``plain`` names parameters that a conversion left without a posterior, down to the next
    converted module; ``warned`` is what a warning has named.
    ``seldom`` are the slots that a call of the module left unread, ``lowered`` the dtypes of those
    read in autocast's alone, both by method and grad mode; ``drawn`` what its last compiled call
    drew. ``variants`` are by method and number: of a dict, torch.compile guards on what it read.
    """

    slots: dict[str, Slot] = field(default_factory=dict)
    methods: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[int, Any]] = field(default_factory=dict)
    strict: bool = False
    spec: Any = None
    extend: Callable[[nn.Module], object] | None = None
    plain: frozenset[str] = frozenset()
    warned: frozenset[tuple[str, bool]] = frozenset()
    seldom: dict[tuple[str, int], set[int]] = field(default_factory=dict)
    lowered: dict[tuple[str, int], dict[int, torch.dtype]] = field(default_factory=dict)
    drawn: Drawn | None = None
    handle: int = field(default_factory=lambda: next(_uids))

    def __reduce__(self) -> tuple[Any, ...]:
        # variants are code generated for this instance: a copy makes its own, and its own handle
        kept = ("slots", "methods", "strict", "spec", "extend", "plain")
        return _restore_state, ({k: getattr(self, k) for k in kept},)


def _restore_state(kept: dict[str, Any]) -> OwnerState:
    return OwnerState(**kept)


class Site(NamedTuple):
    """Where one Bayesian parameter lives now."""

    name: str
    module: nn.Module
    attribute: str
    slot: Slot

    @property
    def tensors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """Mean and trained spread."""
        return tensors_of(self.module, self.attribute, self.slot)

    @property
    def mean(self) -> nn.Parameter:
        return self.tensors[0]

    @property
    def raw(self) -> nn.Parameter:
        return self.tensors[1]

    @property
    def std(self) -> Tensor:
        return gaussian.std_from_raw(self.raw, self.slot.parameterization)

    @property
    def logvar(self) -> Tensor:
        return gaussian.logvar_from_raw(self.raw, self.slot.parameterization)

    @property
    def held(self) -> Tensor | None:
        """Which weights have no spread and no KL: pruned and fixed ones; None if none has."""
        return held_elements(self.raw) if self.slot.has_held else None

    @property
    def weights(self) -> int:
        """Weights with a posterior: all but the fixed ones."""
        count = self.mean.numel()
        if self.slot.has_held:
            count -= int(full_tensor(fixed_elements(self.raw).sum()))
        return count


def held_elements(raw: Tensor) -> Tensor:
    """Which weights are pruned or fixed, from their trained spread."""
    return raw.detach() < gaussian.HELD


def fixed_elements(raw: Tensor) -> Tensor:
    """Which weights are fixed at their means, from their trained spread."""
    return raw.detach() <= FIXED_RAW / 2


def pruned_elements(raw: Tensor) -> Tensor:
    """Which weights are pruned, from their trained spread."""
    return held_elements(raw) & ~fixed_elements(raw)


class Posterior(NamedTuple):
    """One posterior tensor: N(mean, exp(logvar)) and its prior."""

    name: str
    mean: nn.Parameter
    logvar: Tensor
    prior: Prior


def raw_name(attribute: str, slot: Slot) -> str:
    """Name of the trained spread beside ``attribute``: ``weight_logvar`` or ``weight_rho``."""
    return attribute + RAW_SUFFIX[slot.parameterization]


def tensors_of(module: nn.Module, attribute: str, slot: Slot) -> tuple[nn.Parameter, nn.Parameter]:
    """Mean and trained spread as the module holds them now.

    Raises:
        UnsupportedModuleError: One was taken away or replaced by another shape since the
            conversion.
    """
    parameters = module._parameters
    mean = dict.get(parameters, attribute)  # past the fallback, whose mapping gives draws
    raw = dict.get(parameters, raw_name(attribute, slot))
    if mean is None or raw is None or mean.shape != raw.shape:
        kind = type(module).__name__
        if mean is None or raw is None:
            name = attribute if mean is None else raw_name(attribute, slot)
            what = f"{kind} holds no parameter {name!r} any more"
        else:
            what = (
                f"{attribute!r} of {kind} now has the shape {tuple(mean.shape)}, its posterior "
                f"{tuple(raw.shape)}"
            )
        raise UnsupportedModuleError(
            f"{slot.name} was Bayesian, but {what}. Change, wrap or prune a layer before the "
            "conversion, or go back with to_deterministic(model) first; or give what is there now "
            "a posterior: bayesify.extend_(model)."
        )
    return mean, raw


def given(module: nn.Module, attribute: str, slot: Slot) -> Tensor | None:
    """The weight that stands in the place of a posterior, as ``functional_call`` puts it there.

    It is no Parameter, and its log variance is one: given both, they are a posterior as any other.
    What a forward itself puts there while the fallback runs it is a weight in any case.
    """
    parameters = module._parameters
    found = dict.get(parameters, attribute)
    ordinary = type(parameters) is dict
    if found is None or (ordinary and type(found) is nn.Parameter):
        return None
    other = raw_name(attribute, slot)
    put = () if ordinary else getattr(parameters, "put", ())
    if attribute in put and other not in put:
        return found
    raw = dict.get(parameters, other)
    ours = isinstance(found, nn.Parameter) or not isinstance(raw, nn.Parameter)
    return None if ours else found


def posterior_tensors(module: nn.Module) -> dict[str, nn.Parameter]:
    """Means and trained spreads of one module itself, by their names in it."""
    state = owner_state(module)
    found: dict[str, nn.Parameter] = {}
    for attribute, slot in state.slots.items() if state is not None else ():
        mean, raw = tensors_of(module, attribute, slot)
        found |= {attribute: mean, raw_name(attribute, slot): raw}
    return found


def owner_state(module: nn.Module) -> OwnerState | None:
    """The state of a converted module, None of an ordinary one."""
    state: OwnerState | None = module.__dict__.get(STATE)
    return state


def is_bayesian(model: nn.Module) -> bool:
    """Whether any parameter of ``model`` has a posterior."""
    return any(True for _ in sites(model))


def sites(model: nn.Module) -> Iterator[Site]:
    """Every Bayesian parameter of ``model`` once, under its first qualified name."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        state = owner_state(module)
        if state is None:
            continue
        for attribute, slot in state.slots.items():
            if slot.uid not in seen:
                seen.add(slot.uid)
                name = f"{prefix}.{attribute}" if prefix else attribute
                yield Site(name, module, attribute, slot)


def bayesian_sites(model: nn.Module) -> list[Site]:
    """:func:`sites` as a list that is not empty.

    Raises:
        UnsupportedModuleError: ``model`` has no posterior, or two for a weight that is tied.
    """
    found = list(sites(model))
    if not found:
        raise UnsupportedModuleError(
            f"{type(model).__name__} has no Bayesian parameter. Convert it first: "
            "model = bayesify.to_bbb(model)."
        )
    names: dict[int, str] = {}
    for site in found:
        mean = dict.get(site.module._parameters, site.attribute)
        # what functional_call puts in place of parameters may stand for several
        if isinstance(mean, nn.Parameter) and names.setdefault(id(mean), site.name) != site.name:
            raise UnsupportedModuleError(
                f"{names[id(mean)]!r} and {site.name!r} are one tied parameter with two "
                "posteriors. Tie weights before the conversion, and convert the whole model at "
                "once, not its parts one by one; or let bayesify.extend_(model) keep the first."
            )
    return found


def posteriors(model: nn.Module) -> Iterator[Posterior]:
    """Every posterior tensor of ``model`` once: ``(name, mean, logvar, prior)``.

    With the exp parameterisation ``logvar`` is the nn.Parameter itself; with softplus it is
    computed from it.

    >>> import torch, bayesify
    >>> model = bayesify.to_bbb(torch.nn.Linear(2, 1), initial_std=1.0)
    >>> [(p.name, p.logvar.mean().item()) for p in bayesify.posteriors(model)]
    [('weight', 0.0), ('bias', 0.0)]
    """
    for site in sites(model):
        yield Posterior(site.name, site.mean, site.logvar, site.slot.prior)


def stddev(model: nn.Module) -> dict[str, Tensor]:
    """Posterior standard deviation of every Bayesian parameter by name, without gradient."""
    with torch.no_grad():
        return {site.name: site.std for site in sites(model)}


def posterior_stats(model: nn.Module) -> dict[str, dict[str, float]]:
    """Per tensor: ``elements``, mean and max of sigma and of the signal-to-noise ratio.

    Returns:
        ``{name: {"elements", "fixed", "mean_std", "max_std", "mean_snr", "max_snr"}}``, the ratio
        being ``|mean| / std`` (Blundell et al., 2015, section 5). The fixed weights
        (:func:`bayesify.fix_`), which have no sigma, count in ``elements`` and ``fixed`` alone.
    """
    stats: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for site in sites(model):
            stats[site.name] = tensor_stats(site.mean, site.raw, site.slot.parameterization)
    return stats


def tensor_stats(mean: Tensor, raw: Tensor, parameterization: Parameterization) -> dict[str, float]:
    """What :func:`posterior_stats` says of one tensor."""
    mean, raw = full_tensor(mean.detach()).float(), full_tensor(raw.detach()).float()
    elements = mean.numel()
    fixed = fixed_elements(raw)
    count = int(fixed.sum())
    if count == elements:
        mean, raw = mean.new_zeros(1), raw.new_full((1,), FIXED_RAW)
    elif count:
        mean, raw = mean[~fixed], raw[~fixed]
    std = gaussian.std_from_raw(raw, parameterization)
    snr = gaussian.signal_to_noise(mean, std)
    return {
        "elements": elements,
        "fixed": count,
        "mean_std": std.mean().item(),
        "max_std": std.max().item(),
        "mean_snr": snr.mean().item(),
        "max_snr": snr.max().item(),
    }


def full_tensor(tensor: Tensor) -> Tensor:
    """``tensor``, gathered where FSDP2 has sharded it; then every process must call it."""
    sharded: Any = tensor
    gathered: Tensor = sharded.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


def root_mean_square(tensor: Tensor) -> float:
    """Root mean square in float64; zero if empty, not finite if an element is not."""
    if tensor.numel() == 0:
        return 0.0
    tensor = full_tensor(tensor.detach())
    total = torch.zeros((), dtype=torch.float64, device=tensor.device)
    # pieces that stay in the cache: a float64 copy of a large tensor costs ten times as much
    for piece in tensor.reshape(-1).split(1 << 17):
        double = piece.double()
        total += torch.dot(double, double)
    return math.sqrt(total.item() / tensor.numel())


def set_prior_(model: nn.Module, prior: Prior) -> nn.Module:
    """Give every Bayesian parameter of ``model`` another prior.

    A prior around the initial weights takes the present means as those weights.

    Raises:
        ArgumentError: ``prior`` is not a prior, or a relative one that the weights of a tensor put
            out of range; then no prior is changed.
        UnsupportedModuleError: ``model`` has no posterior.
    """
    if not isinstance(prior, Prior):
        raise ArgumentError(
            f"prior must be a GaussianPrior, ScaleMixturePrior or LivePrior, got {prior!r}."
        )
    scaled = [(site, _prior_scale(site, prior)) for site in bayesian_sites(model)]
    for site, scale in scaled:
        attach_prior(site, prior, scale)
    return model


def attach_prior(site: Site, prior: Prior, scale: float | None = None) -> None:
    """Set the prior of one slot and keep beside it what the prior needs of the present means.

    Raises:
        ArgumentError: It is relative, and the weights give it a standard deviation out of range.
    """
    scale = _prior_scale(site, prior) if scale is None else scale
    site.slot.prior, site.slot.prior_scale = prior, scale
    buffer = site.attribute + PRIOR_MEAN_SUFFIX
    site.module._buffers.pop(buffer, None)
    if isinstance(prior, GaussianPrior) and prior.needs_initial:
        mean = site.mean.detach().clone()
        site.module.register_buffer(buffer, mean, persistent=False)


def _prior_scale(site: Site, prior: Prior) -> float:
    """What the standard deviation of a prior is in units of."""
    if not isinstance(prior, GaussianPrior) or not prior.relative:
        return 1.0
    mean = site.mean.detach()
    if mean.device.type == "meta":
        return 1.0
    rms = root_mean_square(mean)
    scale = 1.0 if rms == 0.0 else rms
    if not may_be_std(prior.std * scale):
        raise ArgumentError(
            f"The prior of {site.name!r} would have the standard deviation {prior.std * scale:.3g},"
            f" {prior.std:g} times the root mean square of its weights; expected {STD_RANGE}."
        )
    return scale


def gaussian_prior(site: Site) -> tuple[Tensor | float, Tensor | float]:
    """Mean and variance of a Gaussian or live prior of one slot.

    Raises:
        ArgumentError: A live source gave something of another shape.
    """
    prior = site.slot.prior
    if isinstance(prior, GaussianPrior):
        var = (prior.std * site.slot.prior_scale) ** 2
        if prior.mean == "initial":
            initial = site.module._buffers[site.attribute + PRIOR_MEAN_SUFFIX]
            assert initial is not None
            return initial, var
        return float(prior.mean), var
    assert isinstance(prior, LivePrior)
    values = []
    for what, value in zip(("mean", "variance"), prior.source(site.name), strict=True):
        if isinstance(value, Tensor):
            if value.shape not in (site.mean.shape, torch.Size([])):
                raise ArgumentError(
                    f"LivePrior: the source's {what} for {site.name!r} has shape "
                    f"{tuple(value.shape)}, expected {tuple(site.mean.shape)} or a number."
                )
            value = value.detach()
        values.append(value)
    return values[0], values[1]
