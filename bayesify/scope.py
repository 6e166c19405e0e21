"""Draw scopes, modes and seeds: inside one scope every parameter is drawn once.

The outermost call of a converted model opens a scope; a parameter read inside it is drawn when the
scope opens, or at its first read if an earlier call of the same method has not read it (an expert
of a mixture, a branch that was skipped), and kept until the scope closes. Each thread has its own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from . import gaussian
from .errors import ArgumentError
from .kernels import grouped
from .kernels.buffers import Buffers
from .kernels.noise import fold, noise
from .posterior import STATE, Site, Slot, bayesian_sites, owner_state, sites, tensors_of

_SEED_BOUND = 1 << 62


class Scope:
    """One draw of every weight: a seed and the tensors realised from it so far.

    Tensors are kept per (slot, grad mode): one drawn without a graph must not serve a call that
    needs gradients. One in autocast's dtype stands beside that in the mean's.
    """

    __slots__ = ("compiled", "drawing", "filled", "keys", "lowered", "reads", "realised", "seed")

    def __init__(self, seed: Tensor | None, keys: dict[int, int] | None = None) -> None:
        self.seed = seed
        self.drawing = seed is not None
        self.keys = {} if keys is None else keys
        self.realised: dict[tuple[Any, ...], Tensor] = {}
        self.filled: set[tuple[int, int]] = set()  # what needs no look again: (module, grad mode)
        self.reads: set[tuple[int, int]] = set()
        self.lowered: set[tuple[int, int, torch.dtype]] = set()  # reads in autocast's dtype
        self.compiled = False  # whether compiled code has read something, which is not in reads

    def clear(self) -> None:
        """Let go of what is realised."""
        self.realised.clear()
        self.filled.clear()

    def of(self, module: nn.Module) -> Scope:
        """The scope in which the parameters of a module are read: this one, unless modes differ."""
        return self

    def empty(self) -> Scope:
        """A scope of the same seed."""
        return Scope(self.seed, self.keys)

    def fork(self, *, keep: bool) -> Scope:
        """A scope of the same seed, with a copy of what is realised or with nothing."""
        child = self.empty()
        if keep:
            child.realised = dict(self.realised)
            child.filled = set(self.filled)
        return child

    def read(self, module: nn.Module, attribute: str, slot: Slot) -> Tensor:
        """The draw of one slot, whose parameters are those that ``module`` holds now."""
        if torch.compiler.is_compiling():
            self.compiled = True
        else:
            self.reads.add((slot.uid, grad_mode()))
        return self.draw(module, attribute, slot)

    def read_lowered(self, module: nn.Module, attribute: str, slot: Slot) -> Tensor:
        """As :meth:`read`, for operations that autocast lowers: in its dtype where it is on.

        The numbers are those that autocast would make of the draw, once for all reads.
        """
        if not torch._C._is_any_autocast_enabled() or torch.compiler.is_compiling():
            return self.read(module, attribute, slot)
        mean, _ = tensors_of(module, attribute, slot)
        dtype = autocast_dtype(mean)
        if dtype is None:
            return self.read(module, attribute, slot)
        index = (slot.uid, grad_mode(), dtype)
        self.lowered.add(index)
        tensor = self.realised.get(index)
        if tensor is None:
            tensor = self.realised[index] = self.draw(module, attribute, slot).to(dtype)
        return tensor

    def draw(self, module: nn.Module, attribute: str, slot: Slot) -> Tensor:
        """As :meth:`read`, but no read."""
        index = (slot.uid, grad_mode())
        tensor = self.realised.get(index)
        if tensor is None:
            tensor = realise(module, attribute, slot, self.seed, self.key_of(slot))
            self.realised[index] = tensor
        return tensor

    def deviation(self, module: nn.Module, attribute: str, slot: Slot) -> Tensor:
        """The draw of one slot less its mean: sigma times noise. Zeros, where there is no seed."""
        if self.seed is None:
            return torch.zeros_like(tensors_of(module, attribute, slot)[0])
        index = (slot.uid, grad_mode(), "deviation")
        tensor = self.realised.get(index)
        if tensor is None:
            mean, raw = tensors_of(module, attribute, slot)
            dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
            epsilon = self.noise(slot, mean.shape, dtype, mean.device)
            with torch._C.DisableTorchFunction():  # as in realise
                std = gaussian.std_from_raw(raw, slot.parameterization).to(dtype)
                tensor = self.realised[index] = (std * epsilon).to(mean.dtype)
        return tensor

    def noise(
        self, slot: Slot, size: Sequence[int], dtype: torch.dtype, device: torch.device,
        family: int = 0,
    ) -> Tensor:  # fmt: skip
        """Standard normal noise that belongs to one slot; family 0 is that of its draw.

        Zeros, where there is no seed.
        """
        with torch._C.DisableTorchFunction():
            if self.seed is None:
                return torch.zeros(size, dtype=dtype, device=device)
            return noise(self.seed, self.key_of(slot) ^ family, size, dtype, device)

    def key_of(self, slot: Slot) -> int:
        """The key of a slot's noise."""
        return self.keys.get(slot.uid, slot.key)


AT_MEAN = Scope(None)


def grad_mode() -> int:
    """What draws of one scope are told apart by: 0 without gradient, 1 with, 2 in inference."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        return 2
    return int(torch.is_grad_enabled())


def autocast_dtype(mean: Tensor) -> torch.dtype | None:
    """To what autocast lowers a weight now; None if it leaves it as it is."""
    kind = mean.device.type
    if mean.dtype is not torch.float32 or not torch.amp.is_autocast_available(kind):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class _Mode:
    """An entry of the stack that ``sampled``, ``at_mean`` and ``one_draw`` push."""

    __slots__ = ("drawing", "modules", "scope")

    def __init__(self, modules: frozenset[int], drawing: bool, scope: Scope | None) -> None:
        self.modules = modules
        self.drawing = drawing
        self.scope = scope


class _Local(threading.local):
    def __init__(self) -> None:
        self.scope: Scope | None = None
        self.modes: tuple[_Mode, ...] = ()
        self.on_checkpoint: Callable[[], None] | None = None
        self.reads: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


LOCAL = _Local()


class _Mixed(Scope):
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
        return _Mixed(self.training, self.seed, self.keys)


def realise(module: nn.Module, attribute: str, slot: Slot, seed: Tensor | None, key: int) -> Tensor:
    """Draw one parameter: on the CPU as draws are made together if possible, else by plain torch.

    The latter is the reference of :mod:`bayesify.kernels.grouped`. It draws in float32, or in
    float64 for a float64 mean, and has the mean's dtype.
    """
    mean, raw = tensors_of(module, attribute, slot)
    assert seed is not None
    # Not autocast and not a torch-function mode: the mode that swaps reads must not see this one.
    with torch._C.DisableTorchFunction():
        # On the CPU alone: the backward of a draw on CUDA reads the log variance again, which FSDP2
        # may have let go of by then. Memory is not kept either, where a unit is to be let go of.
        if mean.is_cpu and grouped.possible() and _suits_group(slot, mean, raw):
            [(value, _)] = grouped.draw([grouped.Item(mean, raw, key, Buffers())], seed)
            return value
        dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
        std = gaussian.std_from_raw(raw, slot.parameterization)
        return gaussian.draw(mean, std, noise(seed, key, mean.shape, dtype, mean.device))


def _suits_group(slot: Slot, mean: Tensor, raw: Tensor) -> bool:
    """Whether :mod:`bayesify.kernels.grouped` can draw this parameter, where it is possible."""
    return slot.parameterization == "exp" and grouped.suits(mean, raw)


def new_seed() -> Tensor:
    """A seed from torch's global CPU generator, with the rank folded in when distributed."""
    seed = torch.randint(0, _SEED_BOUND, (), dtype=torch.int64, device="cpu")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # wraps around in int64; the noise mixes all bits of it
        seed = seed + fold(0, torch.distributed.get_rank())
    return seed


def as_seed(seed: int | Tensor | None) -> Tensor:
    """A seed given by a user as the int64 CPU scalar that scopes carry.

    Raises:
        ArgumentError: ``seed`` is neither None, nor an int in [0, 2**63), nor an integer scalar.
    """
    if seed is None:
        return new_seed()
    if isinstance(seed, Tensor):
        if seed.dim() != 0 or seed.dtype.is_floating_point or seed.device.type != "cpu":
            raise ArgumentError(
                "seed must be an int or an integer CPU tensor with no dimension, got a "
                f"{seed.dtype} tensor of shape {tuple(seed.shape)} on {seed.device}."
            )
        return seed.to(torch.int64)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise ArgumentError(f"seed must be an integer in [0, 2**63), got {seed!r}.")
    return torch.tensor(seed, dtype=torch.int64, device="cpu")


def read(module: nn.Module, attribute: str, autocast: bool = False) -> Tensor:
    """What a rewritten forward reads instead of ``module.attribute``.

    Args:
        module: The owner.
        attribute: Of the parameter.
        autocast: Whether autocast lowers the weight in every operation that takes this read.
    """
    slot = module.__dict__[STATE].slots[attribute]
    scope = LOCAL.scope
    assert scope is not None
    scope = scope.of(module)
    if not scope.drawing:
        return tensors_of(module, attribute, slot)[0]
    if autocast:
        return scope.read_lowered(module, attribute, slot)
    return scope.read(module, attribute, slot)


def _wanted(module: nn.Module) -> Scope | None:
    """The scope in which an outermost call of ``module`` runs; None: a new one that draws."""
    if not LOCAL.modes:
        return None if module.training else AT_MEAN
    if _parts_differ(module):
        return _Mixed(module.training, keys=distinct_keys(list(sites(module))))
    return _decided(id(module), module.training)


def _decided(identity: int, training: bool) -> Scope | None:
    """The scope that the modes give a module; None: a new one that draws."""
    drawing: bool | None = None
    for mode in reversed(LOCAL.modes):
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
    for mode in reversed(LOCAL.modes):
        if id(module) not in mode.modules:
            of_others.append(mode.modules)
        elif mode.scope is not None or not mode.drawing:
            break  # what lies outside this block decides nothing
    return bool(of_others) and any(id(m) in o for m in module.modules() for o in of_others)


def _prefill(module: nn.Module, method: str, scope: Scope) -> list[Slot]:
    """Draw every weight below ``module`` now, except those that are sharded or seldom read.

    Made here, a draw lies outside every checkpointed region and every compiled sub-graph; a
    sharded parameter is drawn by the module that reads it, after its own all-gather.

    Returns:
        The slots that were drawn; none while torch.compile traces, which drops what is not read,
        and none where modes of parts differ, which is rare: all is drawn when it is read.
    """
    mode = grad_mode()
    if (id(module), mode) in scope.filled or isinstance(scope, _Mixed):
        return []
    compiling = torch.compiler.is_compiling()
    state = module.__dict__[STATE]
    seldom = set() if compiling else state.seldom.get((method, mode), set())
    lowered = {} if compiling else state.lowered.get((method, mode), {})
    drawn: list[Slot] = []
    scope.filled.add((id(module), mode))
    seen: dict[int, int] = {}
    together = grouped.possible()
    items: dict[tuple[Any, ...], grouped.Item] = {}
    slots: list[Slot] = []
    for child in module.modules():
        state = owner_state(child)
        if state is None:
            continue
        for attribute, slot in state.slots.items():
            if seen.setdefault(slot.key, slot.uid) != slot.uid:
                # a copy of a layer in the same model: not the same noise
                scope.keys.setdefault(slot.uid, fold(slot.key, 1 + len(scope.keys)))
            mean, raw = tensors_of(child, attribute, slot)
            index: tuple[Any, ...] = (slot.uid, mode)
            dtype = lowered.get(slot.uid)
            if dtype is not None and dtype == autocast_dtype(mean):
                index = (*index, dtype)
            else:
                dtype = None
            if type(mean) is not nn.Parameter or index in scope.realised:
                continue
            if slot.estimator != "weight" or slot.uid in seldom:
                continue  # most of its reads need no draw, or there is none
            if not compiling:
                drawn.append(slot)
            if together and _suits_group(slot, mean, raw):
                if index not in items:
                    items[index] = grouped.Item(mean, raw, scope.key_of(slot), slot.buffers, dtype)
                    slots.append(slot)
                    slot.drawn = None
            elif dtype is None:
                scope.draw(child, attribute, slot)
            else:
                scope.read_lowered(child, attribute, slot)
    if items:
        assert scope.seed is not None
        # as in realise
        with torch._C.DisableTorchFunction():
            made = grouped.draw(list(items.values()), scope.seed)
        for index, slot, (value, hook) in zip(items, slots, made, strict=True):
            scope.realised[index], slot.drawn = value, hook
    return drawn


def _note_unread(module: nn.Module, method: str, scope: Scope, drawn: list[Slot]) -> None:
    """Remember which weights a call drew in vain: later calls draw them when they read them.

    And which it read in autocast's dtype alone: later calls draw them in it.
    """
    if scope.compiled:
        return
    mode = grad_mode()
    used = {(uid, of): dtype for uid, of, dtype in scope.lowered}
    whole = module.__dict__[STATE].lowered.setdefault((method, mode), {})
    for slot in drawn:
        dtype = used.get((slot.uid, mode))
        if dtype is not None and (slot.uid, mode) not in scope.reads:
            whole[slot.uid] = dtype
        elif (slot.uid, mode) in scope.reads:
            whole.pop(slot.uid, None)
    unread = [s for s in drawn if (s.uid, mode) not in scope.reads and (s.uid, mode) not in used]
    if unread:
        seldom = module.__dict__[STATE].seldom.setdefault((method, mode), set())
        seldom.update(slot.uid for slot in unread)
        for slot in unread:
            slot.drawn = None


def enter(
    module: nn.Module, method: str, run: Callable[..., Any], args: Any, kwargs: Any, at_mean: Any
) -> Any:
    """Run an outermost call of a method: ``run`` inside a scope that draws, else ``at_mean``."""
    scope = _wanted(module)
    if scope is AT_MEAN:
        LOCAL.scope = scope
        try:
            return at_mean(*args, **kwargs)
        finally:
            LOCAL.scope = None
    held = scope is not None
    if scope is None:
        scope = Scope(new_seed())
    LOCAL.scope = scope
    try:
        if torch.compiler.is_compiling():
            _prefill(module, method, scope)
            return run(*args, **kwargs)
        with _checkpoint_seam:
            drawn = _prefill(module, method, scope)
            result = run(*args, **kwargs)
        _note_unread(module, method, scope, drawn)
        return result
    finally:
        LOCAL.scope = None
        if not held:
            scope.clear()


@contextlib.contextmanager
def _pushed(mode: _Mode) -> Iterator[None]:
    previous = LOCAL.modes
    LOCAL.modes = (*previous, mode)
    try:
        with _checkpoint_seam:
            yield
    finally:
        LOCAL.modes = previous


def modules_of(model: nn.Module) -> frozenset[int]:
    """Identities of the modules of a model that has a posterior."""
    bayesian_sites(model)
    return frozenset(map(id, model.modules()))


def distinct_keys(found: list[Site]) -> dict[int, int]:
    """Noise keys for parts that were converted apart and share a name; by slot, usually none."""
    seen: dict[int, int] = {}
    keys: dict[int, int] = {}
    for site in found:
        count = seen[site.slot.key] = seen.get(site.slot.key, -1) + 1
        if count:
            keys[site.slot.uid] = fold(site.slot.key, count)
    return keys


@contextlib.contextmanager
def sampled(model: nn.Module) -> Iterator[None]:
    """Every call of ``model`` in this block draws its weights, also in ``eval()``.

    Given a part of a model, it holds for the weights of that part, also when the whole is called.
    Of several blocks that name a module the innermost decides.

    Raises:
        UnsupportedModuleError: ``model`` has no posterior.
    """
    with _pushed(_Mode(modules_of(model), True, None)):
        yield


@contextlib.contextmanager
def at_mean(model: nn.Module) -> Iterator[None]:
    """Every call of ``model`` in this block uses the posterior means, also in ``train()``.

    Given a part of a model, it holds for the weights of that part, also when the whole is called.
    Of several blocks that name a module the innermost decides.

    Raises:
        UnsupportedModuleError: ``model`` has no posterior.
    """
    with _pushed(_Mode(modules_of(model), False, None)):
        yield


@contextlib.contextmanager
def one_draw(model: nn.Module, seed: int | Tensor | None = None) -> Iterator[None]:
    """All calls of ``model`` in this block share one draw of its weights, also in ``eval()``.

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
    with held(modules_of(model), scope):
        yield


@contextlib.contextmanager
def held(modules: frozenset[int], scope: Scope) -> Iterator[None]:
    """All calls of the modules in this block read the draws of ``scope``, also in ``eval()``."""
    with _pushed(_Mode(modules, True, scope)):
        try:
            yield
        finally:
            scope.clear()


def draws(model: nn.Module, seed: int | Tensor | None = None) -> dict[str, Tensor]:
    """The weights that ``one_draw(model, seed)`` uses, for ``torch.func.functional_call``.

    With the estimators ``local`` and ``flipout`` each example has weights of its own: a call in
    ``one_draw`` then gives something else than one with these, of the same distribution.

    Returns:
        ``{name: draw}`` over the Bayesian parameters, tied ones once; differentiable in means
        and log variances; batched if ``seed`` is batched by ``torch.vmap``.

    Raises:
        ArgumentError: ``seed`` is not a non-negative integer.
        UnsupportedModuleError: ``model`` has no posterior.

    >>> import torch, bayesify
    >>> model = bayesify.to_bbb(torch.nn.Linear(2, 1)).eval()
    >>> x = torch.ones(1, 2)
    >>> with bayesify.one_draw(model, seed=0):
    ...     y = model(x)
    >>> torch.equal(y, torch.func.functional_call(model, bayesify.draws(model, seed=0), (x,)))
    True
    """
    tensor, found = as_seed(seed), bayesian_sites(model)
    keys = distinct_keys(found)
    return {
        s.name: realise(s.module, s.attribute, s.slot, tensor, keys.get(s.slot.uid, s.slot.key))
        for s in found
    }


@contextlib.contextmanager
def recording(on_checkpoint: Callable[[], None]) -> Iterator[None]:
    """Call ``on_checkpoint`` before any activation checkpoint of this thread in this block."""
    outer, LOCAL.on_checkpoint = LOCAL.on_checkpoint, on_checkpoint
    try:
        with _checkpoint_seam:
            yield
    finally:
        LOCAL.on_checkpoint = outer


def _carried(function: Callable[..., Any], *, keep: bool) -> Callable[..., Any]:
    """``function`` bound to the present scope and modes, whenever and wherever it is called."""
    if LOCAL.on_checkpoint is not None:
        LOCAL.on_checkpoint()
    scope, modes, reads = LOCAL.scope, LOCAL.modes, LOCAL.reads
    if scope is None and not modes:
        return function
    snapshot = None if scope is None else scope.fork(keep=keep)
    frozen = [(m, None if m.scope is None else m.scope.fork(keep=keep)) for m in modes]

    def run(*args: Any, **kwargs: Any) -> Any:
        outer = LOCAL.scope, LOCAL.modes
        LOCAL.scope = None if snapshot is None else snapshot.fork(keep=True)
        LOCAL.modes = tuple(
            _Mode(m.modules, m.drawing, None if s is None else s.fork(keep=True)) for m, s in frozen
        )
        try:
            with _checkpoint_seam, reads():
                return function(*args, **kwargs)
        finally:
            LOCAL.scope, LOCAL.modes = outer

    return run


class _CheckpointSeam:
    """While a scope or mode is active, activation checkpoints remember it for their recomputation.

    ``torch.utils.checkpoint`` recomputes a region inside backward, after the scope of its forward
    has closed. Its two entry points are wrapped, counted over threads, and put back at the end.
    """

    _GENERATORS = (
        "_checkpoint_without_reentrant_generator_impl",
        "_checkpoint_without_reentrant_generator",
    )

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

    def _install(self) -> None:
        module = torch.utils.checkpoint
        name = next(n for n in self._GENERATORS if hasattr(module, n))
        reentrant, generator = module.CheckpointFunction, getattr(module, name)
        self._originals = {"CheckpointFunction": reentrant, name: generator}

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


_checkpoint_seam = _CheckpointSeam()
