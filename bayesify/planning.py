"""What a conversion will do, before anything changes: one row for each parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from .absorbed_biases import hints
from .errors import ArgumentError
from .estimators import check_estimator
from .fixed import masked
from .gaussian import Parameterization
from .numeric import real
from .posterior import RAW_SUFFIX, Estimator, root_mean_square, sites
from .priors import STD_RANGE, GaussianPrior, Prior, may_be_std
from .rewriter.estimators import may_take
from .rewriter.owner import methods_to_wrap, original_class
from .selection import Pattern, assign, parse_patterns, select
from .spacing import Spread, below_spacing
from .validation import Found, check_model, obstacle, refuse

Estimators = Estimator | Mapping[Any, Estimator]
"""One for all, or by pattern."""
LOGVAR_RANGE = -2000.0, 80.0
"""Below, a weight counts as pruned (:data:`bayesify.gaussian.HELD`); above, float32 overflows."""
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
        if fraction is not None:
            fraction = real("BBBConfig: relative_std", fraction, STD_RANGE, may_be_std)
            object.__setattr__(self, "relative_std", fraction)
        if self.parameterization not in RAW_SUFFIX:
            raise ArgumentError(
                "BBBConfig: parameterization must be 'exp' or 'softplus', got "
                f"{self.parameterization!r}."
            )
        for name in ("include_frozen", "strict"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ArgumentError(f"BBBConfig: {name} must be True or False, got {value!r}.")


@dataclass(frozen=True)
class PlanRow:
    """One parameter of a model and what the conversion does with it.

    ``action`` is ``bayes``, ``frozen``, ``integer``, ``complex`` or ``skipped: <pattern>``; ``std``
    the initial standard deviation (None where it has no posterior, or no data: the meta device).
    ``estimator`` is what its layer's code may take; :func:`rungs` says what a call has taken.
    ``fixed`` of the elements have neither draw nor KL (:func:`bayesify.fix_`).
    """

    name: str
    aliases: tuple[str, ...]
    owner: str
    shape: tuple[int, ...]
    elements: int
    action: str
    rewrite: str
    prior: str
    estimator: str
    std: float | None
    fixed: int = 0

    @property
    def bayes(self) -> bool:
        return self.action == "bayes"


@dataclass(frozen=True)
class ConversionPlan:
    """What :func:`to_bbb` will do: one row for each floating-point parameter.

    ``notes`` are of patterns that may not mean what was meant, ``hints`` of the model; ``fixed``
    says which elements are fixed, and why; ``spacing`` which sigmas their dtype cannot hold.
    """

    model: str
    rows: tuple[PlanRow, ...]
    notes: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    spacing: tuple[str, ...] = ()

    @property
    def elements(self) -> int:
        """Parameters of the model, tied ones once."""
        return sum(row.elements for row in self.rows)

    @property
    def bayesian_elements(self) -> int:
        """Parameters that get a posterior, tied ones once, fixed elements not counted."""
        return sum(row.elements - row.fixed for row in self.rows if row.bayes)

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
            "hints": list(self.hints),
            "fixed": list(self.fixed),
            "spacing": list(self.spacing),
            "rows": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        width = max([len(r.name) for r in self.rows] + [9])
        table = [("parameter", "owner", "shape", "action", "estimator", "std")]
        for r in self.rows:
            std = "" if r.std is None else f"{r.std:.3g}"
            table.append((r.name, r.owner, str(r.shape), r.action, r.estimator, std))
        lines = [f"{a:{width}}  {b:20}  {c:18}  {d:20}  {e:9}  {f}" for a, b, c, d, e, f in table]
        lines.append(
            f"{self.model}: {self.bayesian_elements:,} of {self.elements:,} parameters "
            f"({100 * self.share:.2f} %) get a posterior"
        )
        return "\n".join([*lines, *self.fixed, *self.notes, *self.hints, *self.spacing])


@dataclass(frozen=True)
class Conversion:
    """The arguments of one conversion, kept so that new layers can be converted alike.

    ``estimators`` are (pattern, estimator), the first that matches a parameter being its own.
    """

    skip: tuple[Pattern, ...] = ()
    only: tuple[Pattern, ...] = ()
    preset: str | None = None
    prior: Prior = field(default_factory=GaussianPrior)
    logvar: float | None = None
    estimators: tuple[tuple[Pattern, Estimator], ...] = ()
    config: BBBConfig = field(default_factory=BBBConfig)

    def __post_init__(self) -> None:
        if not isinstance(self.prior, Prior):
            raise ArgumentError(
                "prior must be a GaussianPrior, ScaleMixturePrior or LivePrior, got "
                f"{self.prior!r}."
            )
        if self.logvar is not None:
            least, most = LOGVAR_RANGE
            expected = f"a number from {least:g} to {most:g} (log of the variance)"
            logvar = real("logvar", self.logvar, expected, lambda value: least <= value <= most)
            object.__setattr__(self, "logvar", logvar)
        for _, estimator in self.estimators:
            check_estimator(estimator)
        if not isinstance(self.config, BBBConfig):
            raise ArgumentError(f"config must be a BBBConfig, got {self.config!r}.")


def _parameters(model: nn.Module) -> list[Found]:
    found: dict[int, Found] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                entry = found.setdefault(id(parameter), Found(parameter, []))
                entry.places.append((name, module, attribute))
    return list(found.values())


def _rms(parameter: Tensor) -> float | None:
    """The root mean square of a parameter, None of one without numbers to compute with."""
    if parameter.device.type == "meta" or obstacle(parameter) is not None:
        return None
    return root_mean_square(parameter)


def _initial_std(
    item: Found, spec: Conversion, tensors: int, scales: dict[int, float | None]
) -> float | None:
    if spec.logvar is not None:
        return math.exp(0.5 * spec.logvar)
    if item.rms is None:
        return None
    fraction = spec.config.relative_std
    if fraction is None:
        # noise adds up over the layers, in variance
        fraction = DEFAULT_NOISE / math.sqrt(tensors)
    return fraction * (item.rms or _reference_rms(item, scales))


def _reference_rms(item: Found, scales: dict[int, float | None]) -> float:
    """A scale for a tensor of zeros: that of the largest tensor beside it, else one."""
    _, module, _ = item.places[0]
    beside = [p for p in module._parameters.values() if p is not None]
    found = [scales[id(p)] if id(p) in scales else _rms(p) for p in beside]
    return max((rms for rms in found if rms and math.isfinite(rms)), default=1.0)


def _rewrite(item: Found) -> str:
    names = []
    for _, module, attribute in item.places:
        cls = type(module)
        wrapped = methods_to_wrap(original_class(cls), frozenset({attribute}))
        names += [f"{cls.__name__}.{m}" for m in wrapped if m == "forward" or "forward" not in m]
        names += [f"hook {type(h).__name__}" for h in module._forward_pre_hooks.values()]
    return ", ".join(dict.fromkeys(names))


def _choose_estimators(model: nn.Module, bayes: list[Found], spec: Conversion) -> tuple[str, ...]:
    """Give each parameter its estimator if its layer's code may take it; gives notes."""
    if all(estimator == "weight" for _, estimator in spec.estimators):
        return ()
    wanted, notes = assign(model, spec.estimators, what="estimator", strict=spec.config.strict)
    takers: dict[tuple[int, str], set[int]] = {}
    for item in sorted(bayes, key=lambda item: -item.parameter.dim()):
        estimator: Any = wanted.get(item.name, "weight")
        if estimator == "weight" or len({id(module) for _, module, _ in item.places}) > 1:
            continue  # what is tied is one draw in all places
        _, module, _ = item.places[0]
        beside = takers.setdefault((id(module), estimator), set())
        shape = _shape(item.parameter)
        if len(shape) > 1 and may_take(original_class(type(module)), len(shape), estimator):
            beside.update(shape[:2])
        elif len(shape) != 1 or all(shape[0] % side for side in beside):
            continue  # no weight, and no bias of one
        item.estimator = estimator
    if all(item.estimator == "weight" for item in bayes):
        notes = (*notes, "estimator: no weight can take it, each is drawn whole.")
    return notes


def _shape(parameter: Tensor) -> tuple[int, ...]:
    lazy = isinstance(parameter, nn.parameter.UninitializedParameter)
    return (0,) if lazy else tuple(parameter.shape)


def classify(model: nn.Module, spec: Conversion) -> tuple[list[Found], tuple[str, ...]]:
    """Every parameter of a model, trained spreads left out, with its action; notes on patterns."""
    selection = select(
        model, skip=spec.skip, only=spec.only, preset=spec.preset, strict=spec.config.strict
    )
    raws = {id(site.raw) for site in sites(model)}
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
    return found, selection.notes


def make_plan(model: nn.Module, spec: Conversion) -> tuple[ConversionPlan, list[Found]]:
    """The plan, and of what it converts that which has no posterior yet."""
    found, notes = classify(model, spec)
    means = {id(site.mean) for site in sites(model)}
    bayes = [item for item in found if item.action == "bayes"]
    told_fixed = []
    rules = masked(model)
    for item in bayes:
        item.rms = _rms(item.parameter)
        rule = rules.get(id(item.parameter))
        if rule is not None:
            told_fixed.append(rule.sentence(item.name))
            item.fixed = None if rule.readers else rule
    chosen = [item for item in bayes if id(item.parameter) not in means]
    refuse(model, chosen, RAW_SUFFIX[spec.config.parameterization], bool(spec.skip))
    scales = {id(item.parameter): item.rms for item in bayes}
    for item in bayes:
        item.std = _initial_std(item, spec, len(bayes), scales)
    notes += _choose_estimators(model, bayes, spec)
    rows = [
        PlanRow(
            name=item.name,
            aliases=tuple(name for name, _, _ in item.places[1:]),
            owner=type(item.places[0][1]).__name__,
            shape=_shape(item.parameter),
            elements=math.prod(_shape(item.parameter)),
            action=item.action,
            rewrite=_rewrite(item) if item.action == "bayes" else "",
            prior=str(spec.prior) if item.action == "bayes" else "",
            estimator=item.estimator if item.action == "bayes" else "",
            std=item.std,
            fixed=0 if item.fixed is None else item.fixed.elements,
        )
        for item in found
    ]
    told = hints(model, {name for item in bayes for name, _, _ in item.places})
    spreads = [
        Spread(item.name, item.std, item.rms, item.parameter.dtype)
        for item in bayes
        if item.estimator == "weight" and item.std is not None and item.rms is not None
    ]
    planned = ConversionPlan(
        type(model).__name__, tuple(rows), notes, told, tuple(told_fixed), below_spacing(spreads)
    )
    return planned, chosen


def specify(
    skip: Any, only: Any, preset: str | None, prior: Prior | None, logvar: float | None,
    estimator: Any, config: BBBConfig,
) -> Conversion:  # fmt: skip
    chosen = estimator if isinstance(estimator, Mapping) else {"*": estimator}
    return Conversion(
        parse_patterns(skip), parse_patterns(only), preset,
        GaussianPrior() if prior is None else prior, logvar,
        tuple((p, value) for key, value in chosen.items() for p in parse_patterns(key)), config,
    )  # fmt: skip


def plan(
    model: nn.Module,
    *,
    skip: Pattern | Sequence[Pattern] = (),
    only: Pattern | Sequence[Pattern] = (),
    preset: str | None = None,
    prior: Prior | None = None,
    logvar: float | None = None,
    estimator: Estimators = "weight",
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
