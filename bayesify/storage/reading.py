"""From a file to a model."""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from ..classes import name_classes_
from ..conversion import BBBConfig, Conversion
from ..convert import apply_, plan_something
from ..errors import ArgumentError, CheckpointError, ModelError
from ..gaussian import Parameterization
from ..likelihoods import likelihood_of, set_likelihood_
from ..models import ModelSpec
from ..posterior import (
    PRIOR_MEAN_SUFFIX,
    Site,
    attach_prior,
    is_bayesian,
    owner_state,
    sites,
    tensor_stats,
)
from ..pruning import keep_pruned_
from ..rewriter import caches
from ..seeds import key_of
from .layout import Contents, read_contents
from .posterior_json import Row
from .undoing import left_as_it_was

_LISTED = 5


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
            Bayesian parameters; it is changed in place, and left as it was after an error, for
            which a copy of its values is held meanwhile. None builds a model of timm or
            torchvision by the name in the file.
        device: Where to; None leaves a given model where it is, and builds on the CPU.

    Returns:
        ``model``, or the one built. A built model is in evaluation mode; a given one keeps its
        mode, and in ``train()`` it draws: call ``.eval()``. It has the likelihood of the file, or
        keeps its own where the file can only name one, with a warning if it has none. Which
        parameters are frozen (``requires_grad=False``) and live priors are not in the file.

    Raises:
        ArgumentError: ``model`` is no module, or there is no such device.
        CheckpointError: The file cannot be read, is of a newer format, or does not fit the model;
            the message lists what differs.
    """
    path = Path(path)
    file = read_contents(path)
    target = None if device is None else _device(device)
    if model is None:
        built = _build(path, file)
        _check_fit(path, built, file)
        return _fill(path, built, file, target)
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, not {model!r}.")
    if hasattr(model, "_orig_mod") or isinstance(
        model, nn.DataParallel | nn.parallel.DistributedDataParallel
    ):
        raise CheckpointError(
            f"{path} cannot be loaded into a {type(model).__name__}: give the model inside it, and "
            "compile or wrap it afterwards."
        )
    _check_fit(path, model, file)
    with left_as_it_was(model):
        return _fill(path, model, file, target)


def _fill(path: Path, model: nn.Module, file: Contents, device: torch.device | None) -> nn.Module:
    """Give a model that was checked what the file holds."""
    try:
        if not is_bayesian(model):
            _convert(model, file)
        _restore(model, file)
        name_classes_(model, file.classes)
        _give_likelihood(path, model, file, device)
        return model if device is None else model.to(device)
    except Exception as error:  # a model may have hooks and methods of any kind
        raise CheckpointError(
            f"{path} cannot be loaded into this {type(model).__name__}: {error}"
        ) from error


def _give_likelihood(
    path: Path, model: nn.Module, file: Contents, device: torch.device | None
) -> None:
    """Give the model the likelihood of the file, or name the one that a file cannot hold."""
    if file.unstored:
        if likelihood_of(model) is None:
            warnings.warn(
                f"The model in {path} had the likelihood {', '.join(file.unstored)}, which is code "
                "and not in the file: give it again with bayesify.set_likelihood_(model, ...).",
                UserWarning,
                stacklevel=4,
            )
        return
    set_likelihood_(model, file.likelihood)
    first = next(model.parameters(), None)
    if file.likelihood is not None and first is not None:
        file.likelihood.to(first.device if device is None else device)


def _device(device: torch.device | str) -> torch.device:
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except Exception as error:  # an unknown name, no driver, no such index: each another kind
        raise ArgumentError(f"device {device!r} cannot be used here: {error}") from error
    return target


def read_stats(path: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
    """What :func:`bayesify.posterior_stats` says of the model in a file, without building it.

    Raises:
        CheckpointError: As :func:`load`.
    """
    path = Path(path)
    file = read_contents(path)
    stats = {}
    for row in file.rows:
        raw = file.state[row.raw()]
        stats[row.name] = tensor_stats(file.state[row.name], raw, row.parameterization)
    return stats


def _build(path: Path, file: Contents) -> nn.Module:
    """Build the model that the file names, with the dtype of its tensors."""
    if file.spec is None:
        raise CheckpointError(
            f"{path} does not say how to build its {file.kind}. Build the model yourself "
            "and give it: load(path, model=...)."
        )
    try:
        spec = ModelSpec.from_json(file.spec)
        with torch.random.fork_rng(devices=[]), _as_large_as(file):  # the weights are overwritten
            _check_size(path, spec, file)
            model = spec.build()
    except ModelError as error:
        raise CheckpointError(f"The model in {path} cannot be built: {error}") from error
    spreads = {row.raw(name) for row in file.rows for name in row.names}
    dtypes = {t.dtype for k, t in file.state.items() if k not in spreads and t.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    return model.eval()


def _check_size(path: Path, spec: ModelSpec, file: Contents) -> None:
    """Compare shapes with those of a model without data, before the real one takes memory.

    Raises:
        CheckpointError: They differ.
    """
    try:
        with torch.device("meta"):
            model = spec.build()
    except ModelError:  # some compute with numbers while they are built; the real one will tell
        return
    own = dict(model.state_dict())
    other = [key for key, value in own.items() if key in file.state
             and getattr(value, "shape", None) != file.state[key].shape]  # fmt: skip
    other += [key for key in own if key not in file.state]
    if other:
        shown = ", ".join(other[:_LISTED]) + (", ..." if len(other) > _LISTED else "")
        raise CheckpointError(
            f"{path} does not fit the {spec.name!r} that it names: {len(other)} tensors are "
            f"missing from the file or of another shape: {shown}."
        )


def _memory(value: Tensor | None) -> int:
    """Elements that take memory."""
    return 0 if value is None or value.device.type == "meta" else value.numel()


@contextmanager
def _as_large_as(file: Contents) -> Iterator[None]:
    """End the building of a model that becomes far larger than what the file holds."""
    thread = threading.get_ident()
    modules = 10_000 + 20 * len(file.state)
    elements = (1 << 24) + 4 * sum(value.numel() for value in file.state.values())
    left = {"modules": modules, "elements": elements}

    def take(what: str, count: int) -> None:
        if threading.get_ident() == thread:
            left[what] -= count
            if left[what] < 0:
                raise ModelError(f"it has more {what} than the tensors in the file are for")

    handles = [
        register_module_module_registration_hook(lambda *_: take("modules", 1)),
        register_module_parameter_registration_hook(
            lambda _, __, value: take("elements", _memory(value))
        ),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_fit(path: Path, model: nn.Module, file: Contents) -> None:
    """Compare names, shapes, dtypes, ties and Bayesian parameters; the model is not changed."""
    expected = dict(file.state)
    bayesian = is_bayesian(model)
    if not bayesian:
        for row in file.rows:
            for name in row.names:
                expected.pop(row.raw(name))
    own: dict[str, Any] = dict(model.state_dict(keep_vars=True))
    common = [key for key in expected if isinstance(own.get(key), Tensor)]
    extra = [key for key in file.extra if key in own and not isinstance(own[key], Tensor)]
    problems = {
        "missing from the model": [
            key for key in (*expected, *file.extra) if key not in common and key not in extra
        ],
        "missing from the file": [key for key in own if key not in expected and key not in extra],
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
        "expanded, which cannot be written to": [
            key
            for key in common
            if any(n > 1 and not s for n, s in zip(own[key].shape, own[key].stride(), strict=True))
        ],
        "without data (meta)": [key for key in common if own[key].device.type == "meta"],
    }
    there_modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    problems["below modules that the model has not"] = [
        root for root, _ in file.conversions if root not in there_modules
    ]
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


def _otherwise_tied(model: nn.Module, file: Contents) -> list[str]:
    """Bayesian parameters that are one tensor under other names in the model than in the file."""
    tied: dict[int, set[str]] = defaultdict(set)
    by_name: dict[str, int] = {}
    for name, parameter in nn.Module.named_parameters(model, remove_duplicate=False):
        tied[id(parameter)].add(name)
        by_name[name] = id(parameter)
    return [
        f"{row.name} (file {sorted(row.names)}, model {sorted(tied[by_name[row.name]])})"
        for row in file.rows
        if row.name in by_name and tied[by_name[row.name]] != row.names
    ]


def _convert(model: nn.Module, file: Contents) -> None:
    """Give the parameters that are Bayesian in the file a posterior, and no other."""
    for root, _ in file.conversions:
        groups: dict[Parameterization, list[str]] = defaultdict(list)
        prefix = f"{root}." if root else ""
        for row in file.rows:
            if row.name.startswith(prefix):
                groups[row.parameterization].append(re.escape(row.name[len(prefix) :]))
        for parameterization, names in groups.items():
            config = BBBConfig(parameterization=parameterization, include_frozen=True)
            exactly = f"re:^(?:{'|'.join(names)})$"
            converted = model.get_submodule(root)
            apply_(converted, plan_something(converted, Conversion(only=(exactly,), config=config)))


def _restore(model: nn.Module, file: Contents) -> None:
    """Fill a model that was checked and converted."""
    current = model.state_dict()
    state = type(current)({**file.state, **file.extra})
    state._metadata = getattr(current, "_metadata", None)  # type: ignore[attr-defined]
    model.load_state_dict(state)
    rows = {row.name: row for row in file.rows}
    missed = rows.keys() ^ {site.name for site in sites(model)}
    if missed:
        raise CheckpointError(f"{min(missed)!r} is Bayesian only in the file, or only here")
    for site in sites(model):
        _restore_slot(site, rows[site.name], file.prior_means.get(site.name))
    for root, conversion in file.conversions:
        for module in model.get_submodule(root).modules():
            owner = owner_state(module)
            if owner is not None:
                owner.spec, owner.strict = conversion, conversion.config.strict
                owner.variants.clear()  # they are code for the estimators of before
    keep_pruned_(model)
    caches.drop(model)


def _restore_slot(site: Site, row: Row, prior_mean: Tensor | None) -> None:
    site.slot.name, site.slot.key = row.slot, key_of(row.slot)
    attach_prior(site, row.prior, row.prior_scale)
    site.slot.estimator = row.estimator
    if prior_mean is not None:
        own = prior_mean.clone().to(site.mean.device)  # the file's memory is only mapped
        site.module._buffers[site.attribute + PRIOR_MEAN_SUFFIX] = own
