"""What a conversion is asked for: the settings of ``to_bbb``, ``to_bbb_`` and ``plan``, once."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ArgumentError
from .estimators import check_estimator
from .gaussian import Parameterization
from .numeric import real
from .posterior import RAW_SUFFIX, Estimator
from .priors import LEAST_STD, MOST_STD, GaussianPrior, Prior, may_be_std
from .selection import ParsedPattern, parse_patterns

Estimators = Estimator | Mapping[Any, Estimator]
"""One for all, or by pattern."""
MOST_INITIAL_STD = math.exp(40.0)
"""The largest initial sigma: beyond, its variance overflows in float32."""
_SHARE = f"a number from {LEAST_STD:g} to {MOST_STD:g}"
_STD = f"a number above 0 and up to {MOST_INITIAL_STD:.2g}, or a RelativeStd"


@dataclass(frozen=True)
class RelativeStd:
    """An initial standard deviation in units of each tensor's own weights.

    ``sigma = fraction * sqrt(mean(w**2))``; a tensor of zeros takes the root mean square of the
    largest tensor in its module, or else 1.

    Args:
        fraction: Sigma over root mean square, in [1e-8, 1e8]. Training from random weights wants
            0.01 to 0.1.

    Raises:
        ArgumentError: ``fraction`` is out of its range.
    """

    fraction: float

    def __post_init__(self) -> None:
        fraction = real("RelativeStd: fraction", self.fraction, _SHARE, may_be_std)
        object.__setattr__(self, "fraction", fraction)

    def __str__(self) -> str:
        return f"{self.fraction:g}rms"


InitialStd = float | RelativeStd
"""Of every weight the same, or in proportion to each tensor."""


def read_initial_std(text: str) -> InitialStd:
    """The initial sigma in a text: ``0.01``, or ``0.05rms`` of each tensor's root mean square.

    Raises:
        ArgumentError: It is neither.
    """
    found = re.fullmatch(r"\s*(\S*?)\s*(rms)?\s*", text)
    try:
        number = float(found[1] if found else text)
    except ValueError:
        raise ArgumentError(
            "initial_std must be a number, 0.01, or a share of each tensor's root mean square, "
            f"0.05rms, got {text!r}."
        ) from None
    return RelativeStd(number) if found and found[2] else _absolute(number)


def _absolute(value: Any) -> float:
    return real("initial_std", value, _STD, lambda std: 0.0 < std <= MOST_INITIAL_STD)


@dataclass(frozen=True)
class BBBConfig:
    """What a conversion does beyond the choice of parameters, prior and initial sigma.

    Args:
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

    parameterization: Parameterization = "exp"
    include_frozen: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
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
class Conversion:
    """The settings of one conversion, kept with the model so that new layers are converted alike.

    It takes what :func:`to_bbb` takes and holds it parsed: patterns as tuples, ``estimator`` as
    (pattern, estimator) pairs, of which the first that matches a parameter is its own.

    Args:
        skip: Patterns of what stays deterministic: a class, a class name or glob, a module's
            name, a glob on qualified names, ``re:...``, ``@last-layer``, ``@before-batchnorm``, or
            a function ``(module, name) -> bool``, asked about the parameters that each module holds
            itself. One or a sequence.
        only: Patterns of what may become Bayesian; skip beats only.
        preset: ``full``, ``no-conv``, ``linear-only``, ``no-layernorm`` or ``last-layer``.
        prior: Prior over the weights.
        initial_std: Initial sigma: a number for every weight, or ``RelativeStd(0.05)`` of each
            tensor's root mean square. None keeps a pretrained network's function: 0.003 of the root
            mean square, divided by the square root of the number of Bayesian tensors.
        estimator: How a weight is drawn that one linear layer, convolution or embedding reads.
            ``"weight"``: once, for the whole batch. ``"flipout"``: once, with random signs for
            each example. ``"local"``: its outputs instead, each element by itself. The last two
            give gradients of less variance; reads that cannot take them keep ``"weight"``. A
            mapping from patterns, ``{"head": "local", "*": "flipout"}``, chooses for each
            parameter: the first that matches.
        config: See :class:`BBBConfig`.

    Raises:
        ArgumentError: An argument has a value that cannot work.
    """

    skip: tuple[ParsedPattern, ...] = ()
    only: tuple[ParsedPattern, ...] = ()
    preset: str | None = None
    prior: Prior = GaussianPrior()  # noqa: RUF009 - it is frozen
    initial_std: InitialStd | None = None
    estimator: tuple[tuple[ParsedPattern, Estimator], ...] = (("*", "weight"),)
    config: BBBConfig = BBBConfig()

    def __post_init__(self) -> None:
        for name in ("skip", "only"):
            object.__setattr__(self, name, parse_patterns(getattr(self, name)))
        if not isinstance(self.prior, Prior):
            raise ArgumentError(
                "prior must be a GaussianPrior, ScaleMixturePrior or LivePrior, got "
                f"{self.prior!r}."
            )
        if self.initial_std is not None and not isinstance(self.initial_std, RelativeStd):
            object.__setattr__(self, "initial_std", _absolute(self.initial_std))
        object.__setattr__(self, "estimator", _by_pattern(self.estimator))
        if not isinstance(self.config, BBBConfig):
            raise ArgumentError(f"config must be a BBBConfig, got {self.config!r}.")

    @property
    def patterns(self) -> tuple[ParsedPattern, ...]:
        """All patterns, those of ``estimator`` too."""
        return (*self.skip, *self.only, *(pattern for pattern, _ in self.estimator))


def _by_pattern(given: Any) -> tuple[tuple[ParsedPattern, Estimator], ...]:
    """``estimator`` as pairs: of one for all, of a mapping, or of pairs."""
    pairs: Any = [("*", given)]
    if isinstance(given, Mapping):
        pairs = given.items()
    elif isinstance(given, tuple) and all(isinstance(p, tuple) and len(p) == 2 for p in given):
        pairs = given
    for _, estimator in pairs:
        check_estimator(estimator)
    return tuple((p, estimator) for key, estimator in pairs for p in parse_patterns(key))
