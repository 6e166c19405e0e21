"""From a file to a model."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..classes import name_classes_
from ..convert import apply_, revert_
from ..errors import ArgumentError, BayesifyError, CheckpointError, ModelError
from ..gaussian import Parameterization
from ..kernels.noise import key_of
from ..models import ModelSpec
from ..planning import BBBConfig, Conversion
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
from .layout import Contents, Row, read_contents

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
    file = read_contents(path)
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
    name_classes_(result, file.classes)
    return result if device is None else result.to(device)


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
        with torch.random.fork_rng(devices=[]):  # the new weights are overwritten
            model = spec.build()
    except ModelError as error:
        raise CheckpointError(f"The model in {path} cannot be built: {error}") from error
    spreads = {row.raw(name) for row in file.rows for name in row.names}
    dtypes = {t.dtype for k, t in file.state.items() if k not in spreads and t.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    return model.eval()


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


def _convert(path: Path, model: nn.Module, file: Contents) -> None:
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
                revert_(module)
        raise CheckpointError(
            f"{path} cannot be loaded into this {type(model).__name__}: {error}"
        ) from error


def _restore(model: nn.Module, file: Contents) -> None:
    """Fill a model that was checked and converted."""
    current = model.state_dict()
    state = type(current)({**file.state, **file.extra})
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
                owner.variants.clear()  # they are code for the estimators of before
    keep_pruned_(model)
    caches.drop(model)


def _restore_slot(site: Site, row: Row, prior_mean: Tensor | None) -> None:
    site.slot.name, site.slot.key = row.slot, key_of(row.slot)
    attach_prior(site, row.prior)
    site.slot.prior_scale = row.prior_scale
    site.slot.estimator = row.estimator
    if prior_mean is not None:
        own = prior_mean.clone().to(site.mean.device)  # the file's memory is only mapped
        site.module._buffers[site.attribute + PRIOR_MEAN_SUFFIX] = own
