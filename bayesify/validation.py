"""What forbids a conversion: models, parameters and names that cannot be what it needs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ArgumentError, UnsupportedModuleError
from .fixed import Masked
from .posterior import PRIOR_MEAN_SUFFIX, Estimator
from .rewriter.owner import generated_class, original_class

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class Found:
    """One parameter: every place that holds it, the first being canonical."""

    parameter: Tensor
    places: list[tuple[str, nn.Module, str]]
    action: str = "bayes"
    estimator: Estimator = "weight"
    rms: float | None = None
    std: float | None = None
    fixed: Masked | None = None

    @property
    def name(self) -> str:
        return self.places[0][0]


def check_model(model: Any) -> None:
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
    if "_orig_mod" in model._modules:
        raise UnsupportedModuleError(
            "The model is already compiled. Convert first: torch.compile(to_bbb(model)); the "
            "original is model._orig_mod."
        )
    wrapper = _parallel(model)
    if wrapper is not None:
        raise UnsupportedModuleError(f"The model is inside {wrapper}: give model.module.")
    if next(nn.Module.named_parameters(model), None) is None:
        raise UnsupportedModuleError(
            f"{type(model).__name__} has no parameter, so there is nothing to convert."
        )


def _parallel(module: nn.Module) -> str | None:
    """What forbids a conversion inside a wrapper for several devices, and what to do instead."""
    if isinstance(module, nn.DataParallel):
        return (
            "nn.DataParallel, which is not supported. Convert the model in it and use "
            "DistributedDataParallel or FSDP2 (fully_shard)"
        )
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return (
            "DistributedDataParallel, which would not average the gradients of the log variances. "
            "Convert the model in it, and wrap what comes out"
        )
    return None


def obstacle(parameter: Tensor) -> str | None:
    """Why a tensor cannot be the mean of a posterior, with the remedy."""
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return "is not initialised yet: run one batch first"
    if type(parameter) is not nn.Parameter:
        return (
            f"is a {type(parameter).__name__}, not a plain nn.Parameter: convert before sharding "
            "or quantising"
        )
    if parameter.layout is not torch.strided:
        return f"is sparse ({parameter.layout}): make it dense"
    if parameter.dtype not in _DTYPES:
        return f"is of {parameter.dtype}, a storage type: convert before quantising"
    return None


def _problems(model: nn.Module, chosen: list[Found], raw_suffix: str) -> list[tuple[str, str]]:
    """Everything that forbids the conversion, each as (what and its remedy, what to skip)."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for item in chosen:
        closed = [problem for name, _, _ in item.places for problem in _closed(name, modules)]
        if closed:  # whatever else is wrong in there
            found += closed
            continue
        reason = obstacle(item.parameter)
        if reason is None and item.rms is not None and not math.isfinite(item.rms):
            reason = "holds NaN or Inf: repair the weights"
        if reason is not None:
            found.append((f"{item.name} {reason}", item.name))
        for name, module, attribute in item.places:
            for suffix in (raw_suffix, PRIOR_MEAN_SUFFIX):
                if hasattr(module, attribute + suffix):
                    what = (
                        f"{name + suffix} exists already, so {name} cannot get a posterior under "
                        "that name: rename it"
                    )
                    found.append((what, name))
    return found


def _closed(name: str, modules: dict[str, nn.Module]) -> list[tuple[str, str]]:
    """The outermost module around a parameter that lets nobody change what is in it."""
    parts = name.split(".")[:-1]
    for path in (".".join(parts[:depth]) for depth in range(len(parts) + 1)):
        module = modules[path]
        if isinstance(module, torch.jit.ScriptModule):
            what = f"{name} belongs to the ScriptModule {path!r}: convert before torch.jit.script"
            return [(what, path)]
        if "_orig_mod" in module._modules:
            return [(f"{name} belongs to {path!r}, which is compiled: convert before", path)]
        wrapper = _parallel(module)
        if wrapper is not None:
            return [(f"{name} belongs to {path!r}, which is {wrapper}", path)]
        kind = original_class(type(module))
        try:
            generated_class(kind, frozenset(), False)
        except Exception as error:  # a class may forbid subclasses in its own way
            what = f"{name}: {kind.__name__} does not allow a subclass in its place ({error})"
            return [(what, path)]
    return []


def refuse(model: nn.Module, chosen: list[Found], raw_suffix: str, skipping: bool) -> None:
    """Raise one error with all problems and the ``skip`` that leaves them out.

    Args:
        model: the model to convert.
        chosen: the parameters that are to get a posterior.
        raw_suffix: what the name of the trained spread adds to that of its mean.
        skipping: whether the user skips something already.

    Raises:
        UnsupportedModuleError: something forbids the conversion.
    """
    problems = _problems(model, chosen, raw_suffix)
    if not problems:
        return
    lines = [f"{type(model).__name__} cannot be converted:"]
    for what, name in problems:
        lines.append(f"  {what}, or skip={_exactly(name)!r}." if name else f"  {what}.")
    patterns = list(dict.fromkeys(_exactly(name) for _, name in problems))
    if len(patterns) > 1 and all(name for _, name in problems):
        plain = not any(pattern.startswith("re:") for pattern in patterns)
        beside = "Beside what you skip already, " if skipping else ""
        skip = ",".join(patterns) if plain else patterns
        lines.append(f"{beside}skip={skip!r} leaves all of these out.")
    raise UnsupportedModuleError("\n".join(lines))


def _exactly(name: str) -> str:
    """A pattern for one qualified name, whatever characters are in it."""
    return name if re.fullmatch(r"[\w.-]+", name) else rf"re:^{re.escape(name)}(\.|$)"
