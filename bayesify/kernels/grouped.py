"""All draws of a scope together, on the CPU: noise by several threads, into kept memory.

The plain reference is :func:`bayesify.scope.realise`, tensor by tensor; the numbers are the same,
bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .buffers import Buffers
from .noise import fill_normal, fold, noise


class Item(NamedTuple):
    """One tensor to draw: N(mean, exp(logvar)), its noise key and its memory."""

    mean: nn.Parameter
    logvar: nn.Parameter
    key: int
    buffers: Buffers


def possible() -> bool:
    """Whether nothing watches or transforms tensors now, so that memory may be used anew."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or _get_current_dispatch_mode_stack()
    )


def _may_overwrite(grad: Tensor) -> bool:
    """Whether this backward is the last of its graph, and of one gradient at a time."""
    return not (
        torch._C._autograd._get_current_graph_task_keep_graph()
        or torch._C._functorch.is_legacy_batchedtensor(grad)
        or not possible()
    )


def suits(mean: Tensor, raw: Tensor) -> bool:
    """Whether a tensor can be drawn here: float32 or float64 on the CPU, contiguous."""
    return (
        type(mean) is nn.Parameter
        and type(raw) is nn.Parameter
        and mean.device.type == "cpu"
        and raw.device.type == "cpu"
        and mean.dtype in (torch.float32, torch.float64)
        and raw.dtype is torch.float32
        and mean.is_contiguous()
        and raw.is_contiguous()
    )


def draw(items: Sequence[Item], seed: Tensor) -> list[Tensor]:
    """Draw every item under one seed.

    Each draw keeps one tensor for its backward, sigma times the noise, in which the gradient of
    the log variance is then computed in place.
    """
    number = int(seed)
    deltas = [item.buffers.take(item.mean) for item in items]
    fill_normal(
        [(delta, fold(number, item.key)) for delta, item in zip(deltas, items, strict=True)]
    )
    found = []
    for item, delta in zip(items, deltas, strict=True):
        value = item.buffers.take(item.mean)
        if torch.is_grad_enabled() and (item.mean.requires_grad or item.logvar.requires_grad):
            value = _Draw.apply(item.mean, item.logvar, (value, delta), seed, item.key)
        else:
            _finish(item.mean, item.logvar, value, delta)
        found.append(value)
    return found


def _finish(mean: Tensor, logvar: Tensor, value: Tensor, delta: Tensor) -> None:
    """Turn the noise in ``delta`` into sigma times noise, and fill ``value`` with the draw."""
    with torch.no_grad():
        if value.dtype == logvar.dtype:
            torch.mul(logvar, 0.5, out=value).exp_()
            delta.mul_(value)
        else:
            delta.mul_(torch.exp(0.5 * logvar).to(value.dtype))
        torch.add(mean, delta, out=value)


class _Draw(torch.autograd.Function):
    """``w = mean + exp(logvar / 2) * noise`` with ``dw/dlogvar = (w - mean) / 2``."""

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, logvar: Tensor, memory: tuple[Tensor, Tensor], seed: Tensor,
        key: int,
    ) -> Tensor:  # fmt: skip
        value, delta = memory
        _finish(mean, logvar, value, delta)
        ctx.save_for_backward(logvar, delta)
        ctx.seed, ctx.key = seed, key
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        logvar, delta = ctx.saved_tensors
        wanted = None
        if ctx.needs_input_grad[1]:
            if torch.is_grad_enabled():  # this gradient is differentiated again
                eps = noise(ctx.seed, ctx.key, delta.shape, delta.dtype, delta.device)
                delta = torch.exp(0.5 * logvar).to(delta.dtype) * eps
                wanted = (grad * (0.5 * delta)).to(logvar.dtype)
            elif delta.dtype != logvar.dtype or not _may_overwrite(grad):
                wanted = (grad * delta).mul_(0.5).to(logvar.dtype)
            else:
                wanted = delta.mul_(grad).mul_(0.5)
        return grad, wanted, None, None, None
