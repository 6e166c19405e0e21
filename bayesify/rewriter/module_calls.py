"""Calls of submodules, and of functions that no trace sees into, stay calls in the graph."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from .. import torch_private
from ..torch_private import pytree
from . import context_variables
from .active import ACTIVE
from .objects import TracedObject
from .recording import Recording
from .trace_context import has_hooks, paused, restore, untouched, without_hooks
from .values import TraceFailure
from .writer import Expression, access, call_of, call_of_torch, can_be_target, traced_inside


class ModuleCalls:
    """Records what a traced method calls that has a graph of its own, or none.

    A submodule is a leaf: it is evaluated at the means, on examples, and its call is one node.

    Args:
        recording: The trace.
        run_leaf: Calls a submodule at the means, on examples.
        variables: The context variables as they were when the trace began.
    """

    def __init__(
        self,
        recording: Recording,
        run_leaf: Callable[..., Any],
        variables: contextvars.Context,
    ) -> None:
        self.recording = recording
        self.run_leaf = run_leaf
        self.variables = variables

    def call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
        around: Callable[..., Any] | None,
    ) -> Any:  # fmt: skip
        """Record a call of a submodule.

        Args:
            module: What is called, held by the owner or not.
            args: Its arguments, traced.
            kwargs: Those with a keyword, traced.
            around: torch's own ``__call__`` where a ``__call__`` of the class's own, which is part
                of this trace, has come to it; else None.

        Raises:
            TraceFailure: The call cannot be evaluated without data, or no code can repeat it.
        """
        recording = self.recording
        variables = context_variables.changed(self.variables)
        path = recording.paths.get(id(module))
        arguments = tuple(recording.passed(a) for a in args)
        keywords = {k: recording.passed(v) for k, v in kwargs.items()}
        with recording.examples.handing_on():
            examples = recording.examples.inside((args, kwargs))
        with paused(), self._as_outline(module):
            copies = context_variables.constants(variables, ACTIVE.hooked) if variables else ()
            result = self._evaluate(module, around, *examples)
        if variables:
            context_variables.check(variables, copies)
            called = (recording.constant(copies), recording.argument(module), *arguments)
            if around is not None:
                raise TraceFailure("it sets a context variable in a __call__ of its own")
            target = context_variables.in_context
            node = recording.node("call_function", target, called, keywords)
        elif around is not None:
            if path is None:
                raise TraceFailure(f"it calls a {type(module).__name__} that it does not hold")
            itself: Any = Expression(access(path))
            node = recording.node("call_function", call_of_torch, (itself, *arguments), keywords)
        elif path and can_be_target(path):
            node = recording.node("call_module", ".".join(path), arguments, keywords)
        else:
            node = self._call_by_expression(module, path, arguments, keywords)
        if any(type(v) is TracedObject for v in pytree.tree_leaves((args, kwargs))):
            recording.handed_on = True
        return recording.wrap(result, node, (args, kwargs))

    def _evaluate(
        self, module: nn.Module, around: Callable[..., Any] | None, args: Any, kwargs: Any
    ) -> Any:
        """What a submodule gives on examples, in whose fake mode its own trace is."""
        outer, ACTIVE.fake_mode = ACTIVE.fake_mode, self.recording.examples.fake_mode
        try:
            callee = module if around is None else functools.partial(around, module)
            return self.run_leaf(callee, args, kwargs)
        except TraceFailure:
            raise
        except Exception as error:
            raise TraceFailure(
                f"the call of its {type(module).__name__} cannot be evaluated without data "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
            ) from error
        finally:
            ACTIVE.fake_mode = outer

    def _call_by_expression(
        self, module: nn.Module, path: tuple[str, ...] | None, arguments: Any, keywords: Any
    ) -> fx.Node:
        """A call of the owner itself, of what it does not hold, or of what has no name for fx."""
        recording = self.recording
        tensors = (*module._parameters.values(), *module._buffers.values())
        traced = any(True for _ in traced_inside(module.__dict__))
        if id(module) in recording.made and (traced or any(t is not None for t in tensors)):
            raise TraceFailure(f"it makes a {type(module).__name__} that holds tensors")
        found = recording.constant(module) if path is None else Expression(access(path))
        return recording.node("call_function", call_of, (found, *arguments), keywords)

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
                            example: Any = self.recording.examples.of(parameter)
                            child._parameters[name] = example
                yield
            finally:
                ACTIVE.hooked = hooked
                for child, parameters in kept:
                    restore(child._parameters, parameters)

    def call_opaque(
        self, function: Any, run: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Record a call of an autograd or scripted function, evaluated by ``run``."""
        recording = self.recording
        with torch_private.DisableTorchFunction():
            # at the means: a module that it calls would leave examples among the draws
            result = recording.examples.run(
                lambda *a, **k: self.run_leaf(run, a, k), args, kwargs
            )  # fmt: skip
            arguments = tuple(recording.argument(a) for a in args)
            keywords = {k: recording.argument(v) for k, v in kwargs.items()}
            callee = recording.constant(function)
            node = recording.node("call_function", call_of, (callee, *arguments), keywords)
            return recording.wrap(result, node, (args, kwargs))
