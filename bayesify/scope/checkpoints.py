"""What calls modules again in backward remembers the scope of its forward.

These are activation checkpoints, and functions of autograd whose backward runs a model: adjoint
methods of differential equations, reversible blocks.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint

from .. import torch_private
from .blocks import Mode, only, open_modes
from .local import LOCAL


def _carried(function: Callable[..., Any], *, keep: bool) -> Callable[..., Any]:
    """``function`` bound to the present scope and modes, whenever and wherever it is called."""
    if LOCAL.on_checkpoint is not None:
        LOCAL.on_checkpoint()
    scope, modes, reads = LOCAL.scope, open_modes(), LOCAL.reads
    if scope is None and not modes:
        return function
    snapshot = None if scope is None else scope.fork(keep=keep)
    frozen = [(m, None if m.scope is None else m.scope.fork(keep=keep)) for m in modes]

    def run(*args: Any, **kwargs: Any) -> Any:
        outer = LOCAL.scope
        LOCAL.scope = None if snapshot is None else snapshot.fork(keep=True)
        around = tuple(
            Mode(m.modules, m.drawing, None if s is None else s.fork(keep=True)) for m, s in frozen
        )
        try:
            with only(around), SEAM, reads():
                return function(*args, **kwargs)
        finally:
            LOCAL.scope = outer

    return run


def _remember(node: Any) -> None:
    """Bind the backward of a function of autograd, whose forward begins, to the present scope."""
    scope, function = LOCAL.scope, node._forward_cls.__module__
    if scope is None or not scope.drawing or LOCAL.on_checkpoint is not None:
        return
    # own functions call no module, and those of checkpoints are bound below
    if not function.startswith(("bayesify.kernels.", "torch.utils.checkpoint")):
        node.apply = _carried(functools.partial(_run_backward, type(node)), keep=True)


def _run_backward(kind: Any, *gradients: Any) -> Any:
    # asked for, not kept: a node that holds itself is never let go of
    return kind.apply(torch_private.current_autograd_node(), *gradients)


class _CheckpointSeam:
    """While a scope or mode is active, what runs again in backward remembers it.

    ``torch.utils.checkpoint`` recomputes a region inside backward, after the scope of its forward
    has closed, and a function of autograd may call a module there. Their entry points are wrapped,
    counted over threads, and put back at the end.
    """

    _GENERATORS = (
        "_checkpoint_without_reentrant_generator_impl",
        "_checkpoint_without_reentrant_generator",
    )

    _nodes: Any = torch.autograd.function.BackwardCFunction

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._originals: dict[str, Any] = {}

    def __enter__(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self._install()

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                for name, original in self._originals.items():
                    setattr(torch.utils.checkpoint, name, original)
                del self._nodes.__init__

    def _install(self) -> None:
        module = torch.utils.checkpoint
        name = next(n for n in self._GENERATORS if hasattr(module, n))
        reentrant, generator = module.CheckpointFunction, getattr(module, name)
        self._originals = {"CheckpointFunction": reentrant, name: generator}
        self._nodes.__init__ = _remember  # made whatever name the function is called by

        class CheckpointFunction:
            # A reentrant region runs its own backward: it must not share a graph with its
            # surroundings, so it draws anew from the seed.
            @staticmethod
            def apply(function: Any, *args: Any) -> Any:
                return reentrant.apply(_carried(function, keep=False), *args)

        def without_reentrant(function: Any, *args: Any, **kwargs: Any) -> Any:
            # recomputes what the forward saved: it must find what was realised at its start
            return generator(_carried(function, keep=True), *args, **kwargs)

        setattr(module, "CheckpointFunction", CheckpointFunction)  # noqa: B010
        setattr(module, name, without_reentrant)


SEAM = _CheckpointSeam()


@contextlib.contextmanager
def recording(on_checkpoint: Callable[[], None]) -> Iterator[None]:
    """Call ``on_checkpoint`` before any activation checkpoint of this thread in this block."""
    outer, LOCAL.on_checkpoint = LOCAL.on_checkpoint, on_checkpoint
    try:
        with SEAM:
            yield
    finally:
        LOCAL.on_checkpoint = outer
