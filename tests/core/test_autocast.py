"""Draws in autocast's dtype: the numbers of float32 draws that autocast lowers."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import bayesify
from bayesify import draws, kl_divergence, one_draw, sampled, to_bbb
from bayesify.kernels import grouped
from bayesify.seeds import fold


class Net(nn.Module):
    """A convolution, a norm, products, a layer that is called twice, and a part in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Parameter(torch.randn(8, 8) / 3)
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)
        self.turn = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).mean((2, 3)).float())
        y = self.twice(self.twice(y @ self.mix))
        with torch.autocast("cpu", enabled=False):
            logits: Tensor = self.head(y.float()) @ self.turn
        return logits


X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return to_bbb(Net(), initial_std=math.exp(-1.5)).train()


@pytest.fixture(autouse=True)
def _autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


def reference(model: nn.Module, seed: int) -> Tensor:
    """Float32 draws, which autocast lowers itself."""
    out: Tensor = functional_call(Net(), draws(model, seed), (X,))
    return out


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def dtypes(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes of what is drawn together from now on."""
    seen: list[torch.dtype] = []
    original = grouped.prepare

    def spy(items: Any, seed: Tensor) -> Any:
        drawn = original(items, seed)
        values = (v.read() if isinstance(v, grouped.Later) else v for v in drawn)
        seen.extend(value.dtype for value in values)
        return drawn

    monkeypatch.setattr(grouped, "prepare", spy)
    return seen


def test_outputs_and_gradients_are_those_of_lowered_float32_draws(model: nn.Module) -> None:
    for seed in range(3):  # the first call has yet to learn what autocast lowers
        with one_draw(model, seed):
            out = model(X)
        expected = reference(model, seed)
        assert torch.equal(out, expected)
        found, wanted = gradients(model, out.sum()), gradients(model, expected.sum())
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            # the sum over two calls of a layer is one in bfloat16, as for a deterministic model
            rtol = 2e-2 if name.startswith("twice") else 1e-6
            scale = float(wanted[name].abs().max())
            torch.testing.assert_close(value, wanted[name], rtol=rtol, atol=rtol * scale, msg=name)


@pytest.mark.parametrize("part", ["head", "twice", "mix", "conv"])
def test_a_part_of_the_model_in_the_first_call_and_later(part: str) -> None:
    # autocast keeps casts of ordinary parameters, and the first call traces
    torch.manual_seed(0)
    model = to_bbb(Net(), only=[part], initial_std=math.exp(-1.5)).train()
    original = {n: p for n, p in model.named_parameters() if "logvar" not in n}
    for seed in (3, 4):
        with one_draw(model, seed):
            out = model(X)
            value = kl_divergence(model)
        expected = functional_call(Net(), {**original, **draws(model, seed)}, (X,))
        assert type(out) is Tensor
        assert torch.equal(out, expected)
        (out.float().square().mean() + 1e-3 * value).backward()
        assert all(type(p.grad) is Tensor for p in model.parameters())


def test_only_what_autocast_lowers_is_drawn_in_its_dtype(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    model(X)
    seen = dtypes(monkeypatch)
    model(X)
    assert seen.count(torch.bfloat16) == 5  # conv and twice with their biases, mix
    assert seen.count(torch.float32) == 5  # norm, head, turn
    with torch.autocast("cpu", enabled=False):
        seen.clear()
        model(X)
        assert set(seen) == {torch.float32}


def test_one_draw_is_read_with_autocast_and_without(model: nn.Module) -> None:
    for _ in range(2):
        with one_draw(model, 3):
            lowered = model(X)
            with torch.autocast("cpu", enabled=False):
                whole = model(X)
            again = model(X)
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(whole, reference(model, 3))
        assert torch.equal(lowered, reference(model, 3))
        assert torch.equal(lowered, again)


def test_the_kl_divergence_adds_its_gradient_to_that_of_lowered_draws(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    model(X)
    with one_draw(model, 5):
        loss = model(X).square().sum() + 0.1 * kl_divergence(model)
    expected = reference(other, 5).square().sum() + 0.1 * kl_divergence(other)
    torch.testing.assert_close(loss, expected)
    found, wanted = gradients(model, loss), gradients(other, expected)
    for name, value in found.items():
        rtol = 2e-2 if name.startswith("twice") else 1e-5
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(value, wanted[name], rtol=rtol, atol=rtol * scale, msg=name)


def test_checkpointed_activations_recompute_lowered_draws(model: nn.Module) -> None:
    for seed in range(2):
        with one_draw(model, seed):
            plain = gradients(model, model(X).sum())
        with one_draw(model, seed):
            out = checkpoint(model, X, use_reentrant=False)
        found = gradients(model, out.sum())
        for name, value in found.items():
            assert torch.equal(value, plain[name]), name


def test_without_gradient_and_by_predict(model: nn.Module) -> None:
    model.eval()
    for seed in range(2):
        with torch.no_grad(), sampled(model), one_draw(model, seed):
            assert torch.equal(model(X), reference(model, seed))
    with torch.no_grad():
        expected = torch.stack([reference(model, fold(0, k)) for k in range(4)])
    found = bayesify.predict(model, X, num_samples=4, seed=0)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_a_device_without_autocast(model: nn.Module) -> None:
    assert model.to("meta")(X.to("meta")).shape == (4, 5)
