"""Passes over a traced graph: read to draw, and the contexts that torch.fx drops."""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from .. import scope
from ..estimators.registry import estimate, estimate_embedding
from .context_variables import in_context
from .estimators import LINEAR
from .tracer import Trace
from .writer import Expression, access, call_of, call_of_torch

_LOWERED = frozenset((*LINEAR, torch.matmul, torch.addmm, torch.mm, torch.bmm, torch.baddbmm))
"""Operations whose arguments autocast lowers on every device."""
_LOWERED_METHODS = frozenset(("matmul", "addmm", "mm", "bmm", "baddbmm"))


_PADDING = {F.embedding: 2, F.embedding_bag: 10}
"""Lookups, and where the index of their padding stands among the arguments."""


def draw(module: Any, attribute: str, autocast: bool = False) -> Any:
    """Read one parameter of a rewritten forward: its draw in the present scope.

    With ``autocast`` it goes into operations alone that autocast lowers.
    """
    return scope.read(module, attribute, autocast)


def reads_to_draws(trace: Trace, bayesian: Collection[tuple[tuple[str, ...], str]]) -> int:
    """Turn each ``get_attr`` of a Bayesian parameter into a ``draw``.

    Args:
        trace: Changed in place.
        bayesian: (module path, attribute) of the parameters that have a posterior.

    Returns:
        How many reads became draws.
    """
    count = 0
    for node in trace.graph.nodes:
        where = trace.parameters.get(node.name) if node.op == "get_attr" else None
        if where is None or where not in bayesian:
            continue
        path, attribute = where
        node.op, node.target = "call_function", draw
        node.args = (Expression(access(path)), attribute)
        if _is_lowered(node):
            node.kwargs = {"autocast": True}
        count += 1
    return count


def masked_rows(
    trace: Trace, bayesian: Collection[tuple[tuple[str, ...], str]]
) -> list[tuple[tuple[str, ...], str, int]]:
    """The Bayesian parameters whose rows a lookup masks: ``padding_idx`` keeps their gradient 0.

    Args:
        trace: As it was traced.
        bayesian: (module path, attribute) of the parameters that have a posterior.

    Returns:
        Module path, attribute and row.
    """
    found = []
    for node in trace.graph.nodes:
        where = trace.parameters.get(node.name) if node.op == "get_attr" else None
        if where is None or where not in bayesian:
            continue
        for user in node.users:
            position = _PADDING.get(user.target) if user.op == "call_function" else None
            if position is None:
                continue
            given = dict(enumerate(user.args))
            row = given.get(position, user.kwargs.get("padding_idx"))
            if given.get(1, user.kwargs.get("weight")) is node and type(row) is int:
                found.append((*where, row))
    return found


def _is_lowered(node: fx.Node) -> bool:
    """Whether autocast, where it is on, lowers this read in all that is done with it."""
    here = node.meta.get("context")
    known: dict[str, frozenset[Any]] = {
        "call_function": _LOWERED, "call_method": _LOWERED_METHODS,
    }  # fmt: skip
    return bool(node.users) and all(
        user.target in known.get(user.op, ()) and user.meta.get("context") == here
        for user in node.users
    )


def _argument(expression: Expression) -> Any:
    """An expression where fx's types expect a node or a constant."""
    return expression


def enter_context(*_: Any) -> None:
    """Marks the start of a ``with`` block; never runs."""


def exit_context() -> None:
    """Marks the end of a ``with`` block; never runs."""


def restore_contexts(trace: Trace) -> None:
    """Put back the grad modes and autocast states that were entered inside the forward."""
    nodes = [n for n in trace.graph.nodes if n.op not in ("placeholder", "output")]
    if not nodes:
        return
    entry = trace.graph.output_node().meta["context"]
    current = entry
    for node in [*nodes, trace.graph.output_node()]:
        context = node.meta.get("context", entry)
        if context == current:
            continue
        with trace.graph.inserting_before(node):
            if current != entry:
                trace.graph.call_function(exit_context)
            if context != entry:
                trace.graph.call_function(
                    enter_context, (_argument(Expression(_with(entry, context))),)
                )
        current = context


def _with(entry: tuple[Any, ...], context: tuple[Any, ...]) -> str:
    """Source of the context managers that lead from one state to the other."""
    managers = []
    if context[1] != entry[1]:
        managers.append(f"torch.inference_mode({context[1]})")
    if context[0] != entry[0]:
        managers.append(f"torch.set_grad_enabled({context[0]})")
    for before, (device, enabled, dtype) in zip(entry[2:4], context[2:4], strict=True):
        if before != (device, enabled, dtype) or entry[4] != context[4]:
            managers.append(
                f"torch.autocast({device!r}, dtype={dtype}, enabled={enabled}, "
                f"cache_enabled={context[4]})"
            )
    return ", ".join(managers)


_ENTER = re.compile(r"^\s*\w+ = .*enter_context\((?P<managers>.*)\);?.*$")
_EXIT = re.compile(r"^\s*\w+ = .*exit_context\(\).*$")


_CALLED: tuple[Callable[..., Any], ...] = (
    draw, estimate, estimate_embedding, in_context, call_of_torch,
)  # fmt: skip
"""What generated code calls by its bare name."""


def source_of(trace: Trace, name: str) -> tuple[str, dict[str, Any]]:
    """Python source of the rewritten method ``name`` and the globals that it needs."""
    own = {function.__name__: function for function in _CALLED}
    for node in trace.graph.nodes:
        if node.name == "self" or node.name in own:  # names that the generated code uses itself
            node._rename(f"{node.name}_value")
    code = trace.graph.python_code("self")
    lines, indent = [], ""
    for line in code.src.strip("\n").split("\n"):
        entered = _ENTER.match(line)
        if entered:
            lines.append(f"    with {_strip_none(entered['managers'])}:")
            indent = "    "
        elif _EXIT.match(line):
            indent = ""
        else:
            lines.append(indent + line)
    source = "\n".join(lines)
    for short in [name for name, value in code.globals.items() if value is call_of]:
        for node in trace.graph.find_nodes(op="call_function", target=call_of):
            callee = str(node.args[0])  # torch.compile knows a call, but not call_of
            source = source.replace(f"{short}({callee}, ", f"{callee}(")
            source = source.replace(f"{short}({callee})", f"{callee}()")
    for short, function in own.items():
        source = re.sub(rf"\b{function.__module__.replace('.', '_')}_{short}\b", short, source)
    source = source.replace("def forward(", f"def {name}(", 1)
    names = dict(code.globals)
    names.update(trace.constants, **own, torch=torch)
    return source, names


def _strip_none(text: str) -> str:
    return text.split(");  ")[0].rstrip(";")


def compile_source(source: str, names: dict[str, Any], method: str, label: str) -> Any:
    """The function that ``source`` defines, with its source known to tracebacks."""
    filename = f"<bayesify {label}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    exec(compile(source, filename, "exec"), names)
    return names[method]
