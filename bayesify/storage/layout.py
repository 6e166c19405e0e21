"""What stands in a file: its JSON, both ways, and its tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import BayesifyError, CheckpointError
from ..gaussian import Parameterization
from ..planning import BBBConfig, Conversion
from ..posterior import PRIOR_MEAN_SUFFIX, RAW_SUFFIX, Estimator
from ..priors import GaussianPrior, LivePrior, Prior, ScaleMixturePrior

FORMAT = 1
_KEYS = {
    "aliases", "conversions", "elements", "info", "input", "model", "posterior", "versions",
}  # fmt: skip
KEY = "bayesify"


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
        return cls(
            name=str(data["name"]),
            aliases=tuple(map(str, data["aliases"])),
            slot=str(data["slot"]),
            parameterization=BBBConfig(parameterization=data["parameterization"]).parameterization,
            prior=_prior_from_json(data["prior"]),
            prior_scale=float(data["prior_scale"]),
            estimator=Conversion(estimators=(("*", data.get("estimator", "weight")),)).estimators[
                0
            ][1],
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
    kinds: dict[str, type[GaussianPrior | ScaleMixturePrior]] = {
        kind.__name__: kind for kind in (GaussianPrior, ScaleMixturePrior)
    }
    return kinds[data["kind"]](**{k: v for k, v in data.items() if k != "kind"})


def conversion_to_json(conversion: Conversion) -> dict[str, Any]:
    """Plain values that :func:`conversion_from_json` reads."""
    # A file does not choose which class is imported: a class pattern becomes its name.
    skip, only = (
        [p if isinstance(p, str) else p.__name__ for p in patterns]
        for patterns in (conversion.skip, conversion.only)
    )
    return {
        "skip": skip,
        "only": only,
        "preset": conversion.preset,
        "prior": _prior_to_json(conversion.prior, "the conversion"),
        "logvar": conversion.logvar,
        "estimators": [
            [p if isinstance(p, str) else p.__name__, e] for p, e in conversion.estimators
        ],
        "config": asdict(conversion.config),
    }


def conversion_from_json(data: Mapping[str, Any]) -> Conversion:
    """The conversion that :func:`conversion_to_json` gave; anything else raises."""
    return Conversion(
        skip=tuple(data["skip"]),
        only=tuple(data["only"]),
        preset=data["preset"],
        prior=_prior_from_json(data["prior"]),
        logvar=data["logvar"],
        estimators=tuple((str(p), e) for p, e in data.get("estimators", ())),
        config=BBBConfig(**data["config"]),
    )


@dataclass(frozen=True)
class Contents:
    """A whole file, checked to be complete in itself.

    ``conversions`` are (path of the converted module, arguments); ``spec`` is the JSON of a
    ModelSpec; ``state`` the tensors of the state_dict, tied ones under each of their keys;
    ``extra`` the plain values in it; ``classes`` the names of the outputs, as far as they are
    known.
    """

    rows: tuple[Row, ...]
    conversions: tuple[tuple[str, Conversion], ...]
    kind: str
    spec: Any
    state: dict[str, Tensor]
    extra: dict[str, Any]
    prior_means: dict[str, Tensor]
    classes: tuple[str, ...]


def read_contents(path: str | os.PathLike[str]) -> Contents:
    """Read a file; its tensors are mapped memory, to be copied from.

    Raises:
        CheckpointError: As :func:`read_header`.
    """
    with _open(path) as file:
        header = _header(path, file)
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    try:
        rows = tuple(map(Row.from_json, header["posterior"]))
        conversions = tuple(
            (str(c["root"]), conversion_from_json(c["arguments"])) for c in header["conversions"]
        )
        extra = dict(header.get("extra", {}))
        state = {**tensors, **{key: tensors[kept] for key, kept in header["aliases"].items()}}
        for row in rows:
            for name in row.names:
                if state[name].shape != state[row.raw(name)].shape:
                    raise ValueError(f"{row.raw(name)} has another shape than {name}")
        prior_means = {
            row.name: state.pop(row.name + PRIOR_MEAN_SUFFIX)
            for row in rows
            if isinstance(row.prior, GaussianPrior) and row.prior.needs_initial
        }
        kind, spec = str(header["model"]["class"]), header["model"]["spec"]
    except (KeyError, TypeError, ValueError, AttributeError, BayesifyError) as error:
        raise _damaged(path, error) from error
    named = header["info"].get("classes") if isinstance(header["info"], dict) else None
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        named = []
    return Contents(rows, conversions, kind, spec, state, extra, prior_means, tuple(named))


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file says about itself, without its tensors; the keys stand in this package's text.

    Raises:
        CheckpointError: The file is no readable bayesify checkpoint, or of a newer format.
    """
    with _open(path) as file:
        return _header(path, file)


def describe(header: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a header says, in a few (name, value) lines for people."""
    model, elements = header["model"], header["elements"]
    share = elements["bayesian"] / elements["total"]
    spec = {k: v for k, v in (model["spec"] or {}).items() if v}
    lines = [
        ("model", f"{spec.pop('name', 'given by the user')} ({model['class']})"),
        ("arguments", ", ".join(f"{k}={v}" for k, v in spec.items())),
        ("weights", str(header["info"].get("weights", ""))),
        (
            "posterior",
            f"{elements['bayesian']:,} of {elements['total']:,} parameters ({share:.2%})",
        ),
        ("prior", ", ".join(sorted({str(Row.from_json(r).prior) for r in header["posterior"]}))),
    ]
    for entry in header["conversions"]:
        conversion = conversion_from_json(entry["arguments"])
        words = [f"{k}={', '.join(map(str, v))}" for k, v in
                 (("skip", conversion.skip), ("only", conversion.only)) if v]  # fmt: skip
        words += [f"preset={conversion.preset}"] if conversion.preset else []
        where = f"{entry['root']}: " if entry["root"] else ""
        lines.append(("converted", where + ("; ".join(words) or "everything")))
    if header["input"]:
        lines.append(("input", " x ".join(map(str, header["input"]["size"]))))
    if "classes" in header["info"]:
        lines.append(("classes", f"{len(header['info']['classes'])}"))
    versions = ", ".join(f"{k} {v}" for k, v in header["versions"].items())
    lines.append(("written by", f"{versions} (format {header['format']})"))
    return [(name, value) for name, value in lines if value]


@contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[Any]:
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "does not exist"
        raise CheckpointError(f"{path} {what}; expected a file that bayesify.save wrote.")
    try:
        with safe_open(Path(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is no readable safetensors file ({error}): it is cut short, damaged, or of "
            "another kind."
        ) from error


def _header(path: str | os.PathLike[str], file: Any) -> dict[str, Any]:
    text = (file.metadata() or {}).get(KEY)
    if text is None:
        raise CheckpointError(
            f"{path} holds tensors but no posterior: it is a deterministic checkpoint. Give it as "
            "the weights of a model: create_model(name, weights=FILE), or on the command line "
            "bayesify convert NAME --weights FILE."
        )
    try:
        header: dict[str, Any] = json.loads(text)
        version = header["format"]
        newer = version > FORMAT
        if not newer and not header.keys() >= _KEYS:
            raise KeyError(*sorted(_KEYS - header.keys()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(path, error) from error
    if newer:
        raise CheckpointError(
            f"{path} is of format {version}, and this version of bayesify reads formats up to "
            f"{FORMAT}: update bayesify. It was written with {header.get('versions')}."
        )
    return header


def _damaged(path: str | os.PathLike[str], error: Exception) -> CheckpointError:
    return CheckpointError(
        f"The header of {path} is damaged ({type(error).__name__}: {error}). Fetch or write the "
        "file anew."
    )
