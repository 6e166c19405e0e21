"""The graph that a trace writes: nodes, their arguments, and reads of the live owner."""

from __future__ import annotations

import dataclasses
import functools
import keyword
import math
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import context_variables
from .guards import INTERNAL, PRIMITIVES
from .objects import TracedObject, may_change
from .trace_context import context_state
from .values import (
    ForeignTensor,
    TracedNumber,
    TracedParts,
    TracedSize,
    TracedTensor,
    TraceFailure,
)


class Expression:
    """An argument that the generated code spells out, such as ``self.attn.bias_cache['cpu']``."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __repr__(self) -> str:
        return self.source


class GraphWriter:
    """Writes fx nodes whose arguments are traced values or things of one module.

    Invariant: a graph holds no tensor of its module. Each is named by its path from the owner and
    read there at every call, so that a load, a cast or a move of the module shows.

    Args:
        owner: The module whose method is traced; its tensors become reads of the live module.

    Attributes:
        graph: What was written.
        constants: Objects that the code refers to by name.
        parameters: Path and name of what each ``get_attr`` node of a parameter reads, by node name.
        paths: Where each module lies below the owner, by identity.
        modules: The owner and those below it, each once.
        tensors: Kind, path, name and tensor of each that the modules hold, by identity.
        made: Modules that the method itself has made, by identity.
    """

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.graph = fx.Graph()
        self.constants: dict[str, Any] = {}
        self.parameters: dict[str, tuple[tuple[str, ...], str]] = {}
        self.made: dict[int, nn.Module] = {}
        self.entry_context = context_state()
        self.grad_mode = self.entry_context[0]
        self._reads: dict[str, fx.Node] = {}
        self._last_read: fx.Node | None = None
        self._last_placeholder: fx.Node | None = None
        self._index()

    def _index(self) -> None:
        """Give each module a path and each tensor a place, the first that is found.

        A parameter comes before a buffer and both before a plain attribute, wherever they are held:
        what is read must be named as what is drawn.
        """
        self.paths: dict[int, tuple[str, ...]] = {}
        self.modules: list[nn.Module] = []
        self.tensors: dict[int, tuple[str, tuple[str, ...], str, Tensor]] = {}
        attributes: list[tuple[tuple[str, ...], str, Any]] = []
        stack: list[tuple[tuple[str, ...], nn.Module]] = [((), self.owner)]
        while stack:
            path, module = stack.pop()
            if id(module) in self.paths:
                continue
            self.paths[id(module)] = path
            self.modules.append(module)
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self.tensors.setdefault(id(parameter), ("parameter", path, name, parameter))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    self.tensors.setdefault(id(buffer), ("buffer", path, name, buffer))
            for name, value in module.__dict__.items():
                if name not in INTERNAL:
                    attributes.append((path, name, value))
            stack.extend(
                ((*path, name), child)
                for name, child in reversed(module._modules.items())
                if child is not None
            )
        for attribute in attributes:  # last: what is a parameter too, of whatever module, is one
            self._index_attribute(*attribute)

    def _index_attribute(self, path: tuple[str, ...], name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self.tensors.setdefault(id(value), ("attribute", path, name, value))
        elif isinstance(value, list | tuple | dict):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                if isinstance(item, Tensor) and type(key) in (int, str) and name.isidentifier():
                    entry = ("item", path, f"{name}[{key!r}]", item)
                    self.tensors.setdefault(id(item), entry)

    def placeholder(self, name: str) -> fx.Node:
        """An input of the graph; all of them come before any other node."""
        self._last_placeholder = node = self.graph.placeholder(name)
        return node

    def constant(self, value: Any) -> Expression:
        """A name for an object, under which the code finds it."""
        for name, known in self.constants.items():
            if known is value:
                return Expression(name)
        name = f"_constant_{len(self.constants)}"
        self.constants[name] = value
        return Expression(name)

    def _read(self, kind: str, path: tuple[str, ...], name: str) -> fx.Node:
        """A node that reads a tensor of the live owner, placed before everything else."""
        target = ".".join((*path, name))
        node = self._reads.get(target)
        if node is None:
            if not can_be_target((*path, name)):
                raise TraceFailure(f"it reads {target!r}, a name that no code can spell out")
            anchor = self._last_read or self._last_placeholder
            place = (
                self.graph.inserting_after(anchor)
                if anchor is not None
                else self.graph.inserting_before(next(iter(self.graph.nodes), None))
            )
            with place:
                node = self.graph.create_node("get_attr", target, name="_".join((*path, name)))
            node.meta["context"] = self.entry_context
            self._reads[target] = self._last_read = node
            if kind == "parameter":
                self.parameters[node.name] = (path, name)
        return node

    def made_of_data(self, tensor: Tensor) -> Tensor:
        """A tensor made of data outside of torch: the graph makes a fresh one at every call."""
        self.tensors.setdefault(id(tensor), ("data", (), "", tensor))
        return tensor

    def _fresh(self, tensor: Tensor) -> fx.Node:
        name = f"data {id(tensor)}"
        if name not in self._reads:
            self._reads[name] = self.node("call_method", "clone", (self.constant(tensor),))
        return self._reads[name]

    def argument(self, value: Any) -> Any:
        """``value`` as an argument of a node.

        What was traced becomes its node, a tensor of the module a read of the live one, a plain
        value itself; containers are taken apart.

        Raises:
            TraceFailure: It is an object that may be another one at the next call, or a function
                that may read parameters where no trace sees it.
        """
        kind = type(value)
        if kind is TracedTensor:
            if value.recorder is not self:
                raise ForeignTensor(value)
            return value.node
        if kind is TracedObject:
            return value.__dict__["node"]
        if isinstance(value, TracedNumber):
            return value.recorded()
        if isinstance(value, Tensor):
            where = self.tensors.get(id(value))
            if where is None:
                return self.constant(value)
            if where[0] == "data":
                return self._fresh(value)
            if where[0] == "item":
                return Expression(access((*where[1],)) + "." + where[2])
            return self._read(*where[:3])
        if kind is TracedParts:
            return value.node
        if kind in (TracedSize, tuple, torch.Size):
            return tuple(self.argument(v) for v in tuple.__iter__(value))
        if kind is list:
            return [self.argument(v) for v in value]
        if kind is dict and all(type(k) is str for k in value):
            return {k: self.argument(v) for k, v in value.items()}
        if kind is slice:
            return slice(*(self.argument(v) for v in (value.start, value.stop, value.step)))
        if isinstance(value, PRIMITIVES):
            return value if _can_be_written(value) else self.constant(value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self._build(kind, tuple(self.argument(v) for v in value), {})
        if isinstance(value, dict) or (
            dataclasses.is_dataclass(value) and not isinstance(value, type)
        ):
            return self._built(value)
        if kind is functools.partial:
            parts = (value.func, *value.args)
            keywords = {k: self.argument(v) for k, v in value.keywords.items()}
            return self._build(kind, tuple(self.argument(v) for v in parts), keywords)
        if isinstance(value, nn.Module) and id(value) in self.paths:
            return Expression(access(self.paths[id(value)]))
        if not callable(value) or any(True for _ in traced_inside(value)):
            # it may be made anew, or changed, at every call
            raise TraceFailure(f"it passes an object of type {kind.__name__} along")
        if _reaches_parameters(value):
            raise TraceFailure(f"it passes a {kind.__name__} along that may read parameters")
        if id(value) in self.made or may_change(value):
            raise TraceFailure(f"it passes a {kind.__name__} along that a call may change")
        return self.constant(value)

    def passed(self, value: Any) -> Any:
        """``value`` as what user code gets, to which a torch.Size is no tuple."""
        argument = self.argument(value)
        if type(value) in (TracedSize, torch.Size):
            return self._build(torch.Size, (argument,), {})
        return argument

    def _built(self, value: Any) -> Any:
        """A dict or dataclass built anew by the code, with traced values inside."""
        kind = type(value)
        if isinstance(value, dict):
            if kind is dict:
                pairs = [(self.argument(k), self.argument(v)) for k, v in value.items()]
                return self._build(dict, (pairs,), {})
            if all(isinstance(k, str) for k in value) and dataclasses.is_dataclass(kind):
                return self._build(kind, (), {k: self.argument(v) for k, v in value.items()})
            pairs = [(self.argument(k), self.argument(v)) for k, v in value.items()]
            return self._build(kind, (pairs,), {})
        fields = [f for f in dataclasses.fields(value) if f.init]
        return self._build(
            kind, (), {f.name: self.argument(getattr(value, f.name)) for f in fields}
        )

    def _build(self, kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        return self.node("call_function", kind, args, kwargs)

    def node(
        self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        """Write a node, with the grad mode and autocast state in which it must run."""
        context = context_state()
        if context[0] != self.grad_mode and context[1] == self.entry_context[1]:
            raise TraceFailure("code that torch.fx cannot see has switched the gradient on or off")
        for name in kwargs or ():
            if not name.isidentifier() or keyword.iskeyword(name):
                raise TraceFailure(f"it passes a keyword {name!r}, which no code can spell out")
        node = self.graph.create_node(op, target, args, kwargs or {})
        node.meta["context"] = context
        return node

    def number(self, target: Any, args: tuple[Any, ...], method: bool = False) -> fx.Node:
        """The node that computes a number of traced values."""
        arguments = tuple(self.argument(a) for a in args)
        return self.node("call_method" if method else "call_function", target, arguments)

    # -- where a value comes from ----------------------------------------------------------

    def made_of_draws(self, value: Any) -> bool:
        """Whether a value is computed of parameters alone: kept, it would outlive its draw."""
        nodes = [t.node for t in traced_inside(value)]
        return bool(nodes) and all(
            self._comes_of(n, "parameter") and not self._comes_of(n, "placeholder") for n in nodes
        )

    def depends_on_argument(self, value: Any) -> bool:
        """Whether an argument has gone into a value, which then is no cache but state."""
        return any(self._comes_of(t.node, "placeholder") for t in traced_inside(value))

    def _comes_of(self, node: fx.Node, what: str) -> bool:
        """Whether a node comes of an argument, or of a parameter (a submodule's included)."""
        seen, stack = {node}, [node]
        while stack:
            current = stack.pop()
            if what == "placeholder" and current.op == "placeholder":
                return True
            if what == "parameter" and (
                current.op == "call_module"
                or current.target in (context_variables.in_context, call_of_torch)
                or current.name in self.parameters
            ):
                return True
            new = [n for n in current.all_input_nodes if n not in seen]
            seen.update(new)
            stack.extend(new)
        return False


def call_of(function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """The call of a value, as ``operator.call`` of Python 3.11."""
    return function(*args, **kwargs)


def call_of_torch(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What a ``__call__`` of a class's own calls as ``super().__call__``."""
    return nn.Module.__call__(module, *args, **kwargs)


def can_be_target(path: tuple[str, ...]) -> bool:
    """Whether fx writes a name as it is, be it no identifier."""
    return not any(character in part for part in path for character in '"\\\n\r')


def _can_be_written(value: Any) -> bool:
    """Whether generated code may spell out a plain value, instead of naming a constant."""
    kind: type = type(value)
    if kind is int:
        return bool(-(2**63) <= value < 2**63)
    if kind is float:
        return math.isfinite(value)
    if kind is str:
        return re.fullmatch(r"[\w .,:>-]*", value) is not None
    return kind in _WRITTEN


_WRITTEN = (
    bool, type(None), type(Ellipsis), torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


@functools.cache
def resolves(function: Any) -> bool:
    """Whether the qualified name under which fx writes a function leads back to it."""
    try:
        found: Any = sys.modules[function.__module__]
        for part in function.__qualname__.split("."):
            found = getattr(found, part)
    except (AttributeError, KeyError):
        return getattr(function, "__module__", None) != "torch._tensor"
    return found is function


def access(path: tuple[str, ...]) -> str:
    """Source of ``self.blocks[0].attn`` for a path, whatever its names look like."""
    source = "self"
    for part in path:
        source = f"{source}.{part}" if part.isidentifier() else f"getattr({source}, {part!r})"
    return source


def _reaches_parameters(value: Any) -> bool:
    """Whether a function is bound to a module with parameters, or closes over one."""
    if isinstance(value, nn.Module):
        return next(value.parameters(), None) is not None
    if isinstance(value, types.MethodType):
        return _reaches_parameters(value.__self__)
    cells = value.__closure__ or () if isinstance(value, types.FunctionType) else ()
    for cell in cells:
        try:
            if _reaches_parameters(cell.cell_contents):
                return True
        except ValueError:  # an empty cell
            continue
    return False


def traced_inside(value: Any, depth: int = 0) -> Iterator[TracedTensor]:
    """The traced tensors that a value holds: in containers, objects, partials and closures."""
    if type(value) is TracedTensor:
        yield value
    elif depth > 6 or type(value) is TracedObject:
        return
    elif isinstance(value, list | tuple | set):
        for item in tuple.__iter__(value) if isinstance(value, tuple) else list(value):
            yield from traced_inside(item, depth + 1)
    elif isinstance(value, dict):
        for item in value.values():
            yield from traced_inside(item, depth + 1)
    elif isinstance(value, functools.partial):
        yield from traced_inside((value.func, value.args, value.keywords), depth + 1)
    elif isinstance(value, types.MethodType):
        yield from traced_inside(value.__self__, depth + 1)
    elif hasattr(value, "__dict__") and not isinstance(
        value, nn.Module | Tensor | type | types.FunctionType | types.ModuleType
    ):
        for item in list(vars(value).values()):
            yield from traced_inside(item, depth + 1)
    elif isinstance(value, types.FunctionType) and value.__closure__:
        for cell in value.__closure__:
            try:
                yield from traced_inside(cell.cell_contents, depth + 1)
            except ValueError:  # an empty cell
                continue
