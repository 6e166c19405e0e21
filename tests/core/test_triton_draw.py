"""The Triton draw: in the interpreter, compiled ahead of time, without Triton, and on a card."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesify
from bayesify import gaussian
from bayesify.kernels import choice, grouped, philox
from bayesify.kernels import noise as draw_noise
from bayesify.posterior import sites

HERE = Path(__file__).parent


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE.parents[1],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )


OWN = "kernel or compiled or draws_are or gradients_are or contiguous or anywhere or launch"


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(f"{OWN} or standard-after or standard-twice", id="kernels"),
        pytest.param(f"not ({OWN})", id="composed", marks=pytest.mark.slow),
    ],
)
def test_in_the_interpreter(chosen: str) -> None:
    pytest.importorskip("triton")
    options = ("-q", "-p", "no:cacheprovider", "-k", chosen, str(HERE / "interpreted.py"))
    result = run("-m", "pytest", *options, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


# -- compiled for a card that is not here ------------------------------------------------------


def arguments(common: bool) -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """Kernels, types of their arguments and constants; the common ones or the others."""
    tl: Any = pytest.importorskip("triton.language")
    table, draw = {"table": "*i64", "rows": "*i32"}, {"seed": "i64", "key": "i64", "n": "i32"}
    names = ("mean", "logvar", "grad", "kl", "prior_mean", "prior_var", "by_mean", "by_logvar")
    backward = {**dict.fromkeys(names, "*fp32"), **draw}

    def flags(drawn: bool, kl: bool, stride: int) -> dict[str, Any]:
        return {
            "DRAWN": drawn, "KL": kl, "HELD": stride > 0, "MEAN_STRIDE": stride, "VAR_STRIDE": 0,
            "WIDE": False,
        }  # fmt: skip

    if common:
        for out in (tl.float32, tl.bfloat16):
            yield "draw_kernel", table, {"TYPE": tl.float32, "OUT": out, "WIDE": False}
        yield "noise_kernel", {"out": "*fp32", **draw}, {"WIDE": False}
        yield "kl_kernel", {**table, "partial": "*fp32"}, {}
        for grad in ("*fp32", "*bf16"):
            yield "backward_kernel", {**backward, "grad": grad}, flags(True, True, 0)
        return
    for dtype in (tl.bfloat16, tl.float16, tl.float64):
        wide = dtype is tl.float64
        yield "draw_kernel", table, {"TYPE": dtype, "OUT": dtype, "WIDE": wide}
    yield "noise_kernel", {"out": "*fp64", **draw}, {"WIDE": True}
    yield "backward_kernel", backward, flags(True, False, 0)
    yield "backward_kernel", backward, flags(False, True, 1)


@pytest.mark.parametrize("common", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_kernel_compiles_for_sm_90(
    common: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    triton: Any = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bayesify.kernels import triton_draw, triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, signature, constants in arguments(common):
        kernel: Any = getattr(triton_kernels, name)
        aligned = {
            (index,): [["tt.divisibility", 16]]
            for index, parameter in enumerate(kernel.arg_names)
            if signature.get(parameter, "").startswith("*") or parameter == "n"
        }
        source = ASTSource(
            fn=kernel,
            signature={p: signature.get(p, "constexpr") for p in kernel.arg_names},
            constexprs={**constants, "BLOCK": triton_draw.BLOCK},
            attrs=aligned,
        )
        compiled = triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options=triton_draw.OPTIONS
        )
        assembly = compiled.asm["ptx"]
        assert ".target sm_90" in assembly
        assert len(compiled.asm["cubin"]) > 1000
        if not constants.get("WIDE"):
            assert ".local" not in assembly, name  # nothing spilt, no reduction of large angles
        if common:
            assert "global.v4" in assembly, name  # accesses of 16 bytes


LAUNCHES = """
import sys
from collections import Counter
import torch
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from bayesify.kernels import grouped, triton_draw, triton_kernels
from bayesify.kernels.buffers import Buffers

class Card:  # what Triton asks of a device before a launch
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

driver.set_active(Card())
run, launched = JITFunction.run, []

def compile_only(self, *args, grid, warmup, **kwargs):
    launched.append((self.__name__, grid))
    return run(self, *args, grid=grid, warmup=True, **kwargs)

JITFunction.run = compile_only
grouped.by_triton = lambda device: True
for seed in (5, -1 << 62, 16, 1):
    triton_draw.fill_normal(torch.empty(100), seed, abs(seed) + 1)
sizes = (64,), (5000,), (1,), (0,)
items = [
    grouped.Item(nn.Parameter(torch.randn(size)), nn.Parameter(torch.zeros(size)), 5, Buffers())
    for size in sizes
]
drawn = grouped.draw(items, torch.tensor(3))
kl = grouped.gaussian_kl([(hook, 0.0, 1.0) for _, hook in drawn])
(sum(value.sum() for value, _ in drawn) + kl).backward()
grouped.Repeated(items).stack([1, 2, 3])
assert dict(Counter(launched)) == {
    ("noise_kernel", (1,)): 4, ("draw_kernel", (4,)): 1, ("kl_kernel", (4,)): 1,
    ("backward_kernel", (1,)): 2, ("backward_kernel", (2,)): 1, ("draw_kernel", (12,)): 1,
}, launched
[cache] = [kernels[0] for kernels in triton_kernels.noise_kernel.device_caches.values()]
assert len(cache) == 1, "a seed or a key compiles the kernel anew"
print("fine")
"""


def test_launches_fit_the_kernels(tmp_path: Path) -> None:
    """All but the last step of each: arguments are bound, and the kernel compiled for them."""
    pytest.importorskip("triton")
    result = run("-c", LAUNCHES, TRITON_CACHE_DIR=str(tmp_path))
    assert result.stdout == "fine\n", result.stderr


# -- where Triton is missing or broken ---------------------------------------------------------


def test_without_triton_nothing_is_imported_and_nothing_fails() -> None:
    code = """
import sys, warnings
warnings.simplefilter("error")
import torch, bayesify
from bayesify.kernels import choice
model = bayesify.to_bbb(torch.nn.Linear(3, 2)).train()
(model(torch.ones(1, 3)).sum() + bayesify.kl_divergence(model)).backward()
assert not any(name.startswith("bayesify.kernels.triton") for name in sys.modules)
sys.modules["triton"] = None  # importing it raises ImportError
assert not choice._works(0)
assert not choice.by_triton(torch.device("cpu"))
print("fine")
"""
    result = run("-c", code)
    assert result.stdout == "fine\n", result.stderr


def test_a_triton_that_does_not_work_is_named_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from bayesify.kernels import triton_draw

    def broken(*args: Any) -> None:
        raise RuntimeError("no C compiler")

    empty = torch.empty
    monkeypatch.setattr(triton_draw, "fill_normal", broken)
    monkeypatch.setattr(torch, "empty", lambda size, **kwargs: empty(size))
    choice._works.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"cuda:0 \(RuntimeError: no C compiler\)"):
            assert not choice.by_triton(torch.device("cuda", 0))
        found = draw_noise.__globals__["_noise"](
            torch.tensor(5), 7, [6], torch.float32, torch.device("cuda", 0)
        )
    finally:
        choice._works.cache_clear()
    expected = empty(6)
    philox.fill_normal(expected, 5, 7)
    assert torch.equal(found, expected)


# -- on a card ---------------------------------------------------------------------------------


def vit_base(dtype: torch.dtype = torch.float32) -> nn.Module:
    import timm

    model = timm.create_model("vit_base_patch16_224").to("cuda", dtype)
    return bayesify.to_bbb(model, initial_std=math.exp(-3.0))


def items_of(model: nn.Module) -> list[grouped.Item]:
    return [grouped.Item(s.mean, s.raw, s.slot.key, s.slot.buffers) for s in sites(model)]


def wide_noise(item: grouped.Item, seed: int) -> Tensor:
    noise = torch.empty(item.mean.shape, dtype=torch.float64, device="cuda")
    philox.fill_normal(noise, seed, item.key)
    return noise


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vit_base_against_float64(dtype: torch.dtype) -> None:
    assert choice.by_triton(torch.device("cuda"))
    model = vit_base(dtype)
    items = items_of(model)
    assert all(grouped.suits(item.mean, item.logvar) for item in items)
    drawn = grouped.draw(items, torch.tensor(11))
    torch.manual_seed(1)
    upstream = [torch.randn_like(value) for value, _ in drawn]
    torch.autograd.backward([value for value, _ in drawn], upstream)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    for item, (value, _), grad in zip(items, drawn, upstream, strict=True):
        std, noise = torch.exp(0.5 * item.logvar.double()), wide_noise(item, 11)
        torch.testing.assert_close(
            value.double(), item.mean.double() + std * noise, rtol=rounding, atol=1e-6
        )
        assert item.mean.grad is not None
        assert item.logvar.grad is not None
        assert torch.equal(item.mean.grad, grad)
        torch.testing.assert_close(
            item.logvar.grad.double(), 0.5 * grad.double() * std * noise, rtol=1e-5, atol=1e-6
        )


@pytest.mark.gpu
@pytest.mark.parametrize("prior", [0.7, "initial"])
def test_the_kl_of_vit_base_against_float64(prior: float | str) -> None:
    model = vit_base()
    if prior == "initial":
        bayesify.set_prior_(model, bayesify.GaussianPrior(mean="initial", std=0.3))
    else:
        bayesify.set_prior_(model, bayesify.GaussianPrior(std=float(prior)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    drawn = grouped.draw(items := items_of(model), torch.tensor(3))
    for site, (_, hook) in zip(sites(model), drawn, strict=True):
        site.slot.drawn = hook
    value = bayesify.kl_divergence(model)
    assert all(site.slot.drawn is None for site in sites(model))  # it hung on the draws
    (sum(v.sum() for v, _ in drawn) + 0.5 * value).backward()
    expected = torch.zeros((), dtype=torch.float64, device="cuda")
    for site, item in zip(sites(model), items, strict=True):
        mean = item.mean.detach().double().requires_grad_()
        logvar = item.logvar.detach().double().requires_grad_()
        if prior == "initial":
            centre, var = site.module._buffers[site.attribute + "_prior_mean"], 0.3**2
            assert centre is not None
        else:
            centre, var = torch.zeros((), device="cuda"), float(prior) ** 2
        kl = gaussian.kl_divergence(mean, logvar, centre.double(), var)
        noise = wide_noise(item, 3)
        ((mean + torch.exp(0.5 * logvar) * noise).sum() + 0.5 * kl).backward()
        expected += kl.detach()
        for found, wanted in ((item.mean.grad, mean.grad), (item.logvar.grad, logvar.grad)):
            assert found is not None
            assert wanted is not None
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(value.detach().double(), expected, rtol=1e-5, atol=0.0)


@pytest.mark.gpu
def test_one_seed_is_one_draw_alone_together_and_compiled() -> None:
    model: Any = bayesify.to_bbb(nn.Linear(300, 40), initial_std=math.exp(-0.5)).cuda().eval()
    alone = bayesify.draws(model, seed=5)["weight"]
    eye = torch.eye(300, device="cuda")
    found = []
    for forward in (model, torch.compile(model, fullgraph=True)):
        with torch.no_grad(), bayesify.one_draw(model, seed=5):
            found.append((forward(eye) - forward(torch.zeros_like(eye))).t())
    for weight in found:
        torch.testing.assert_close(weight, alone, rtol=1e-2, atol=1e-2)  # may go by TF32
    noise = draw_noise(torch.tensor(5), 77, [999], torch.float32, torch.device("cuda"))
    expected = torch.empty(999)
    philox.fill_normal(expected, 5, 77)
    torch.testing.assert_close(noise.cpu(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.gpu
def test_a_step_keeps_no_noise_on_a_card() -> None:
    """Memory between forward and backward: the draw alone, of all that has a weight's size."""
    model = (
        bayesify.to_bbb(nn.Linear(4096, 4096, bias=False), initial_std=math.exp(-3.0))
        .cuda()
        .train()
    )
    x = torch.ones(1, 4096, device="cuda")
    model(x).sum().backward()
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = model(x).sum()
    assert torch.cuda.memory_allocated() - before < 1.1 * 4 * 4096**2
    loss.backward()
    # the draw, its gradient, which is that of the mean, and the gradient of the log variance
    assert torch.cuda.max_memory_allocated() - before < 3.2 * 4 * 4096**2
