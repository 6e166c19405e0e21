"""All draws of a scope together, on the CPU: noise by several threads, into kept memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .noise import fill_normal, fold

if TYPE_CHECKING:
    from .grouped import Draw, Item

DTYPES = frozenset({torch.float32, torch.float64})
_PIECE = 1 << 17
"""Elements whose intermediate results stay in the cache, enough for all threads of torch."""


def draw(items: Sequence[Item], seed: int, gradient: bool) -> list[tuple[Tensor, Tensor | None]]:
    """Each draw, and for its backward ``half = sigma * noise / 2``: by the log variance."""
    values = [item.buffers.take(item.mean, item.dtype) for item in items]
    halves = [
        item.buffers.take(item.mean) if gradient or value.dtype != item.mean.dtype else value
        for item, value in zip(items, values, strict=True)
    ]
    fill_normal([(h, fold(seed, i.key)) for h, i in zip(halves, items, strict=True)], std=0.5)
    with torch.no_grad():
        for item, half, value in zip(items, halves, values, strict=True):
            _finish(item.mean, item.logvar, half, value)
    return [(v, h if gradient else None) for v, h in zip(values, halves, strict=True)]


def _finish(*tensors: Tensor) -> None:
    """Turn half the noise into ``half = sigma * noise / 2``, and fill ``value`` with the draw.

    Half of the noise, so that its derivative needs no factor; a power of two costs no bit.
    """
    for mean, logvar, half, value in _pieces(*tensors):
        if value.dtype == logvar.dtype and value.data_ptr() != half.data_ptr():
            torch.mul(logvar, 0.5, out=value).exp_()
            half.mul_(value)
        else:
            half.mul_(torch.mul(logvar, 0.5).exp_().to(half.dtype))
        torch.add(mean, half, alpha=2, out=value)


class Repeated:
    """Draws of the same tensors under many seeds, without gradient: sigma is computed once."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.stds = [item.buffers.take(item.mean) for item in items]
        with torch.no_grad():
            for item, std in zip(items, self.stds, strict=True):
                for logvar, part in _pieces(item.logvar, std):
                    part.copy_(torch.mul(logvar, 0.5).exp_())

    def draw(self, seed: int) -> list[Tensor]:
        """One draw of each tensor, in memory that is used again once nobody holds it."""
        values = [item.buffers.take(item.mean) for item in self.items]
        self._fill(seed, values)
        return values

    def stack(self, seeds: Sequence[int]) -> list[Tensor]:
        """Draws of each tensor, one behind the other: (number of seeds, shape of the tensor)."""
        values = [item.mean.new_empty((len(seeds), *item.mean.shape)) for item in self.items]
        for k, seed in enumerate(seeds):
            self._fill(seed, [value[k] for value in values])
        return values

    def _fill(self, seed: int, values: Sequence[Tensor]) -> None:
        fill_normal([(v, fold(seed, i.key)) for v, i in zip(values, self.items, strict=True)])
        with torch.no_grad():
            for item, std, value in zip(self.items, self.stds, values, strict=True):
                for m, s, v in _pieces(item.mean, std, value):
                    v.mul_(s).add_(m)


def gradients(node: Draw, grad: Tensor | None, kl: Tensor | None, overwrite: bool) -> Any:
    """Of mean and log variance; see :meth:`.grouped.Draw.gradients`."""
    mean, logvar = node.item.mean.detach(), node.item.logvar.detach()
    by_mean, by_logvar = grad, None
    if grad is not None:
        assert node.half is not None
        strided = grad.layout is torch.strided
        if not overwrite or not strided or node.half.dtype != logvar.dtype:
            by_logvar = (grad * node.half).to(logvar.dtype)
            grad_now = None
        else:
            by_logvar, node.half, grad_now = node.half, None, grad
    else:
        by_logvar, grad_now = torch.zeros_like(logvar), None
    factor = None
    if kl is not None:
        factor = float(kl)
        by_mean = node.item.buffers.take(mean) if overwrite else torch.empty_like(mean)
    elif grad_now is None:
        return by_mean, by_logvar
    prior = node.prior or (None, None)
    _add(factor, mean, logvar, by_mean, by_logvar, grad, grad_now, *prior)
    return by_mean, by_logvar


def kl(nodes: Sequence[Draw]) -> Tensor:
    """Sum of the KL divergences of drawn tensors, without gradient."""
    total = 0.0
    for node in nodes:
        assert node.prior is not None
        total += _kl_value(node.item.mean.detach(), node.item.logvar.detach(), node.prior)
    return torch.tensor(total, dtype=nodes[0].item.mean.dtype)


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


def log(value: Tensor | float) -> Any:
    """Natural logarithm of a tensor or of a number."""
    return torch.log(value) if isinstance(value, Tensor) else math.log(value)


def _kl_value(mean: Tensor, logvar: Tensor, prior: tuple[Tensor | float, Tensor | float]) -> float:
    total = 0.0
    for m, s, pm, pv in _pieces(mean, logvar, *prior):
        ratio, offset = _less(s, log(pv)), _less(m, pm)
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
        by_s.add_(torch.expm1(_less(s, log(pv))), alpha=0.5 * factor)
