"""The C library of the CPU: its noise, draws, KL divergences and gradients against float64."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal
from torch.distributions import kl_divergence as kl_of_torch

from bayesify.kernels import native, philox
from bayesify.seeds import key_of

pytestmark = pytest.mark.skipif(
    not native.there(), reason="bayesify was installed without a C compiler"
)
SIZES = [0, 1, 3, 4, 255, 256, 257, 8192, 8193, 50_001]


def noise(size: int, seed: int, key: int, dtype: torch.dtype = torch.float32) -> Tensor:
    tensor = torch.full((size + 8,), math.nan, dtype=dtype)
    native.fill_normal(tensor[4 : size + 4], seed, key)
    assert tensor[:4].isnan().all()  # nothing before or behind is touched
    assert tensor[size + 4 :].isnan().all()
    return tensor[4 : size + 4]


def reference(size: int, seed: int, key: int) -> Tensor:
    tensor = torch.empty(size, dtype=torch.float64)
    philox.fill_normal(tensor, seed, key)
    return tensor


def close(found: Tensor, expected: Tensor, rtol: float = 0.0, atol: float = 0.0) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=atol)


def test_a_library_that_cannot_be_loaded_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / native.FILE).write_bytes(b"not a library")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    with pytest.warns(RuntimeWarning, match="C library cannot be loaded .*made by plain torch"):
        assert native._library.__wrapped__() is None


def test_a_library_of_another_version_is_not_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any library does for one from before there was a number."""
    other = importlib.util.find_spec("_ctypes")
    assert other is not None
    assert other.origin is not None
    shutil.copy(other.origin, tmp_path / native.FILE)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    with pytest.warns(RuntimeWarning, match=r"another version .*interface 1, wanted .*pip install"):
        assert native._library.__wrapped__() is None


def test_a_library_that_is_not_there_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    monkeypatch.setattr(native, "_library", functools.cache(native._library.__wrapped__))
    with pytest.warns(RuntimeWarning, match="pip install -e . compiles it"):
        assert not native.there()
    assert not native.there()  # a second warning would be an error


# -- noise -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_the_noise_is_that_of_philox(size: int, threads: int) -> None:
    for seed, key in ((0, 0), (-7, key_of("a.weight")), ((1 << 63) + 11, (1 << 64) - 1)):
        close(noise(size, seed, key), reference(size, seed, key), atol=1e-6)
        close(noise(size, seed, key, torch.float64), reference(size, seed, key), atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_noise_of_low_precision_is_rounded(dtype: torch.dtype) -> None:
    assert torch.equal(noise(1001, 1, 2, dtype), noise(1001, 1, 2).to(dtype))


def test_the_largest_numbers() -> None:
    """Where the uniform number is next to 0, and next to 1."""
    found, expected = noise(1 << 22, 3, 5), reference(1 << 22, 3, 5)
    assert expected.abs().max() > 5
    close(found, expected, rtol=2e-6, atol=5e-7)


def test_the_bits_are_the_same_on_all_processors() -> None:
    """One that contracts products and sums, or lacks vectors, must not have other numbers."""
    found = noise(100_003, 123456789012345, 987654321)
    digest = hashlib.blake2b(found.numpy().tobytes(), digest_size=8).hexdigest()
    assert digest == "8338050f21c9ecc9"


# -- draws -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_draws(size: int, threads: int) -> None:
    mean, logvar = torch.randn(size), 3 * torch.randn(size) - 5
    value, half, alone = torch.empty(size), torch.empty(size), torch.empty(size)
    other = torch.randn(300), torch.randn(300), torch.empty(300), None, 8
    native.draw([(mean, logvar, value, half, 7), other], 5)  # type: ignore[list-item]
    spread = torch.exp(0.5 * logvar.double()) * reference(size, 5, 7)
    close(value, mean.double() + spread, rtol=1e-6, atol=1e-6)
    close(half, 0.5 * spread, rtol=1e-6, atol=1e-6)
    assert torch.equal(value, mean + 2 * half)
    native.draw([native.DrawRow(mean, logvar, alone, None, 7)], 5)
    assert torch.equal(alone, value)
    close(other[2], other[0] + torch.exp(0.5 * other[1]) * reference(300, 5, 8), atol=1e-5)


def test_sigma_of_any_log_variance() -> None:
    raw = torch.cat([
        torch.linspace(-174, 176, 3000),
        torch.tensor([-200.0, -math.inf, 0.0, -0.0, 178.0, math.inf, math.nan]),
    ])  # fmt: skip
    size = raw.numel()
    half = torch.empty(size)
    native.draw([native.DrawRow(torch.zeros(size), raw, None, half, 7)], 5)
    expected = 0.5 * torch.exp(0.5 * raw) * reference(size, 5, 7).float()
    assert expected.isinf().sum() == 2
    torch.testing.assert_close(half, expected, rtol=3e-6, atol=1e-30, equal_nan=True)


# -- the KL divergence -----------------------------------------------------------------------

PRIORS: dict[str, Callable[[int], tuple[Any, Any]]] = {
    "standard": lambda n: (0.0, 1.0),
    "numbers": lambda n: (0.3, 0.01),
    "mean": lambda n: (torch.randn(n), 0.5),
    "var": lambda n: (-0.2, torch.rand(n) + 0.01),
    "both": lambda n: (torch.randn(n), torch.rand(n) + 0.01),
}


def wide_kl(mean: Tensor, logvar: Tensor, m: Any, v: Any) -> Tensor:
    prior = Normal(torch.as_tensor(m).double(), torch.as_tensor(v).double().sqrt())
    return kl_of_torch(Normal(mean.double(), logvar.double().mul(0.5).exp()), prior)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("size", SIZES)
def test_the_kl(size: int, prior: str, threads: int) -> None:
    first = torch.randn(size), torch.randn(size) - 3
    second = torch.randn(301), torch.randn(301)
    rows = [native.KLRow(*part, PRIORS[prior](part[0].numel())) for part in (first, second)]
    expected = sum(wide_kl(mean, logvar, *p).sum() for mean, logvar, p, _ in rows)
    assert native.kl(rows) == pytest.approx(float(expected), rel=2e-6)


def test_the_kl_of_posteriors_near_their_prior() -> None:
    """The difference of numbers near 1 would lose it."""
    assert native.kl([native.KLRow(torch.zeros(1000), torch.zeros(1000), (0.0, 1.0))]) == 0.0
    for ratio in (1e-3, 0.1, 0.34, 0.35, 0.5, -1e-4, -0.1, -0.34, -0.36, -2.0):
        row = native.KLRow(torch.zeros(1), torch.full((1,), ratio), (0.0, 1.0))
        expected = 0.5 * (math.expm1(ratio) - ratio)
        assert native.kl([row]) == pytest.approx(expected, rel=2e-5, abs=1e-13)


@pytest.mark.parametrize("var", [0.0, 1e-42, 1e-38, 3e38, math.inf, math.nan, -1.0])
def test_the_kl_under_strange_variances(var: float) -> None:
    """As the plain expression in torch."""
    mean, raw, v = torch.ones(1), torch.zeros(1), torch.full((1,), var)
    ratio = raw - torch.log(v)
    expected = 0.5 * (torch.expm1(ratio) - ratio + mean.square() / v).sum()
    found = torch.tensor(native.kl([native.KLRow(mean, raw, (0.0, v))]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("raw", [-200.0, 80.0, -math.inf, math.nan])
def test_the_kl_of_strange_log_variances(raw: float) -> None:
    x = torch.full((3,), raw)
    expected = 1.5 * (torch.expm1(x) - x)[0]
    found = torch.tensor(native.kl([native.KLRow(torch.zeros(3), x, (0.0, 1.0))]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0, equal_nan=True)


# -- gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("size", SIZES)
def test_gradients_against_autograd_in_float64(
    size: int, prior: str, drawn: bool, threads: int
) -> None:
    mean, logvar, upstream = torch.randn(size), torch.randn(size) - 3, torch.randn(size)
    numbers = PRIORS[prior](size)
    half = torch.empty(size) if drawn else torch.full((size,), math.nan)
    if drawn:
        native.draw([native.DrawRow(mean, logvar, None, half, 7)], 5)
    wide = mean.double().requires_grad_(), logvar.double().requires_grad_()
    loss = 0.25 * wide_kl_in_closed_form(*wide, *numbers)
    if drawn:
        value = wide[0] + torch.exp(0.5 * wide[1]) * reference(size, 5, 7)
        loss = loss + (value * upstream.double()).sum()
    expected = torch.autograd.grad(loss, wide)
    by_mean = torch.empty(size)
    native.gradient(mean, logvar, numbers, 0.25, upstream if drawn else None, by_mean, half)
    close(by_mean, expected[0], rtol=1e-6, atol=1e-5)
    close(half, expected[1], rtol=1e-6, atol=1e-5)


def wide_kl_in_closed_form(mean: Tensor, logvar: Tensor, m: Any, v: Any) -> Tensor:
    v = torch.as_tensor(v, dtype=torch.float64)
    terms: Tensor = (logvar.exp() + (mean - m).square()) / v - 1 - logvar + v.log()
    return 0.5 * terms.sum()
