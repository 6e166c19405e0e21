"""Inputs of several calls: each call sees them as they were given, also where a forward writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..torch_private import pytree


class Given:
    """Arguments with which a model is called many times.

    A forward may write into its input (``x.div_(255)``) or take its containers apart: the next
    call would be of something else. The first call is of copies; where it leaves them as they
    were, later ones get the tensors themselves. Each gets lists and dicts of its own. The caller's
    tensors stay as they are.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        self._leaves, self._structure = pytree.tree_flatten((args, kwargs or {}))
        self._copies: list[Any] | None = None  # untouched ones, once a call has left them so
        self._written = False

    def call(self, run: Callable[..., Any]) -> Any:
        """What ``run(*args, **kwargs)`` gives."""
        copied = self._written or self._copies is None
        leaves = [_copy(leaf) for leaf in self._leaves] if copied else self._leaves
        before = _versions(leaves)
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        result = run(*args, **kwargs)
        written = before is None or before != _versions(leaves)
        if copied and not written:
            self._copies = leaves
        elif written and not self._written:
            self._written = True
            if not copied:  # what it was given is lost, not what the call before had
                assert self._copies is not None
                self._leaves = self._copies
        return result


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _versions(leaves: list[Any]) -> list[int] | None:
    """What tells that a tensor was written into; None where torch does not count."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return [tensor._version for tensor in tensors]
