"""Leave out of an exported graph the channels that are pruned as a whole."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten
_LINEAR = {aten.linear.default}
_CONV = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}
_NORM = {aten.batch_norm.default}
_BY_ELEMENT = {
    getattr(aten, name).default
    for name in (
        "relu relu_ gelu gelu_ silu silu_ mish mish_ elu elu_ selu hardswish hardswish_ hardtanh "
        "hardtanh_ hardsigmoid leaky_relu leaky_relu_ relu6 sigmoid tanh softplus"
    ).split()
}
"""Operators that give each element from that element alone; other arguments are constants."""
_NOTHING = {aten.clone.default, aten.contiguous.default, aten.alias.default}


@dataclass
class _Chain:
    """A producer of dead channels, the operators behind it, and the layer that reads them.

    ``value`` is what a dead channel holds wherever it is read, (channels,); ``dead`` which may go.
    """

    producer: fx.Node
    between: list[fx.Node]
    consumer: fx.Node
    dead: Tensor
    value: Tensor


def shrink_(graph_module: fx.GraphModule) -> int:
    """Leave out output channels whose weights are all zero, and what reads them.

    A channel of a ``Linear`` or convolution with zero weights holds its bias everywhere. Behind
    operators that work channel by channel (activations, BatchNorm at its running statistics,
    depthwise convolutions) it still holds one number, so that the next layer need not read it: its
    part goes into that layer's bias. Where that would not be exact, or another operator reads the
    channel too (a residual sum, a split), the channel stays.

    Args:
        graph_module: What ``torch.export.export(...).module()`` gives, of a deterministic model in
            ``eval()``; changed in place.

    Returns:
        The number of channels that are gone.

    Reference:
        Li et al., 2017, arXiv:1608.08710, section 3.
    """
    uses = _uses(graph_module)
    removed = 0
    with torch.no_grad():
        for node in list(graph_module.graph.nodes):
            chain = _chain(graph_module, node, uses)
            if chain is not None and bool(chain.dead.any()):
                _cut(graph_module, chain)
                removed += int(chain.dead.sum())
    if removed:
        graph_module.graph.lint()
        graph_module.recompile()
    return removed


def _chain(root: fx.GraphModule, node: fx.Node, uses: Counter[int]) -> _Chain | None:
    """The chain that begins at ``node``, if it is a layer with dead channels."""
    if node.target not in _LINEAR | _CONV or not _owned(root, node, uses) or _groups(node) != 1:
        return None
    weight = _tensor(root, node.args[1])
    dead = (weight == 0).flatten(1).all(dim=1)
    if not bool(dead.any()):
        return None
    if bool(dead.all()):
        dead[0] = False  # no layer is left without a channel
    bias = _tensor(root, _argument(node, 2))
    value = torch.zeros_like(weight[:, 0].flatten(1)[:, 0]) if bias is None else bias.clone()
    between: list[fx.Node] = []
    at = node
    while len(at.users) == 1:
        reader = next(iter(at.users))
        if reader.args[0] is not at or at in reader.args[1:]:
            return None
        if reader.target in _NOTHING or reader.target is aten.dropout.default:
            if reader.target is aten.dropout.default and reader.args[2]:
                return None  # it draws, also in evaluation
        elif reader.target in _BY_ELEMENT:
            value = reader.target(value, *reader.args[1:], **reader.kwargs)  # type: ignore[operator]
        elif reader.target in _NORM and _owned(root, reader, uses) and not reader.args[5]:
            if node.target in _LINEAR and node.meta["val"].dim() != 2:
                return None
            parts = [_tensor(root, _argument(reader, i)) for i in range(1, 5)]
            if parts[2] is None:
                return None
            value = aten.batch_norm.default(value[None], *parts, *reader.args[5:])[0]
        elif reader.target in _CONV | _LINEAR and _owned(root, reader, uses):
            if (reader.target in _LINEAR) != (node.target in _LINEAR):
                return None
            read = _tensor(root, reader.args[1])
            bias = _tensor(root, _argument(reader, 2))
            if _groups(reader) == 1:
                if bias is None or _padded(reader):
                    dead &= value == 0
                return _Chain(node, between, reader, dead, value)
            if _groups(reader) != len(value) or read.shape[:2] != (len(value), 1):
                return None
            if _padded(reader):
                dead &= value == 0  # else its border would differ from its middle
            value = value * read.flatten(1).sum(1)
            value = value if bias is None else value + bias
        else:
            return None
        between.append(reader)
        at = reader
    return None


def _cut(root: fx.GraphModule, chain: _Chain) -> None:
    """Take the dead channels out of every tensor of a chain."""
    live = ~chain.dead
    for index in (1, 2):
        _keep(root, _argument(chain.producer, index), live)
    for node in chain.between:
        if node.target in _NORM:
            for index in range(1, 5):
                _keep(root, _argument(node, index), live)
        elif node.target in _CONV:
            for index in (1, 2):
                _keep(root, _argument(node, index), live)
            node.args = (*node.args[:6], int(live.sum()))
    weight, bias = (_tensor(root, _argument(chain.consumer, index)) for index in (1, 2))
    if bias is not None:
        # of a convolution without padding every position sums over the whole kernel
        summed = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
        constant = summed[:, chain.dead] @ chain.value[chain.dead]
        _assign(root, _argument(chain.consumer, 2), bias + constant)
    _assign(root, chain.consumer.args[1], weight[:, live].contiguous())


def _argument(node: fx.Node, index: int) -> Any:
    return node.args[index] if len(node.args) > index else None


def _groups(node: fx.Node) -> int:
    return 1 if node.target in _LINEAR else int(_argument(node, 6) or 1)


def _padded(node: fx.Node) -> bool:
    return node.target in _CONV and any(_argument(node, 4) or (0,))


def _tensor(root: fx.GraphModule, node: Any) -> Any:
    """The parameter or buffer of a ``get_attr`` node."""
    return None if node is None else operator.attrgetter(node.target)(root).detach()


def _owned(root: fx.GraphModule, node: fx.Node, uses: Counter[int]) -> bool:
    """Whether all tensors of a layer are the model's own and nothing else reads them."""
    last = 5 if node.target in _NORM else 3
    tensors = [a for a in node.args[1:last] if a is not None]
    if node.kwargs or not all(isinstance(a, fx.Node) and a.op == "get_attr" for a in tensors):
        return False
    return all(uses[_tensor(root, a).data_ptr()] == 1 for a in tensors)


def _uses(root: fx.GraphModule) -> Counter[int]:
    """How often the memory of each parameter or buffer is read."""
    uses: Counter[int] = Counter()
    for node in root.graph.nodes:
        if node.op == "get_attr":
            value = operator.attrgetter(node.target)(root)
            if isinstance(value, Tensor):
                uses[value.data_ptr()] += len(node.users)
    return uses


def _keep(root: fx.GraphModule, node: Any, live: Tensor) -> None:
    if node is not None:
        _assign(root, node, _tensor(root, node)[live].contiguous())


def _assign(root: fx.GraphModule, node: Any, value: Tensor) -> None:
    path, _, name = node.target.rpartition(".")
    owner = root.get_submodule(path)
    if name in owner._parameters:
        owner._parameters[name] = nn.Parameter(value, requires_grad=False)
    elif name in owner._buffers:
        owner._buffers[name] = value
    else:
        setattr(owner, name, value)
