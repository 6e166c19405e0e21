"""Whether a call draws: ``train()`` and ``eval()``, and the blocks that override them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from ..posterior import bayesian_sites, sites
from .blocks import Mode, open_modes, opened
from .checkpoints import SEAM
from .drawing import AT_MEAN, Scope
from .seeds import as_seed, distinct_keys, new_seed


@contextlib.contextmanager
def sampled(model: nn.Module) -> Iterator[None]:
    """Every call of ``model`` in this block draws its weights, also in ``eval()``.

    Given a part of a model, it holds for the weights of that part, also when the whole is called.
    Of several blocks that name a module the innermost decides. A block holds in its own task and
    in tasks that are made inside it, not in other threads (see :mod:`contextvars`).

    Raises:
        UnsupportedModuleError: ``model`` has no posterior.
    """
    with opened(Mode(modules_of(model), True, None)), SEAM:
        yield


@contextlib.contextmanager
def at_mean(model: nn.Module) -> Iterator[None]:
    """Every call of ``model`` in this block uses the posterior means, also in ``train()``.

    Given a part of a model, it holds for the weights of that part, also when the whole is called.
    Of several blocks that name a module the innermost decides. A block holds in its own task and
    in tasks that are made inside it, not in other threads (see :mod:`contextvars`).

    Raises:
        UnsupportedModuleError: ``model`` has no posterior.
    """
    with opened(Mode(modules_of(model), False, None)), SEAM:
        yield


@contextlib.contextmanager
def one_draw(model: nn.Module, seed: int | Tensor | None = None) -> Iterator[None]:
    """All calls of ``model`` in this block share one draw of its weights, also in ``eval()``.

    The block holds in its own task and in tasks that are made inside it, not in other threads (see
    :mod:`contextvars`; ``asyncio.to_thread`` carries it).

    Args:
        model: A converted model, a part of one, or a module that holds one.
        seed: The draw is a function of it and of the parameters' names alone, whatever the order
            of the calls; with the estimators ``local`` and ``flipout``, also of an example's place
            in its batch. None takes a number from torch's global generator.

    Raises:
        ArgumentError: ``seed`` is not a non-negative integer.
        UnsupportedModuleError: ``model`` has no posterior.
    """
    scope = Scope(as_seed(seed), distinct_keys(bayesian_sites(model)))
    with held(frozenset(map(id, model.modules())), scope):
        yield


@contextlib.contextmanager
def held(modules: frozenset[int], scope: Scope) -> Iterator[None]:
    """All calls of the modules in this block read the draws of ``scope``, also in ``eval()``."""
    with opened(Mode(modules, True, scope)), SEAM:
        try:
            yield
        finally:
            scope.clear()


def modules_of(model: nn.Module) -> frozenset[int]:
    """Identities of the modules of a model that has a posterior."""
    bayesian_sites(model)
    return frozenset(map(id, model.modules()))


class Mixed(Scope):
    """The scope of one call in which modes of parts of the model differ from its own."""

    __slots__ = ("decided", "training")

    def __init__(
        self, training: bool, seed: Tensor | None = None, keys: dict[int, int] | None = None
    ) -> None:
        super().__init__(new_seed() if seed is None else seed, keys)
        self.training = training
        self.decided: dict[int, Scope | None] = {}

    def of(self, module: nn.Module) -> Scope:
        if id(module) not in self.decided:
            self.decided[id(module)] = _decided(id(module), self.training)
        return self.decided[id(module)] or self

    def empty(self) -> Scope:
        return Mixed(self.training, self.seed, self.keys)


def wanted(module: nn.Module) -> Scope | None:
    """The scope in which an outermost call of ``module`` runs; None: a new one that draws."""
    if not open_modes():
        return None if module.training else AT_MEAN
    if _parts_differ(module):
        return Mixed(module.training, keys=distinct_keys(list(sites(module))))
    return _decided(id(module), module.training)


def _decided(identity: int, training: bool) -> Scope | None:
    """The scope that the modes give a module; None: a new one that draws."""
    drawing: bool | None = None
    for mode in reversed(open_modes()):
        if identity in mode.modules:
            if drawing is None:
                drawing = mode.drawing
                if not drawing:
                    return AT_MEAN
            if mode.scope is not None:
                return mode.scope
    if drawing is None:
        drawing = training
    return None if drawing else AT_MEAN


def _parts_differ(module: nn.Module) -> bool:
    """Whether a mode decides for a part of ``module`` and not for the whole."""
    of_others: list[frozenset[int]] = []
    for mode in reversed(open_modes()):
        if id(module) not in mode.modules:
            of_others.append(mode.modules)
        elif mode.scope is not None or not mode.drawing:
            break  # what lies outside this block decides nothing
    return bool(of_others) and any(id(m) in o for m in module.modules() for o in of_others)
