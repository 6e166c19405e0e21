"""All draws of a scope together, with a backward for each: :mod:`.cpu_draw`, :mod:`.triton_draw`.

The plain reference is that of :func:`bayesify.scope.realise`, tensor by tensor. The numbers are the
same up to the rounding of exponentials, logarithms and angles.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import torch_private
from ..gaussian import HELD
from . import cpu_draw
from .choice import by_triton
from .drawn import Draw as Draw
from .drawn import Item as Item
from .noise import noise


def possible() -> bool:
    """Whether nothing watches or transforms tensors now, so that memory may be used anew."""
    return not (
        torch.compiler.is_compiling() or transformed() or torch_private.dispatch_mode_stack()
    )


def transformed() -> bool:
    """Whether torch.func or forward differentiation transforms what is computed now."""
    return (
        torch_private.peek_interpreter_stack() is not None or torch_private.forward_ad_level() >= 0
    )


def _ordinary(grad: Tensor | None) -> bool:
    """Whether a backward runs as usual, with one gradient at a time."""
    batched = grad is not None and torch_private.is_legacy_batchedtensor(grad)
    return not batched and possible()


def _way(device: torch.device) -> Any:
    """The module that draws on a device; None where each tensor is drawn by itself."""
    if by_triton(device):
        from . import triton_draw  # not before: a machine without CUDA may not have Triton

        return triton_draw
    return cpu_draw if device.type == "cpu" else None


def suits(mean: Tensor, raw: Tensor) -> bool:
    """Whether a tensor can be drawn here: dense, contiguous, of a dtype that its device has."""
    if type(mean) is not nn.Parameter or type(raw) is not nn.Parameter:
        return False
    way = _way(mean.device)
    return (
        way is not None
        and raw.device == mean.device
        and mean.dtype in way.DTYPES
        and raw.dtype is torch.float32
        and mean.is_contiguous()
        and raw.is_contiguous()
        and (way is cpu_draw or torch.compiler.is_compiling() or aligned(mean, raw))
    )


def aligned(*tensors: Tensor) -> bool:
    """Whether a GPU may read tensors by 16 bytes; a view into a larger one may begin anywhere."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def draw(items: Sequence[Item], seed: Tensor) -> list[tuple[Tensor, Hook | None]]:
    """Draw every item under one seed.

    Returns:
        Each draw and, where it has a gradient, where :func:`gaussian_kl` may hang the KL divergence
        of the same tensor.
    """
    made = prepare(items, seed)
    return [(v.read(), v.hook) if isinstance(v, Later) else (v, None) for v in made]


def prepare(items: Sequence[Item], seed: Tensor) -> list[Tensor | Later]:
    """As :func:`draw`; a draw that has a gradient gets its node when it is first read."""
    gradient = torch.is_grad_enabled()
    found: list[Tensor | Later] = []
    for item, (value, half) in zip(items, values(items, int(seed), gradient), strict=True):
        differentiable = gradient and (item.mean.requires_grad or item.logvar.requires_grad)
        found.append(Later(value, Draw(item, half, seed)) if differentiable else value)
    return found


def values(items: Sequence[Item], seed: int, gradient: bool) -> list[tuple[Tensor, Tensor | None]]:
    """Each draw, without a node, and what its backward keeps of the noise (:func:`keeps_noise`)."""
    found: list[Any] = [None] * len(items)
    for way, members in _by_way(items):
        drawn = way.draw([items[i] for i in members], seed, gradient)
        for index, row in zip(members, drawn, strict=True):
            found[index] = row
    return found


def keeps_noise(mean: Tensor) -> bool:
    """Whether a backward keeps the noise of its draw, where it is slow to make."""
    return mean.device.type == "cpu"


def _by_way(items: Sequence[Item]) -> list[tuple[Any, list[int]]]:
    groups: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(item.mean.device.type, []).append(index)
    return [(_way(items[members[0]].mean.device), members) for members in groups.values()]


class Repeated:
    """Draws of the same tensors under many seeds, without gradient.

    The numbers are those of :func:`draw`. The tensors must not change in between.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        self._count = len(items)
        self._parts = [
            (way.Repeated([items[i] for i in members]), members) for way, members in _by_way(items)
        ]

    def draw(self, seed: int) -> list[Tensor]:
        """One draw of each tensor."""
        return self._gather([part.draw(seed) for part, _ in self._parts])

    def stack(self, seeds: Sequence[int]) -> list[Tensor]:
        """Draws of each tensor, one behind the other: (number of seeds, shape of the tensor)."""
        return self._gather([part.stack(seeds) for part, _ in self._parts])

    def _gather(self, drawn: list[list[Tensor]]) -> list[Tensor]:
        found: list[Any] = [None] * self._count
        for values, (_, members) in zip(drawn, self._parts, strict=True):
            for index, value in zip(members, values, strict=True):
                found[index] = value
        return found


def gradients(drawn: Draw, grad: Tensor | None, kl: Tensor | None) -> tuple[Any, Any]:
    """Of mean and log variance: by the draw, and by the KL divergence if one hangs on it."""
    if not drawn.unchanged():
        raise RuntimeError(
            "A mean or log variance was changed in place between forward and backward (by an "
            "optimizer step?): its gradient would be wrong. Call backward before."
        )
    if grad is not None and drawn.spent():
        raise RuntimeError(
            "This draw's backward ran already. Give retain_graph=True to the first one."
        )
    if torch.is_grad_enabled():
        return plain_gradients(drawn, grad, kl)
    sparse = grad is not None and grad.layout is not torch.strided
    if grad is not None and sparse and kl is not None:
        grad, sparse = grad.to_dense(), False  # as the gradient of the KL divergence is
    ordinary = _ordinary(grad)
    if drawn.repeatable and (sparse or not ordinary):
        return plain_gradients(drawn, grad, kl)
    keeps_graph = torch_private.current_graph_task_keep_graph()
    return gradients_of(drawn, grad, kl, ordinary and not keeps_graph)


def plain_gradients(drawn: Draw, grad: Tensor | None, kl: Tensor | None) -> tuple[Any, Any]:
    """As :func:`gradients`, by differentiable operations, which make the noise again."""
    mean, logvar = drawn.item.mean, drawn.item.logvar
    by_mean: Any = 0.0
    by_logvar: Any = 0.0
    if grad is not None:
        dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
        eps = noise(drawn.seed, drawn.item.key, mean.shape, dtype, mean.device)
        std = torch.exp(0.5 * logvar).to(dtype)
        by_mean, by_logvar = grad, (grad.to(dtype) * (0.5 * std * eps)).to(logvar.dtype)
    if kl is not None:
        assert drawn.prior is not None
        prior_mean, prior_var = drawn.prior
        held = (logvar < HELD) & drawn.item.held
        if isinstance(prior_var, Tensor):
            prior_var = torch.where(held, 1.0, prior_var)
        by_mean = by_mean + (kl * (mean - prior_mean) / prior_var).masked_fill(held, 0.0)
        excess = torch.expm1(logvar - cpu_draw.log(prior_var)).masked_fill(held, 0.0)
        by_logvar = by_logvar + 0.5 * kl * excess
    return by_mean, by_logvar


class Later:
    """A draw whose node in the autograd graph is made when it is first read.

    Autograd runs the youngest node first. Where all nodes are made before the forward, their
    backward runs after that of the whole model, and no all-reduce of DDP can begin before.
    """

    __slots__ = ("_node", "_value", "hook")

    def __init__(self, value: Tensor, node: Draw) -> None:
        self._value, self._node = value, node
        self.hook: Hook | None = None  # where the KL divergence of the same tensor may hang

    def read(self) -> Tensor:
        """The draw, with its node. Not inside a transform of torch.func (:func:`transformed`)."""
        if self.hook is None:
            item = self._node.item
            watched = torch_private.dispatch_mode_stack()
            with (
                torch_private.DisableTorchFunction(),
                torch_private.disable_current_modes() if watched else contextlib.nullcontext(),
            ):
                self._value, token = _apply_draw(item.mean, item.logvar, [self._value], self._node)
            self.hook = Hook(self._node, token)
        return self._value


class Hook(NamedTuple):
    """The backward of a draw, and a number that comes of it, whose gradient reaches there."""

    node: Draw
    token: Tensor


class _Draw(torch.autograd.Function):
    """``w = mean + exp(logvar / 2) * noise``, and a number on which the KL divergence can hang."""

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, logvar: Tensor, memory: Any, node: Draw
    ) -> tuple[Tensor, Tensor]:
        (value,) = memory
        ctx.node = node
        ctx.set_materialize_grads(False)
        return value, mean.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        by_mean, by_logvar = gradients(ctx.node, *grads)
        wants_mean, wants_logvar, *_ = ctx.needs_input_grad
        return by_mean if wants_mean else None, by_logvar if wants_logvar else None, None, None


# Taken here, where nobody has wrapped it: the fallback of the rewriter exchanges what goes into
# functions of autograd for draws.
_apply_draw: Any = _Draw.apply


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
    groups: dict[torch.device, list[Hook]] = {}
    for hook, prior_mean, prior_var in drawn:
        hook.node.prior = prior_mean, prior_var
        groups.setdefault(hook.node.item.mean.device, []).append(hook)
    terms = [
        hang(kl_of([hook.node for hook in hooks]), *(hook.token for hook in hooks))
        for hooks in groups.values()
    ]
    return sum((term.to(terms[0].device) for term in terms[1:]), start=terms[0])


def hang(value: Tensor, *tokens: Tensor) -> Tensor:
    """``value``, whose gradient goes to the backward of the draws that gave the tokens."""
    found: Tensor = _Hang.apply(value, *tokens)
    return found


def kl_of(nodes: Sequence[Draw]) -> Tensor:
    """Sum of the KL divergences from the nodes' tensors to their priors, without gradient.

    The tensors are of one device.
    """
    value: Tensor = _way(nodes[0].item.mean.device).kl(nodes)
    return value


def gradients_of(
    node: Draw, grad: Tensor | None, kl: Tensor | None, overwrite: bool = True
) -> tuple[Tensor, Tensor]:
    """Of mean and log variance; with ``overwrite``, what the node keeps of the noise may be used.

    A sparse ``grad`` needs a node that keeps the noise.
    """
    by_mean, by_logvar = _way(node.item.mean.device).gradients(node, grad, kl, overwrite)
    return by_mean, by_logvar
