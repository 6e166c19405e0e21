"""Draws and KL divergences of many tensors as one operator each, for torch.compile.

The compiler cannot look into an operator, and a compiled step must not consist of a dozen small
ones for each weight. The numbers are those of :mod:`.grouped`, whose functions do the work.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import grouped
from .buffers import BY_HANDLE, Buffers
from .drawn import Draw, Item

Prior = tuple[Tensor | float, Tensor | float]
"""Mean and variance: numbers, or tensors of the weight's shape."""

_PRIORS = (
    "Tensor?[] prior_means, float[] means_of_priors, Tensor?[] prior_vars, "
    "float[] vars_of_priors, bool[] held"
)
_LIBRARY: Any = torch.library.Library("bayesify", "FRAGMENT")
_LIBRARY.define(
    "draws(Tensor[] means, Tensor[] logvars, Tensor seed, int[] keys, int[] buffers, bool gradient)"
    " -> Tensor[]"
)
_LIBRARY.define(
    "draws_backward(Tensor?[] grads, Tensor? kl, Tensor[] means, Tensor[] logvars, "
    "Tensor[] halves, Tensor seed, int[] keys, int[] buffers) -> Tensor[]"
)
_LIBRARY.define(f"kl(Tensor[] means, Tensor[] logvars, {_PRIORS}) -> Tensor")
_LIBRARY.define(
    f"kl_backward(Tensor grad, Tensor[] means, Tensor[] logvars, {_PRIORS}) -> Tensor[]"
)


class Drawn(NamedTuple):
    """What a compiled call has drawn: of which slots, by which seed, and where a KL may hang."""

    slots: tuple[int, ...]
    seed: Tensor
    token: Tensor


class _Pending:
    """A draw whose backward has not run: what it drew, and the priors of a KL that hangs on it."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = _identities(tensors)
        self.priors: list[tuple[Prior | None, bool]] | None = None


_MOST_PENDING = 64
_PENDING: OrderedDict[tuple[int, int], _Pending] = OrderedDict()
_LOCK = threading.Lock()


def _identities(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    return [(tensor.data_ptr(), tensor._version) for tensor in tensors]


# -- draws ---------------------------------------------------------------------------------------


def draw(items: Sequence[Item], seed: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """The draw of each item, and the token of :class:`Drawn` if they have a gradient.

    A tensor whose draw is never read gets a gradient of zeros instead of none.
    """
    gradient = torch.is_grad_enabled()
    made = torch.ops.bayesify.draws(
        [item.mean for item in items], [item.logvar for item in items], seed,
        [item.key for item in items], [item.buffers.handle for item in items], gradient,
    )  # fmt: skip
    return made[: len(items)], made[-1] if gradient else None


def _draws(
    means: Sequence[Tensor], logvars: Sequence[Tensor], seed: Tensor, keys: Sequence[int],
    buffers: Sequence[int], gradient: bool,
) -> list[Tensor]:  # fmt: skip
    items = [_item(*row) for row in zip(means, logvars, keys, buffers, strict=True)]
    values, halves = [], []
    for mean, (value, half) in zip(means, grouped.values(items, int(seed), gradient), strict=True):
        values.append(value)
        halves.append(mean.new_empty(0) if half is None else half)
    if not gradient:
        return values
    with _LOCK:
        _PENDING[_key(seed, means)] = _Pending((*means, *logvars))
        while len(_PENDING) > _MOST_PENDING:
            _PENDING.popitem(last=False)
    return [*values, *halves, means[0].new_zeros(())]


def _draws_fake(
    means: Sequence[Tensor], logvars: Sequence[Tensor], seed: Tensor, keys: Sequence[int],
    buffers: Sequence[int], gradient: bool,
) -> list[Tensor]:  # fmt: skip
    values = [torch.empty_like(mean) for mean in means]
    if not gradient:
        return values
    halves = [torch.empty_like(m) if grouped.keeps_noise(m) else m.new_empty(0) for m in means]
    return [*values, *halves, means[0].new_empty(())]


def _draws_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    means, logvars, seed, ctx.keys, ctx.buffers, ctx.gradient = inputs
    ctx.count = len(means)
    ctx.set_materialize_grads(False)
    if ctx.gradient:
        halves = output[ctx.count : 2 * ctx.count]
        ctx.save_for_backward(*means, *logvars, *halves, seed)


def _draws_gradient(ctx: Any, grads: Sequence[Tensor | None]) -> Any:
    n, (*saved, seed) = ctx.count, ctx.saved_tensors
    found = torch.ops.bayesify.draws_backward(
        list(grads[:n]), grads[-1], saved[:n], saved[n : 2 * n], saved[2 * n :], seed, ctx.keys,
        ctx.buffers,
    )  # fmt: skip
    return found[:n], found[n:], None, None, None, None


def _draws_backward(
    grads: Sequence[Tensor | None], kl: Tensor | None, means: Sequence[Tensor],
    logvars: Sequence[Tensor], halves: Sequence[Tensor], seed: Tensor, keys: Sequence[int],
    buffers: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    with _LOCK:
        pending = _PENDING.pop(_key(seed, means), None)
    priors = None if pending is None or kl is None else pending.priors
    by_means, by_logvars = [], []
    for i, (grad, mean, logvar) in enumerate(zip(grads, means, logvars, strict=True)):
        prior, held = (None, False) if priors is None else priors[i]
        if grad is None and prior is None:
            by_mean, by_logvar = torch.zeros_like(mean), torch.zeros_like(logvar)
        else:
            item = _item(mean, logvar, keys[i], buffers[i], held)
            half = None
            if halves[i].shape == mean.shape:
                half = item.buffers.take(mean).copy_(halves[i])  # the gradient is written over it
            node = Draw(item, half, seed)
            node.prior = prior
            factor = None if prior is None else kl
            by_mean, by_logvar = grouped.gradients_of(node, grad, factor)
        by_means.append(by_mean.clone() if by_mean is grad else by_mean)
        by_logvars.append(by_logvar)
    return [*by_means, *by_logvars]


def _draws_backward_fake(
    grads: Sequence[Tensor | None], kl: Tensor | None, means: Sequence[Tensor],
    logvars: Sequence[Tensor], halves: Sequence[Tensor], seed: Tensor, keys: Sequence[int],
    buffers: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(tensor) for tensor in (*means, *logvars)]


def _key(seed: Tensor, means: Sequence[Tensor]) -> tuple[int, int]:
    return int(seed), means[0].data_ptr()


def _item(mean: Any, logvar: Any, key: int, buffers: int, held: bool = False) -> Item:
    if mean.is_cuda and not grouped.aligned(mean, logvar):
        mean, logvar = mean.clone(), logvar.clone()
    memory = BY_HANDLE.get(buffers)
    return Item(mean, logvar, key, Buffers() if memory is None else memory, None, held)


# -- the KL divergence ---------------------------------------------------------------------------


def comes_of(loss: Tensor, drawn: Drawn) -> bool:
    """Whether the backward of a loss runs through that of a compiled call."""
    wanted, seen, todo = drawn.token.grad_fn, set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is wanted:
            return wanted is not None
        if node is not None and node not in seen:
            seen.add(node)
            todo += [source for source, _ in node.next_functions]
    return False


def hung_kl(
    drawn: Drawn, tensors: Sequence[tuple[Tensor, Tensor]], priors: Sequence[Prior],
    held: Sequence[bool],
) -> Tensor | None:  # fmt: skip
    """The KL divergence of what a compiled call drew, its gradient computed with that of the draw.

    None where that cannot be: the backward has run, or a tensor has changed.
    """
    means = [mean for mean, _ in tensors]
    key = _key(drawn.seed, means)
    with _LOCK:
        pending = _PENDING.get(key)
    if pending is None or pending.tensors != _identities((*means, *(raw for _, raw in tensors))):
        return None
    raws = [raw for _, raw in tensors]
    nodes = _nodes(means, raws, *_columns(priors, held))
    value = grouped.kl_of(nodes)
    pending.priors = [(node.prior, node.item.held) for node in nodes]  # where they are read
    return grouped.hang(value, drawn.token)


def kl(
    tensors: Sequence[tuple[Tensor, Tensor]], priors: Sequence[Prior], held: Sequence[bool]
) -> Tensor:
    """Sum of the KL divergences from N(mean, exp(logvar)) to Gaussian priors, by itself."""
    means, logvars = ([pair[i] for pair in tensors] for i in (0, 1))
    found: Tensor = torch.ops.bayesify.kl(means, logvars, *_columns(priors, held))
    return found


def _columns(priors: Sequence[Prior], held: Sequence[bool]) -> Any:
    found: list[Any] = []
    for column in (0, 1):
        values = [prior[column] for prior in priors]
        found.append([v if isinstance(v, Tensor) else None for v in values])
        found.append([0.0 if isinstance(v, Tensor) else v for v in values])
    return *found, list(held)


def _nodes(
    means: Sequence[Tensor], logvars: Sequence[Tensor], prior_means: Sequence[Tensor | None],
    means_of_priors: Sequence[float], prior_vars: Sequence[Tensor | None],
    vars_of_priors: Sequence[float], held: Sequence[bool],
) -> list[Draw]:  # fmt: skip
    nodes, nothing = [], torch.zeros(())
    for i, (mean, logvar) in enumerate(zip(means, logvars, strict=True)):
        node = Draw(_item(mean, logvar, 0, -1, held[i]), None, nothing)
        m, v = prior_means[i], prior_vars[i]
        node.prior = means_of_priors[i] if m is None else m, vars_of_priors[i] if v is None else v
        nodes.append(node)
    return nodes


def _kl(*arguments: Any) -> Tensor:
    return grouped.kl_of(_nodes(*arguments))


def _kl_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    means, logvars, prior_means, ctx.numbers, prior_vars, ctx.variances, ctx.held = inputs
    ctx.count = len(means)
    ctx.places = [[v is not None for v in values] for values in (prior_means, prior_vars)]
    given = [v for v in (*prior_means, *prior_vars) if v is not None]
    ctx.save_for_backward(*means, *logvars, *given)


def _kl_gradient(ctx: Any, grad: Tensor) -> Any:
    n, saved = ctx.count, list(ctx.saved_tensors)
    rest = iter(saved[2 * n :])
    prior_means, prior_vars = ([next(rest) if v else None for v in p] for p in ctx.places)
    arguments = (
        saved[:n], saved[n : 2 * n], prior_means, ctx.numbers, prior_vars, ctx.variances, ctx.held
    )  # fmt: skip
    if torch.is_grad_enabled():  # this gradient has one itself
        pairs = [grouped.plain_gradients(node, None, grad) for node in _nodes(*arguments)]
        by_means, by_logvars = ([pair[i] for pair in pairs] for i in (0, 1))
    else:
        found = torch.ops.bayesify.kl_backward(grad, *arguments)
        by_means, by_logvars = found[:n], found[n:]
    # torch counts a list as one of tensors where it has nothing else
    by_priors = [[None] * n if all(place) else None for place in ctx.places]
    return by_means, by_logvars, by_priors[0], None, by_priors[1], None, None


def _kl_backward(grad: Tensor, *arguments: Any) -> list[Tensor]:
    pairs = [grouped.gradients_of(node, None, grad) for node in _nodes(*arguments)]
    return [*(by_mean for by_mean, _ in pairs), *(by_logvar for _, by_logvar in pairs)]


def _kl_fake(means: Sequence[Tensor], *others: Any) -> Tensor:
    return means[0].new_empty(())


def _kl_backward_fake(
    grad: Tensor, means: Sequence[Tensor], logvars: Sequence[Tensor], *others: Any
) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (*means, *logvars)]


for _name, _run, _fake in (
    ("draws", _draws, _draws_fake),
    ("draws_backward", _draws_backward, _draws_backward_fake),
    ("kl", _kl, _kl_fake),
    ("kl_backward", _kl_backward, _kl_backward_fake),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bayesify::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd(
    "bayesify::draws", _draws_gradient, setup_context=_draws_context, lib=_LIBRARY
)
torch.library.register_autograd(
    "bayesify::kl", _kl_gradient, setup_context=_kl_context, lib=_LIBRARY
)
