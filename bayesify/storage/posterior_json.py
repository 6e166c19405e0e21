"""What a file says of its posterior, in JSON, both ways: each parameter, and each conversion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from ..conversion import BBBConfig, Conversion, InitialStd, RelativeStd
from ..errors import CheckpointError
from ..gaussian import Parameterization
from ..numeric import real
from ..posterior import RAW_SUFFIX, Estimator
from ..priors import STD_RANGE, GaussianPrior, LivePrior, Prior, ScaleMixturePrior, may_be_std
from ..selection import Filter, ParsedPattern, Recorded

_MAX_PATTERNS, _MAX_PATTERN = 1000, 1000
"""Of one conversion, and characters of one: each is compared with every name of a model."""


@dataclass(frozen=True)
class Row:
    """One Bayesian parameter; ``slot`` is the name that its noise is keyed by."""

    name: str
    aliases: tuple[str, ...]
    slot: str
    parameterization: Parameterization
    prior: Prior
    prior_scale: float
    estimator: Estimator

    @property
    def names(self) -> frozenset[str]:
        """All names of the parameter, more than one if it is tied."""
        return frozenset((self.name, *self.aliases))

    def raw(self, name: str | None = None) -> str:
        """Key of the trained spread beside ``name``, by default the first."""
        return (name or self.name) + RAW_SUFFIX[self.parameterization]

    def to_json(self) -> dict[str, Any]:
        """Plain values that :meth:`from_json` reads."""
        return {
            "name": self.name,
            "aliases": list(self.aliases),
            "slot": self.slot,
            "parameterization": self.parameterization,
            "prior": _prior_to_json(self.prior, self.name),
            "prior_scale": self.prior_scale,
            "estimator": self.estimator,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """The row that :meth:`to_json` gave; anything else raises."""
        prior = _prior_from_json(data["prior"])
        std = prior.std if isinstance(prior, GaussianPrior) else 1.0
        estimator = data.get("estimator", "weight")
        return cls(
            name=text_in(data["name"]),
            aliases=tuple(map(text_in, list_in(data["aliases"]))),
            slot=text_in(data["slot"]),
            parameterization=BBBConfig(parameterization=data["parameterization"]).parameterization,
            prior=prior,
            prior_scale=real(
                "prior_scale",
                data["prior_scale"],
                f"such that std is {STD_RANGE}",
                lambda scale: may_be_std(std * scale),
            ),
            estimator=Conversion(estimator=(("*", estimator),)).estimator[0][1],
        )


def _prior_to_json(prior: Prior, name: str) -> dict[str, Any]:
    if isinstance(prior, LivePrior):
        raise CheckpointError(
            f"The prior of {name!r} is live: it calls a function, which a file cannot hold. Set "
            "another one before saving, set_prior_(model, GaussianPrior()), and the live one again "
            "after loading."
        )
    return {"kind": type(prior).__name__, **asdict(prior)}


def _prior_from_json(data: Mapping[str, Any]) -> Prior:
    kinds: dict[Any, type[GaussianPrior | ScaleMixturePrior]] = {
        kind.__name__: kind for kind in (GaussianPrior, ScaleMixturePrior)
    }
    return kinds[data["kind"]](**{k: v for k, v in data.items() if k != "kind"})


def conversion_to_json(conversion: Conversion) -> dict[str, Any]:
    """Plain values that :func:`conversion_from_json` reads."""
    return {
        "skip": [*map(_pattern_to_json, conversion.skip)],
        "only": [*map(_pattern_to_json, conversion.only)],
        "preset": conversion.preset,
        "prior": _prior_to_json(conversion.prior, "the conversion"),
        "initial_std": _initial_std_to_json(conversion.initial_std),
        "estimators": [[_pattern_to_json(p), e] for p, e in conversion.estimator],
        "config": asdict(conversion.config),
    }


def conversion_from_json(data: Mapping[str, Any]) -> Conversion:
    """The conversion that :func:`conversion_to_json` gave; anything else raises."""
    skip, only = (tuple(map(_pattern_from_json, list_in(data[key]))) for key in ("skip", "only"))
    estimator = tuple((_pattern_from_json(p), e) for p, e in list_in(data.get("estimators", [])))
    patterns = (*skip, *only, *(pattern for pattern, _ in estimator))
    globs = [pattern for pattern in patterns if set(pattern) & set("*?[")]
    if len(globs) > _MAX_PATTERNS or any(len(pattern) > _MAX_PATTERN for pattern in patterns):
        raise ValueError(
            f"more than {_MAX_PATTERNS:,} patterns, or one of more than {_MAX_PATTERN:,} characters"
        )
    config = dict(data["config"])
    return Conversion(
        skip=skip,
        only=only,
        preset=None if data["preset"] is None else text_in(data["preset"]),
        prior=_prior_from_json(data["prior"]),
        initial_std=_initial_std_from_json(data, config.pop("relative_std", None)),
        estimator=estimator,
        config=BBBConfig(**config),
    )


def _pattern_to_json(pattern: ParsedPattern) -> str | dict[str, Any]:
    """Text, or what a function has chosen: a file holds no code, nor says which class to import."""
    if isinstance(pattern, Filter):
        pattern = pattern.recorded
    if isinstance(pattern, Recorded) and not pattern.startswith("re:"):
        return {"function": str(pattern), "names": sorted(pattern.names)}
    return pattern if isinstance(pattern, str) else pattern.__name__


def _pattern_from_json(value: Any) -> str:
    if isinstance(value, dict):
        return Recorded(
            text_in(value["function"]), frozenset(map(text_in, list_in(value["names"])))
        )
    return Recorded(value) if text_in(value).startswith("re:") else text_in(value)


def _initial_std_to_json(value: InitialStd | None) -> float | dict[str, float] | None:
    return {"rms": value.fraction} if isinstance(value, RelativeStd) else value


def _initial_std_from_json(data: Mapping[str, Any], relative: Any) -> InitialStd | None:
    """The initial sigma; files of format 1 have ``logvar``, or ``relative_std`` in the config."""
    if "initial_std" not in data:
        logvar = data["logvar"]
        if logvar is None:
            return None if relative is None else RelativeStd(relative)
        return math.exp(0.5 * real("logvar", logvar, "a number up to 80", lambda v: v <= 80.0))
    value = data["initial_std"]
    return RelativeStd(value["rms"]) if isinstance(value, dict) else value


def text_in(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def list_in(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is no list")
    return value


def rows_of(header: Mapping[str, Any]) -> tuple[Row, ...]:
    """The Bayesian parameters that a header names."""
    return tuple(map(Row.from_json, header["posterior"]))


def conversions_of(header: Mapping[str, Any]) -> tuple[tuple[str, Conversion], ...]:
    """(path of the converted module, arguments) of each conversion that a header names."""
    return tuple(
        (text_in(c["root"]), conversion_from_json(c["arguments"])) for c in header["conversions"]
    )


def recorded(
    root: str, conversion: Conversion, rows: tuple[Row, ...], state: Mapping[str, Tensor]
) -> Conversion:
    """The conversion with what its regular expressions had chosen in their place.

    A file of a stranger could hold one that takes for ever, so they are not even compiled.
    """
    prefix = f"{root}." if root else ""
    estimators = {
        name.removeprefix(prefix): row.estimator
        for row in rows
        for name in row.names
        if name.startswith(prefix)
    }
    below = frozenset(key.removeprefix(prefix) for key in state if key.startswith(prefix))
    bayesian = frozenset(estimators)

    def record(pattern: ParsedPattern, names: frozenset[str]) -> ParsedPattern:
        if not isinstance(pattern, Recorded):
            return pattern
        regex = pattern.startswith("re:")
        return Recorded(str(pattern), names if regex else pattern.names, below)

    return replace(
        conversion,
        skip=tuple(record(pattern, below - bayesian) for pattern in conversion.skip),
        only=tuple(record(pattern, bayesian) for pattern in conversion.only),
        estimator=tuple(
            (record(p, frozenset(n for n, own in estimators.items() if own == e)), e)
            for p, e in conversion.estimator
        ),
    )
