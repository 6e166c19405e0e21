"""From a deterministic model to a Bayesian one and back: plan, convert, revert."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import ArgumentError, BayesifyError, UnsupportedModuleError
from .gaussian import Parameterization, raw_from_logvar
from .posterior import (
    PRIOR_MEAN_SUFFIX,
    RAW_SUFFIX,
    STATE,
    OwnerState,
    Site,
    Slot,
    attach_prior,
    initial_logvar,
    owner_state,
    raw_name,
    sites,
)
from .priors import GaussianPrior, Prior
from .rewriter import caches
from .rewriter.owner import DrawnHook, adopt, generated_class, methods_to_wrap, original_class
from .selection import Pattern, parse_patterns, select

Estimator = Literal["weight"]


@dataclass(frozen=True)
class BBBConfig:
    """What a conversion does beyond the choice of parameters and prior.

    Args:
        relative_std: Initial standard deviation in units of each tensor's root mean square, when
            no ``logvar`` is given.
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

    relative_std: float = 0.005
    parameterization: Parameterization = "exp"
    include_frozen: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.relative_std) and self.relative_std > 0):
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

    ``action`` is ``bayes``, ``frozen``, ``integer`` or ``skipped: <pattern>``; ``std`` the initial
    standard deviation (None where it has no posterior, or no data: the meta device).
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
            lines.append(
                f"{r.name:{width}}  {r.owner:20}  {r.shape!s:18}  {r.action:20}  {std}"
            )
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
                f"logvar must be a finite number (log of the variance) or None, got {self.logvar!r}."
            )
        if self.estimator != "weight":
            raise ArgumentError(f"estimator must be 'weight', got {self.estimator!r}.")
        if not isinstance(self.config, BBBConfig):
            raise ArgumentError(f"config must be a BBBConfig, got {self.config!r}.")


@dataclass
class _Found:
    """One parameter: every place that holds it, the first being canonical."""

    parameter: Tensor
    places: list[tuple[str, nn.Module, str]]

    @property
    def name(self) -> str:
        return self.places[0][0]


def _parameters(model: nn.Module) -> list[_Found]:
    found: dict[int, _Found] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                entry = found.setdefault(id(parameter), _Found(parameter, []))
                entry.places.append((name, module, attribute))
    return list(found.values())


def _check_model(model: Any) -> None:
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
    if next(model.parameters(), None) is None:
        raise UnsupportedModuleError(
            f"{type(model).__name__} has no parameter, so there is nothing to convert."
        )


def _problems(chosen: list[_Found], scripted: dict[int, str], suffix: str) -> list[str]:
    """Everything that forbids the conversion, each with its remedy."""
    problems = []
    for item in chosen:
        parameter = item.parameter
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            problems.append(f"{item.name} is not initialised yet: run one batch first.")
        elif type(parameter) is not nn.Parameter:
            problems.append(
                f"{item.name} is a {type(parameter).__name__}, not a plain nn.Parameter: convert "
                f"before sharding or quantising, or skip={item.name!r}."
            )
        elif parameter.device.type != "meta" and not bool(torch.isfinite(parameter).all()):
            problems.append(f"{item.name} holds NaN or Inf: repair the weights first.")
        for name, module, attribute in item.places:
            if id(module) in scripted:
                problems.append(
                    f"{name} belongs to the ScriptModule {scripted[id(module)]!r}: scripted code "
                    f"cannot be traced. skip={scripted[id(module)]!r}."
                )
            for extra in (suffix, PRIOR_MEAN_SUFFIX):
                if hasattr(module, attribute + extra):
                    problems.append(
                        f"{name + extra} exists already, so {name} cannot get a posterior under "
                        f"that name: rename it, or skip={name!r}."
                    )
    return problems


def _initial_std(item: _Found, spec: Conversion) -> float | None:
    if spec.logvar is not None:
        return math.exp(0.5 * spec.logvar)
    if item.parameter.device.type == "meta":
        return None
    return math.exp(0.5 * initial_logvar(item.parameter, _reference_rms(item), spec.config.relative_std))


def _reference_rms(item: _Found) -> float:
    """A scale for a tensor of zeros: that of the largest tensor beside it, else one."""
    _, module, _ = item.places[0]
    siblings = [p for p in module._parameters.values() if p is not None and p.is_floating_point()]
    scales = [p.detach().double().square().mean().sqrt().item() for p in siblings if p.numel()]
    return max(scales, default=0.0) or 1.0


def _rewrite(item: _Found) -> str:
    names = []
    for _, module, attribute in item.places:
        cls = type(module)
        wrapped = methods_to_wrap(original_class(cls), frozenset({attribute}))
        names += [f"{cls.__name__}.{m}" for m in wrapped if m == "forward" or "forward" not in m]
        names += [f"hook {type(h).__name__}" for h in module._forward_pre_hooks.values()]
    return ", ".join(dict.fromkeys(names))


def _plan(model: nn.Module, spec: Conversion) -> tuple[ConversionPlan, list[_Found]]:
    selection = select(
        model, skip=spec.skip, only=spec.only, preset=spec.preset, strict=spec.config.strict
    )
    raws = {id(site.raw) for site in sites(model)}
    means = {id(site.mean) for site in sites(model)}
    rows, chosen = [], []
    for item in _parameters(model):
        if id(item.parameter) in raws:
            continue
        _, module, _ = item.places[0]
        if not item.parameter.is_floating_point():
            action = "integer"
        elif item.name in selection.skipped:
            action = f"skipped: {selection.skipped[item.name]}"
        elif not item.parameter.requires_grad and not spec.config.include_frozen:
            action = "frozen"
        else:
            action = "bayes"
            if id(item.parameter) not in means:
                chosen.append(item)
        bayes = action == "bayes"
        rows.append(
            PlanRow(
                name=item.name,
                aliases=tuple(name for name, _, _ in item.places[1:]),
                owner=type(module).__name__,
                shape=tuple(item.parameter.shape),
                elements=item.parameter.numel(),
                action=action,
                rewrite=_rewrite(item) if bayes else "",
                prior=str(spec.prior) if bayes else "",
                std=_initial_std(item, spec) if bayes else None,
            )
        )
    return ConversionPlan(type(model).__name__, tuple(rows), selection.notes), chosen


def _spec(
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
    config: BBBConfig = BBBConfig(),  # noqa: B008 (immutable)
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
    _check_model(model)
    return _plan(model, _spec(skip, only, preset, prior, logvar, estimator, config))[0]


def to_bbb(
    model: nn.Module,
    *,
    skip: Pattern | Sequence[Pattern] = (),
    only: Pattern | Sequence[Pattern] = (),
    preset: str | None = None,
    prior: Prior | None = None,
    logvar: float | None = None,
    estimator: Estimator = "weight",
    config: BBBConfig = BBBConfig(),  # noqa: B008 (immutable)
) -> nn.Module:
    """A Bayesian copy of ``model``: a Gaussian posterior over each selected parameter.

    Args:
        model: Any module; it is copied and left as it is.
        skip: Patterns of what stays deterministic: a class, a class name or glob, a module's
            name, a glob on qualified names, or ``re:...``.
        only: Patterns of what may become Bayesian; skip beats only.
        preset: ``full``, ``no-conv``, ``linear-only``, ``no-layernorm`` or ``last-layer``.
        prior: Prior over the weights; N(0, 1) if None.
        logvar: Initial log variance of every weight; None scales sigma with each tensor
            (``config.relative_std``), which keeps a pretrained model's function.
        estimator: ``"weight"``: one draw of the weights for the whole batch.
        config: See :class:`BBBConfig`.

    Returns:
        A model of the same class, methods and state_dict keys, plus one ``<name>_logvar`` for
        each Bayesian parameter. It draws in ``train()`` and uses the means in ``eval()``.

    Raises:
        ArgumentError: An argument has a value that cannot work.
        NoMatchError: A pattern matches nothing, under ``config.strict``.
        UnsupportedModuleError: The model cannot be converted; the message lists every reason.

    Reference:
        Blundell et al., 2015, arXiv:1505.05424.

    >>> import torch, bayesify
    >>> model = bayesify.to_bbb(torch.nn.Linear(3, 1))
    >>> sorted(model.state_dict())
    ['bias', 'bias_logvar', 'weight', 'weight_logvar']
    """
    _check_model(model)
    try:
        copied = _copy(model)
    except BayesifyError:
        raise
    except Exception as error:
        raise UnsupportedModuleError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}). Convert "
            "it in place with to_bbb_(model)."
        ) from error
    return to_bbb_(
        copied, skip=skip, only=only, preset=preset, prior=prior, logvar=logvar,
        estimator=estimator, config=config,
    )  # fmt: skip


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model that keeps results of its last call, without their graphs."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in (*module.__dict__.values(), *module._buffers.values()):
            items = value if isinstance(value, list | tuple) else [value]
            if isinstance(value, dict):
                items = list(value.values())
            for item in items:
                if isinstance(item, Tensor) and not item.is_leaf:
                    memo[id(item)] = item.detach().clone()
    return copy.deepcopy(model, memo)


def to_bbb_(
    model: nn.Module,
    *,
    skip: Pattern | Sequence[Pattern] = (),
    only: Pattern | Sequence[Pattern] = (),
    preset: str | None = None,
    prior: Prior | None = None,
    logvar: float | None = None,
    estimator: Estimator = "weight",
    config: BBBConfig = BBBConfig(),  # noqa: B008 (immutable)
) -> nn.Module:
    """Convert ``model`` itself; arguments, result and errors as :func:`to_bbb`.

    A model that cannot be converted is left exactly as it was.
    """
    _check_model(model)
    already = [site.name for site in sites(model)]
    if already:
        raise UnsupportedModuleError(
            f"{type(model).__name__} is already Bayesian ({len(already)} parameters, the first "
            f"being {already[0]!r}). Use it as it is, set_prior_(model, prior) for another prior, "
            "or to_deterministic(model) first."
        )
    spec = _spec(skip, only, preset, prior, logvar, estimator, config)
    apply_(model, spec)
    return model


def apply_(model: nn.Module, spec: Conversion) -> ConversionPlan:
    """Convert what ``spec`` selects and is not Bayesian yet."""
    result, chosen = _plan(model, spec)
    if not any(row.bayes for row in result.rows):
        actions = ", ".join(sorted({row.action for row in result.rows})) or "no parameter at all"
        raise UnsupportedModuleError(
            f"No parameter of {type(model).__name__} is selected ({actions}). "
            + "; ".join(result.notes)
        )
    suffix = RAW_SUFFIX[spec.config.parameterization]
    scripted = {
        id(inner): name
        for name, module in model.named_modules()
        if isinstance(module, torch.jit.ScriptModule)
        for inner in module.modules()
    }
    problems = _problems(chosen, scripted, suffix)
    if problems:
        raise UnsupportedModuleError(
            f"{type(model).__name__} cannot be converted:\n  " + "\n  ".join(problems)
        )
    for note in result.notes:
        _warn(note)
    undo: list[Callable[[], None]] = []
    try:
        _apply(model, spec, chosen, undo)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    caches.drop(model)
    return result


def _warn(note: str) -> None:
    import warnings

    from .errors import NoMatchWarning

    warnings.warn(note, NoMatchWarning, stacklevel=4)


def _apply(
    model: nn.Module, spec: Conversion, chosen: list[_Found], undo: list[Callable[[], None]]
) -> None:
    slots: dict[int, dict[str, Slot]] = {}
    parameterization = spec.config.parameterization
    for item in chosen:
        slot = Slot(item.name, spec.prior, parameterization)
        std = _initial_std(item, spec)
        logvar = torch.tensor(-10.0 if std is None else 2.0 * math.log(std))
        value = float(raw_from_logvar(logvar.double(), parameterization))
        raw = nn.Parameter(
            torch.full_like(item.parameter, value, dtype=torch.float32, requires_grad=False)
        )
        for _, module, attribute in item.places:
            name = raw_name(attribute, slot)
            if name not in module._parameters:
                module.register_parameter(name, raw)
                undo.append(lambda m=module, n=name: m._parameters.pop(n, None))  # type: ignore[misc]
            slots.setdefault(id(module), {})[attribute] = slot
        undo.append(lambda m=item.places[0][1], n=item.places[0][2] + PRIOR_MEAN_SUFFIX: _forget(m, n))  # type: ignore[misc]
        attach_prior(Site(item.name, item.places[0][1], item.places[0][2], slot), spec.prior)
        for _, module, attribute in item.places[1:]:
            _share_prior_mean(item.places[0], module, attribute)
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        if not any(id(m) in slots or owner_state(m) is not None for m in module.modules()):
            continue
        _adopt(module, slots.get(id(module), {}), spec, undo)


def _share_prior_mean(place: tuple[str, nn.Module, str], module: nn.Module, attribute: str) -> None:
    buffer = place[1]._buffers.get(place[2] + PRIOR_MEAN_SUFFIX)
    if buffer is not None and attribute + PRIOR_MEAN_SUFFIX not in module._buffers:
        module.register_buffer(attribute + PRIOR_MEAN_SUFFIX, buffer, persistent=False)


def _forget(module: nn.Module, buffer: str) -> None:
    module._buffers.pop(buffer, None)
    module._non_persistent_buffers_set.discard(buffer)


def _adopt(
    module: nn.Module, slots: dict[str, Slot], spec: Conversion, undo: list[Callable[[], None]]
) -> None:
    """Give one module its state and its generated class."""
    state = owner_state(module)
    if state is not None:
        state.slots.update(slots)
        state.variants.clear()
        undo.append(lambda: [state.slots.pop(a, None) for a in slots] and None)
        return
    original = type(module)
    hooked = bool(slots) and bool(module._forward_pre_hooks or module._forward_hooks)
    cls = generated_class(original, frozenset(slots), hooked)
    methods = {
        name: value
        for name, value in module.__dict__.items()
        if name.startswith("forward") and callable(value)
    }
    state = OwnerState(slots=slots, methods=methods, strict=spec.config.strict, spec=spec)
    try:
        module.__class__ = cls
    except TypeError as error:
        raise UnsupportedModuleError(
            f"{original.__name__} does not allow a subclass in its place ({error}). Skip it."
        ) from error
    undo.append(lambda: _revert(module))
    for name in methods:
        del module.__dict__[name]
    if hooked:
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in hooks.items():
                hooks[key] = DrawnHook(hook)
    module.__dict__[STATE] = state
    adopt(module)


def _revert(module: nn.Module) -> None:
    """Take state, class and posterior off one module; its means stay."""
    state = module.__dict__.pop(STATE, None)
    module.__class__ = original_class(type(module))
    if state is None:
        return
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in hooks.items():
            if isinstance(hook, DrawnHook):
                hooks[key] = hook.hook
    for attribute, slot in state.slots.items():
        module._parameters.pop(raw_name(attribute, slot), None)
        _forget(module, attribute + PRIOR_MEAN_SUFFIX)
    module.__dict__.update(state.methods)


def to_deterministic(model: nn.Module) -> nn.Module:
    """A deterministic copy of a converted model at its posterior means.

    Returns:
        A model of the original classes and state_dict keys.

    Raises:
        UnsupportedModuleError: The model has no posterior.

    >>> import torch, bayesify
    >>> layer = torch.nn.Linear(3, 1)
    >>> back = bayesify.to_deterministic(bayesify.to_bbb(layer))
    >>> type(back) is torch.nn.Linear, torch.equal(back.weight, layer.weight)
    (True, True)
    """
    if not any(owner_state(m) is not None for m in model.modules()):
        raise UnsupportedModuleError(
            f"{type(model).__name__} has no Bayesian parameter: it is deterministic already."
        )
    copied = _copy(model)
    for module in copied.modules():
        _revert(module)
    caches.drop(copied)
    return copied


def reconvert_(model: nn.Module) -> None:
    """Convert parameters that a method such as ``reset_classifier`` has added, as the rest was."""
    state = owner_state(model)
    if state is not None and state.spec is not None:
        spec: Conversion = state.spec
        apply_(model, replace(spec, config=replace(spec.config, strict=False)))
