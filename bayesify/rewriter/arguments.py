"""Arguments of a call split into tensors and a hashable structure, and put together again."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .guards import PRIMITIVES, float_key
from .objects import may_be_handed_on


def flatten(value: Any, tensors: list[Tensor], names: list[str], name: str) -> Any:
    """Split arguments into a hashable structure, and tensors with objects that are handed on.

    Raises:
        TypeError: Something is opaque or mutable in a way that a graph cannot follow.
    """
    if isinstance(value, Tensor):
        for index, known in enumerate(tensors):
            if known is value:  # attention asks whether query is key
                return ("same", index)
        tensors.append(value)
        names.append(name)
        return (
            "tensor", value.dtype, value.device.type, value.device.index, value.dim(),
            value.requires_grad,
        )  # fmt: skip
    kind = type(value)
    if kind is float:
        return ("value", float_key(value), value if value == value else math.nan)
    if kind in (bool, int, float, str, type(None)):
        return ("value", kind.__name__, value)
    if kind is tuple or kind is list or kind is torch.Size:
        items = [flatten(v, tensors, names, f"{name}_{i}") for i, v in enumerate(value)]
        return (kind, tuple(items))
    if kind is dict:
        entries = []
        for k, v in value.items():
            entries.append((k, flatten(v, tensors, names, f"{name}_{k}")))
        return (kind, tuple(entries))
    if isinstance(value, PRIMITIVES):
        return ("value", kind.__name__, value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        items = [flatten(v, tensors, names, f"{name}_{i}") for i, v in enumerate(value)]
        return (kind, tuple(items))
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return (slice, tuple(flatten(v, tensors, names, name) for v in parts))
    if (
        isinstance(value, dict)
        and kind.__module__ == "collections"
        and kind.__name__ == "OrderedDict"
    ):
        entries = [(k, flatten(v, tensors, names, f"{name}_{k}")) for k, v in value.items()]
        return (kind, tuple(entries))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value) if f.init]
        if isinstance(value, dict) or set(vars(value)) == set(fields):
            entries = [
                (f, flatten(getattr(value, f), tensors, names, f"{name}_{f}")) for f in fields
            ]
            return ("dataclass", kind, tuple(entries))
    if may_be_handed_on(value):
        for index, known in enumerate(tensors):
            if known is value:
                return ("same", index)
        tensors.append(value)
        names.append(name)
        return ("object", kind)
    raise TypeError(f"an argument of type {kind.__name__}")


def unflatten(structure: Any, tensors: list[Any], used: Iterator[int]) -> Any:
    """Inverse of :func:`flatten`; ``used`` counts the tensors that were taken."""
    kind = structure[0]
    if kind in ("tensor", "object"):
        return tensors[next(used)]
    if kind == "same":
        return tensors[structure[1]]
    if kind == "value":
        return structure[2]
    if kind == "dataclass":
        return structure[1](**{k: unflatten(v, tensors, used) for k, v in structure[2]})
    items = structure[1]
    if kind is slice:
        return slice(*(unflatten(v, tensors, used) for v in items))
    if issubclass(kind, dict):
        return kind((k, unflatten(v, tensors, used)) for k, v in items)
    values = [unflatten(v, tensors, used) for v in items]
    return kind(*values) if hasattr(kind, "_fields") else kind(values)


def shapes_of(tensors: list[Tensor], layout: bool) -> tuple[Any, ...]:
    return tuple(
        (tuple(t.shape), t.stride() if layout else None)
        for t in tensors
        if isinstance(t, Tensor | Outline)
    )


@dataclasses.dataclass
class Outline:
    """The metadata of a tensor argument."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    layout: torch.layout = torch.strided

    def stride(self) -> tuple[int, ...]:
        return self.strides


def describe(structure: Any, found: list[Any]) -> None:
    if isinstance(structure, tuple):
        if structure and structure[0] == "tensor":
            found.append(structure)
        else:
            for item in structure:
                describe(item, found)


def argument_names(original: Callable[..., Any], args: Any, kwargs: Any) -> list[str]:
    """A readable name for every input of the graph, after the method's signature."""
    try:
        parameters = list(inspect.signature(original).parameters.values())[1:]
    except (TypeError, ValueError):
        parameters = []
    positional = [
        p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    found: list[str] = []

    def walk(structure: Any, name: str) -> None:
        if structure[0] in ("tensor", "object"):
            found.append(name if name.isidentifier() else "input")
        elif structure[0] == "dataclass":
            for key, item in structure[2]:
                walk(item, f"{name}_{key}")
        elif isinstance(structure[0], type):
            for i, item in enumerate(structure[1]):
                if issubclass(structure[0], dict):
                    walk(item[1], f"{name}_{item[0]}" if name else str(item[0]))
                else:
                    walk(item, f"{name}_{i}")

    for i, item in enumerate(args[1]):
        walk(item, positional[i] if i < len(positional) else f"input_{i}")
    walk(kwargs, "")
    return found
