"""A Bayesian model in one safetensors file: its tensors, and in JSON how to build it again.

The tensors are the state_dict (posterior means, log variances, buffers; tied tensors once) and,
for a prior around the initial weights, those weights as ``<name>_prior_mean``. The only metadata
key is ``bayesify``, a JSON text with sorted keys:

============= =================================================================================
format        version of this layout, an integer
model         ``class``, and ``spec``: the :class:`bayesify.models.ModelSpec`, or null
input         the :class:`bayesify.models.InputConfig`, or null
elements      ``total`` and ``bayesian``: parameters of the model, those with a posterior
conversions   ``root`` and the arguments of each conversion, for layers that are added later
posterior     one row for each Bayesian parameter: ``name``, ``aliases``, ``slot`` (the name that
              its noise is keyed by), ``parameterization``, ``prior``, ``prior_scale``
aliases       state_dict keys that are stored under another key
versions      of the packages that wrote the file
info          what the caller of :func:`save` added
============= =================================================================================
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import gaussian
from .convert import BBBConfig, Conversion, _revert, apply_
from .errors import ArgumentError, BayesifyError, CheckpointError, ModelError
from .gaussian import Parameterization
from .kernels.noise import key_of
from .models import ModelSpec, input_config
from .posterior import (
    PRIOR_MEAN_SUFFIX,
    RAW_SUFFIX,
    Site,
    attach_prior,
    bayesian_sites,
    is_bayesian,
    owner_state,
    sites,
)
from .priors import GaussianPrior, LivePrior, Prior, ScaleMixturePrior
from .rewriter import caches
from .selection import Pattern

FORMAT = 1
KEY = "bayesify"
SPEC = "_bayesify_spec"
"""Attribute under which a model that was built by its name carries its ModelSpec."""
_PACKAGES = ("bayesify", "numpy", "safetensors", "timm", "torch", "torchvision")
_LISTED = 5


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    spec: ModelSpec | None = None,
    info: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a Bayesian model into one safetensors file, whole or not at all.

    The same model gives the same bytes. A compiled model, or one inside DistributedDataParallel,
    is saved as the model itself.

    Args:
        model: A converted model.
        path: The file to write; by convention it ends in ``.bbb.safetensors``.
        spec: How :func:`load` builds the model. A model of ``create_model`` brings its own; one
            without needs ``load(path, model=...)``.
        info: Anything of your own that JSON can hold; :func:`read_header` returns it.
        overwrite: Replace a file that exists.

    Raises:
        ArgumentError: ``info`` cannot be JSON.
        CheckpointError: The path exists, is a folder or cannot be written; or the model holds what
            such a file cannot: a live prior, sharded or meta tensors, extra state.
        UnsupportedModuleError: ``model`` has no posterior.

    >>> import tempfile, torch, bayesify
    >>> model = bayesify.to_bbb(torch.nn.Linear(2, 1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(model, folder + "/a.bbb.safetensors")
    ...     back = load(folder + "/a.bbb.safetensors", model=torch.nn.Linear(2, 1))
    >>> torch.equal(back.weight, model.weight)
    True
    """
    while hasattr(model, "_orig_mod"):
        model = model._orig_mod
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    with replacing(path, overwrite=overwrite) as temporary:
        header = _header_of(model, spec, info)
        tensors, header["aliases"] = _tensors_of(model)
        text = json.dumps(header, sort_keys=True, allow_nan=False)
        # More than one key: safetensors writes them in an order that differs from run to run.
        save_file(tensors, temporary, metadata={KEY: text})


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Read a model that :func:`save` wrote: same posterior, priors, and draws for a given seed.

    Args:
        path: The file.
        model: A deterministic model of the same architecture, or a converted one with the same
            Bayesian parameters; it is changed in place, and left as it was after an error. None
            builds a model of timm or torchvision by the name in the file.
        device: Where to; None leaves a given model where it is, and builds on the CPU.

    Returns:
        ``model``, or the one built, in evaluation mode. Which parameters are frozen
        (``requires_grad=False``) and live priors are not in the file.

    Raises:
        ArgumentError: ``model`` is no module.
        CheckpointError: The file cannot be read, is of a newer format, or does not fit the model;
            the message lists what differs.
    """
    path = Path(path)
    file = _parse(path, *_read(path))
    if model is None:
        result = _build(path, file)
    elif not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, not {model!r}.")
    elif hasattr(model, "_orig_mod") or isinstance(
        model, nn.DataParallel | nn.parallel.DistributedDataParallel
    ):
        raise CheckpointError(
            f"{path} cannot be loaded into a {type(model).__name__}: give the model inside it, and "
            "compile or wrap it afterwards."
        )
    else:
        result = model
    _check_fit(path, result, file)
    if not is_bayesian(result):
        _convert(path, result, file)
    _restore(result, file)
    return result if device is None else result.to(device)


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file says about itself, without its tensors; see this module's text for the keys.

    Raises:
        CheckpointError: The file is no readable bayesify checkpoint, or of a newer format.
    """
    path = Path(path)
    with _open(path) as file:
        return _header(path, file)


def read_stats(path: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
    """What :func:`bayesify.posterior_stats` says of the model in a file, without building it.

    Raises:
        CheckpointError: As :func:`load`.
    """
    path = Path(path)
    file = _parse(path, *_read(path))
    stats = {}
    for row in file.rows:
        mean = file.state[row.name].float()
        std = gaussian.std_from_raw(file.state[row.raw].float(), row.parameterization)
        snr = gaussian.signal_to_noise(mean, std)
        stats[row.name] = {
            "elements": mean.numel(),
            "mean_std": std.mean().item(),
            "max_std": std.max().item(),
            "mean_snr": snr.mean().item(),
            "max_snr": snr.max().item(),
        }
    return stats


# -- files -----------------------------------------------------------------------------------


def check_target(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Whether a file can be written to ``path``, asked before long work.

    Returns:
        The path, with links resolved.

    Raises:
        CheckpointError: It exists, is a folder, or its folder is missing or not writable.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise CheckpointError(f"{path} is a folder: give the name of a file in it.")
    if not target.parent.is_dir():
        raise CheckpointError(f"There is no folder {target.parent} to write {target.name} into.")
    if target.exists() and not overwrite:
        raise CheckpointError(
            f"{path} exists: give another name, or overwrite it (overwrite=True, --force)."
        )
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"{target.parent} is not writable: choose another folder for {target.name}."
        )
    return target


@contextmanager
def replacing(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary file that takes the place of ``path`` if the block ends without an error.

    Raises:
        CheckpointError: As :func:`check_target`; or the disk or safetensors refuses to write.
    """
    target = check_target(path, overwrite=overwrite)
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written ({error}). Nothing is left of it.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Make a file or the entries of a folder outlast a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {what}; expected a file that bayesify.save wrote.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is no readable safetensors file ({error}): it is cut short, damaged, or of "
            "another kind."
        ) from error


def _header(path: Path, file: Any) -> dict[str, Any]:
    text = (file.metadata() or {}).get(KEY)
    if text is None:
        raise CheckpointError(
            f"{path} holds tensors but no posterior: it is a deterministic checkpoint. Give it as "
            "the weights of a model: create_model(name, weights=FILE), or on the command line "
            "bayesify convert NAME --weights FILE."
        )
    try:
        header = json.loads(text)
        version = header["format"]
        newer = version > FORMAT
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(path, error) from error
    if newer:
        raise CheckpointError(
            f"{path} is of format {version}, and this version of bayesify reads formats up to "
            f"{FORMAT}: update bayesify. It was written with {header.get('versions')}."
        )
    return dict(header)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with _open(path) as file:
        return _header(path, file), {key: file.get_tensor(key) for key in file.keys()}


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"The header of {path} is damaged ({type(error).__name__}: {error}). Fetch or write the "
        "file anew."
    )


# -- writing ---------------------------------------------------------------------------------


def _header_of(
    model: nn.Module, spec: ModelSpec | None, info: Mapping[str, Any] | None
) -> dict[str, Any]:
    bayesian_sites(model)
    if spec is None:
        spec = model.__dict__.get(SPEC)
    try:
        built_by = None if spec is None else spec.to_json()
    except ModelError:  # an argument that JSON cannot hold: the user builds the model, as we do not
        built_by = None
    try:
        shown = asdict(
            input_config(model)
            if spec is None
            else input_config(model, img_size=spec.img_size, in_chans=spec.in_chans)
        )
    except ModelError:
        shown = None
    try:
        added = json.loads(json.dumps(dict(info or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"info must be what JSON can hold: {error}.") from error
    raws = {id(site.raw) for site in sites(model)}
    kind = type(model)
    return {
        "format": FORMAT,
        "model": {"class": f"{kind.__module__}.{kind.__qualname__}", "spec": built_by},
        "input": shown,
        "elements": {
            "total": sum(p.numel() for p in model.parameters() if id(p) not in raws),
            "bayesian": sum(site.mean.numel() for site in sites(model)),
        },
        "conversions": _conversions_of(model),
        "posterior": _rows_of(model),
        "versions": _versions(),
        "info": added,
    }


def _rows_of(model: nn.Module) -> list[dict[str, Any]]:
    means: dict[int, str] = {}
    for site in sites(model):
        twin = means.setdefault(id(site.mean), site.name)
        if twin != site.name:
            raise CheckpointError(
                f"{twin!r} and {site.name!r} are one tied parameter with two posteriors: convert "
                "the whole model at once, not its parts one by one."
            )
    names: dict[int, list[str]] = defaultdict(list)
    for prefix, module in model.named_modules(remove_duplicate=False):
        state = owner_state(module)
        for attribute, slot in state.slots.items() if state is not None else ():
            names[slot.uid].append(f"{prefix}.{attribute}" if prefix else attribute)
    return [
        {
            "name": site.name,
            "aliases": sorted(set(names[site.slot.uid]) - {site.name}),
            "slot": site.slot.name,
            "parameterization": site.slot.parameterization,
            "prior": _prior_to_json(site.slot.prior, site.name),
            "prior_scale": site.slot.prior_scale,
        }
        for site in sites(model)
    ]


def _conversions_of(model: nn.Module) -> list[dict[str, Any]]:
    """The arguments of each conversion, at the module that it was called on."""
    found: list[dict[str, Any]] = []
    inside: set[int] = set()
    for path, module in model.named_modules():
        state = owner_state(module)
        if state is None or id(module) in inside:
            continue
        inside.update(map(id, module.modules()))
        spec: Conversion = state.spec
        # set_prior_ may have replaced a live prior, which only layers added later would get
        prior = next(sites(module)).slot.prior if isinstance(spec.prior, LivePrior) else spec.prior
        found.append(
            {
                "root": path,
                "skip": [_pattern_to_json(p) for p in spec.skip],
                "only": [_pattern_to_json(p) for p in spec.only],
                "preset": spec.preset,
                "prior": _prior_to_json(prior, path),
                "logvar": spec.logvar,
                "estimator": spec.estimator,
                "config": asdict(spec.config),
            }
        )
    return found


def _pattern_to_json(pattern: Pattern) -> str:
    # A file does not choose which class is imported: a class becomes its name.
    return pattern if isinstance(pattern, str) else pattern.__name__


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
        "GaussianPrior": GaussianPrior,
        "ScaleMixturePrior": ScaleMixturePrior,
    }
    return kinds[data["kind"]](**{k: v for k, v in data.items() if k != "kind"})


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a checkout that is not installed
            continue
    return found


def _tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to write, each piece of memory once, and the keys that share one."""
    state: dict[str, Any] = dict(model.state_dict(keep_vars=True))
    for site in sites(model):
        prior_mean = site.module._buffers.get(site.attribute + PRIOR_MEAN_SUFFIX)
        if prior_mean is not None:
            state[site.name + PRIOR_MEAN_SUFFIX] = prior_mean
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    stored: dict[Any, str] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{key!r} is a {type(value).__name__}, not a tensor: extra state would need a "
                "pickle, which bayesify neither writes nor reads."
            )
        if type(value) not in (Tensor, nn.Parameter):
            raise CheckpointError(
                f"{key!r} is a {type(value).__name__}, of which this process may hold a part only. "
                "Save the whole, unsharded model."
            )
        if value.device.type == "meta" or value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(
                f"{key!r} is no dense tensor with data ({value.device}, {value.layout}, "
                f"{value.dtype}): give it data, or make it dense, before saving."
            )
        memory = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and memory in stored:
            aliases[key] = stored[memory]
            continue
        stored[memory] = key
        tensor = value.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()  # a view: safetensors takes no two tensors of one storage
        tensors[key] = tensor
    return tensors, aliases


# -- reading ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One Bayesian parameter in a file."""

    name: str
    aliases: tuple[str, ...]
    slot: str
    parameterization: Parameterization
    prior: Prior
    prior_scale: float

    @property
    def names(self) -> frozenset[str]:
        return frozenset((self.name, *self.aliases))

    @property
    def raw(self) -> str:
        return self.name + RAW_SUFFIX[self.parameterization]


@dataclass(frozen=True)
class _File:
    """What a file holds, checked to be complete in itself."""

    rows: tuple[_Row, ...]
    conversions: tuple[tuple[str, Conversion], ...]
    kind: str
    spec: dict[str, Any] | None
    state: dict[str, Tensor]
    prior_means: dict[str, Tensor]


def _parse(path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> _File:
    try:
        rows = tuple(
            _Row(
                name=str(row["name"]),
                aliases=tuple(map(str, row["aliases"])),
                slot=str(row["slot"]),
                parameterization=BBBConfig(parameterization=row["parameterization"]).parameterization,
                prior=_prior_from_json(row["prior"]),
                prior_scale=float(row["prior_scale"]),
            )
            for row in header["posterior"]
        )
        conversions = tuple(
            (str(c["root"]), _conversion_from_json(c)) for c in header["conversions"]
        )
        kind, spec = str(header["model"]["class"]), header["model"]["spec"]
        state = {**tensors, **{key: tensors[kept] for key, kept in header["aliases"].items()}}
        for row in rows:
            if not state[row.name].shape == state[row.raw].shape:
                raise ValueError(f"{row.raw} has another shape than {row.name}")
        prior_means = {
            row.name: state.pop(row.name + PRIOR_MEAN_SUFFIX)
            for row in rows
            if isinstance(row.prior, GaussianPrior) and row.prior.needs_initial
        }
    except (KeyError, TypeError, ValueError, AttributeError, BayesifyError) as error:
        raise _damaged(path, error) from error
    return _File(rows, conversions, kind, spec, state, prior_means)


def _conversion_from_json(data: Mapping[str, Any]) -> Conversion:
    return Conversion(
        skip=tuple(data["skip"]),
        only=tuple(data["only"]),
        preset=data["preset"],
        prior=_prior_from_json(data["prior"]),
        logvar=data["logvar"],
        estimator=data["estimator"],
        config=BBBConfig(**data["config"]),
    )


def _build(path: Path, file: _File) -> nn.Module:
    """Build the model that the file names, with the dtype of its tensors."""
    if file.spec is None:
        raise CheckpointError(
            f"{path} does not say how to build its {file.kind}. Build the model yourself and give it: "
            "load(path, model=...)."
        )
    try:
        spec = ModelSpec.from_json(file.spec)
        with torch.random.fork_rng(devices=[]):  # the new weights are overwritten
            model = spec.build()
    except ModelError as error:
        raise CheckpointError(f"The model in {path} cannot be built: {error}") from error
    model.__dict__[SPEC] = spec
    spreads = {name + RAW_SUFFIX[row.parameterization] for row in file.rows for name in row.names}
    dtypes = {t.dtype for k, t in file.state.items() if k not in spreads and t.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    return model.eval()


def _check_fit(path: Path, model: nn.Module, file: _File) -> None:
    """Compare names, shapes, dtypes, ties and Bayesian parameters; the model is not changed."""
    expected = dict(file.state)
    bayesian = is_bayesian(model)
    if not bayesian:
        for row in file.rows:
            for name in row.names:
                expected.pop(name + RAW_SUFFIX[row.parameterization], None)
    own: dict[str, Any] = dict(model.state_dict(keep_vars=True))
    common = [key for key in expected if isinstance(own.get(key), Tensor)]
    problems = {
        "missing from the model": [key for key in expected if key not in common],
        "missing from the file": [key for key in own if key not in expected],
        "of another shape": [
            f"{key} (file {tuple(expected[key].shape)}, model {tuple(own[key].shape)})"
            for key in common
            if own[key].shape != expected[key].shape
        ],
        "of another dtype": [
            f"{key} (file {expected[key].dtype}, model {own[key].dtype})"
            for key in common
            if own[key].dtype != expected[key].dtype
        ],
        "tied to others": _otherwise_tied(model, file),
        "not parameters": [
            row.name
            for row in file.rows
            if row.name in common and not isinstance(own[row.name], nn.Parameter)
        ],
        "without data (meta)": [key for key in common if own[key].device.type == "meta"],
    }
    if bayesian:
        there = {(site.name, site.slot.parameterization) for site in sites(model)}
        wanted = {(row.name, row.parameterization) for row in file.rows}
        problems["Bayesian in the file only"] = [name for name, _ in sorted(wanted - there)]
        problems["Bayesian in the model only"] = [name for name, _ in sorted(there - wanted)]
    found = [
        f"{len(keys)} {what}: {', '.join(keys[:_LISTED])}{', ...' if len(keys) > _LISTED else ''}"
        for what, keys in problems.items()
        if keys
    ]
    if found:
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}. Tensors " + "; ".join(found) + ". "
            "Give a model of the architecture and dtype that was saved: load(path, model=...)."
        )


def _otherwise_tied(model: nn.Module, file: _File) -> list[str]:
    """Bayesian parameters that are one tensor under other names in the model than in the file."""
    tied: dict[int, set[str]] = defaultdict(set)
    by_name: dict[str, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied[id(parameter)].add(name)
        by_name[name] = id(parameter)
    return [
        f"{row.name} (file {sorted(row.names)}, model {sorted(tied[by_name[row.name]])})"
        for row in file.rows
        if row.name in by_name and tied[by_name[row.name]] != row.names
    ]


def _convert(path: Path, model: nn.Module, file: _File) -> None:
    """Give the parameters that are Bayesian in the file a posterior, and no other."""
    try:
        for root, _ in file.conversions:
            groups: dict[Parameterization, list[str]] = defaultdict(list)
            prefix = f"{root}." if root else ""
            for row in file.rows:
                if row.name.startswith(prefix):
                    groups[row.parameterization].append(re.escape(row.name[len(prefix) :]))
            for parameterization, names in groups.items():
                config = BBBConfig(parameterization=parameterization, include_frozen=True)
                exactly = f"re:^(?:{'|'.join(names)})$"
                apply_(model.get_submodule(root), Conversion(only=(exactly,), config=config))
    except (BayesifyError, AttributeError) as error:
        for module in model.modules():
            if owner_state(module) is not None:
                _revert(module)
        raise CheckpointError(
            f"{path} cannot be loaded into this {type(model).__name__}: {error}"
        ) from error


def _restore(model: nn.Module, file: _File) -> None:
    """Fill a model that was checked and converted."""
    current = model.state_dict()
    state = type(current)(file.state)
    state._metadata = getattr(current, "_metadata", None)  # type: ignore[attr-defined]
    model.load_state_dict(state)
    rows = {row.name: row for row in file.rows}
    for site in sites(model):
        _restore_slot(site, rows[site.name], file.prior_means.get(site.name))
    for root, conversion in file.conversions:
        for module in model.get_submodule(root).modules():
            owner = owner_state(module)
            if owner is not None:
                owner.spec, owner.strict = conversion, conversion.config.strict
    caches.drop(model)


def _restore_slot(site: Site, row: _Row, prior_mean: Tensor | None) -> None:
    site.slot.name, site.slot.key = row.slot, key_of(row.slot)
    attach_prior(site, row.prior)
    site.slot.prior_scale = row.prior_scale
    if prior_mean is not None:
        own = prior_mean.clone().to(site.mean.device)  # the file's memory is only mapped
        site.module._buffers[site.attribute + PRIOR_MEAN_SUFFIX] = own
