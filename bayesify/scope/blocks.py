"""The blocks that are open: they follow the context (a task, a copied context), not the thread."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from .drawing import Scope


class Mode:
    """What a block of ``sampled``, ``at_mean`` or ``one_draw`` says of some modules."""

    __slots__ = ("drawing", "modules", "over", "scope")

    def __init__(self, modules: frozenset[int], drawing: bool, scope: Scope | None) -> None:
        self.modules = modules
        self.drawing = drawing
        self.scope = scope
        self.over = False  # the block has ended, out of reach of the context in which it began


class _Blocks:
    """The modes of one context, the innermost last."""

    __slots__ = ("modes",)

    def __init__(self, modes: tuple[Mode, ...] = ()) -> None:
        self.modes = modes


_OPEN: ContextVar[_Blocks] = ContextVar("bayesify.blocks")


class _Outside(_Blocks):
    """No block, and the way to those of the present context.

    torch.compile traces no ``ContextVar.get`` before torch 2.13, but reads a property whose getter
    is a builtin, and guards on what it gives. Where no block is open, ``get`` gives its argument.
    """

    __slots__ = ()
    here = property(_OPEN.get)


_OUTSIDE = _Outside()


def open_modes() -> tuple[Mode, ...]:
    """The modes of the blocks around, the innermost last."""
    modes: tuple[Mode, ...] = _OUTSIDE.here.modes
    return tuple([m for m in modes if not m.over]) if modes else modes


@contextlib.contextmanager
def opened(mode: Mode) -> Iterator[None]:
    """A block that says ``mode``. It takes away its own entry, whatever was opened or ended since:
    two generators may leave their blocks in another order than that of entering them.
    """
    token = _OPEN.set(_Blocks((*open_modes(), mode)))
    try:
        yield
    finally:
        modes = open_modes()
        try:
            _OPEN.reset(token)
        except ValueError:  # another context: who closed the generator, say, was not who ran it
            mode.over = True
        _OPEN.set(_Blocks(tuple(m for m in modes if m is not mode)))


@contextlib.contextmanager
def only(modes: tuple[Mode, ...]) -> Iterator[None]:
    """Just these modes, as they were somewhere else."""
    token = _OPEN.set(_Blocks(modes))
    try:
        yield
    finally:
        _OPEN.reset(token)
