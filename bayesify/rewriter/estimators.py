"""Estimators that draw no whole weight: what an operation on a weight is exchanged for.

``local`` draws the output of the operation, ``flipout`` gives each example its own signs of one
shared draw. Both leave the distribution of each output as it is and make the noise of the examples
of a batch independent or uncorrelated, so that gradients vary less. An example is an index of the
first dimension of the input.

All noise is a function of the scope's seed and of the parameter: a call that is repeated in one
scope, or recomputed by activation checkpointing, has the same noise.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .. import gaussian, torch_private
from ..posterior import STATE, Slot, given, tensors_of
from ..scope import LOCAL, Scope
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
_DIMENSIONS["embedding"] = 2
_OUTPUT, _IN_SIGNS, _OUT_SIGNS = 1, 2, 3  # families of noise beside that of the draw


# -- what generated code calls -----------------------------------------------------------------


def local(
    operation: Callable[..., Tensor], module: nn.Module, weight: str, bias: str | Tensor | None,
    input: Tensor, *args: Any, **kwargs: Any,
) -> Tensor:  # fmt: skip
    r"""Draw the output of a linear operation rather than its weight.

    .. math:: y = x \mu_w + \mu_b + \sqrt{x^2 \sigma_w^2 + \sigma_b^2}\, \epsilon

    Every element has noise of its own. Over the positions of an image, or the tokens of a
    sentence, weights thus differ, where one draw of the weight has them in common: the
    distribution of each element is exact, the covariance between positions is left out.

    Reference:
        Kingma, Salimans and Welling, 2015, arXiv:1506.02557, section 2.3, equation 6.
    """
    bias = _unless_given(module, bias)
    found = given(module, weight, _slot(module, weight))
    if found is not None:
        return operation(input, found, _drawn(module, bias), *args, **kwargs)
    mean, raw, slot = _posterior(module, weight)
    spread = gaussian.var_from_raw(raw, slot.parameterization)
    shift_spread = None
    if isinstance(bias, str):
        bias, raw, own = _posterior(module, bias)
        shift_spread = gaussian.var_from_raw(raw, own.parameterization)
    center = operation(input, mean, bias, *args, **kwargs)
    half = center.dtype == torch.float16  # squares of small numbers are zero there
    dtype = torch.float32 if half else mean.dtype
    spread = spread.to(dtype)
    shift_spread = None if shift_spread is None else shift_spread.to(dtype)
    if half:
        with torch.autocast(center.device.type, enabled=False):
            variance = operation(input.float().square(), spread, shift_spread, *args, **kwargs)
    else:
        variance = operation(input.square(), spread, shift_spread, *args, **kwargs)
    # not 0, where a square root has no gradient; nor less, which fast convolutions can give
    std = variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt().to(center.dtype)
    return torch.addcmul(center, std, _noise(module, slot, center))


def flipout(
    operation: Callable[..., Tensor], module: nn.Module, weight: str, bias: str | Tensor | None,
    input: Tensor, *args: Any, **kwargs: Any,
) -> Tensor:  # fmt: skip
    r"""One shared deviation of the weights, with random signs for each example.

    .. math:: y_n = x_n \mu_w + \mu_b + \big((x_n \circ s_n)\, \Delta_w + \Delta_b\big) \circ r_n

    The signs are those of channels: within one example the weights are the same everywhere, so
    that the joint distribution of all outputs of an example is exact. They belong to the scope:
    a layer that is called twice on one batch has the same weights for each example.

    Reference:
        Wen, Vicol, Ba, Tran and Grosse, 2018, arXiv:1803.04386, section 3.1, equation 4.
    """
    bias = _unless_given(module, bias)
    found = given(module, weight, _slot(module, weight))
    if found is not None:
        return operation(input, found, _drawn(module, bias), *args, **kwargs)
    scope = _scope(module)
    mean, _, slot = _posterior(module, weight)
    deviation, bias_deviation = scope.deviation(module, weight, slot), None
    if isinstance(bias, str):
        name = bias
        bias, _, own = _posterior(module, name)
        bias_deviation = scope.deviation(module, name, own)
    axis = 1 - mean.dim()  # of the channels: spatial dimensions come after them
    center = operation(input, mean, bias, *args, **kwargs)
    flipped = input * _signs(module, slot, _IN_SIGNS, input, axis)
    deviating = operation(flipped, deviation, bias_deviation, *args, **kwargs)
    return torch.addcmul(center, deviating, _signs(module, slot, _OUT_SIGNS, center, axis))


def local_embedding(
    module: nn.Module, weight: str, input: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Draw the rows that are looked up, one by one; nothing is drawn of the others."""
    slot = _slot(module, weight)
    found = given(module, weight, slot)
    if found is not None:
        return F.embedding(input, found, *args, **kwargs)
    # the fallback of a module around this one must not exchange the mean for a draw
    with torch_private.DisableTorchFunction():
        mean, raw = tensors_of(module, weight, slot)
        center = F.embedding(input, mean, *args, **kwargs)
        rows = F.embedding(input, raw, *args, **kwargs)
    std = gaussian.std_from_raw(rows, slot.parameterization).to(center.dtype)
    return torch.addcmul(center, std, _noise(module, slot, center))


def flipout_embedding(
    module: nn.Module, weight: str, input: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Look up one shared deviation, with random signs of the columns for each example."""
    slot = _slot(module, weight)
    found = given(module, weight, slot)
    if found is not None:
        return F.embedding(input, found, *args, **kwargs)
    deviation = _scope(module).deviation(module, weight, slot)
    with torch_private.DisableTorchFunction():
        mean, _ = tensors_of(module, weight, slot)
        center = F.embedding(input, mean, *args, **kwargs)
        deviating = F.embedding(input, deviation, *args, **kwargs)
    return torch.addcmul(center, deviating, _signs(module, slot, _OUT_SIGNS, center, -1))


def _scope(module: nn.Module) -> Scope:
    assert LOCAL.scope is not None
    return LOCAL.scope.of(module)


def _slot(module: nn.Module, attribute: str) -> Slot:
    slot: Slot = module.__dict__[STATE].slots[attribute]
    return slot


def _unless_given(module: nn.Module, bias: str | Tensor | None) -> str | Tensor | None:
    """A bias by name, or the tensor that stands in the place of its posterior."""
    if not isinstance(bias, str):
        return bias
    found = given(module, bias, _slot(module, bias))
    return bias if found is None else found


def _drawn(module: nn.Module, bias: str | Tensor | None) -> Tensor | None:
    """A bias by name drawn as a whole."""
    if not isinstance(bias, str):
        return bias
    return _scope(module).read(module, bias, _slot(module, bias))


def _posterior(module: nn.Module, attribute: str) -> tuple[Tensor, Tensor, Slot]:
    slot = _slot(module, attribute)
    mean, raw = tensors_of(module, attribute, slot)
    # under another name: the fallback of a module around this one exchanges the mean for a draw
    with torch_private.DisableTorchFunction():
        return mean.view_as(mean), raw, slot


def _noise(module: nn.Module, slot: Slot, like: Tensor) -> Tensor:
    return _scope(module).noise(slot, like.shape, like.dtype, like.device, _OUTPUT)


def _signs(module: nn.Module, slot: Slot, family: int, tensor: Tensor, axis: int) -> Tensor:
    """A sign for each channel, anew for each index of the first dimension if there is one more."""
    size = [1] * tensor.dim()
    size[axis] = tensor.shape[axis]
    if tensor.dim() > -axis:
        size[0] = tensor.shape[0]
    normal = _scope(module).noise(slot, size, torch.float32, tensor.device, family)
    return torch.ones_like(normal).copysign(normal).to(tensor.dtype)


_CALLS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "local": (local, local_embedding),
    "flipout": (flipout, flipout_embedding),
}
RUNTIME: tuple[Callable[..., Any], ...] = tuple(call for pair in _CALLS.values() for call in pair)
"""What generated code calls by its bare name."""


# -- the pass ----------------------------------------------------------------------------------


def may_take(kind: type, dim: int) -> bool:
    """Whether the code of a module class names an operation on weights of so many dimensions."""
    functions = (
        member
        for base in kind.__mro__
        if base not in (nn.Module, object)
        for name, member in vars(base).items()
        if isinstance(member, types.FunctionType) and name != "__init__"
    )
    return any(_DIMENSIONS.get(name) == dim for f in functions for name in f.__code__.co_names)


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
        reason = _obstacle(node)
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


def _obstacle(node: fx.Node) -> str | None:
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
    return None


def _arguments(user: fx.Node) -> dict[str, Any]:
    names: tuple[str, ...] = ("input", "weight", "bias")
    if user.target == F.embedding:
        names = ("input", "weight", "padding_idx", "max_norm")
    return {**dict(zip(names, user.args, strict=False)), **user.kwargs}


def _exchange(trace: Trace, node: fx.Node, estimator: str, wanted: dict[fx.Node, Slot]) -> None:
    (user,) = node.users
    path, weight = trace.parameters[node.name]
    given = _arguments(user)
    owner: Any = Expression(access(path))
    linear, embedding = _CALLS[estimator]
    if user.target == F.embedding:
        names: tuple[str, ...] = ("input", "weight")
        call = embedding
        first: tuple[Any, ...] = (owner, weight, given["input"])
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
        call, first = linear, (operation, owner, weight, bias, given["input"])
    user.target, user.args = call, (*first, *user.args[len(names) :])
    user.kwargs = {k: v for k, v in user.kwargs.items() if k not in names}
