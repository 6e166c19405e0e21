"""What a conversion will do, before anything changes: one row for each parameter."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from .errors import ArgumentError, UnsupportedModuleError
from .gaussian import Parameterization
from .posterior import PRIOR_MEAN_SUFFIX, RAW_SUFFIX, Estimator, root_mean_square, sites
from .priors import GaussianPrior, Prior
from .rewriter.estimators import may_take
from .rewriter.owner import generated_class, methods_to_wrap, original_class
from .selection import Pattern, assign, parse_patterns, select

Estimators = Estimator | Mapping[Any, Estimator]
"""One for all, or by pattern."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
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
    ``estimator`` is what its layer's code may take; :func:`rungs` says what a call has taken.
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
        table = [("parameter", "owner", "shape", "action", "estimator", "std")]
        for r in self.rows:
            std = "" if r.std is None else f"{r.std:.3g}"
            table.append((r.name, r.owner, str(r.shape), r.action, r.estimator, std))
        lines = [f"{a:{width}}  {b:20}  {c:18}  {d:20}  {e:9}  {f}" for a, b, c, d, e, f in table]
        lines.append(
            f"{self.model}: {self.bayesian_elements:,} of {self.elements:,} parameters "
            f"({100 * self.share:.2f} %) get a posterior"
        )
        return "\n".join([*lines, *self.notes])


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
        if self.logvar is not None and not (
            isinstance(self.logvar, int | float) and math.isfinite(self.logvar)
        ):
            raise ArgumentError(
                f"logvar must be a finite number (log of the variance), got {self.logvar!r}."
            )
        for _, estimator in self.estimators:
            if estimator not in get_args(Estimator):
                raise ArgumentError(
                    "estimator must be 'weight', 'local' or 'flipout', or a mapping from patterns "
                    f"to these, got {estimator!r}."
                )
        if not isinstance(self.config, BBBConfig):
            raise ArgumentError(f"config must be a BBBConfig, got {self.config!r}.")


@dataclass
class Found:
    """One parameter: every place that holds it, the first being canonical."""

    parameter: Tensor
    places: list[tuple[str, nn.Module, str]]
    action: str = "bayes"
    estimator: Estimator = "weight"
    rms: float | None = None
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
    if "_orig_mod" in model._modules:
        raise UnsupportedModuleError(
            "The model is already compiled. Convert first: torch.compile(to_bbb(model)); the "
            "original is model._orig_mod."
        )
    if next(model.parameters(), None) is None:
        raise UnsupportedModuleError(
            f"{type(model).__name__} has no parameter, so there is nothing to convert."
        )


def _obstacle(parameter: Tensor) -> str | None:
    """Why a tensor cannot be the mean of a posterior, with the remedy."""
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return "is not initialised yet: run one batch first"
    if type(parameter) is not nn.Parameter:
        return (
            f"is a {type(parameter).__name__}, not a plain nn.Parameter: convert before sharding "
            "or quantising"
        )
    if parameter.layout is not torch.strided:
        return f"is sparse ({parameter.layout}): make it dense"
    if parameter.dtype not in _DTYPES:
        return f"is of {parameter.dtype}, a storage type: convert before quantising"
    return None


def _problems(model: nn.Module, chosen: list[Found], spec: Conversion) -> list[tuple[str, str]]:
    """Everything that forbids the conversion, each as (what and its remedy, what to skip)."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for item in chosen:
        closed = [problem for name, _, _ in item.places for problem in _closed(name, modules)]
        if closed:  # whatever else is wrong in there
            found += closed
            continue
        reason = _obstacle(item.parameter)
        if reason is None and item.rms is not None and not math.isfinite(item.rms):
            reason = "holds NaN or Inf: repair the weights"
        if reason is not None:
            found.append((f"{item.name} {reason}", item.name))
        for name, module, attribute in item.places:
            for suffix in (RAW_SUFFIX[spec.config.parameterization], PRIOR_MEAN_SUFFIX):
                if hasattr(module, attribute + suffix):
                    what = (
                        f"{name + suffix} exists already, so {name} cannot get a posterior under "
                        "that name: rename it"
                    )
                    found.append((what, name))
    return found


def _closed(name: str, modules: dict[str, nn.Module]) -> list[tuple[str, str]]:
    """The outermost module around a parameter that lets nobody change what is in it."""
    parts = name.split(".")[:-1]
    for path in (".".join(parts[:depth]) for depth in range(len(parts) + 1)):
        module = modules[path]
        if isinstance(module, torch.jit.ScriptModule):
            what = f"{name} belongs to the ScriptModule {path!r}: convert before torch.jit.script"
            return [(what, path)]
        if "_orig_mod" in module._modules:
            return [(f"{name} belongs to {path!r}, which is compiled: convert before", path)]
        kind = original_class(type(module))
        try:
            generated_class(kind, frozenset(), False)
        except Exception as error:  # a class may forbid subclasses in its own way
            what = f"{name}: {kind.__name__} does not allow a subclass in its place ({error})"
            return [(what, path)]
    return []


def _refuse(model: nn.Module, chosen: list[Found], spec: Conversion) -> None:
    """Raise one error with all problems and the ``skip`` that leaves them out."""
    problems = _problems(model, chosen, spec)
    if not problems:
        return
    lines = [f"{type(model).__name__} cannot be converted:"]
    for what, name in problems:
        lines.append(f"  {what}, or skip={_exactly(name)!r}." if name else f"  {what}.")
    patterns = list(dict.fromkeys(_exactly(name) for _, name in problems))
    if len(patterns) > 1 and all(name for _, name in problems):
        plain = not any(pattern.startswith("re:") for pattern in patterns)
        beside = "Beside what you skip already, " if spec.skip else ""
        skip = ",".join(patterns) if plain else patterns
        lines.append(f"{beside}skip={skip!r} leaves all of these out.")
    raise UnsupportedModuleError("\n".join(lines))


def _exactly(name: str) -> str:
    """A pattern for one qualified name, whatever characters are in it."""
    return name if re.fullmatch(r"[\w.-]+", name) else rf"re:^{re.escape(name)}(\.|$)"


def _rms(parameter: Tensor) -> float | None:
    """The root mean square of a parameter, None of one without numbers to compute with."""
    if parameter.device.type == "meta" or _obstacle(parameter) is not None:
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
        if len(shape) > 1 and may_take(original_class(type(module)), len(shape)):
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
        item.rms = _rms(item.parameter)
    chosen = [item for item in bayes if id(item.parameter) not in means]
    _refuse(model, chosen, spec)
    scales = {id(item.parameter): item.rms for item in bayes}
    for item in bayes:
        item.std = _initial_std(item, spec, len(bayes), scales)
    notes = selection.notes + _choose_estimators(model, bayes, spec)
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
        )
        for item in found
    ]
    return ConversionPlan(type(model).__name__, tuple(rows), notes), chosen


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
