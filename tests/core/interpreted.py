"""The Triton kernels on CPU tensors, run by Triton's interpreter; started by test_triton_draw.py.

By themselves: ``TRITON_INTERPRET=1 python -m pytest tests/core/interpreted.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_grouped import (
    mixed,
    plainly,
    step,
    test_batched_gradients,
    test_gradients_accumulate,
    test_repeated_draws_are_the_same_draws,
    test_second_derivatives,
    test_sparse_gradients,
    test_the_gradient_of_the_kl_is_that_of_the_reference,
    test_the_value_of_the_kl_is_that_of_torch_distributions,
    test_two_graphs_at_once_and_a_graph_that_is_kept,
)
from torch import Tensor, nn

import bayesify
from bayesify import divergence, gaussian
from bayesify.kernels import grouped, philox, triton_draw, triton_kernels
from bayesify.kernels.buffers import Buffers
from bayesify.scope import drawing

__all__ = [
    "test_batched_gradients",
    "test_gradients_accumulate",
    "test_repeated_draws_are_the_same_draws",
    "test_second_derivatives",
    "test_sparse_gradients",
    "test_the_gradient_of_the_kl_is_that_of_the_reference",
    "test_the_value_of_the_kl_is_that_of_torch_distributions",
    "test_two_graphs_at_once_and_a_graph_that_is_kept",
]
BLOCK = triton_draw.BLOCK
SIZES = [(1,), (3,), (4,), (4095,), (4096,), (4097,), (3, 5, 7), (2, 6000), (), (0, 2)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ROUNDING = {
    torch.float32: 1e-6, torch.float64: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10,
}  # fmt: skip


def reference_noise(
    seed: Tensor, key: int, size: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    result = torch.empty(size, dtype=dtype, device=device)
    philox.fill_normal(result, int(seed), key)
    return result


@pytest.fixture(autouse=True)
def _by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA device decides is decided for the CPU."""
    monkeypatch.setattr(grouped, "by_triton", lambda device: True)
    for module in (grouped, drawing, divergence):
        monkeypatch.setattr(module, "noise", reference_noise)
    monkeypatch.setattr(triton_draw, "BLOCK", 1 << 16)  # the interpreter is slow by block


@pytest.fixture
def real_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_draw, "BLOCK", BLOCK)


def items_of(dtype: torch.dtype) -> list[grouped.Item]:
    torch.manual_seed(0)
    return [
        grouped.Item(
            nn.Parameter(torch.randn(size).to(dtype)),
            nn.Parameter(torch.randn(size) - 1),
            (1 << 61) + index,
            Buffers(),
        )
        for index, size in enumerate(SIZES)
    ]


def plain(item: grouped.Item, seed: Tensor) -> Tensor:
    wide = torch.float64 if item.mean.dtype == torch.float64 else torch.float32
    noise = reference_noise(seed, item.key, item.mean.shape, wide, item.mean.device)
    return gaussian.draw(item.mean, torch.exp(0.5 * item.logvar), noise)


@pytest.mark.usefixtures("real_block")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [0, 1, 16, -(1 << 62) - 5, (1 << 62) + 9])
def test_draws_are_those_of_the_plain_version(dtype: torch.dtype, number: int) -> None:
    items, seed = items_of(dtype), torch.tensor(number)
    drawn = grouped.draw(items, seed)
    for item, (value, hook) in zip(items, drawn, strict=True):
        assert hook is not None
        assert hook.node.half is None
        assert value.dtype == dtype
        bound = ROUNDING[dtype]
        torch.testing.assert_close(value, plain(item, seed), rtol=bound, atol=2e-6)


@pytest.mark.usefixtures("real_block")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_plain_version(dtype: torch.dtype) -> None:
    items, seed = items_of(dtype), torch.tensor(3)
    for item, (value, _) in zip(items, grouped.draw(items, seed), strict=True):
        upstream = torch.randn(item.mean.shape).to(dtype)
        inputs = [item.mean, item.logvar]
        found = torch.autograd.grad(value, inputs, upstream)
        expected = torch.autograd.grad(plain(item, seed), inputs, upstream)
        assert torch.equal(found[0], expected[0])
        assert found[1].dtype == torch.float32
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=2e-6)


def test_draws_in_the_dtype_of_autocast() -> None:
    seed = torch.tensor(3)
    kinds = (None, torch.bfloat16, torch.float16)
    items = [item._replace(dtype=kinds[i % 3]) for i, item in enumerate(items_of(torch.float32))]
    for item, (value, hook) in zip(items, grouped.draw(items, seed), strict=True):
        dtype = item.dtype or torch.float32
        assert value.dtype == dtype
        assert hook is not None
        # a sum that is rounded otherwise in float32 may be so in the last bit of the other dtype
        bound = ROUNDING[dtype]
        torch.testing.assert_close(value, plain(item, seed).to(dtype), rtol=bound, atol=2e-6)
        upstream = torch.randn(item.mean.shape).to(dtype)
        found = torch.autograd.grad(value, [item.mean, item.logvar], upstream)
        lowered = plain(item, seed).to(dtype)
        expected = torch.autograd.grad(lowered, [item.mean, item.logvar], upstream)
        assert found[0].dtype == found[1].dtype == torch.float32
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=2e-6)


def test_a_gradient_that_is_not_contiguous() -> None:
    item = grouped.Item(
        nn.Parameter(torch.randn(6, 50)), nn.Parameter(torch.randn(6, 50)), 5, Buffers()
    )
    seed, upstream = torch.tensor(3), torch.randn(50, 6).t()
    [(value, _)] = grouped.draw([item], seed)
    (found,) = torch.autograd.grad(value, item.logvar, upstream)
    (expected,) = torch.autograd.grad(plain(item, seed), item.logvar, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.usefixtures("real_block")
def test_the_noise_of_the_kernel_is_that_of_the_reference() -> None:
    for dtype in (torch.float32, torch.float64):
        found, expected = (torch.empty(9001, dtype=dtype) for _ in range(2))
        triton_draw.fill_normal(found, -77, (1 << 62) + 3)
        philox.fill_normal(expected, -77, (1 << 62) + 3)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(found[:5000], _first(5000, dtype))


def _first(count: int, dtype: torch.dtype) -> Tensor:
    shorter = torch.empty(count, dtype=dtype)
    triton_draw.fill_normal(shorter, -77, (1 << 62) + 3)
    return shorter


def test_angles_all_around() -> None:
    words = torch.arange(0, 1 << 32, (1 << 32) // 4096)
    for offset in (0, 1, -1):
        second = (words + offset).clamp_(0, (1 << 32) - 1)
        cos, sin = philox.box_muller(torch.full_like(second, 1 << 28), second)
        u = second.float() * 2.0**-32 + 2.0**-33
        radius = (-2 * (torch.tensor(float(1 << 28)) * 2.0**-32 + 2.0**-33).double().log()).sqrt()
        torch.testing.assert_close(cos, radius * torch.cos(2 * torch.pi * u.double()))
        torch.testing.assert_close(sin, radius * torch.sin(2 * torch.pi * u.double()))


@pytest.mark.usefixtures("real_block")
def test_the_launches_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[tuple[str, int]] = []
    kind: Any = type(triton_kernels.draw_kernel)
    plain_grid = kind.__getitem__

    def counted(self: Any, grid: tuple[int]) -> Any:
        launches.append((self.fn.__name__, grid[0]))
        return plain_grid(self, grid)

    monkeypatch.setattr(kind, "__getitem__", counted)
    model = bayesify.to_bbb(
        nn.Sequential(nn.Linear(50, 200), nn.Linear(200, 3)), initial_std=math.exp(-1.0)
    )
    loss = model(torch.ones(1, 50)).sum()
    (loss + bayesify.kl_divergence(model)).backward()
    blocks = [3, 1, 1, 1]  # of both weights and both biases
    assert launches[:2] == [("draw_kernel", sum(blocks)), ("kl_kernel", sum(blocks))]
    assert sorted(launches[2:]) == [("backward_kernel", count) for count in sorted(blocks)]


def test_values_and_gradients_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    values, gradients = step(mixed(), 3)
    plainly(monkeypatch)
    expected, wanted = step(mixed(), 3)
    for a, b in zip(values, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
    assert list(gradients) == list(wanted)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_tensor_that_begins_anywhere_is_drawn_by_itself() -> None:
    flat = torch.randn(9)
    odd = nn.Parameter(flat[1:])
    assert not grouped.suits(odd, nn.Parameter(torch.zeros(8)))
    assert grouped.suits(nn.Parameter(flat[4:8]), nn.Parameter(torch.zeros(4)))


def test_a_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "keeps_noise", lambda mean: False)
    x = torch.randn(2, 3)

    def gradients(backend: str | None, whole: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = bayesify.to_bbb(nn.Linear(3, 2), prior=bayesify.GaussianPrior(0.5)).train()
        call: Any = torch.compile(model, backend=backend) if backend else model
        with bayesify.one_draw(model, seed=3):
            loss = call(x).square().sum()
        if whole:
            loss = bayesify.elbo_loss(loss, model, num_data=2)
        else:
            loss = loss + 0.5 * bayesify.kl_divergence(model)
        loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for whole in (True, False):
        torch._dynamo.reset()
        for found, expected in zip(
            gradients("aot_eager", whole), gradients(None, whole), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
