"""The fallback: the original code runs, and modules give it draws in place of their parameters.

Each Bayesian module of the owner holds its parameters in a dict that gives draws to the thread
that runs the fallback, and to every other thread, and to the toolkit, what it holds.
"""

from __future__ import annotations

import copy
import functools
import threading
import types
from collections import OrderedDict
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import scope as scopes
from .. import torch_private
from ..posterior import STATE, owner_state, raw_name, tensors_of
from ..scope import LOCAL
from .active import ACTIVE
from .assignments import members
from .guards import INTERNAL
from .trace_context import opaque_calls, restore
from .writes import Writes

_LOCK = threading.Lock()


class DrawnParameters(dict[str, Any]):
    """The parameters of one module, which read as draws where the present thread exchanges them.

    At the means it gives them as they are, but lists no log variances. It stands in the module
    while any thread exchanges. The functions of ``dict`` itself, called as
    ``dict.get(parameters, name)``, give what it holds.
    """

    __slots__ = ("before", "module", "plain", "put", "read", "users")

    def __init__(self, module: nn.Module, plain: dict[str, Any]) -> None:
        super().__init__(plain)
        self.module, self.plain, self.users = module, plain, 0
        self.put: set[str] = set()  # what a forward has put in
        self.before: dict[str, Any] = {}  # the parameters in whose place it did
        self.read: dict[int, Any] = {}  # the draws that it has read, and may put back

    def exchanged(self) -> Any:
        """The slots of the module where it is that of before the conversion, else None."""
        if id(self.module) not in ACTIVE.exchanged or ACTIVE.tracer is not None:
            return None
        return None if LOCAL.scope is None else self.module.__dict__[STATE].slots

    def __getitem__(self, name: str) -> Any:
        slots = self.exchanged()
        if slots is None or name not in slots or not LOCAL.scope.drawing:  # type: ignore[union-attr]
            return dict.__getitem__(self, name)
        outer, ACTIVE.exchanged = ACTIVE.exchanged, frozenset()
        try:
            found = scopes.read(self.module, name)
        finally:
            ACTIVE.exchanged = outer
        if name not in self.put:
            self.read[id(found)] = found
        return found

    def __setitem__(self, name: str, value: Any) -> None:
        """Take what ``functional_call`` puts in, and for a draw that it found the parameter."""
        if self.read.get(id(value)) is value and value is not None:
            self.put.discard(name)
            value = self.before.pop(name, self.plain.get(name))
        elif self.exchanged() is not None and value is not self.plain.get(name):
            self.put.add(name)
            if isinstance(held := dict.get(self, name), nn.Parameter):
                self.before[name] = held
        dict.__setitem__(self, name, value)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default

    def __iter__(self) -> Iterator[str]:
        slots = self.exchanged()
        if slots is None:
            return dict.__iter__(self)
        raws = {raw_name(attribute, slot) for attribute, slot in slots.items()}
        return iter([name for name in dict.__iter__(self) if name not in raws])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def keys(self) -> Any:
        return KeysView(self)

    def values(self) -> Any:
        return ValuesView(self)

    def items(self) -> Any:
        return ItemsView(self)

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(dict.items(self)),)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        """A copy of the posterior, not of a draw; in one scope it has the same noise."""
        with torch_private.DisableTorchFunction():  # HeldReads would give draws to be copied
            return copy.deepcopy(dict(dict.items(self)), memo)


@contextmanager
def exchanged(modules: list[nn.Module], aside: nn.Module | None = None) -> Iterator[None]:
    """Let the Bayesian parameters of these modules read as draws, in this thread.

    No one else sees them: not other threads, nor calls whose scope does not draw. One stands
    aside that would put what it reads where other threads find it, as an RNN's list of weights.
    """
    outer = ACTIVE.exchanged
    held = []
    with _LOCK:
        for module in modules:
            state = module.__dict__.get(STATE)
            if state is not None and state.slots and id(module) not in outer:
                held.append(_installed(module))
    ACTIVE.exchanged = outer.union(map(id, modules)).difference((id(aside),))
    try:
        yield
    finally:
        ACTIVE.exchanged = outer
        with _LOCK:
            for parameters in held:
                _release(parameters)


def _installed(module: nn.Module) -> DrawnParameters:
    parameters: Any = module._parameters
    if type(parameters) is not DrawnParameters:
        parameters = module.__dict__["_parameters"] = DrawnParameters(module, parameters)
    found: DrawnParameters = parameters
    found.users += 1
    return found


def _release(parameters: DrawnParameters) -> None:
    parameters.users -= 1
    if not parameters.users and parameters.module.__dict__["_parameters"] is parameters:
        restore(parameters.plain, dict(dict.items(parameters)))  # some may have been replaced
        parameters.module.__dict__["_parameters"] = parameters.plain


class HeldReads(TorchFunctionMode):
    """Exchanges each Bayesian parameter among a torch function's arguments for its draw.

    A second way beside :func:`exchanged`, at a cost for every torch function: what holds a
    parameter itself, such as a closure, a list, an RNN's flat weights, reads it from no module.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.outer: list[Any] = []
        self.met = False
        self.where: dict[int, tuple[nn.Module, str]] = {}
        for module in modules:
            state = owner_state(module)
            for attribute in state.slots if state is not None else ():
                mean = dict.get(module._parameters, attribute)
                self.where.setdefault(id(mean), (module, attribute))
        self.writes = Writes(self.where)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if LOCAL.scope is None or not LOCAL.scope.drawing or ACTIVE.tracer is not None:
            return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "requires_grad_" or (
            name == "__set__" and func.__self__.__name__ == "requires_grad"
        ):
            value = kwargs.get("requires_grad") if kwargs else None
            value = value if value is not None else (*args[1:], True)[0]
            if self.set_requires_grad(args[0], bool(value)):
                return args[0]
        if name == "__get__" and func.__self__.__name__ in _HARMLESS:
            return func(*args, **(kwargs or {}))
        return self.writes.run(func, self.exchange(args), self.exchange(kwargs or {}))

    def __enter__(self) -> HeldReads:
        opaque_calls.__enter__()
        self.outer.append(ACTIVE.exchange)
        ACTIVE.exchange = self.exchange_while_drawing
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        ACTIVE.exchange = self.outer.pop()
        opaque_calls.__exit__()

    def exchange_while_drawing(self, value: Any) -> Any:
        scope = LOCAL.scope
        return value if scope is None or not scope.drawing else self.exchange(value)

    def set_requires_grad(self, tensor: Any, value: bool) -> bool:
        """Let the posterior of a draw, or of a mean, have a gradient or none; whether it is one.

        The draw that was made lets it through: the next read makes another with the same noise.
        """
        assert LOCAL.scope is not None
        for module, attribute in self.where.values():
            slot = module.__dict__[STATE].slots[attribute]
            scope, index = LOCAL.scope.of(module), (slot.uid, scopes.grad_mode())
            mean = dict.get(module._parameters, attribute)
            if tensor is mean or (mean is not None and scope.realised.get(index) is tensor):
                for part in tensors_of(module, attribute, slot):
                    part.requires_grad_(value)
                scope.realised.pop(index, None)
                scope.later.pop(index, None)
                slot.drawn = None
                return True
        return False

    def exchange(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            found = self.where.get(id(value))
            if found is None:
                return value
            self.met = True
            return scopes.read(*found)
        kind = type(value)
        if kind in (tuple, list):
            return kind(self.exchange(v) for v in value)
        if kind is dict:
            return {k: self.exchange(v) for k, v in value.items()}
        return value


_HARMLESS = {"shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad"}


@contextmanager
def drawn_reads(
    modules: list[nn.Module], held: bool, aside: nn.Module | None = None
) -> Iterator[HeldReads | None]:
    """Every read of a parameter of these modules is a draw; ``held``: also one that is held."""
    with exchanged(modules, aside):
        if held:
            with HeldReads(modules) as mode:
                yield mode
        else:
            yield None


def owner_holds_parameters(owner: nn.Module) -> bool:
    """Whether a module, or the code of its class, shows that it holds parameters elsewhere.

    What lies in a deeper object is found when it is read in the first run.
    """
    state = owner_state(owner)
    own = [v for n, v in owner.__dict__.items() if type(v) in _HOLDERS and v and n not in INTERNAL]
    methods = () if state is None else state.methods.values()
    return any(map(holds_parameters, (*own, *methods, *_closures(type(owner)))))  # type: ignore[arg-type]


_HOLDERS = (
    list, tuple, set, frozenset, dict, OrderedDict, functools.partial, types.MethodType,
    types.FunctionType,
)  # fmt: skip


@functools.cache
def _closures(cls: type) -> tuple[types.FunctionType, ...]:
    found = (f for many in members(cls).values() for f in many if isinstance(f, types.FunctionType))
    return tuple(f for f in found if f.__closure__ or f.__defaults__ or f.__kwdefaults__)


def holds_parameters(value: Any, depth: int = 0) -> bool:
    """Whether a container, or a function by what it closes over, holds a parameter itself."""
    kind = type(value)
    if isinstance(value, Tensor):
        return isinstance(value, nn.Parameter)
    if kind not in _HOLDERS or depth > 3:
        return False
    parts: Any = ()
    if kind in (list, tuple, set, frozenset):
        parts = tuple(value)
    elif kind in (dict, OrderedDict):
        parts = tuple(value.values())
    elif kind is functools.partial:
        parts = (value.func, value.args, value.keywords)
    elif kind is types.MethodType:
        parts = (value.__self__, value.__func__)
    else:
        cells = [content_of(cell) for cell in value.__closure__ or ()]
        parts = (value.__defaults__, value.__kwdefaults__, *cells)
    return any(holds_parameters(part, depth + 1) for part in parts)


def content_of(cell: types.CellType) -> Any:
    """What a closure holds in a cell; None if nothing yet."""
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None
