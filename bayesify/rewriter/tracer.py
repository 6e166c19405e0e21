"""Value-guided torch.fx tracing of one module's own method, its submodules being leaves.

The method runs once on traced tensors. :mod:`.recording` writes the torch functions that it calls,
:mod:`.module_calls` the submodules, :mod:`.attributes` what it reads and assigns of plain
attributes, :mod:`.containers` what it must not change.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from .. import torch_private
from ..torch_private import FakeTensorMode
from . import caches, context_variables, objects
from .active import ACTIVE
from .arguments import Outline
from .attributes import Attributes
from .containers import Containers, outline
from .guards import Guard
from .module_calls import ModuleCalls
from .objects import TracedObject
from .randomness import random_numbers_kept
from .recording import WRITES as WRITES
from .recording import Recording
from .trace_context import HOOKS_CHANGED, TRACE_LOCK, patches, paused, untouched
from .values import Dims, TracedTensor, TraceFailure


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


class MethodTracer(Recording):
    """Runs one method on traced tensors and records it; what :class:`.active.Tracer` promises.

    Args:
        owner: The module whose method is traced.
        run_leaf: Calls a submodule at the means, on examples.
        hiding: Of the caches that modules keep outside of their buffers.
        fake_mode: As in :class:`.Recording`.
    """

    def __init__(
        self, owner: nn.Module, run_leaf: Callable[..., Any], hiding: caches.Hiding,
        fake_mode: FakeTensorMode | None = None,
    ) -> None:  # fmt: skip
        super().__init__(owner, fake_mode)
        self.hiding = hiding
        self._variables = contextvars.copy_context()
        self._calls = ModuleCalls(self, run_leaf, self._variables)
        self._attributes = Attributes(self, hiding)

    # -- what passes by --------------------------------------------------------------------

    def call_module(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
        call: Callable[..., Any] | None = None,
    ) -> Any:  # fmt: skip
        """Record a call of a submodule, which stays a call; ``call``: of this, not of its own."""
        with torch_private.DisableTorchFunction():
            try:
                return self._calls.call(module, args, kwargs, call)
            except BaseException as error:
                self.note_error(error)
                raise

    def call_opaque(
        self, function: Any, run: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Record a call of an autograd or scripted function, which stays a call."""
        return self._calls.call_opaque(function, run, args, kwargs)

    def note_read(self, module: nn.Module, name: str, value: Any) -> None:
        """A plain attribute was read."""
        self._attributes.read(module, name, value)

    def note_absent(self, module: nn.Module, name: str) -> None:
        """A plain attribute was asked for that is not there."""
        self._attributes.absent(module, name)

    def note_write(self, module: nn.Module, name: str, value: Any) -> None:
        """An attribute was assigned."""
        self._attributes.assigned(module, name, value)

    # -- running ---------------------------------------------------------------------------

    def run(self, method: Callable[..., Any], names: list[str], build: Callable[..., Any],
            tensors: list[Tensor]) -> Trace:  # fmt: skip
        """Trace ``method``.

        Args:
            method: Bound method to trace.
            names: A name for each tensor argument.
            build: From traced tensors to the method's (args, kwargs).
            tensors: Tensor arguments, real or fake; only their metadata is used.

        Raises:
            TraceFailure: No graph does what the method does at every call. Everything that the
                method has changed is as it was before.
        """
        with self._patched(), random_numbers_kept(), self.examples.fake_mode, self:
            args, kwargs = build(self._placeholders(names, tensors))
            before = outline((args, kwargs))
            held = Containers(self.modules)
            result = self._run(functools.partial(method, *args, **kwargs))
            held.check(self.made_of_draws)
            self._attributes.check_caches()
            with torch_private.DisableTorchFunction(), self.examples.handing_on():
                output = self.passed(result)
                examples = self.examples.inside(result)
        if outline((args, kwargs)) != before:
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

    def _placeholders(self, names: list[str], tensors: list[Tensor]) -> list[Any]:
        """A traced value for each tensor argument, and for each object that is handed on."""
        traced: list[Any] = []
        for index, (name, tensor) in enumerate(zip(names, tensors, strict=True)):
            node = self.placeholder(name)
            with torch_private.DisableTorchFunction(), paused():
                if isinstance(tensor, Tensor | Outline):
                    traced.append(TracedTensor(self.examples.of(tensor), node, self, index))
                else:
                    example = objects.example_of(tensor, self.examples.of)
                    traced.append(TracedObject(example, node))
        return traced

    def _run(self, method: Callable[[], Any]) -> Any:
        """Run the method, which may leave nothing behind outside of its module."""
        handles = RemovableHandle.next_id
        context = contextvars.copy_context()  # what it leaves set is not to stay
        result = context.run(method)
        if self.error:
            raise TraceFailure(f"it handles an error of its trace ({self.error})")
        if context.run(context_variables.changed, self._variables):
            raise TraceFailure("it sets a context variable for later calls")
        if RemovableHandle.next_id != handles:  # for all modules, say
            raise TraceFailure(HOOKS_CHANGED)
        return result

    @contextmanager
    def _patched(self) -> Iterator[None]:
        fresh = caches.parametrizations_computed_anew()
        with TRACE_LOCK, untouched(self.modules, self._hide), patches(), fresh:
            outer, ACTIVE.tracer = ACTIVE.tracer, self
            try:
                yield
            finally:
                ACTIVE.tracer = outer

    def _hide(self, module: nn.Module) -> None:
        if module is self.owner:
            self.hiding.hide()
