"""All draws of a scope together, on CUDA: one Triton launch for a device and a dtype.

The noise is that of :mod:`.philox`. It never reaches memory: the backward of each draw, one launch
a tensor, makes it again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_kernels as kernels
from .drawn import Draw, Item

BLOCK = 4096
"""Elements of one program."""

OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
DTYPES = frozenset(_TYPES)


def fill_normal(tensor: Tensor, seed: int, key: int) -> None:
    """Fill a contiguous tensor with the noise of :func:`.philox.fill_normal`."""
    n = tensor.numel()
    if n:
        with torch.cuda.device_of(tensor):
            kernels.noise_kernel[(triton.cdiv(n, BLOCK),)](
                tensor, _signed(seed), key, n, tensor.dtype is torch.float64, BLOCK,
                **OPTIONS,
            )  # fmt: skip


def draw(items: Sequence[Item], seed: int, gradient: bool) -> list[tuple[Tensor, None]]:
    """Each draw; nothing is kept of it for the backward."""
    values = [torch.empty_like(i.mean, dtype=i.dtype, requires_grad=False) for i in items]
    _fill(items, [seed], [value.unsqueeze(0) for value in values])
    return [(value, None) for value in values]


class Repeated:
    """Draws of the same tensors under many seeds; see :class:`.cpu_draw.Repeated`."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items

    def draw(self, seed: int) -> list[Tensor]:
        return [value for value, _ in draw(self.items, seed, False)]

    def stack(self, seeds: Sequence[int]) -> list[Tensor]:
        values = []
        for item in self.items:
            mean = item.mean.detach()
            step = -(-mean.numel() // 16) * 16  # each draw begins where accesses of 16 bytes may
            memory = mean.new_empty(step * len(seeds))
            strides = torch.empty_like(mean, device="meta").stride()
            values.append(memory.as_strided((len(seeds), *mean.shape), (step, *strides)))
        _fill(self.items, seeds, values)
        return values


def _fill(items: Sequence[Item], seeds: Sequence[int], values: Sequence[Tensor]) -> None:
    """Draw under each seed, ``values[i][k]`` being the draw of item ``i`` under seed ``k``."""
    groups: dict[Any, list[tuple[Item, Tensor]]] = {}
    for item, value in zip(items, values, strict=True):
        if item.mean.numel():
            kind: Any = (item.mean.device, item.mean.dtype, value.dtype)
            groups.setdefault(kind, []).append((item, value))
    for kind, members in groups.items():
        device, dtype, lowered = kind
        sizes = tuple(item.mean.numel() for item, _ in members for _ in seeds)
        starts, rows = _blocks(device, sizes)
        table = [
            (
                item.mean.data_ptr(), item.logvar.data_ptr(),
                value.data_ptr() + k * value.stride(0) * value.element_size(),
                _signed(seed), item.key, item.mean.numel(),
            )
            for item, value in members for k, seed in enumerate(seeds)
        ]  # fmt: skip
        filled = [(*row, start) for row, start in zip(table, starts, strict=True)]
        with torch.cuda.device_of(members[0][1]):
            kernels.draw_kernel[(rows.numel(),)](
                _upload(filled, torch.int64, device), rows, _TYPES[dtype], _TYPES[lowered],
                dtype is torch.float64, BLOCK, **OPTIONS,
            )  # fmt: skip


def gradients(node: Draw, grad: Tensor | None, kl: Tensor | None, overwrite: bool) -> Any:
    """Of mean and log variance, in one launch; see :func:`.grouped.gradients`."""
    mean, logvar = node.item.mean.detach(), node.item.logvar.detach()
    by_logvar = torch.empty_like(logvar)
    by_mean = grad if kl is None else torch.empty_like(mean)
    prior_mean, prior_var = (
        value if isinstance(value, Tensor) else torch.full((), value, device=mean.device)
        for value in node.prior or (logvar, logvar)
    )
    n = mean.numel()
    if n:
        with torch.cuda.device_of(mean):
            kernels.backward_kernel[(triton.cdiv(n, BLOCK),)](
                mean, logvar, logvar if grad is None else grad.contiguous(),
                logvar if kl is None else kl, prior_mean, prior_var,
                by_logvar if kl is None else by_mean, by_logvar,
                _signed(int(node.seed)), node.item.key, n,
                grad is not None, kl is not None, node.item.held,
                min(prior_mean.dim(), 1), min(prior_var.dim(), 1),
                mean.dtype is torch.float64, BLOCK, **OPTIONS,
            )  # fmt: skip
    return by_mean, by_logvar


def kl(nodes: Sequence[Draw]) -> Tensor:
    """Sum of the KL divergences of drawn tensors of one device, without gradient.

    The priors of the nodes become tensors on that device, which the backward reads.
    """
    device = nodes[0].item.mean.device
    found = {p for node in nodes for p in node.prior or () if not isinstance(p, Tensor)}
    numbers = dict(zip(found, _upload(list(found), torch.float32, device).unbind(), strict=True))
    full: list[tuple[Item, Tensor, Tensor]] = []
    for node in nodes:
        assert node.prior is not None
        mean, var = (p.contiguous() if isinstance(p, Tensor) else numbers[p] for p in node.prior)
        node.prior = mean, var
        if node.item.mean.numel():
            full.append((node.item, mean, var))
    if not full:
        return torch.zeros((), device=device)
    starts, rows = _blocks(device, tuple(item.mean.numel() for item, _, _ in full))
    table = [
        (
            item.mean.data_ptr(), item.logvar.data_ptr(), mean.data_ptr(), var.data_ptr(),
            min(mean.dim(), 1), min(var.dim(), 1), item.mean.numel(), start,
            int(item.held),
        )
        for (item, mean, var), start in zip(full, starts, strict=True)
    ]  # fmt: skip
    partial = torch.empty(rows.numel(), device=device)
    with torch.cuda.device_of(partial):
        kernels.kl_kernel[(rows.numel(),)](
            _upload(table, torch.int64, device), rows, partial, BLOCK, **OPTIONS
        )
    return partial.double().sum().mul_(0.5).float()


@functools.lru_cache(maxsize=64)
def _blocks(device: torch.device, sizes: tuple[int, ...]) -> tuple[list[int], Tensor]:
    """The first program of each tensor, and on the device the tensor of each program."""
    counts = torch.tensor([triton.cdiv(n, BLOCK) for n in sizes])
    starts = (counts.cumsum(0) - counts).tolist()
    rows = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), counts)
    return starts, rows.to(device)


def _upload(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor on the device; nobody waits for it."""
    on_host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


def _signed(seed: int) -> int:
    """The same 64 bits as an int64."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
