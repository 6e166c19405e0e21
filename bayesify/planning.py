"""What a conversion will do, before anything changes: one row for each parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from .absorbed_biases import hints
from .conversion import BBBConfig, Conversion, Estimators, InitialStd
from .fixed import masked
from .posterior import RAW_SUFFIX, Site, root_mean_square, sites
from .priors import Prior
from .rewriter.estimators import may_take
from .rewriter.owner import methods_to_wrap, original_class
from .selection import Pattern, Selection, assign, select
from .settings.fields import documented, taken
from .spacing import Spread, below_spacing
from .validation import Found, check_model, obstacle, refuse

DEFAULT_NOISE = 0.003
"""Initial sigma over root mean square, shared by all tensors (benchmarks/initial_sigma.py)."""


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


class Planned(NamedTuple):
    """All that a conversion needs to know: what a user reads of it, and what its application takes.

    ``conversion`` are the settings, functions among its patterns with what they have chosen;
    ``chosen`` the parameters that are to get a posterior and have none yet.
    """

    plan: ConversionPlan
    conversion: Conversion
    chosen: list[Found]


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
    item: Found, asked: InitialStd | None, tensors: int, scales: dict[int, float | None]
) -> float | None:
    """The first sigma of one of ``tensors`` parameters; None without data to measure it by."""
    if isinstance(asked, float):
        return asked
    if item.rms is None:
        return None
    # by default a share for each: noise adds up over the layers, in variance
    fraction = DEFAULT_NOISE / math.sqrt(tensors) if asked is None else asked.fraction
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


def _choose_estimators(
    model: nn.Module, bayes: list[Found], spec: Conversion, strict: bool
) -> tuple[Conversion, tuple[str, ...]]:
    """Give each parameter the estimator that it is to have, if its layer's code may take it.

    Matrices come first: a bias follows the weight beside it, whose sides its length is one of.

    Returns:
        The settings with what functions among the patterns have chosen, and notes for the user.
    """
    if all(estimator == "weight" for _, estimator in spec.estimator):
        return spec, ()
    assigned = assign(model, spec.estimator, what="estimator", strict=strict)
    takers: dict[tuple[int, str], set[int]] = {}
    for item in sorted(bayes, key=lambda item: -item.parameter.dim()):
        estimator = assigned.values.get(item.name, "weight")
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
    notes = assigned.notes
    if all(item.estimator == "weight" for item in bayes):
        notes = (*notes, "estimator: no weight can take it, each is drawn whole.")
    return replace(spec, estimator=assigned.choices), notes


def _shape(parameter: Tensor) -> tuple[int, ...]:
    lazy = isinstance(parameter, nn.parameter.UninitializedParameter)
    return (0,) if lazy else tuple(parameter.shape)


def classify(
    model: nn.Module, spec: Conversion, present: Sequence[Site], strict: bool
) -> tuple[list[Found], Selection]:
    """Every parameter of a model but trained spreads, with its action; and the selection itself.

    Args:
        model: any module.
        spec: what is selected.
        present: the posteriors that it has already.
        strict: whether a pattern that matches nothing is an error.
    """
    selection = select(model, skip=spec.skip, only=spec.only, preset=spec.preset, strict=strict)
    raws = {id(site.raw) for site in present}
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
    return found, selection


def make_plan(
    model: nn.Module,
    spec: Conversion,
    present: Sequence[Site] = (),
    *,
    strict: bool | None = None,
) -> Planned:
    """Decide everything about a conversion; nothing changes but the plan's own records.

    In the order in which one decision needs the other: which parameters are selected; what is
    known of each (its root mean square, fixed elements); whether anything forbids it; its sigma,
    which by default depends on how many there are; its estimator, which depends on its layer.
    A parameter that has its posterior already counts among them, but is not chosen again.

    Args:
        model: A module that :func:`.validation.check_model` accepts.
        spec: The settings.
        present: The posteriors that the model has already, as :func:`.posterior.sites` gives them.
        strict: Whether a pattern that matches nothing is an error; None asks the settings.

    Raises:
        NoMatchError: A pattern matches nothing, under ``strict``.
        UnsupportedModuleError: Something selected cannot have a posterior.
    """
    strict = spec.config.strict if strict is None else strict
    found, selection = classify(model, spec, present, strict)
    spec = replace(spec, skip=selection.skip, only=selection.only)
    bayes = [item for item in found if item.action == "bayes"]
    fixed = _measure(model, bayes)
    means = {id(site.mean) for site in present}
    chosen = [item for item in bayes if id(item.parameter) not in means]
    refuse(model, chosen, RAW_SUFFIX[spec.config.parameterization], bool(spec.skip))
    scales = {id(item.parameter): item.rms for item in bayes}
    for item in bayes:
        item.std = _initial_std(item, spec.initial_std, len(bayes), scales)
    spec, notes = _choose_estimators(model, bayes, spec, strict)
    plan = ConversionPlan(
        type(model).__name__,
        tuple(_row(item, spec) for item in found),
        selection.notes + notes,
        hints(model, {name for item in bayes for name, _, _ in item.places}),
        fixed,
        below_spacing(
            Spread(item.name, item.std, item.rms, item.parameter.dtype)
            for item in bayes
            if item.estimator == "weight" and item.std is not None and item.rms is not None
        ),
    )
    return Planned(plan, spec, chosen)


def _measure(model: nn.Module, bayes: list[Found]) -> tuple[str, ...]:
    """Note each parameter's root mean square and fixed elements; says of these what and why."""
    rules = masked(model)
    told = []
    for item in bayes:
        item.rms = _rms(item.parameter)
        rule = rules.get(id(item.parameter))
        if rule is not None:
            told.append(rule.sentence(item.name))
            item.fixed = None if rule.readers else rule
    return tuple(told)


def _row(item: Found, spec: Conversion) -> PlanRow:
    shape, bayes = _shape(item.parameter), item.action == "bayes"
    return PlanRow(
        name=item.name,
        aliases=tuple(name for name, _, _ in item.places[1:]),
        owner=type(item.places[0][1]).__name__,
        shape=shape,
        elements=math.prod(shape),
        action=item.action,
        rewrite=_rewrite(item) if bayes else "",
        prior=str(spec.prior) if bayes else "",
        estimator=item.estimator if bayes else "",
        std=item.std,
        fixed=0 if item.fixed is None else item.fixed.elements,
    )


@documented(Conversion)
def plan(  # noqa: D417 - the others are fields of Conversion
    model: nn.Module,
    *,
    skip: Pattern | Sequence[Pattern] = (),
    only: Pattern | Sequence[Pattern] = (),
    preset: str | None = None,
    prior: Prior = Conversion.prior,
    initial_std: InitialStd | None = None,
    estimator: Estimators = "weight",
    config: BBBConfig = Conversion.config,
) -> ConversionPlan:
    """The dry run of :func:`to_bbb`: what it would do, parameter by parameter.

    Args:
        model: Any module; it is not changed.

    Returns:
        One row for each parameter, and notes. It prints as a table.

    Raises:
        ArgumentError: An argument has a value that cannot work.
        NoMatchError: A pattern matches nothing, under ``config.strict``.
        UnsupportedModuleError: The model cannot be converted; the message lists every reason.

    >>> import torch, bayesify
    >>> p = bayesify.plan(torch.nn.Linear(3, 1), skip="bias")
    >>> [(row.name, row.action) for row in p.rows]
    [('weight', 'bayes'), ('bias', 'skipped: bias')]
    """
    spec = taken(Conversion, locals())
    check_model(model)
    return make_plan(model, spec, list(sites(model))).plan
