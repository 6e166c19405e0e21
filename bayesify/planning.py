"""What a conversion will do, before anything changes: one row for each parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import ArgumentError, UnsupportedModuleError
from .gaussian import Parameterization
from .posterior import RAW_SUFFIX, initial_logvar, sites
from .priors import GaussianPrior, Prior
from .rewriter.owner import methods_to_wrap, original_class
from .selection import Pattern, parse_patterns, select

Estimator = Literal["weight"]
DEFAULT_NOISE = 0.003
"""Initial sigma over root mean square, shared by all tensors (benchmarks/initial_sigma.py)."""


@dataclass(frozen=True)
class BBBConfig:
    """What a conversion does beyond the choice of parameters and prior.

    Args:
        relative_std: Initial standard deviation in units of each tensor's root mean square, when
            no ``logvar`` is given. None: 0.003 divided by the square root of the number of
            Bayesian tensors, which keeps a pretrained network's function. Training from random
            weights wants more, 0.01 to 0.1.
        parameterization: ``"exp"``: the trained parameter is the log variance, under the key
            ``weight_logvar`` (the BYOV paper's choice); ``"softplus"``: sigma = softplus(rho),
            under ``weight_rho`` (Blundell et al., 2015).
        include_frozen: Give parameters with ``requires_grad=False`` a posterior too; their means
            stay frozen.
        strict: A pattern that matches nothing, and later a forward that cannot become a graph,
            is an error instead of a warning.

    Raises:
        ArgumentError: A value is out of its range.
    """

    relative_std: float | None = None
    parameterization: Parameterization = "exp"
    include_frozen: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        fraction = self.relative_std
        if fraction is not None and not (math.isfinite(fraction) and fraction > 0):
            raise ArgumentError(
                f"BBBConfig: relative_std must be positive and finite, got {self.relative_std!r}."
            )
        if self.parameterization not in RAW_SUFFIX:
            raise ArgumentError(
                "BBBConfig: parameterization must be 'exp' or 'softplus', got "
                f"{self.parameterization!r}."
            )


@dataclass(frozen=True)
class PlanRow:
    """One parameter of a model and what the conversion does with it.

    ``action`` is ``bayes``, ``frozen``, ``integer``, ``complex`` or ``skipped: <pattern>``; ``std``
    the initial standard deviation (None where it has no posterior, or no data: the meta device).
    """

    name: str
    aliases: tuple[str, ...]
    owner: str
    shape: tuple[int, ...]
    elements: int
    action: str
    rewrite: str
    prior: str
    std: float | None

    @property
    def bayes(self) -> bool:
        return self.action == "bayes"


@dataclass(frozen=True)
class ConversionPlan:
    """What :func:`to_bbb` will do: one row for each floating-point parameter, and visible notes."""

    model: str
    rows: tuple[PlanRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def elements(self) -> int:
        """Parameters of the model, tied ones once."""
        return sum(row.elements for row in self.rows)

    @property
    def bayesian_elements(self) -> int:
        """Parameters that get a posterior, tied ones once."""
        return sum(row.elements for row in self.rows if row.bayes)

    @property
    def share(self) -> float:
        """Share of the parameters that get a posterior, in [0, 1]."""
        return self.bayesian_elements / self.elements if self.elements else 0.0

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        return {
            "model": self.model,
            "elements": self.elements,
            "bayesian_elements": self.bayesian_elements,
            "share": self.share,
            "notes": list(self.notes),
            "rows": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        width = max([len(r.name) for r in self.rows] + [9])
        lines = [f"{'parameter':{width}}  {'owner':20}  {'shape':18}  {'action':20}  std"]
        for r in self.rows:
            std = "" if r.std is None else f"{r.std:.3g}"
            lines.append(f"{r.name:{width}}  {r.owner:20}  {r.shape!s:18}  {r.action:20}  {std}")
        lines.append(
            f"{self.model}: {self.bayesian_elements:,} of {self.elements:,} parameters "
            f"({100 * self.share:.2f} %) get a posterior"
        )
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class Conversion:
    """The arguments of one conversion, kept so that new layers can be converted alike."""

    skip: tuple[Pattern, ...] = ()
    only: tuple[Pattern, ...] = ()
    preset: str | None = None
    prior: Prior = field(default_factory=GaussianPrior)
    logvar: float | None = None
    estimator: Estimator = "weight"
    config: BBBConfig = field(default_factory=BBBConfig)

    def __post_init__(self) -> None:
        if not isinstance(self.prior, Prior):
            raise ArgumentError(
                "prior must be a GaussianPrior, ScaleMixturePrior or LivePrior, got "
                f"{self.prior!r}."
            )
        if self.logvar is not None and not (
            isinstance(self.logvar, int | float) and math.isfinite(self.logvar)
        ):
            raise ArgumentError(
                f"logvar must be a finite number (log of the variance), got {self.logvar!r}."
            )
        if self.estimator != "weight":
            raise ArgumentError(f"estimator must be 'weight', got {self.estimator!r}.")
        if not isinstance(self.config, BBBConfig):
            raise ArgumentError(f"config must be a BBBConfig, got {self.config!r}.")


@dataclass
class Found:
    """One parameter: every place that holds it, the first being canonical."""

    parameter: Tensor
    places: list[tuple[str, nn.Module, str]]
    action: str = "bayes"
    std: float | None = None

    @property
    def name(self) -> str:
        return self.places[0][0]


def _parameters(model: nn.Module) -> list[Found]:
    found: dict[int, Found] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                entry = found.setdefault(id(parameter), Found(parameter, []))
                entry.places.append((name, module, attribute))
    return list(found.values())


def check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"model must be a torch.nn.Module, got {type(model).__name__}. "
            "bayesify.create_model builds one by name."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModuleError(
            "The model is a ScriptModule: scripted code cannot be traced. Convert the Python "
            "model before torch.jit.script."
        )
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModuleError(
            "The model is already compiled. Convert first: torch.compile(to_bbb(model)); the "
            "original is model._orig_mod."
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise UnsupportedModuleError(f"{name} is not initialised yet: run one batch first.")
    if next(model.parameters(), None) is None:
        raise UnsupportedModuleError(
            f"{type(model).__name__} has no parameter, so there is nothing to convert."
        )


def _initial_std(item: Found, spec: Conversion, tensors: int) -> float | None:
    if spec.logvar is not None:
        return math.exp(0.5 * spec.logvar)
    if item.parameter.device.type == "meta":
        return None
    fraction = spec.config.relative_std
    if fraction is None:
        # noise adds up over the layers, in variance
        fraction = DEFAULT_NOISE / math.sqrt(tensors)
    return math.exp(0.5 * initial_logvar(item.parameter, _reference_rms(item), fraction))


def _reference_rms(item: Found) -> float:
    """A scale for a tensor of zeros: that of the largest tensor beside it, else one."""
    _, module, _ = item.places[0]
    siblings = [p for p in module._parameters.values() if p is not None and p.is_floating_point()]
    scales = [p.detach().double().square().mean().sqrt().item() for p in siblings if p.numel()]
    return max(scales, default=0.0) or 1.0


def _rewrite(item: Found) -> str:
    names = []
    for _, module, attribute in item.places:
        cls = type(module)
        wrapped = methods_to_wrap(original_class(cls), frozenset({attribute}))
        names += [f"{cls.__name__}.{m}" for m in wrapped if m == "forward" or "forward" not in m]
        names += [f"hook {type(h).__name__}" for h in module._forward_pre_hooks.values()]
    return ", ".join(dict.fromkeys(names))


def make_plan(model: nn.Module, spec: Conversion) -> tuple[ConversionPlan, list[Found]]:
    selection = select(
        model, skip=spec.skip, only=spec.only, preset=spec.preset, strict=spec.config.strict
    )
    raws = {id(site.raw) for site in sites(model)}
    means = {id(site.mean) for site in sites(model)}
    found = []
    for item in _parameters(model):
        if id(item.parameter) in raws:
            continue
        if not item.parameter.is_floating_point():
            item.action = "complex" if item.parameter.is_complex() else "integer"
        elif item.name in selection.skipped:
            item.action = f"skipped: {selection.skipped[item.name]}"
        elif not item.parameter.requires_grad and not spec.config.include_frozen:
            item.action = "frozen"
        found.append(item)
    bayes = [item for item in found if item.action == "bayes"]
    for item in bayes:
        item.std = _initial_std(item, spec, len(bayes))
    rows = [
        PlanRow(
            name=item.name,
            aliases=tuple(name for name, _, _ in item.places[1:]),
            owner=type(item.places[0][1]).__name__,
            shape=tuple(item.parameter.shape),
            elements=item.parameter.numel(),
            action=item.action,
            rewrite=_rewrite(item) if item.action == "bayes" else "",
            prior=str(spec.prior) if item.action == "bayes" else "",
            std=item.std,
        )
        for item in found
    ]
    chosen = [item for item in bayes if id(item.parameter) not in means]
    return ConversionPlan(type(model).__name__, tuple(rows), selection.notes), chosen


def specify(
    skip: Any, only: Any, preset: str | None, prior: Prior | None, logvar: float | None,
    estimator: Any, config: BBBConfig,
) -> Conversion:  # fmt: skip
    return Conversion(
        parse_patterns(skip), parse_patterns(only), preset,
        GaussianPrior() if prior is None else prior, logvar, estimator, config,
    )  # fmt: skip


def plan(
    model: nn.Module,
    *,
    skip: Pattern | Sequence[Pattern] = (),
    only: Pattern | Sequence[Pattern] = (),
    preset: str | None = None,
    prior: Prior | None = None,
    logvar: float | None = None,
    estimator: Estimator = "weight",
    config: BBBConfig = BBBConfig(),
) -> ConversionPlan:
    """The dry run of :func:`to_bbb`, with the same arguments; the model is not changed.

    Raises:
        ArgumentError: An argument has a value that cannot work.
        UnsupportedModuleError: The model cannot be converted at all.

    >>> import torch, bayesify
    >>> p = bayesify.plan(torch.nn.Linear(3, 1), skip="bias")
    >>> [(row.name, row.action) for row in p.rows]
    [('weight', 'bayes'), ('bias', 'skipped: bias')]
    """
    check_model(model)
    return make_plan(model, specify(skip, only, preset, prior, logvar, estimator, config))[0]
