"""All draws of a scope together, on the CPU: noise by several threads, into kept memory.

The plain reference is :func:`bayesify.scope.realise`, tensor by tensor; the numbers are the same,
bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .buffers import Buffers
from .noise import fill_normal, fold, noise

_PIECE = 1 << 17
"""Elements whose intermediate results stay in the cache, enough for all threads of torch."""


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


def _may_overwrite(grad: Tensor | None) -> bool:
    """Whether this backward is the last of its graph, and of one gradient at a time."""
    return not (
        torch._C._autograd._get_current_graph_task_keep_graph()
        or (grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad))
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


def draw(items: Sequence[Item], seed: Tensor) -> list[tuple[Tensor, Hook | None]]:
    """Draw every item under one seed.

    Returns:
        Each draw and, where it has a gradient, where :func:`gaussian_kl` may hang the KL divergence
        of the same tensor.
    """
    number = int(seed)
    halves = [item.buffers.take(item.mean) for item in items]
    values = [item.buffers.take(item.mean) for item in items]
    fill_normal([(h, fold(number, i.key)) for h, i in zip(halves, items, strict=True)], std=0.5)
    with torch.no_grad():
        for item, half, value in zip(items, halves, values, strict=True):
            _finish(item.mean, item.logvar, half, value)
    found: list[tuple[Tensor, Hook | None]] = []
    for item, half, value in zip(items, halves, values, strict=True):
        if torch.is_grad_enabled() and (item.mean.requires_grad or item.logvar.requires_grad):
            node = Draw(item, half, seed)
            drawn, token = _Draw.apply(item.mean, item.logvar, [value], node)
            found.append((drawn, Hook(node, token)))
        else:
            found.append((value, None))
    return found


def _finish(*tensors: Tensor) -> None:
    """Turn half the noise into ``half = sigma * noise / 2``, and fill ``value`` with the draw.

    Half of it is the draw's derivative by the log variance; a power of two costs no bit.
    """
    for mean, logvar, half, value in _pieces(*tensors):
        if value.dtype == logvar.dtype:
            torch.mul(logvar, 0.5, out=value).exp_()
            half.mul_(value)
        else:
            half.mul_(torch.exp(0.5 * logvar).to(value.dtype))
        torch.add(mean, half, alpha=2, out=value)


class Draw:
    """What the backward of one draw needs, and whether a KL divergence hangs on it."""

    def __init__(self, item: Item, half: Tensor, seed: Tensor) -> None:
        self.item, self.seed = item, seed
        self.half: Tensor | None = half
        self.prior: tuple[Tensor | float, Tensor | float] | None = None
        self.versions = (item.mean._version, item.logvar._version)

    def may_carry(self, mean: Tensor, logvar: Tensor) -> bool:
        """Whether a KL divergence of these tensors, which must be its own, can hang here.

        Not after its backward, nor after a change of its tensors.
        """
        return (
            self.half is not None
            and mean is self.item.mean
            and logvar is self.item.logvar
            and mean.dtype == logvar.dtype
            and self._unchanged()
        )

    def _unchanged(self) -> bool:
        return self.versions == (self.item.mean._version, self.item.logvar._version)

    def gradients(self, grad: Tensor | None, kl: Tensor | None) -> tuple[Any, Any]:
        """Of mean and log variance: by the draw, and by the KL divergence if one hangs on it."""
        if not self._unchanged():
            raise RuntimeError(
                "A mean or log variance was changed in place between forward and backward (by an "
                "optimizer step?): its gradient would be wrong. Call backward before."
            )
        if grad is not None and self.half is None:
            raise RuntimeError(
                "This draw's backward ran already. Give retain_graph=True to the first one."
            )
        if torch.is_grad_enabled():
            return self._differentiable(grad, kl)
        mean, logvar = self.item.mean.detach(), self.item.logvar.detach()
        if grad is not None and grad.layout is not torch.strided and kl is not None:
            grad = grad.to_dense()  # as the gradient of the KL divergence is
        overwrite = _may_overwrite(grad)
        by_mean, by_logvar = grad, None
        if grad is not None:
            assert self.half is not None
            strided = grad.layout is torch.strided
            if not overwrite or not strided or self.half.dtype != logvar.dtype:
                by_logvar = (grad * self.half).to(logvar.dtype)
                grad_now = None
            else:
                by_logvar, self.half, grad_now = self.half, None, grad
        else:
            by_logvar, grad_now = torch.zeros_like(logvar), None
        factor = None
        if kl is not None:
            factor = float(kl)
            by_mean = self.item.buffers.take(mean) if overwrite else torch.empty_like(mean)
        elif grad_now is None:
            return by_mean, by_logvar
        prior = self.prior or (None, None)
        _add(factor, mean, logvar, by_mean, by_logvar, grad, grad_now, *prior)
        return by_mean, by_logvar

    def _differentiable(self, grad: Tensor | None, kl: Tensor | None) -> tuple[Any, Any]:
        mean, logvar = self.item.mean, self.item.logvar
        by_mean: Any = 0.0
        by_logvar: Any = 0.0
        if grad is not None:
            eps = noise(self.seed, self.item.key, mean.shape, mean.dtype, mean.device)
            std = torch.exp(0.5 * logvar).to(mean.dtype)
            by_mean, by_logvar = grad, (grad * (0.5 * std * eps)).to(logvar.dtype)
        if kl is not None:
            assert self.prior is not None
            prior_mean, prior_var = self.prior
            by_mean = by_mean + kl * (mean - prior_mean) / prior_var
            by_logvar = by_logvar + 0.5 * kl * torch.expm1(logvar - _log(prior_var))
        return by_mean, by_logvar


class Hook(NamedTuple):
    """The backward of a draw, and a zero that comes of it: what is added to it reaches there."""

    node: Draw
    token: Tensor


class _Draw(torch.autograd.Function):
    """``w = mean + exp(logvar / 2) * noise``, and a zero on which the KL divergence can hang."""

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, logvar: Tensor, memory: Any, node: Draw
    ) -> tuple[Tensor, Tensor]:
        (value,) = memory
        ctx.node = node
        ctx.set_materialize_grads(False)
        return value, mean.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        by_mean, by_logvar = ctx.node.gradients(*grads)
        wants_mean, wants_logvar, *_ = ctx.needs_input_grad
        return by_mean if wants_mean else None, by_logvar if wants_logvar else None, None, None


# -- the KL divergence of tensors that were drawn --------------------------------------------


class _Hang(torch.autograd.Function):
    """A number whose gradient goes to the backward of draws."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *tokens: Tensor) -> Tensor:
        ctx.count = len(tokens)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *(grads * ctx.count)


def gaussian_kl(drawn: Sequence[tuple[Hook, Tensor | float, Tensor | float]]) -> Tensor:
    """Sum of the KL divergences from drawn posteriors to N(prior mean, prior variance).

    The reference is :func:`bayesify.gaussian.kl_divergence`. Here the gradient is added where the
    gradient of the draw is computed: no other tensor of the size of a weight is made.
    """
    total = 0.0
    tokens = []
    for (node, token), prior_mean, prior_var in drawn:
        node.prior = prior_mean, prior_var
        tokens.append(token)
        total += _kl_value(node.item.mean.detach(), node.item.logvar.detach(), node.prior)
    value = torch.tensor(total, dtype=tokens[0].dtype)
    result: Tensor = _Hang.apply(value, *tokens)
    return result


def _pieces(*tensors: Any) -> Iterator[tuple[Any, ...]]:
    """Flat parts of tensors of one shape; a number or None is the same for all parts."""
    count = max(1, -(-tensors[0].numel() // _PIECE))
    columns = []
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.dim() == tensors[0].dim():
            flat = tensor.reshape(-1)
            columns.append(flat.split(_PIECE) if count > 1 else (flat,))
        else:
            columns.append((tensor,) * count)
    return zip(*columns, strict=True)


def _log(value: Tensor | float) -> Any:
    return torch.log(value) if isinstance(value, Tensor) else math.log(value)


def _kl_value(mean: Tensor, logvar: Tensor, prior: tuple[Tensor | float, Tensor | float]) -> float:
    total = 0.0
    for m, s, pm, pv in _pieces(mean, logvar, *prior):
        ratio, offset = _less(s, _log(pv)), _less(m, pm)
        terms = torch.expm1(ratio).sub_(ratio)
        if isinstance(pv, float):
            terms.addcmul_(offset, offset, value=1.0 / pv)
        else:
            terms.add_(offset.square().div_(pv))
        total += 0.5 * float(terms.sum())
    return total


def _less(tensor: Tensor, other: Tensor | float) -> Tensor:
    """``tensor - other``, and no pass over the memory for a standard normal prior."""
    return tensor if isinstance(other, float) and other == 0.0 else tensor - other


def _add(factor: float | None, *tensors: Any) -> None:
    """``by_logvar *= grad`` if there is one to multiply; then what the KL divergence adds.

    ``by_mean = grad + factor (mean - m) / v``, ``by_logvar += factor (e^l / v - 1) / 2``.
    """
    for m, s, by_m, by_s, grad, grad_now, pm, pv in _pieces(*tensors):
        if grad_now is not None:
            by_s.mul_(grad_now)
        if factor is None:
            continue
        offset = _less(m, pm)
        if not isinstance(pv, float):
            torch.mul(offset, factor, out=by_m).div_(pv)
            if grad is not None:
                by_m.add_(grad)
        elif grad is not None:
            torch.add(grad, offset, alpha=factor / pv, out=by_m)
        else:
            torch.mul(offset, factor / pv, out=by_m)
        by_s.add_(torch.expm1(_less(s, _log(pv))), alpha=0.5 * factor)
