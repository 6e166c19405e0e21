"""The pass that exchanges operations on a weight for calls of its estimator."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..estimators import registered
from ..estimators.registry import estimate, estimate_embedding
from ..posterior import Slot
from .tracer import Trace
from .writer import Expression, access

LINEAR: dict[Any, tuple[str, int]] = {
    F.linear: ("torch._C._nn.linear", 2),
    torch.conv1d: ("torch.conv1d", 3),
    torch.conv2d: ("torch.conv2d", 4),
    torch.conv3d: ("torch.conv3d", 5),
    torch.conv_transpose1d: ("torch.conv_transpose1d", 3),
    torch.conv_transpose2d: ("torch.conv_transpose2d", 4),
    torch.conv_transpose3d: ("torch.conv_transpose3d", 5),
}
"""Operations (input, weight, bias, ...) in each of whose sums a weight stands once: how generated
code names them, and the dimensions of the weight."""
_DIMENSIONS = {source.rpartition(".")[2]: dim for source, dim in LINEAR.values()}


def may_take(kind: type, dim: int, estimator: str) -> bool:
    """Whether the code of a module class names an operation whose weight an estimator can take.

    It may do something else with the weight all the same: what a call has taken, its graph says.

    Args:
        kind: The class of the module.
        dim: Dimensions of the weight.
        estimator: Its name.
    """
    known = registered(estimator)
    dimensions = {} if known.linear is None else dict(_DIMENSIONS)
    if known.embedding is not None:
        dimensions["embedding"] = 2
    functions = (
        member
        for base in kind.__mro__
        if base not in (nn.Module, object)
        for name, member in vars(base).items()
        if isinstance(member, types.FunctionType) and name != "__init__"
    )
    return any(dimensions.get(name) == dim for f in functions for name in f.__code__.co_names)


def reads_to_estimates(
    trace: Trace, slots: dict[tuple[tuple[str, ...], str], Slot]
) -> tuple[int, list[str]]:
    """Exchange each operation on a weight with an estimator for a call of that estimator.

    Args:
        trace: Changed in place.
        slots: Those of the Bayesian parameters, by (module path, attribute).

    Returns:
        How many parameters take part, and why others that should do not.
    """
    kept: dict[str, str] = {}
    wanted: dict[fx.Node, Slot] = {}
    for node in trace.graph.nodes:
        where = trace.parameters.get(node.name) if node.op == "get_attr" else None
        slot = None if where is None else slots.get(where)
        if slot is not None and slot.estimator != "weight":
            wanted[node] = slot
    for node, slot in wanted.items():
        reason = _obstacle(node, slot.estimator)
        if reason is None:
            _exchange(trace, node, slot.estimator, wanted)
        else:
            kept[node.name] = reason
    left = [node for node in wanted if node.users]
    for node in wanted:
        if not node.users:
            trace.graph.erase_node(node)
    reasons = [f"{trace.parameters[n.name][1]} is drawn whole: {kept[n.name]}" for n in left]
    return len(wanted) - len(left), reasons


def _obstacle(node: fx.Node, estimator: str) -> str | None:
    """Why the operation that reads a parameter cannot be exchanged."""
    if len(node.users) != 1:
        return f"{len(node.users)} operations read it"
    (user,) = node.users
    name = getattr(user.target, "__name__", str(user.target))
    if user.op != "call_function" or (user.target not in LINEAR and user.target != F.embedding):
        return f"{name} reads it"
    given = _arguments(user)
    if given.get("weight") is not node or given["input"] is node or given.get("bias") is node:
        return f"it is not the weight of {name}"
    if given.get("max_norm") is not None:
        return "max_norm changes it in place"
    known = registered(estimator)
    if (known.embedding if user.target == F.embedding else known.linear) is None:
        return f"estimator {estimator!r} has no form for {name}"
    return None


def _arguments(user: fx.Node) -> dict[str, Any]:
    names: tuple[str, ...] = ("input", "weight", "bias")
    if user.target == F.embedding:
        names = ("input", "weight", "padding_idx", "max_norm")
    return {**dict(zip(names, user.args, strict=False)), **user.kwargs}


def _exchange(trace: Trace, node: fx.Node, estimator: str, wanted: dict[fx.Node, Slot]) -> None:
    """Make the operation that reads a weight a call of its estimator.

    The bias goes along by name where it is of the same module and estimator and no other operation
    reads it: its noise is then part of the output's. Else it stays what it is, a draw or a tensor.
    """
    (user,) = node.users
    path, weight = trace.parameters[node.name]
    given = _arguments(user)
    owner: Any = Expression(access(path))
    if user.target == F.embedding:
        names: tuple[str, ...] = ("input", "weight")
        call: Any = estimate_embedding
        first: tuple[Any, ...] = (estimator, owner, weight, given["input"])
    else:
        names = ("input", "weight", "bias")
        bias: Any = given.get("bias")
        if (
            bias in wanted
            and wanted[bias].estimator == estimator
            and len(bias.users) == 1
            and trace.parameters[bias.name][0] == path
        ):
            bias = trace.parameters[bias.name][1]
        operation: Any = Expression(LINEAR[user.target][0])
        call = estimate
        first = (estimator, operation, owner, weight, bias, given["input"])
    user.target, user.args = call, (*first, *user.args[len(names) :])
    user.kwargs = {k: v for k, v in user.kwargs.items() if k not in names}
