"""Standard normal noise as a function of seed, parameter and element."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..seeds import fold
from ..torch_private import disable_current_modes
from . import native, philox
from .choice import by_triton

BLOCK = 1 << 17
"""Elements of noise that one seed makes, so that several threads can fill one tensor."""

Then = Callable[..., None]
_Block = tuple[int, tuple[Tensor, ...]]
_LIBRARY: Any = torch.library.Library("bayesify", "DEF")
_LIBRARY.define(
    "noise(Tensor seed, int key, SymInt[] size, ScalarType dtype, Device device) -> Tensor"
)


def _noise(
    seed: Tensor, key: int, size: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    if device.type == "meta":
        return torch.empty(size, dtype=dtype, device=device)
    result = torch.empty(size, dtype=dtype, device=device)
    if device.type == "cuda":
        if by_triton(device):
            from . import triton_draw  # not before: a machine without CUDA may not have Triton

            triton_draw.fill_normal(result, int(seed), key)
        else:
            philox.fill_normal(result, int(seed), key)
        return result
    if device.type == "cpu":
        fill_normal([(result, key)], int(seed))
        return result
    mixed = fold(int(seed), key)
    return result.normal_(generator=torch.Generator(device=device).manual_seed(mixed))


def fill_normal(
    wanted: Sequence[tuple[Any, ...]], seed: int, std: float = 1.0, then: Then | None = None
) -> None:
    """Fill contiguous CPU tensors with normal noise, each by its own key.

    Args:
        wanted: Rows of a tensor to fill, its key, and what ``then`` gets beside the tensor.
        seed: That of the draw.
        std: Of the noise.
        then: What is made of the noise; see :func:`fill_by_generators`.
    """
    if not native.there():
        # torch's CPU engine keeps only the low 32 bits of a seed, so they must depend on all of it
        fill_by_generators([(row[0], fold(seed, row[1]), *row[2:]) for row in wanted], std, then)
        return
    for tensor, key, *others in wanted:
        native.fill_normal(tensor, seed, key)
        if std != 1.0:
            tensor.mul_(std)
        if then is not None:
            then(*(part.view(-1) for part in (tensor, *others)))


def fill_by_generators(
    wanted: Sequence[tuple[Any, ...]], std: float = 1.0, then: Then | None = None
) -> None:
    """Fill contiguous CPU tensors with normal noise of torch's generators, each by its own seed.

    This is the noise where :mod:`.native` was not compiled. The numbers come in blocks of
    :data:`BLOCK` elements, block ``i > 0`` with the seed ``fold(seed, i)``: however many threads
    there are, they are the same.

    Args:
        wanted: Rows of a tensor to fill, its seed, and other tensors of its size.
        std: Of the noise.
        then: Called with each block of noise, flat, and the same block of the others, in the thread
            that made it, while it is in that thread's cache.
    """
    blocks: list[_Block] = []
    for tensor, seed, *others in wanted:
        parts = [part.view(-1).split(BLOCK) for part in (tensor, *others)]
        for index, block in enumerate(zip(*parts, strict=True)):
            blocks.append((fold(seed, index) if index else seed, block))
    shares = min(torch.get_num_threads(), len(blocks))
    if shares < 2 or sum(block[0].numel() for _, block in blocks) < BLOCK:
        _fill(blocks, std, then, _modes())
        return
    tasks: list[list[_Block]] = [[] for _ in range(shares)]
    loads = [0] * shares
    for row in sorted(blocks, key=lambda row: -row[1][0].numel()):
        lightest = loads.index(min(loads))
        tasks[lightest].append(row)
        loads[lightest] += row[1][0].numel()
    _THREADS.run(tasks, std, then)


def _modes() -> tuple[bool, bool]:
    """Of this thread; a new one has torch's defaults."""
    return torch.is_inference_mode_enabled(), torch.is_grad_enabled()


def _fill(blocks: list[_Block], std: float, then: Then | None, modes: tuple[bool, bool]) -> None:
    generator = torch.Generator()
    inference, gradient = modes
    with torch.inference_mode(inference), torch.set_grad_enabled(gradient and not inference):
        for seed, (noise, *others) in blocks:
            noise.normal_(std=std, generator=generator.manual_seed(seed))
            if then is not None:
                then(noise, *others)


class _Threads:
    """Threads that fill blocks with noise, started when they are first needed."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._pool = None  # a fork has no threads

    def run(self, tasks: list[list[_Block]], std: float, then: Then | None) -> None:
        modes = _modes()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="bayesify-noise")
        others = [self._pool.submit(_fill, task, std, then, modes) for task in tasks[1:]]
        _fill(tasks[0], std, then, modes)
        for other in others:
            other.result()


_THREADS = _Threads()


def _noise_meta(
    seed: Tensor, key: int, size: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.empty(size, dtype=dtype, device=device)


def _noise_vmap(
    info: object,
    in_dims: tuple[int | None, ...],
    seed: Tensor,
    key: int,
    size: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, int]:
    seeds = seed.movedim(in_dims[0] or 0, 0).unbind(0)
    return torch.stack([noise(s, key, size, dtype, device) for s in seeds]), 0


_LIBRARY.impl("noise", _noise, "CPU")  # the seed is always a CPU tensor
torch.library.register_fake("bayesify::noise", _noise_meta, lib=_LIBRARY)
torch.library.register_vmap("bayesify::noise", _noise_vmap, lib=_LIBRARY)


def noise(
    seed: Tensor, key: int, size: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Standard normal noise that is a function of ``seed``, ``key`` and the element alone.

    Args:
        seed: int64 scalar on the CPU; may be batched by ``torch.vmap``.
        key: 63-bit integer that identifies the parameter (:func:`bayesify.seeds.key_of` its name).
        size: Shape of the noise.
        dtype: A floating-point one; below float32 the numbers are those of float32, rounded, where
            they are Philox's.
        device: Where the noise is wanted. CPU and CUDA give the same numbers up to rounding where
            :mod:`.native` was compiled; elsewhere the CPU has numbers of its own.

    Returns:
        A tensor of shape ``size`` without gradient.
    """
    if exporting() and type(seed) is Tensor:  # known to the export, and so is the noise: a constant
        with disable_current_modes():
            constant: Tensor = torch.ops.bayesify.noise(seed, key, size, dtype, device)
            return constant
    result: Tensor = torch.ops.bayesify.noise(seed, key, size, dtype, device)
    return result


def exporting() -> bool:
    """Whether ``torch.export`` runs the code itself, on tensors without data."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
