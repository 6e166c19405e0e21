"""What stands in a file: its JSON, both ways, and its tensors."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..conversion import Conversion
from ..errors import BayesifyError, CheckpointError
from ..estimators import UnknownEstimatorError
from ..likelihoods import Likelihood, from_json, unstored
from ..models import InputConfig
from ..posterior import PRIOR_MEAN_SUFFIX
from ..priors import GaussianPrior
from .json_text import parse_json
from .posterior_json import Row, conversions_of, recorded, rows_of, text_in

FORMAT = 2
_KINDS: dict[str, tuple[type, ...]] = {
    "aliases": (dict,), "conversions": (list,), "elements": (dict,), "info": (dict,),
    "input": (dict, type(None)), "model": (dict,), "posterior": (list,), "versions": (dict,),
}  # fmt: skip
KEY = "bayesify"
LIKELIHOOD = "__likelihood__."
"""Before the names of the likelihood's tensors, which are no part of the model's state."""


def input_of(header: Mapping[str, Any]) -> InputConfig:
    """How images are prepared for the model, where a header says it."""
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in header["input"].items()
    }
    return InputConfig(**fields)


def classes_in(header: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the outputs, as far as a header says them."""
    named = header["info"].get("classes")
    known = isinstance(named, list) and all(isinstance(name, str) for name in named)
    return tuple(named) if known else ()


@dataclass(frozen=True)
class Contents:
    """A whole file, checked to be complete in itself.

    ``conversions`` are (path of the converted module, arguments); ``spec`` is the JSON of a
    ModelSpec; ``state`` the tensors of the state_dict, tied ones under each of their keys;
    ``extra`` the plain values in it; ``classes`` the names of the outputs, as far as they are
    known; ``unstored`` the kinds of likelihoods that the model had and no file can hold.
    """

    rows: tuple[Row, ...]
    conversions: tuple[tuple[str, Conversion], ...]
    kind: str
    spec: Any
    state: dict[str, Tensor]
    extra: dict[str, Any]
    prior_means: dict[str, Tensor]
    classes: tuple[str, ...]
    likelihood: Likelihood | None
    unstored: tuple[str, ...]


def read_contents(path: str | os.PathLike[str]) -> Contents:
    """Read a file; its tensors are mapped memory, to be copied from.

    Raises:
        CheckpointError: As :func:`read_header`.
    """
    with _open(path) as file:
        header = _header(path, file)
        try:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        except (SafetensorError, OSError):
            raise
        except Exception as error:  # a dtype that torch does not have
            raise _damaged(path, error) from error
    try:
        rows, conversions = rows_of(header), conversions_of(header)
        extra = dict(header.get("extra", {}))
        noise = {key: tensors.pop(key) for key in list(tensors) if key.startswith(LIKELIHOOD)}
        said = header.get("likelihood")  # files of before say nothing
        own = {key.removeprefix(LIKELIHOOD): value for key, value in noise.items()}
        missing = () if said is None else tuple(unstored(said))
        likelihood = None if (said is None or missing) and not own else from_json(said, own)
        state = {**tensors, **{key: tensors[kept] for key, kept in header["aliases"].items()}}
        for row in rows:
            for name in row.names:
                _check_spread(name, state[name], row.raw(name), state[row.raw(name)])
        prior_means = {
            row.name: state.pop(row.name + PRIOR_MEAN_SUFFIX)
            for row in rows
            if isinstance(row.prior, GaussianPrior) and row.prior.needs_initial
        }
        for name, prior_mean in prior_means.items():
            _check_spread(name, state[name], name + PRIOR_MEAN_SUFFIX, prior_mean)
        conversions = tuple((root, recorded(root, c, rows, state)) for root, c in conversions)
    except (KeyError, TypeError, ValueError, AttributeError, BayesifyError) as error:
        raise _damaged(path, error) from error
    kind, spec = header["model"]["class"], header["model"]["spec"]
    return Contents(
        rows, conversions, kind, spec, state, extra, prior_means, classes_in(header), likelihood,
        missing,
    )  # fmt: skip


def _check_spread(name: str, mean: Tensor, beside: str, tensor: Tensor) -> None:
    """Refuse what cannot be the spread, or the prior's mean, of a tensor."""
    if tensor.shape != mean.shape:
        raise ValueError(f"{beside} has another shape than {name}")
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise ValueError(f"{beside} is of {tensor.dtype}")


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
        ("prior", ", ".join(sorted({str(row.prior) for row in rows_of(header)}))),
    ]
    for root, conversion in conversions_of(header):
        words = [f"{k}={', '.join(map(str, v))}" for k, v in
                 (("skip", conversion.skip), ("only", conversion.only)) if v]  # fmt: skip
        words += [f"preset={conversion.preset}"] if conversion.preset else []
        where = f"{root}: " if root else ""
        lines.append(("converted", where + ("; ".join(words) or "everything")))
    if header["input"]:
        lines.append(("input", " x ".join(map(str, header["input"]["size"]))))
    classes = classes_in(header)
    if classes:
        lines.append(("classes", f"{len(classes)}"))
    said = header.get("likelihood")
    if said is not None:
        lines.append(("likelihood", _shown(said)))
    versions = ", ".join(f"{k} {v}" for k, v in header["versions"].items())
    lines.append(("written by", f"{versions} (format {header['format']})"))
    return [(name, value) for name, value in lines if value]


def _shown(likelihood: Mapping[str, Any]) -> str:
    """A likelihood as it would be written in Python."""
    arguments = likelihood["args"] or {}
    if likelihood["kind"] == "Heads":
        return ", ".join(f"{name}: {_shown(head)}" for name, head in arguments["heads"])
    return f"{likelihood['kind']}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"


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
        header: dict[str, Any] = parse_json(text)
        version = header["format"]
        if type(version) is not int or version < 1:
            raise ValueError(f"its format is {version!r}")
        newer = version > FORMAT
        if not newer:
            _check_header(header)
    except (ValueError, TypeError, KeyError, AttributeError, BayesifyError) as error:
        raise _damaged(path, error) from error
    if newer:
        raise CheckpointError(
            f"{path} is of format {version}, and this version of bayesify reads formats up to "
            f"{FORMAT}: update bayesify. It was written with {header.get('versions')}."
        )
    return header


def _check_header(header: Mapping[str, Any]) -> None:
    """Refuse a header in which something is missing, of another kind, or contradicts the rest."""
    for key, kinds in _KINDS.items():
        if not isinstance(header[key], kinds):
            raise TypeError(f"{key} is {header[key]!r:.60}")
    model, elements = header["model"], header["elements"]
    text_in(model["class"])
    if model["spec"] is not None:
        text_in(model["spec"]["name"])
    total, bayesian = elements["total"], elements["bayesian"]
    if not (type(total) is type(bayesian) is int and 0 <= bayesian <= total > 0):
        raise ValueError(f"elements is {elements!r:.60}")
    if header.get("likelihood") is not None:
        unstored(header["likelihood"])
        _shown(header["likelihood"])
    for value in (*header["aliases"].values(), *header["versions"].values()):
        text_in(value)
    if header["input"] is not None:
        input_of(header)
    rows = rows_of(header)
    names = Counter(name for row in rows for name in row.names)
    twice = sorted(name for name, count in names.items() if count > 1)
    if twice:
        raise ValueError(f"{twice[0]!r} stands there twice")
    _check_roots([root for root, _ in conversions_of(header)], rows)


def _check_roots(roots: list[str], rows: tuple[Row, ...]) -> None:
    """Each Bayesian parameter is below the root of one conversion, and none below two."""
    known = set(roots)
    if len(known) < len(roots):
        raise ValueError("a module is converted twice")
    for root in roots:
        if root and not known.isdisjoint(_above(root)):
            raise ValueError(f"{root!r} is converted twice")
    for row in rows:
        if known.isdisjoint(_above(row.name)):
            raise ValueError(f"{row.name!r} is below no conversion")


def _above(name: str) -> list[str]:
    """The modules that a name goes through: of ``a.b.weight`` the whole, ``a`` and ``a.b``."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts))]


def _damaged(path: str | os.PathLike[str], error: Exception) -> CheckpointError:
    if isinstance(error, UnknownEstimatorError):
        return CheckpointError(f"{path} needs an estimator that is not there. {error}")
    return CheckpointError(
        f"The header of {path} is damaged ({type(error).__name__}: {error}). Fetch or write the "
        "file anew."
    )
