"""Torch functions become nodes: what a forward calls is run on examples and written down.

Every function called while a method runs is recorded, whether or not it touches an argument:
factories and in-place updates must happen anew on every call. Questions about a tensor's metadata
are answered without a node; where the answer may be another one at the next call, a guard or a
dimension is noted, so that the graph is used only while it is the same.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from .. import torch_private
from ..posterior import owner_state
from ..torch_private import FakeTensorMode
from .active import ACTIVE
from .examples import ExampleRunner
from .guards import MISSING, PRIMITIVES, Guard
from .objects import TracedObject, may_be_handed_on
from .tensor_methods import (
    CONCRETE_ATTRIBUTES,
    CONCRETE_METHODS,
    PARTS,
    TYPES,
    VALUE_METHODS,
    spelled,
)
from .trace_context import paused, transforms
from .values import (
    FREEZES,
    Dims,
    ForeignTensor,
    TracedFloat,
    TracedInt,
    TracedParts,
    TracedSize,
    TracedTensor,
    TraceFailure,
    unpacks_into_names,
)
from .writer import GraphWriter, traced_inside
from .writes import target_of

WRITES = "it writes into its parameter"


class Recording(GraphWriter, TorchFunctionMode):
    """Records the torch functions that are called while it is on.

    Invariant: whatever has entered an answer that the method got is an input of a node, or stands
    in ``guards``, ``types``, ``dims`` or ``layout``; else the trace ends with a
    :class:`TraceFailure`.

    Args:
        owner: The module whose method is traced.
        fake_mode: That of the trace of the caller, whose examples are the arguments; None: a new
            one.

    Attributes:
        guards: Attributes on whose values the graph depends, by (module path, name).
        types: The dtype, device and ``requires_grad`` of tensors on which it depends.
        dims: (argument, dimension) pairs on which it depends; None for all of them.
        layout: Whether it depends on the strides of the arguments.
        guided: Whether a value had to be answered, so that plain fx would have failed.
        error: The first error that the trace raised, if any.
        handed_on: Whether a submodule was given an object, whatever that holds.
    """

    def __init__(self, owner: nn.Module, fake_mode: FakeTensorMode | None) -> None:
        TorchFunctionMode.__init__(self)
        GraphWriter.__init__(self, owner)
        self.examples = ExampleRunner(fake_mode)
        self.guards: dict[tuple[tuple[str, ...], str], Guard] = {}
        self.types: dict[tuple[tuple[str, ...], str], tuple[Any, ...]] = {}
        self.dims: Dims = frozenset()
        self.layout = False
        self.guided = False
        self.error = ""
        self.handed_on = False
        self._sizes: dict[tuple[int, int], TracedInt] = {}
        self._transforms = transforms()

    def note_dims(self, dims: Dims) -> None:
        """The code asked for a value that depends on these dimensions of the arguments."""
        if dims is None or dims:
            self.guided = True
            if dims is None and self.handed_on:
                raise TraceFailure("a size may come of an object that a submodule was given")
        self.dims = None if dims is None or self.dims is None else self.dims | dims

    def note_error(self, error: BaseException) -> None:
        """What the trace raised, the method must not handle: its other branch may be wrong."""
        first = (str(error).splitlines() or [""])[0]
        self.error = self.error or f"{type(error).__name__}: {first}"

    # -- a function ------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._on():
            return func(*args, **(kwargs or {}))
        return self.record(func, args, kwargs or {})

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record one call of a torch function and give its traced result."""
        if not self._on():
            raise TraceFailure(f"{func} on a traced tensor outside of its trace")
        try:
            return self._record(func, args, kwargs)
        except BaseException as error:
            self.note_error(error)
            raise

    def _on(self) -> bool:
        tracer: object = ACTIVE.tracer
        return tracer is self

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call: refused, answered by metadata, or made a node.

        Refusals come first, so that no part of a call that cannot be repeated is recorded.
        """
        if transforms() != self._transforms:
            raise TraceFailure("it differentiates or maps a function by torch.func or forward_ad")
        name = getattr(func, "__name__", "")
        subject = args[0] if args else None
        if type(subject) is TracedTensor and subject.recorder is not self:
            raise ForeignTensor(subject)
        if name == "__get__":
            return self._property(func.__self__.__name__, args[0])
        if name == "__set__":
            return self._set_property(func.__self__.__name__, *args)
        if name in VALUE_METHODS and isinstance(subject, Tensor):
            raise TraceFailure(f"Tensor.{name} reads a tensor's value")
        if name == "requires_grad_" and isinstance(subject, nn.Parameter):
            raise TraceFailure(FREEZES)
        if name == "_assert":
            if isinstance(subject, Tensor):
                raise TraceFailure("torch._assert reads a tensor's value")
            return func(*args)
        if isinstance(subject, Tensor):
            answer = self._metadata(name, func, args, kwargs)
            if answer is not MISSING:
                return answer
        return self._call(func, name, args, kwargs)

    def _call(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function on examples and write the node that runs it at every call."""
        if name.startswith("squeeze"):
            self.note_dims(None)  # whether a dimension goes depends on its size
        if (target := target_of(func, args, kwargs)) is not None:
            self._refuse_write(target)
        result = self.examples.run(func, args, kwargs)
        if func is torch_private.set_grad_enabled:
            if torch.is_inference_mode_enabled() == self.entry_context[1]:  # which switches it too
                self.grad_mode = torch.is_grad_enabled()
        op, target, operands = spelled(func, args)
        node = self.node(
            op, target, tuple(self.argument(a) for a in operands),
            {k: self.argument(v) for k, v in kwargs.items()},
        )  # fmt: skip
        return self.wrap(result, node, (args, kwargs), parts=name in PARTS)

    def _refuse_write(self, target: Tensor) -> None:
        """A write into a posterior's draw is the fallback's to turn into one into its mean."""
        with torch_private.DisableTorchFunction(), paused():
            place = self.examples.inside(target).untyped_storage()._cdata
            for kind, path, name, tensor in self.tensors.values():
                known = self.examples.known(tensor)
                if kind == "parameter" and known is not None:
                    if known.untyped_storage()._cdata == place:
                        module = self.owner.get_submodule(".".join(path))
                        state = owner_state(module)
                        if state is not None and name in state.slots:
                            raise TraceFailure(f"{WRITES} {'.'.join((*path, name))!r}")

    # -- questions -------------------------------------------------------------------------

    def _property(self, name: str, tensor: Any) -> Any:
        """The value of a property of a tensor: metadata, or a tensor such as ``x.T``."""
        traced = type(tensor) is TracedTensor
        if name == "shape":
            return self._shape(tensor)
        if name in TYPES:
            self._note_types(tensor)
        example = tensor.example if traced else self.examples.of(tensor)
        if name == "device" and not traced:
            with torch_private.DisableTorchFunction():
                return tensor.device
        if name in CONCRETE_ATTRIBUTES:
            with torch_private.DisableTorchFunction(), paused():
                return getattr(example, name)
        if name == "grad_fn" or name == "grad":
            raise TraceFailure(f"Tensor.{name} is known only when it runs")
        result = self.examples.run(getattr, (tensor, name), {})
        if not isinstance(result, Tensor):
            raise TraceFailure(f"Tensor.{name} is not a tensor")
        node = self.node("call_function", getattr, (self.argument(tensor), name))
        return self.wrap(result, node, (tensor,))

    def _set_property(self, name: str, tensor: Any, value: Any) -> None:
        self.node("call_function", setattr, (self.argument(tensor), name, self.argument(value)))
        if name == "requires_grad":
            raise TraceFailure(FREEZES)
        if name == "data":
            self._refuse_write(tensor)
            raise TraceFailure(f"assignment to Tensor.{name}")

    def _metadata(self, name: str, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """What a method of a tensor answers without a node; MISSING if it takes one."""
        tensor = args[0]
        traced = type(tensor) is TracedTensor
        if name == "size":
            shape = self._shape(tensor)
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            return shape if dim is None else shape[dim]
        if name in ("numel", "nelement"):
            shape = self._shape(tensor)
            return shape.numel()
        if name == "__len__":
            return operator.index(self._shape(tensor)[0])
        if name == "__iter__":
            if not unpacks_into_names():
                operator.index(self._shape(tensor)[0])
            count = range(len(tensor.example) if traced else len(tensor))
            return iter([self.record(Tensor.__getitem__, (tensor, i), {}) for i in count])
        if name in ("stride", "is_contiguous", "storage_offset"):
            if traced:
                self.note_dims(None)
                self.layout = True
            return self.examples.run(func, args, kwargs)
        if name == "type" and len(args) + len(kwargs) > 1:
            return MISSING  # a cast
        if name in CONCRETE_METHODS:
            if name in TYPES:
                self._note_types(tensor)
            return self.examples.run(func, args, kwargs)
        return MISSING

    def _shape(self, tensor: Any) -> Any:
        if type(tensor) is TracedTensor:
            return TracedSize(self._size(tensor, d) for d in range(tensor.example.dim()))
        with torch_private.DisableTorchFunction():
            shape = tensor.shape
        where = self.tensors.get(id(tensor))
        if where is not None and where[0] == "buffer":
            key = (where[1], f"{where[2]}.shape")
            self.guards[key] = Guard(where[1], where[2], tuple(shape), "shape")
        return shape

    def _size(self, tensor: TracedTensor, dim: int) -> TracedInt:
        key = (id(tensor), dim)
        known = self._sizes.get(key)
        if known is None:
            dims = None if tensor.argument is None else frozenset({(tensor.argument, dim)})
            node = functools.partial(self.number, "size", (tensor, dim), method=True)
            known = TracedInt(tensor.example.shape[dim], self, dims, node)
            known.source = tensor  # keeps id(tensor) taken
            self._sizes[key] = known
        return known

    def _note_types(self, tensor: Any) -> None:
        """The code asked for the dtype or the like of one of the owner's tensors.

        Or of a result, which depends on all of them; those of the arguments are in the key.
        """
        found = [w for w in self.tensors.values() if w[0] in ("parameter", "buffer")]
        if type(tensor) is not TracedTensor:
            found = [where for where in found if where[3] is tensor]
        elif tensor.argument is not None:
            return
        with torch_private.DisableTorchFunction():
            kinds = ((path, name, t.dtype, t.device, t.requires_grad) for _, path, name, t in found)
            for kind in kinds:
                self.types[kind[:2]] = kind

    # -- a result --------------------------------------------------------------------------

    def wrap(self, result: Any, node: fx.Node, inputs: Any, parts: bool = False) -> Any:
        """What the method gets for the result that a call had on examples.

        Tensors are traced, and containers rebuilt around them, each item with a node of its own
        that takes it out of ``node``. A number can only come of shapes, since examples hold no
        data: it stays symbolic if a traced tensor is among the inputs. ``parts`` says that even
        the number of items depends on a shape.

        Raises:
            TraceFailure: The result holds what can neither be traced nor be a constant.
        """
        if isinstance(result, Tensor):
            # also where it is the very input: dropout gives its input back only in eval
            return TracedTensor(result, node, self)
        if result is NotImplemented:  # of `tensor == None`, which Python then answers
            return result
        if result is None or isinstance(result, PRIMITIVES):
            return self._wrap_plain(result, node, inputs)
        if isinstance(result, tuple | list):
            items = tuple(
                self._wrap_part(item, operator.getitem, node, i, inputs)
                for i, item in enumerate(result)
            )
            if parts:
                return TracedParts.make(items, self, node, type(result))
            if isinstance(result, list):
                return list(items)
            if hasattr(result, "_fields"):
                return type(result)(*items)
            if type(result) is tuple:
                return items
            return type(result)(items)  # torch.return_types take one sequence
        if isinstance(result, dict):
            entries = {
                k: self._wrap_part(v, operator.getitem, node, self.argument(k), inputs)
                for k, v in result.items()
            }
            return entries if type(result) is dict else _same_dict(result, entries)
        if dataclasses.is_dataclass(result) and not isinstance(result, type):
            names = [f.name for f in dataclasses.fields(result) if f.init]
            return type(result)(
                **{n: self._wrap_part(getattr(result, n), getattr, node, n, inputs) for n in names}
            )
        if may_be_handed_on(result):
            return TracedObject(result, node)
        raise TraceFailure(f"{node.target} gives an object of type {type(result).__name__}")

    def _wrap_plain(self, result: Any, node: fx.Node, inputs: Any) -> Any:
        if type(result) in (int, float) and any(True for _ in traced_inside(inputs)):
            kind = TracedInt if type(result) is int else TracedFloat
            return kind(result, self, None, lambda: node)
        if type(result) is bool and any(True for _ in traced_inside(inputs)):
            self.note_dims(None)
        return result

    def _wrap_part(self, part: Any, get: Any, node: fx.Node, key: Any, inputs: Any) -> Any:
        return self.wrap(part, self.node("call_function", get, (node, key)), inputs)


def _same_dict(result: Any, items: dict[str, Any]) -> Any:
    kind = type(result)
    return kind(**items) if dataclasses.is_dataclass(kind) else kind(items)
