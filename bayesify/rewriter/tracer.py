"""Value-guided torch.fx tracing of one module's own method, its submodules being leaves.

Every torch function called while the method runs is recorded as an fx node, whether or not it
touches an argument: factories and in-place updates must happen anew on every call. Parameters,
buffers and tensor attributes become reads of the live module. What the method reads of plain
attributes is noted, so that the graph is used only while they are the same.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from .. import torch_private
from ..posterior import owner_state
from ..torch_private import DeviceContext, FakeTensor, FakeTensorMode, device_constructors, pytree
from . import caches, context_variables, objects
from .active import ACTIVE
from .arguments import Outline
from .examples import Examples
from .guards import (
    HOOKS,
    INTERNAL,
    MISSING,
    PRIMITIVES,
    Guard,
    copy_plain,
    held,
    holds_tensor,
    plain,
)
from .objects import TracedObject, may_be_handed_on
from .randomness import has_random_numbers, random_numbers_kept
from .trace_context import (
    HOOKS_CHANGED,
    TRACE_LOCK,
    attributes_of_objects,
    has_hooks,
    patches,
    paused,
    restore,
    transforms,
    untouched,
    without_hooks,
)
from .values import (
    FREEZES,
    Dims,
    ForeignTensor,
    StateFound,
    TracedFloat,
    TracedInt,
    TracedNumber,
    TracedParts,
    TracedSize,
    TracedTensor,
    TraceFailure,
    unpacks_into_names,
)
from .writer import Expression, GraphWriter, access, call_of, can_be_target, resolves, traced_inside
from .writes import target_of

WRITES = "it writes into its parameter"

_CONCRETE_ATTRIBUTES = {
    "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "is_cuda", "is_cpu",
    "is_meta", "is_mps", "is_xpu", "is_quantized", "is_sparse", "is_sparse_csr", "is_mkldnn",
    "is_nested", "is_vulkan", "is_ipu", "is_maia", "is_mtia", "is_xla", "itemsize", "names",
    "output_nr", "retains_grad", "_is_view", "is_inference",
}  # fmt: skip


_CONCRETE_METHODS = {
    "dim", "ndimension", "element_size", "is_floating_point", "is_complex", "is_signed",
    "get_device", "is_inference", "is_conj", "is_neg", "has_names", "is_same_size", "type",
    "data_ptr", "_is_view",
}  # fmt: skip


# what a cast, a move or a freeze of the module's own tensors changes
_TYPES = {
    "dtype", "device", "requires_grad", "is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu",
    "itemsize", "element_size", "is_floating_point", "is_complex", "is_signed", "get_device",
    "type",
}  # fmt: skip


_VALUE_METHODS = {
    "__bool__", "__int__", "__float__", "__index__", "__complex__", "item", "tolist", "numpy",
    "__array__", "__contains__", "is_nonzero", "equal", "allclose", "__repr__", "__format__",
    "__deepcopy__", "__reduce_ex__", "data_ptr", "storage", "untyped_storage", "__dlpack__",
    "nonzero_static", "backward", "register_hook", "__setstate__", "_typed_storage",
}  # fmt: skip


_OPERATORS = {
    f"__{name}__": getattr(operator, name)
    for name in (
        "add sub mul truediv floordiv mod pow matmul neg eq ne lt le gt ge and_ or_ xor getitem "
        "setitem iadd isub imul itruediv abs invert"
    ).split()
    if hasattr(operator, name)
}


_OPERATORS.update({"__and__": operator.and_, "__or__": operator.or_})


_REVERSED = {"__radd__": operator.add, "__rmul__": operator.mul, "__rsub__": operator.sub,
             "__rtruediv__": operator.truediv, "__rpow__": operator.pow,
             "__rmatmul__": operator.matmul, "__rfloordiv__": operator.floordiv,
             "__rmod__": operator.mod}  # fmt: skip


# the name of each method of Tensor, operators under their own: Tensor.__pow__ calls itself "pow"
_METHODS: dict[Any, str] = {}
for _name in (*(n for n in dir(Tensor) if n not in _OPERATORS), *_OPERATORS):
    if callable(_member := inspect.getattr_static(Tensor, _name, None)):
        _METHODS[_member] = _name
_PARTS = {"unbind", "split", "chunk", "tensor_split", "split_with_sizes", "unsafe_chunk",
          "unsafe_split", "hsplit", "vsplit", "dsplit"}  # fmt: skip


@dataclasses.dataclass
class Trace:
    """A traced method.

    Attributes:
        graph: Placeholders are the tensor arguments in flattened order; ``get_attr`` nodes are
            reads of the live owner.
        guards: Attributes on whose values the graph depends.
        dims: (argument, dimension) pairs on which it depends; None for all of them.
        layout: Whether it depends on the strides of the arguments.
        guided: Whether a value had to be answered, so that plain fx would have failed.
        constants: Objects that the code refers to by name.
        parameters: Target of each ``get_attr`` node that reads a parameter, by node name.
        result: What the method gave, with examples for tensors.
    """

    graph: fx.Graph
    guards: tuple[Guard, ...]
    dims: Dims
    layout: bool
    guided: bool
    constants: dict[str, Any]
    parameters: dict[str, tuple[tuple[str, ...], str]]
    result: Any


class MethodTracer(GraphWriter, TorchFunctionMode):
    """Runs one method on traced tensors and records it.

    Args:
        owner: The module whose method is traced.
        run_leaf: Calls a submodule at the means, on examples.
        hiding: Of the caches that modules keep outside of their buffers.
        fake_mode: That of the trace of the caller, whose examples are the arguments; None: a new
            one.
    """

    def __init__(
        self, owner: nn.Module, run_leaf: Callable[..., Any], hiding: caches.Hiding,
        fake_mode: FakeTensorMode | None = None,
    ) -> None:  # fmt: skip
        TorchFunctionMode.__init__(self)
        GraphWriter.__init__(self, owner)
        self.run_leaf = run_leaf
        self.hiding = hiding
        self.fake_mode = fake_mode or Examples(allow_non_fake_inputs=True)
        self.guards: dict[tuple[tuple[str, ...], str], Guard] = {}
        self.types: dict[tuple[tuple[str, ...], str], tuple[Any, ...]] = {}
        self.writes: set[tuple[tuple[str, ...], str]] = set()
        self.dims: Dims = frozenset()
        self.layout = False
        self.guided = False
        self._examples: dict[int, tuple[Tensor, Tensor]] = {}
        self._sizes: dict[tuple[int, int], TracedInt] = {}
        self._handing_on = False
        self._handed_on = False  # whether a submodule was given an object, whatever that holds
        self._error = ""  # the first one that was raised
        self.made: dict[int, nn.Module] = {}  # modules that the method itself has made
        self._made: list[tuple[nn.Module, str, Any]] = []  # objects that are not kept
        self._variables = contextvars.copy_context()
        self._transforms = transforms()
        modes = [m for m in torch_private.function_mode_stack() if isinstance(m, DeviceContext)]
        self._device = modes[-1].device if modes else None

    # -- what there is ---------------------------------------------------------------------

    def example_of(self, tensor: Tensor) -> Tensor:
        """A fake tensor with the metadata of a real one."""
        if isinstance(tensor, FakeTensor) and tensor.fake_mode is self.fake_mode:
            return tensor
        known = self._examples.get(id(tensor))
        if known is None:
            # a sharded parameter has its global shape
            sharded = hasattr(tensor, "full_tensor")
            kinds = (Tensor, nn.Parameter, nn.Buffer, Outline, FakeTensor)  # that of an export
            plain = type(tensor) in kinds or sharded
            if tensor.layout != torch.strided or not plain:
                raise TraceFailure(f"a {type(tensor).__name__} of layout {tensor.layout}")
            with torch_private.DisableTorchFunction(), paused():
                example = torch.empty_strided(
                    tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype,
                    device=tensor.device, requires_grad=tensor.requires_grad,
                )  # fmt: skip
            known = self._examples[id(tensor)] = (tensor, example)
        return known[1]

    def note_dims(self, dims: Dims) -> None:
        """The code asked for a value that depends on these dimensions of the arguments."""
        if dims is None or dims:
            self.guided = True
            if dims is None and self._handed_on:
                raise TraceFailure("a size may come of an object that a submodule was given")
        self.dims = None if dims is None or self.dims is None else self.dims | dims

    # -- recording -------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if ACTIVE.tracer is not self:
            return func(*args, **(kwargs or {}))
        return self.record(func, args, kwargs or {})

    def note_error(self, error: BaseException) -> None:
        """What the trace raised, the method must not handle: its other branch may be wrong."""
        first = (str(error).splitlines() or [""])[0]
        self._error = self._error or f"{type(error).__name__}: {first}"

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record one call of a torch function and give its traced result."""
        if ACTIVE.tracer is not self:
            raise TraceFailure(f"{func} on a traced tensor outside of its trace")
        try:
            return self._record(func, args, kwargs)
        except BaseException as error:
            self.note_error(error)
            raise

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if transforms() != self._transforms:
            raise TraceFailure("it differentiates or maps a function by torch.func or forward_ad")
        name = getattr(func, "__name__", "")
        subject = args[0] if args else None
        if type(subject) is TracedTensor and subject.recorder is not self:
            raise ForeignTensor(subject)
        if name in ("__get__", "__set__"):
            return self._property(func.__self__.__name__, name == "__get__", args)
        if name in _VALUE_METHODS and isinstance(subject, Tensor):
            raise TraceFailure(f"Tensor.{name} reads a tensor's value")
        if name == "requires_grad_" and isinstance(subject, nn.Parameter):
            raise TraceFailure(FREEZES)
        if name == "_assert":
            return func(args[0] if not isinstance(args[0], Tensor) else self._value(), *args[1:])
        if isinstance(subject, Tensor):
            answer = self._metadata(name, func, args, kwargs)
            if answer is not MISSING:
                return answer
        return self._call(func, name, args, kwargs)

    def _value(self) -> Any:
        raise TraceFailure("torch._assert reads a tensor's value")

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

    def _property(self, name: str, get: bool, args: tuple[Any, ...]) -> Any:
        tensor = args[0]
        traced = type(tensor) is TracedTensor
        if not get:
            self._node(
                "call_function", setattr, (self.argument(tensor), name, self.argument(args[1]))
            )
            if name == "requires_grad":
                raise TraceFailure(FREEZES)
            if name == "data":
                self._refuse_write(tensor)
                raise TraceFailure(f"assignment to Tensor.{name}")
            return None
        if name == "shape":
            return self._shape(tensor)
        if name in _TYPES:
            self._note_types(tensor)
        example = tensor.example if traced else self.example_of(tensor)
        if name == "device" and not traced:
            with torch_private.DisableTorchFunction():
                return tensor.device
        if name in _CONCRETE_ATTRIBUTES:
            with torch_private.DisableTorchFunction(), paused():
                return getattr(example, name)
        if name == "grad_fn" or name == "grad":
            raise TraceFailure(f"Tensor.{name} is known only when it runs")
        result = self._evaluate(getattr, (tensor, name), {})
        if not isinstance(result, Tensor):
            raise TraceFailure(f"Tensor.{name} is not a tensor")
        node = self._node("call_function", getattr, (self.argument(tensor), name))
        return self._wrap(result, node, (tensor,))

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

    def _metadata(self, name: str, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
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
            return self._evaluate(func, args, kwargs)
        if name == "data_ptr" or (name == "type" and len(args) + len(kwargs) > 1):
            return MISSING
        if name in _CONCRETE_METHODS:
            if name in _TYPES:
                self._note_types(tensor)
            return self._evaluate(func, args, kwargs)
        return MISSING

    def _evaluate(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run ``func`` on examples: metadata only, no data and no side effect."""
        args, kwargs = self._as_examples((args, kwargs))
        if self._device is not None and func in device_constructors():
            if kwargs.get("device") is None:  # `with torch.device(...)`, which acts when it runs
                kwargs["device"] = self._device
        with torch_private.DisableTorchFunction(), paused():
            return func(*args, **kwargs)

    def _as_examples(self, value: Any) -> Any:
        kind = type(value)
        if kind is TracedTensor:
            return value.example
        if kind is TracedObject:
            if not self._handing_on:
                raise TraceFailure("it gives an object to a function of torch")
            return value.__dict__["example"]
        if isinstance(value, TracedNumber):
            return value.value
        if isinstance(value, Tensor):
            return self.example_of(value)
        if kind in (TracedSize, torch.Size):  # a slice of the one is the other
            return torch.Size(v.value if isinstance(v, TracedNumber) else v for v in value)
        if kind is functools.partial:
            return _examples_of_partial(value, self._as_examples)
        if kind in (tuple, TracedParts):
            return tuple(self._as_examples(v) for v in tuple.__iter__(value))
        if kind is list:
            return [self._as_examples(v) for v in value]
        if kind is slice:
            return slice(*(self._as_examples(v) for v in (value.start, value.stop, value.step)))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return kind(*(self._as_examples(v) for v in value))
        if isinstance(value, dict):
            copy = {k: self._as_examples(v) for k, v in value.items()}
            if kind is dict:
                return copy
            return kind(**copy) if dataclasses.is_dataclass(kind) else kind(copy)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = [f.name for f in dataclasses.fields(value) if f.init]
            return kind(**{f: self._as_examples(getattr(value, f)) for f in fields})
        return value

    def _call(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name.startswith("squeeze"):
            self.note_dims(None)  # whether a dimension goes depends on its size
        if (target := target_of(func, args, kwargs)) is not None:
            self._refuse_write(target)
        result = self._evaluate(func, args, kwargs)
        if func is torch_private.set_grad_enabled:
            if torch.is_inference_mode_enabled() == self.entry_context[1]:  # which switches it too
                self.grad_mode = torch.is_grad_enabled()
        method = _METHODS.get(func, "") if isinstance(args[0] if args else None, Tensor) else ""
        if method in _OPERATORS:
            op, target, operands = "call_function", _OPERATORS[method], args
        elif method in _REVERSED:
            op, target, operands = "call_function", _REVERSED[method], (args[1], args[0])
        elif method:
            op, target, operands = "call_method", method, args
        elif resolves(func):
            op, target, operands = "call_function", func, args
        else:  # a function that its name does not lead to
            op, target, operands = "call_function", call_of, (func, *args)
        node = self._node(
            op, target, tuple(self.argument(a) for a in operands),
            {k: self.argument(v) for k, v in kwargs.items()},
        )  # fmt: skip
        return self._wrap(result, node, (args, kwargs), parts=name in _PARTS)

    def _refuse_write(self, target: Tensor) -> None:
        """A write into a posterior's draw is the fallback's to turn into one into its mean."""
        with torch_private.DisableTorchFunction(), paused():
            place = self._as_examples(target).untyped_storage()._cdata
            for kind, path, name, tensor in self.tensors.values():
                known = self._examples.get(id(tensor))
                if kind == "parameter" and known and known[1].untyped_storage()._cdata == place:
                    module = self.owner.get_submodule(".".join(path))
                    state = owner_state(module)
                    if state is not None and name in state.slots:
                        raise TraceFailure(f"{WRITES} {'.'.join((*path, name))!r}")

    def _wrap(self, result: Any, node: fx.Node, inputs: Any, parts: bool = False) -> Any:
        if isinstance(result, Tensor):
            # also where it is the very input: dropout gives its input back only in eval
            return TracedTensor(result, node, self)
        if result is NotImplemented:  # of `tensor == None`, which Python then answers
            return result
        if result is None or isinstance(result, PRIMITIVES):
            # examples hold no data, so a number can only come of shapes
            if type(result) in (int, float) and any(True for _ in traced_inside(inputs)):
                kind = TracedInt if type(result) is int else TracedFloat
                return kind(result, self, None, lambda: node)
            if type(result) is bool and any(True for _ in traced_inside(inputs)):
                self.note_dims(None)
            return result
        if isinstance(result, tuple | list):
            items = tuple(
                self._wrap(item, self._node("call_function", operator.getitem, (node, i)), inputs)
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
                k: self._wrap(v, self._node("call_function", operator.getitem, (node, key)), inputs)
                for k, v in result.items()
                for key in [self.argument(k)]
            }
            return entries if type(result) is dict else _same_dict(result, entries)
        if dataclasses.is_dataclass(result) and not isinstance(result, type):
            names = [f.name for f in dataclasses.fields(result) if f.init]
            return type(result)(
                **{
                    n: self._wrap(
                        getattr(result, n),
                        self._node("call_function", getattr, (node, n)),
                        inputs,
                    )
                    for n in names
                }
            )
        if may_be_handed_on(result):
            return TracedObject(result, node)
        raise TraceFailure(f"{node.target} gives an object of type {type(result).__name__}")

    # -- modules ---------------------------------------------------------------------------

    def call_module(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
        call: Callable[..., Any] | None = None,
    ) -> Any:  # fmt: skip
        """Record a call of a submodule, which stays a call; ``call``: of this, not of its own."""
        with torch_private.DisableTorchFunction():
            try:
                return self._call_module(module, args, kwargs, call)
            except BaseException as error:
                self.note_error(error)
                raise

    def _call_module(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
        call: Callable[..., Any] | None,
    ) -> Any:  # fmt: skip
        variables = context_variables.changed(self._variables)
        path = self.paths.get(id(module))
        arguments = tuple(self.passed(a) for a in args)
        keywords = {k: self.passed(v) for k, v in kwargs.items()}
        with self._objects():
            examples = self._as_examples((args, kwargs))
        with paused(), self._as_outline(module):
            copies = context_variables.constants(variables, ACTIVE.hooked) if variables else ()
            outer, ACTIVE.fake_mode = ACTIVE.fake_mode, self.fake_mode
            try:
                callee = module if call is None else functools.partial(call, module)
                result = self.run_leaf(callee, *examples)
            except TraceFailure:
                raise
            except Exception as error:
                raise TraceFailure(
                    f"the call of its {type(module).__name__} cannot be evaluated without data "
                    f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
                ) from error
            finally:
                ACTIVE.fake_mode = outer
        if variables:
            context_variables.check(variables, copies)
            called = (self.constant(copies), self.argument(module), *arguments)
            if call is not None:
                raise TraceFailure("it sets a context variable in a __call__ of its own")
            node = self._node("call_function", context_variables.in_context, called, keywords)
        elif call is not None:
            if path is None:
                raise TraceFailure(f"it calls a {type(module).__name__} that it does not hold")
            itself: Any = Expression(access(path))
            node = self._node("call_function", call_of_torch, (itself, *arguments), keywords)
        elif path and can_be_target(path):
            node = self._node("call_module", ".".join(path), arguments, keywords)
        else:
            tensors = (*module._parameters.values(), *module._buffers.values())
            traced = any(True for _ in traced_inside(module.__dict__))
            if id(module) in self.made and (traced or any(t is not None for t in tensors)):
                raise TraceFailure(f"it makes a {type(module).__name__} that holds tensors")
            found = self.constant(module) if path is None else Expression(access(path))
            node = self._node("call_function", call_of, (found, *arguments), keywords)
        if any(type(v) is TracedObject for v in pytree.tree_leaves((args, kwargs))):
            self._handed_on = True
        return self._wrap(result, node, (args, kwargs))

    @contextmanager
    def _objects(self) -> Iterator[None]:
        """Objects are handed on here."""
        self._handing_on = True
        try:
            yield
        finally:
            self._handing_on = False

    @contextmanager
    def _as_outline(self, module: nn.Module) -> Iterator[None]:
        """A submodule with examples in place of its shards and without hooks.

        Ordinary parameters stay: the fake mode sees to them, and another thread may read them.
        """
        modules = list(module.modules())
        kept = [
            (m, dict(m._parameters))
            for m in modules
            if any(hasattr(p, "full_tensor") for p in m._parameters.values())
        ]
        hooked, ACTIVE.hooked = ACTIVE.hooked, ACTIVE.hooked or any(map(has_hooks, modules))
        with untouched(modules, without_hooks):
            try:
                for child in modules:
                    for name, buffer in child._buffers.items():
                        if buffer is not None and buffer.dim() == 0:
                            # a fake mode computes with numbers: BatchNorm would count this batch
                            child._buffers[name] = buffer.clone()
                for child, parameters in kept:
                    for name, parameter in parameters.items():
                        if parameter is not None:
                            child._parameters[name] = self.example_of(parameter)  # type: ignore[assignment]
                yield
            finally:
                ACTIVE.hooked = hooked
                for child, parameters in kept:
                    restore(child._parameters, parameters)

    def call_opaque(
        self, function: Any, run: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Record a call of an autograd or scripted function, which stays a call."""
        with torch_private.DisableTorchFunction():
            # at the means: a module that it calls would leave examples among the draws
            result = self._evaluate(lambda *a, **k: self.run_leaf(run, a, k), args, kwargs)
            arguments = tuple(self.argument(a) for a in args)
            keywords = {k: self.argument(v) for k, v in kwargs.items()}
            callee = self.constant(function)
            node = self._node("call_function", call_of, (callee, *arguments), keywords)
            return self._wrap(result, node, (args, kwargs))

    def note_read(self, module: nn.Module, name: str, value: Any) -> None:
        """A plain attribute was read."""
        path = self.paths.get(id(module))
        if (id(module), name) in self.hiding.by_train:
            raise TraceFailure(f"it reads {name!r}, which train() makes")
        if path is None or (path, name) in self.guards:
            return
        if name in ("_modules", "_parameters", "_buffers"):
            self.guards[path, name] = Guard(path, name, tuple(value), "keys")
            return
        own = object.__getattribute__(module, "__dict__")
        if name in INTERNAL or (path, name) in self.writes:
            return
        if name not in own:
            self._note_of_class(module, path, name, value)
            return
        if (id(module), name) in self.hiding.names:
            self.hiding.read(module, name)
            return
        if isinstance(value, Tensor):
            return
        if type(value) in (TracedSize, TracedParts) or isinstance(value, TracedNumber):
            return
        if has_random_numbers(value):
            raise TraceFailure(f"it takes random numbers of its {type(value).__name__} {name!r}")
        if plain(value):
            copy = value if isinstance(value, PRIMITIVES) else copy_plain(value)
            self.guards[path, name] = Guard(path, name, copy, "equal")
        elif not holds_tensor(value) and not isinstance(value, dict):
            self.guards[path, name] = Guard(path, name, value, "same")

    def _note_of_class(
        self, module: nn.Module, path: tuple[str, ...], name: str, value: Any
    ) -> None:
        """A plain attribute of a module's class was read, which an instance may come to have."""
        if plain(value) and not hasattr(nn.Module, name):
            if inspect.getattr_static(type(module), name, MISSING) is value:  # no property
                copy = value if isinstance(value, PRIMITIVES) else copy_plain(value)
                self.guards[path, name] = Guard(path, name, copy, "class")

    def note_absent(self, module: nn.Module, name: str) -> None:
        """A plain attribute was asked for that is not there."""
        path = self.paths.get(id(module))
        if (id(module), name) in self.hiding.names:
            self.hiding.read(module, name)
        elif path is not None and (path, name) not in (*self.guards, *self.writes):
            found = held(module, name)
            if found is None or found is MISSING:
                self.guards[path, name] = Guard(path, name, found, "equal")

    def note_write(self, module: nn.Module, name: str, value: Any) -> None:
        """An attribute was assigned: the generated code assigns it too, unless it is a cache."""
        path = self.paths.get(id(module))
        if id(module) in self.made and not isinstance(value, Tensor | nn.Module):
            return
        if path is None or name in INTERNAL:
            raise TraceFailure(f"it assigns {name!r} of a module that it does not hold")
        if name in module._parameters or name in module._modules:
            raise TraceFailure(f"it replaces {name!r}, a parameter or a module")
        if isinstance(value, nn.Module | nn.Parameter):
            raise TraceFailure(f"it adds {name!r}, a parameter or a module")
        self.writes.add((path, name))
        if (id(module), name) in self.hiding.names:
            self.hiding.written(module, name)
            self._check_state(module, name, value)
            if not isinstance(value, Tensor):
                self._made.append((module, name, value))
            return
        target = Expression(access(path))
        with torch_private.DisableTorchFunction():
            if self._made_of_draws(value):
                if not isinstance(value, Tensor):
                    self._made.append((module, name, value))
                return  # a cache: kept, it would outlive its draw
            self._node("call_function", setattr, (target, name, self.passed(value)))

    def _check_state(self, module: nn.Module, name: str, value: Any) -> None:
        """What is made of an argument is no cache."""
        if any(self._depends(t.node, "placeholder") for t in traced_inside(value)):
            if (id(module), name) not in self.hiding.names:
                raise TraceFailure(f"it fills its {name!r} with what depends on an argument")
            caches.note_state(module, name)
            raise StateFound(f"its attribute {name!r} carries state from call to call")

    def _containers(self) -> list[tuple[str, Any, Any]]:
        seen: set[int] = set()
        return [
            (name, value, value.copy() if value else type(value)())
            for module in self._modules
            for name, value in (
                *(
                    (n, v) for n, v in module.__dict__.items()
                    if (type(v) in (list, dict, set) and n not in INTERNAL) or n in HOOKS
                ),
                *attributes_of_objects(module, seen),
            )
        ]  # fmt: skip

    def _check_containers(self, held: list[tuple[str, Any, Any]]) -> None:
        """What a forward does to a list or dict of its module must happen at every call."""
        for name, value, content in held:
            if isinstance(value, dict):
                # a cache of draws is not kept
                changed = [
                    k for k, v in value.items()
                    if content.get(k, MISSING) is not v and not self._made_of_draws(v)
                ]  # fmt: skip
                different = bool(changed) or any(k not in value for k in content)
            elif type(value) is list:
                different = len(value) != len(content) or any(
                    a is not b for a, b in zip(value, content, strict=True)
                )
            else:
                different = len(value ^ content) > 0
            if different:
                raise TraceFailure(f"it changes its {type(value).__name__} {name!r}")

    def _made_of_draws(self, value: Any) -> bool:
        nodes = [t.node for t in traced_inside(value)]
        return bool(nodes) and all(
            self._depends(n, "parameter") and not self._depends(n, "placeholder") for n in nodes
        )

    def _depends(self, node: fx.Node, on: str) -> bool:
        """Whether a node comes of an argument, or of a parameter (a submodule's included)."""
        seen, stack = {node}, [node]
        while stack:
            current = stack.pop()
            if on == "placeholder" and current.op == "placeholder":
                return True
            if on == "parameter" and (
                current.op == "call_module"
                or current.target in (context_variables.in_context, call_of_torch)
                or current.name in self.parameters
            ):
                return True
            new = [n for n in current.all_input_nodes if n not in seen]
            seen.update(new)
            stack.extend(new)
        return False

    # -- running ---------------------------------------------------------------------------

    def run(self, method: Callable[..., Any], names: list[str], build: Callable[..., Any],
            tensors: list[Tensor]) -> Trace:  # fmt: skip
        """Trace ``method``.

        Args:
            method: Bound method to trace.
            names: A name for each tensor argument.
            build: From traced tensors to the method's (args, kwargs).
            tensors: Tensor arguments, real or fake; only their metadata is used.
        """
        with self._patched(), random_numbers_kept(), self.fake_mode, self:
            traced: list[Any] = []
            for index, (name, tensor) in enumerate(zip(names, tensors, strict=True)):
                node = self.graph.placeholder(name)
                self._last_placeholder = node
                with torch_private.DisableTorchFunction(), paused():
                    if isinstance(tensor, Tensor | Outline):
                        example = self.example_of(tensor)
                        traced.append(TracedTensor(example, node, self, index))
                    else:
                        example = objects.example_of(tensor, self.example_of)
                        traced.append(TracedObject(example, node))
            args, kwargs = build(traced)
            before = _shape_of((args, kwargs))
            held = self._containers()
            handles = RemovableHandle.next_id
            context = contextvars.copy_context()  # what it leaves set is not to stay
            result = context.run(functools.partial(method, *args, **kwargs))
            if self._error:
                raise TraceFailure(f"it handles an error of its trace ({self._error})")
            if context.run(context_variables.changed, self._variables):
                raise TraceFailure("it sets a context variable for later calls")
            if RemovableHandle.next_id != handles:  # for all modules, say
                raise TraceFailure(HOOKS_CHANGED)
            self._check_containers(held)
            for module, name, value in self._made:  # something may have been put into it since
                self._check_state(module, name, value)
            with torch_private.DisableTorchFunction(), self._objects():
                output = self.passed(result)
                examples = self._as_examples(result)
        if _shape_of((args, kwargs)) != before:
            raise TraceFailure("it changes a container among its arguments")
        self.graph.output(output)
        self.graph.output_node().meta["context"] = self.entry_context
        guards = tuple(self.guards.values())
        if self.types:
            guards += (Guard((), "types", tuple(self.types.values()), "types"),)
        return Trace(
            self.graph, guards, self.dims, self.layout, self.guided,
            self.constants, self.parameters, examples,
        )  # fmt: skip

    @contextmanager
    def _patched(self) -> Iterator[None]:
        fresh = caches.parametrizations_computed_anew()
        with TRACE_LOCK, untouched(self._modules, self._hide), patches(), fresh:
            outer, ACTIVE.tracer = ACTIVE.tracer, self
            try:
                yield
            finally:
                ACTIVE.tracer = outer

    def _hide(self, module: nn.Module) -> None:
        if module is self.owner:
            self.hiding.hide()


def call_of_torch(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What a ``__call__`` of a class's own calls as ``super().__call__``."""
    return nn.Module.__call__(module, *args, **kwargs)


def _examples_of_partial(value: Any, convert: Callable[[Any], Any]) -> Any:
    return functools.partial(convert(value.func), *convert(value.args), **convert(value.keywords))


def _same_dict(result: Any, items: dict[str, Any]) -> Any:
    kind = type(result)
    return kind(**items) if dataclasses.is_dataclass(kind) else kind(items)


def _shape_of(value: Any) -> Any:
    """The structure of containers, with the identity of what they hold."""
    if isinstance(value, list | tuple):
        return type(value), [_shape_of(v) for v in tuple(value)]
    if isinstance(value, dict):
        return type(value), [(k, _shape_of(v)) for k, v in value.items()]
    return id(value)
