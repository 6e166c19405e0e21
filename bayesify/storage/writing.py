"""From a model to a file."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib import metadata
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..classes import classes_of
from ..conversion import Conversion
from ..errors import ArgumentError, CheckpointError, ModelError
from ..likelihoods import likelihood_of, to_json, unstored
from ..models import SPEC, ModelSpec, input_config
from ..posterior import PRIOR_MEAN_SUFFIX, bayesian_sites, owner_state, posterior_tensors, sites
from ..priors import LivePrior
from ..unconverted import warn_of_unconverted
from .files import replacing
from .layout import FORMAT, KEY, LIKELIHOOD
from .posterior_json import Row, conversion_to_json

_PACKAGES = ("bayesify", "numpy", "safetensors", "timm", "torch", "torchvision")


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    spec: ModelSpec | None = None,
    info: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a Bayesian model into one safetensors file, whole or not at all.

    The same model gives the same bytes. Of a compiled model, or one inside
    DistributedDataParallel, the model itself is saved.

    A :class:`LostPosteriorWarning` names what the model was given after its conversion and that
    has no posterior (:func:`extend_`): it is written without one.

    Args:
        model: A converted model.
        path: The file to write; by convention it ends in ``.bbb.safetensors``.
        spec: How :func:`load` builds the model. A model of ``create_model`` brings its own; one
            without needs ``load(path, model=...)``.
        info: Anything of your own that JSON can hold; :func:`read_header` returns it. ``classes``
            is a list of the names of the outputs, by default those that the model knows.
        overwrite: Replace a file that exists.

    Raises:
        ArgumentError: ``info`` cannot be JSON.
        CheckpointError: The path exists, is a folder or cannot be written; or the model holds what
            such a file cannot: a live prior, sharded or meta tensors, extra state that is no JSON;
            or its own ``state_dict`` leaves out a part of the posterior.
        UnsupportedModuleError: ``model`` has no posterior.

    >>> import tempfile, torch, bayesify
    >>> model = bayesify.to_bbb(torch.nn.Linear(2, 1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     bayesify.save(model, folder + "/a.bbb.safetensors")
    ...     back = bayesify.load(folder + "/a.bbb.safetensors", model=torch.nn.Linear(2, 1))
    >>> torch.equal(back.weight, model.weight)
    True
    """
    model = _unwrapped(model)
    warn_of_unconverted(model)
    with replacing(path, overwrite=overwrite) as temporary:
        header = _header(model, spec, info)
        state = _state(model)
        extra = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        if extra:
            header["extra"] = _checked(extra)
        tensors, header["aliases"] = _tensors({k: v for k, v in state.items() if k not in extra})
        text = json.dumps(header, sort_keys=True, allow_nan=False)
        # More than one key: safetensors writes them in an order that differs from run to run.
        try:
            save_file(tensors, temporary, metadata={KEY: text})
        except KeyError as error:
            raise CheckpointError(
                f"safetensors cannot hold tensors of {error}: convert them to another dtype."
            ) from error


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a compiled or a data-parallel one."""
    inner = getattr(model, "_orig_mod", model)
    if isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner = inner.module
    return inner


def _header(
    model: nn.Module, spec: ModelSpec | None, info: Mapping[str, Any] | None
) -> dict[str, Any]:
    bayesian_sites(model)
    rows = [row.to_json() for row in _rows(model)]
    spec = _present_spec(model, model.__dict__.get(SPEC) if spec is None else spec)
    try:
        built_by = None if spec is None else spec.to_json()
    except ModelError:  # an argument that JSON cannot hold: load asks for the model
        built_by = None
    img_size, in_chans = (None, None) if spec is None else (spec.img_size, spec.in_chans)
    try:
        shown = asdict(input_config(model, img_size=img_size, in_chans=in_chans))
    except ModelError:
        shown = None
    try:
        added = json.loads(json.dumps(dict(info or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"info must be what JSON can hold: {error}.") from error
    known = classes_of(model)
    if known is not None:
        added.setdefault("classes", list(known))
    raws = {id(site.raw) for site in sites(model)}
    kind, likelihood = type(model), likelihood_of(model)
    return {
        "format": FORMAT,
        "model": {"class": f"{kind.__module__}.{kind.__qualname__}", "spec": built_by},
        "input": shown,
        "elements": {
            "total": sum(
                p.numel() for _, p in nn.Module.named_parameters(model) if id(p) not in raws
            ),
            "bayesian": sum(site.weights for site in sites(model)),
        },
        "conversions": _conversions(model),
        "likelihood": None if likelihood is None else to_json(likelihood),
        "posterior": rows,
        "versions": _versions(),
        "info": added,
    }


def _present_spec(model: nn.Module, spec: ModelSpec | None) -> ModelSpec | None:
    """The spec with the classes that a model of timm has now, after ``reset_classifier`` too."""
    classes = getattr(model, "num_classes", None)
    if spec is None or spec.source != "timm" or type(classes) is not int or classes < 1:
        return spec
    return replace(spec, num_classes=classes)


def _rows(model: nn.Module) -> list[Row]:
    names: dict[int, list[str]] = defaultdict(list)
    for prefix, module in model.named_modules(remove_duplicate=False):
        state = owner_state(module)
        for attribute, slot in state.slots.items() if state is not None else ():
            names[slot.uid].append(f"{prefix}.{attribute}" if prefix else attribute)
    rows = []
    for name, _, _, slot in sites(model):
        aliases = tuple(sorted(set(names[slot.uid]) - {name}))
        kept = slot.name, slot.parameterization, slot.prior, slot.prior_scale, slot.estimator
        rows.append(Row(name, aliases, *kept))
    return rows


def _conversions(model: nn.Module) -> list[dict[str, Any]]:
    """The arguments of each conversion, with the module that it was called on."""
    found = []
    inside: set[int] = set()
    for path, module in model.named_modules():
        state = owner_state(module)
        if state is None or id(module) in inside:
            continue
        inside.update(map(id, module.modules()))
        conversion: Conversion = state.spec
        if isinstance(conversion.prior, LivePrior):  # set_prior_ has replaced it, or _rows raises
            conversion = replace(conversion, prior=next(sites(module)).slot.prior)
        found.append({"root": path, "arguments": conversion_to_json(conversion)})
    return found


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a checkout that is not installed
            continue
    return found


def _check_complete(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Refuse a state dict that lacks a mean or a log variance, or holds something else for it."""
    lacking = [
        key
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, tensor in posterior_tensors(module).items()
        for key in [f"{prefix}.{name}" if prefix else name]
        if getattr(state.get(key), "shape", None) != tensor.shape
    ]
    if lacking:
        shown = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        raise CheckpointError(
            f"{type(model).__name__}.state_dict() does not hold {len(lacking)} tensors of the "
            f"posterior as the model does ({shown}): a file would lack them. It has a "
            "state_dict or a hook of its own, which must give them under these names; or convert "
            "with these parameters skipped."
        )


def _state(model: nn.Module) -> dict[str, Any]:
    """What is to be written, by name."""
    state: dict[str, Any] = dict(model.state_dict(keep_vars=True))
    _check_complete(model, state)
    for site in sites(model):
        prior_mean = site.module._buffers.get(site.attribute + PRIOR_MEAN_SUFFIX)
        if prior_mean is not None:
            state[site.name + PRIOR_MEAN_SUFFIX] = prior_mean
    likelihood = likelihood_of(model)
    if likelihood is not None and not unstored(to_json(likelihood)):
        state |= {LIKELIHOOD + k: v for k, v in likelihood.state_dict(keep_vars=True).items()}
    return state


def _checked(extra: dict[str, Any]) -> dict[str, Any]:
    """Extra state, as modules give by ``get_extra_state``: what JSON gives back as it is."""
    for key, value in extra.items():
        if not _is_plain(value):
            raise CheckpointError(
                f"{key!r} of the state dict, a {type(value).__name__}, is neither a tensor nor "
                "what JSON gives back as it is (str, int, finite float, bool, None, a list of "
                "these, a dict of them by str): it would need a pickle, which bayesify neither "
                "writes nor reads. Give such a value in its place."
            )
    return extra


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if kind is dict:
        return all(type(key) is str and _is_plain(item) for key, item in value.items())
    if kind is list:
        return all(map(_is_plain, value))
    return value is None or kind in (str, bool, int) or (kind is float and math.isfinite(value))


def _tensors(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to write, each piece of memory once, and the keys that share one."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    stored: dict[Any, str] = {}
    for key, value in state.items():
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
