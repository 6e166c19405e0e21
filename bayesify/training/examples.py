"""What a batch holds: the model's arguments, the targets, and weights of the examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..torch_private import pytree

Inputs = str | Sequence[str] | Callable[[Any], Any]
"""Which entries of a batch that is a mapping are inputs, or what makes a batch of it."""


class Batch(NamedTuple):
    """One batch, ready for the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any
    weights: Tensor | None

    @property
    def size(self) -> int:
        """Number of examples."""
        leaves = pytree.tree_leaves((self.targets, self.args, self.kwargs))
        return next((len(v) for v in leaves if isinstance(v, Tensor) and v.dim()), 1)

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors among the model's arguments."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def arguments(self, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The model's arguments, on a device."""
        args, kwargs = moved((self.args, self.kwargs), device)
        return args, kwargs


def moved(value: Any, device: torch.device) -> Any:
    """The same with every tensor on a device; a copy from pinned memory is not waited for."""
    return pytree.tree_map(
        lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf, value
    )


def read_batch(batch: Any, inputs: Inputs | None = None) -> Batch:
    """Take a batch apart.

    Args:
        batch: ``(input, target)`` or ``(input, target, weight)``, where an input may be a tuple of
            positional or a mapping of keyword arguments of the model; or a mapping, of which
            ``inputs`` says what is what.
        inputs: The name of the entry that is the model's argument, names of several that are its
            keyword arguments, the others being targets; or a function of the batch that gives one
            of two or three values.

    Raises:
        ArgumentError: It is anything else.
    """
    if callable(inputs):
        batch = inputs(batch)
    elif inputs is not None:
        batch = _from_mapping(batch, [inputs] if isinstance(inputs, str) else list(inputs),
                              isinstance(inputs, str))  # fmt: skip
    elif isinstance(batch, Mapping):
        raise ArgumentError(
            f"A batch is a mapping with {_names(batch)}: say which entries are the model's, "
            "inputs='image' for its first argument or inputs=('input_ids', 'attention_mask') for "
            "keyword arguments; or give a function that makes (input, target) of a batch."
        )
    if isinstance(batch, list | tuple) and len(batch) in (2, 3):
        given, targets, *weights = batch
        found = _arguments(given)
        if found is not None and _is_target(targets):
            one = Batch(*found, targets, None)
            return one._replace(weights=_weights(weights[0], one.size)) if weights else one
    what = type(batch).__name__
    if isinstance(batch, list | tuple):
        what = f"{len(batch)} values ({', '.join(type(v).__name__ for v in batch)})"
    raise ArgumentError(
        "Each example must be an input tensor and its label, or these and a weight; the data set "
        f"gave batches of {what}. Labels missing? Let __getitem__ return (input, label)."
    )


def inputs_of(batch: Any, inputs: Inputs | None = None) -> Batch:
    """A batch with or without targets, of which the inputs alone are wanted.

    Raises:
        ArgumentError: It has none.
    """
    if inputs is not None or (isinstance(batch, list | tuple) and len(batch) in (2, 3)):
        return read_batch(batch, inputs)
    first = batch[0] if isinstance(batch, list | tuple) and batch else batch
    found = None if isinstance(first, Mapping) else _arguments(first)
    if found is None:
        raise ArgumentError(
            "Each example without a target must be an input tensor or begin with one, got "
            f"{type(batch).__name__}."
        )
    return Batch(*found, None, None)


def _from_mapping(batch: Any, names: list[str], single: bool) -> Any:
    if not isinstance(batch, Mapping):
        raise ArgumentError(
            f"inputs={names!r} names entries of a batch, and batches are {type(batch).__name__}: "
            "leave inputs out, or let the data set give dicts."
        )
    missing = [name for name in names if name not in batch]
    if missing:
        raise ArgumentError(f"inputs names {missing[0]!r}, and a batch has {_names(batch)}.")
    others = {name: value for name, value in batch.items() if name not in names}
    if not others:
        raise ArgumentError(
            f"Every entry of a batch ({_names(batch)}) is an input: the target is missing."
        )
    given: Any = batch[names[0]] if single else {name: batch[name] for name in names}
    return given, next(iter(others.values())) if len(others) == 1 else others


def _arguments(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Positional and keyword arguments of the model."""
    if isinstance(given, Tensor):
        return (given,), {}
    if isinstance(given, Mapping) and any(isinstance(v, Tensor) for v in given.values()):
        return (), dict(given)
    if isinstance(given, list | tuple) and given and all(isinstance(v, Tensor) for v in given):
        return tuple(given), {}
    return None


def _is_target(value: Any) -> bool:
    parts = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, Mapping | list | tuple):
        return bool(value) and all(_is_target(part) for part in parts)
    return isinstance(value, Tensor)


def _weights(value: Any, size: int) -> Tensor:
    fits = isinstance(value, Tensor) and value.is_floating_point() and value.shape == (size,)
    if not fits or not bool((value.isfinite() & (value >= 0)).all()):
        given = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ArgumentError(
            "The third value of a batch must be the weights of its examples, finite real numbers "
            f"of at least 0 and the shape ({size},), got {given:.100}. For anything else that a "
            "data set gives, inputs=lambda batch: batch[:2]."
        )
    weights: Tensor = value
    return weights


def _names(batch: Mapping[Any, Any]) -> str:
    return ", ".join(map(repr, batch))
