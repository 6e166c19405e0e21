"""All draws of a scope together, on the CPU, into kept memory.

Noise, draw and KL divergence are made by the C library (:mod:`.native`) where it was compiled and
tensors are float32, elsewhere by plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..gaussian import HELD
from . import native
from .drawn import Draw, Item
from .noise import fill_normal

DTYPES = frozenset({torch.float32, torch.float64})
_PIECE = 1 << 17
"""Elements whose intermediate results stay in the cache, enough for all threads of torch."""
_LOG2_E = math.log2(math.e)
_STRIP = 1 << 15
"""Elements that torch works on in the thread that asks, which is one of those that make noise."""


def draw(items: Sequence[Item], seed: int, gradient: bool) -> list[tuple[Tensor, Tensor | None]]:
    """Each draw, and for its backward ``half = sigma * noise / 2``: by the log variance."""
    made: list[tuple[Tensor, Tensor | None]] = []
    rows: list[native.DrawRow] = []
    lowered: list[tuple[Item, Tensor, Tensor]] = []
    plain: list[tuple[Item, Tensor, Tensor]] = []
    for item in items:
        value = item.buffers.take(item.mean, item.dtype)
        apart = value.dtype is not item.mean.dtype
        half = item.buffers.take(item.mean) if gradient or apart else value
        made.append((value, half if gradient else None))
        if not _by_native(item):
            plain.append((item, half, value))
            continue
        if apart:
            lowered.append((item, half, value))
        rows.append(
            native.DrawRow(
                item.mean, item.logvar, None if apart else value,
                half if gradient or apart else None, item.key,
            )
        )  # fmt: skip
    if rows:
        native.draw(rows, seed)
    with torch.no_grad():
        for item, half, value in lowered:
            torch.add(item.mean, half, alpha=2, out=value)
        if plain:
            # half of the noise, so that its derivative needs no factor; a power of two costs no bit
            rows_of_noise = [(half, i.key, i.mean, i.logvar, value) for i, half, value in plain]
            fill_normal(rows_of_noise, seed, std=0.5, then=_finish)
    return made


def _by_native(item: Item) -> bool:
    # also in the backward: the tensors may have become others since the draw
    return native.there() and native.suits(item.mean) and native.suits(item.logvar)


def _finish(*tensors: Tensor) -> None:
    """Turn half the noise into ``half = sigma * noise / 2``, and fill ``value`` with the draw."""
    for half, mean, logvar, value in _pieces(*tensors, size=_STRIP):
        if value.dtype == logvar.dtype and value.data_ptr() != half.data_ptr():
            torch.mul(logvar, 0.5, out=value).exp_()
            half.mul_(value)
        else:
            half.mul_(torch.mul(logvar, 0.5).exp_().to(half.dtype))
        torch.add(mean, half, alpha=2, out=value)


def _scale(*tensors: Tensor) -> None:
    """Turn noise into the draw."""
    for value, mean, std in _pieces(*tensors, size=_STRIP):
        value.mul_(std).add_(mean)


class Repeated:
    """Draws of the same tensors under many seeds, without gradient."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._rows = [(item, *_moments(item)) for item in items]

    def draw(self, seed: int) -> list[Tensor]:
        """One draw of each tensor, in memory that is used again once nobody holds it."""
        values = [item.buffers.take(item.mean) for item, *_ in self._rows]
        self._fill(seed, values)
        return values

    def stack(self, seeds: Sequence[int]) -> list[Tensor]:
        """Draws of each tensor, one behind the other: (number of seeds, shape of the tensor)."""
        values = [item.mean.new_empty((len(seeds), *item.mean.shape)) for item, *_ in self._rows]
        for k, seed in enumerate(seeds):
            self._fill(seed, [value[k] for value in values])
        return values

    def _fill(self, seed: int, values: Sequence[Tensor]) -> None:
        rows, plain = [], []
        for (item, mean, std), value in zip(self._rows, values, strict=True):
            if std is None:
                rows.append(native.DrawRow(mean, item.logvar, value, None, item.key))
            else:
                plain.append((value, item.key, mean, std))
        if rows:
            native.draw(rows, seed)
        fill_normal(plain, seed, then=_scale)


def _moments(item: Item) -> tuple[Tensor, Tensor | None]:
    """Mean and sigma; sigma is None where the C library makes it while it draws."""
    mean, logvar = item.mean.detach(), item.logvar.detach()
    if _by_native(item):
        return mean, None
    std = item.buffers.take(mean)
    for raw, part in _pieces(logvar, std):
        part.copy_(torch.mul(raw, 0.5).exp_())
    return mean, std


def gradients(node: Draw, grad: Tensor | None, kl: Tensor | None, overwrite: bool) -> Any:
    """Of mean and log variance; see :func:`.grouped.gradients`."""
    item, half = node.item, node.half
    mean, logvar = item.mean.detach(), item.logvar.detach()
    in_place = (
        grad is not None
        and half is not None
        and overwrite
        and grad.layout is torch.strided
        and half.dtype is logvar.dtype
    )
    if grad is None:
        by_logvar = torch.zeros_like(logvar)
    elif in_place:
        assert half is not None
        by_logvar, node.half = half, None
    else:
        assert half is not None
        by_logvar = (grad * half).to(logvar.dtype)
    if kl is None:
        if grad is not None and in_place:
            by_logvar.mul_(grad)
        return grad, by_logvar
    by_mean = item.buffers.take(mean) if overwrite else torch.empty_like(mean)
    prior, factor = _numbers(node.prior), float(kl)
    if _by_native(item) and (grad is None or in_place) and all(map(native.suits, prior)):
        upstream = grad if grad is None else grad.contiguous()
        if native.suits(upstream):
            native.gradient(mean, logvar, prior, factor, upstream, by_mean, by_logvar, item.held)
            return by_mean, by_logvar
    _add(
        factor,
        item.held,
        mean,
        logvar,
        by_mean,
        by_logvar,
        grad,
        grad if in_place else None,
        *prior,
    )
    return by_mean, by_logvar


def kl(nodes: Sequence[Draw]) -> Tensor:
    """Sum of the KL divergences of drawn tensors, without gradient."""
    total = 0.0
    rows = []
    for node in nodes:
        item, prior = node.item, _numbers(node.prior)
        if _by_native(item) and all(map(native.suits, prior)):
            rows.append(native.KLRow(item.mean, item.logvar, prior, item.held))
        else:
            total += _kl_value(item.held, item.mean.detach(), item.logvar.detach(), *prior)
    if rows:
        total += native.kl(rows)
    return torch.tensor(total, dtype=nodes[0].item.mean.dtype)


def _numbers(prior: native.Prior | None) -> native.Prior:
    """A prior with numbers in the place of tensors of one number."""
    assert prior is not None
    mean, var = (float(p) if isinstance(p, Tensor) and p.dim() == 0 else p for p in prior)
    return mean, var


def _pieces(*tensors: Any, size: int = _PIECE) -> Iterator[tuple[Any, ...]]:
    """Flat parts of tensors of one shape; a number or None is the same for all parts."""
    count = max(1, -(-tensors[0].numel() // size))
    columns = []
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            flat = tensor.reshape(-1)
            columns.append(flat.split(size) if count > 1 else (flat,))
        else:
            columns.append((tensor,) * count)
    return zip(*columns, strict=True)


def log(value: Tensor | float) -> Any:
    """Natural logarithm of a tensor or of a number."""
    return torch.log(value) if isinstance(value, Tensor) else math.log(value)


def _kl_value(
    has_held: bool,
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | float,
    prior_var: Tensor | float,
) -> float:
    total = 0.0
    for m, s, pm, pv in _pieces(mean, logvar, prior_mean, prior_var):
        ratio, offset = _less(s, log(pv)), _less(m, pm)
        terms = _expm1(ratio).sub_(ratio)
        if isinstance(pv, float):
            terms.addcmul_(offset, offset, value=1.0 / pv)
        else:
            terms.add_(offset.square().div_(pv))
        if has_held:
            terms.masked_fill_(s < HELD, 0.0)
        total += 0.5 * float(terms.sum())
    return total


def _less(tensor: Tensor, other: Tensor | float) -> Tensor:
    """``tensor - other``, and no pass over the memory for a standard normal prior."""
    return tensor if isinstance(other, float) and other == 0.0 else tensor - other


def _expm1(x: Tensor) -> Tensor:
    """``torch.expm1``, for which torch takes ten times as long as for an exponential."""
    if x.dtype is not torch.float32 or not x.numel():
        return torch.expm1(x)
    if float(x.amax()) < -0.5:  # most posteriors are narrower than their prior: nothing cancels
        return torch.mul(x, _LOG2_E).exp2_().sub_(1.0)
    return torch.exp(x.double()).sub_(1.0).float()


def _add(factor: float, has_held: bool, *tensors: Any) -> None:
    """``by_logvar *= grad`` if there is one to multiply; then what the KL divergence adds.

    ``by_mean = grad + factor (mean - m) / v``, ``by_logvar += factor (e^l / v - 1) / 2``.
    """
    for m, s, by_m, by_s, grad, grad_now, pm, pv in _pieces(*tensors):
        if grad_now is not None:
            by_s.mul_(grad_now)
        offset, excess = _less(m, pm), _expm1(_less(s, log(pv)))
        if has_held:
            held = s < HELD
            offset, excess = offset.masked_fill(held, 0.0), excess.masked_fill(held, 0.0)
            pv = pv if isinstance(pv, float) else pv.masked_fill(held, 1.0)
        if not isinstance(pv, float):
            torch.mul(offset, factor, out=by_m).div_(pv)
            if grad is not None:
                by_m.add_(grad)
        elif grad is not None:
            torch.add(grad, offset, alpha=factor / pv, out=by_m)
        else:
            torch.mul(offset, factor / pv, out=by_m)
        by_s.add_(excess, alpha=0.5 * factor)
