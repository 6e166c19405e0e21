"""Many draws at once against the loop, the rule that chooses, and draws that are kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bayesify
from bayesify.inference import Predictor, predict, running
from bayesify.inference.running import Draws
from bayesify.kernels import grouped, native
from bayesify.pruning import prune_
from bayesify.seeds import fold


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm(6)
        self.qkv = nn.Linear(6, 18)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        y = self.embed(x)
        q, k, v = self.qkv(self.norm(y)).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        y = y + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return {"logits": self.head(y) * scale, "input": x, "none": None, "scale": scale}


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.GroupNorm(2, 8), nn.Dropout(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "convolutions": (convolutions, IMAGES),
    "float64": (lambda: convolutions().double(), IMAGES.double()),
    "not contiguous": (lambda: convolutions().to(memory_format=torch.channels_last), IMAGES),
    "tied, dict": (Tied, torch.tensor([[1, 2, 3], [4, 5, 6]])),
    "recurrent": (lambda: nn.LSTM(5, 4, 2), torch.randn(6, 3, 5)),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(6, 2, 12, batch_first=True),
        torch.randn(2, 3, 6),
    ),
}


def converted(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return bayesify.to_bbb(MODELS[name][0](), initial_std=math.exp(-1.5), **options).eval()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which way the draws went, one entry a call of the model."""
    seen: list[str] = []
    for way in ("_one", "_vmapped"):
        plain = getattr(Draws, way)

        def watch(self: Draws, *args: Any, way: str = way, plain: Any = plain) -> Any:
            seen.append(way)
            return plain(self, *args)

        monkeypatch.setattr(Draws, way, watch)
    return seen


def in_a_loop(monkeypatch: pytest.MonkeyPatch, *args: Any, **kwargs: Any) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(running, "MOST_EXAMPLES", 0)
        return predict(*args, **kwargs)


# -- the same numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_at_once_gives_what_the_loop_gives(
    name: str, watched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = converted(name), MODELS[name][1]
    expected = in_a_loop(monkeypatch, model, x, num_samples=5, seed=1)
    assert watched == ["_one"] * 5
    watched.clear()
    first = predict(model, x, num_samples=5, seed=1)
    # vmap has no rule for the first, and torch 2.11 none for the second
    refused = name == "recurrent" or (name == "not contiguous" and len(watched) > 2)
    assert watched == ["_one", "_vmapped", *["_one"] * 5 * refused]  # traced, then run
    watched.clear()
    second = predict(model, x, num_samples=5, seed=1)
    assert watched == (["_one"] * 5 if refused else ["_vmapped"])
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(second, first, rtol=0, atol=0)


@pytest.mark.parametrize("reduce", ["probabilities", "moments"])
def test_summaries_at_once_are_those_of_the_loop(
    reduce: Any, watched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = converted("convolutions")
    expected = in_a_loop(monkeypatch, model, IMAGES, num_samples=7, seed=1, reduce=reduce)
    watched.clear()
    found = predict(model, IMAGES, num_samples=7, seed=1, reduce=reduce)
    assert "_vmapped" in watched
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_loop_gives_the_bits_of_one_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted("convolutions")
    found = in_a_loop(monkeypatch, model, IMAGES, num_samples=3, seed=4)
    for k in range(3):
        with torch.no_grad(), bayesify.one_draw(model, seed=fold(4, k)):
            assert torch.equal(model(IMAGES), found[k])


@pytest.mark.parametrize("how", ["softplus", "pruned", "copies"])
def test_other_posteriors(how: str, watched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted("convolutions")
    if how == "softplus":
        model = converted("convolutions", config=bayesify.BBBConfig(parameterization="softplus"))
    if how == "pruned":
        prune_(model, sparsity=0.5)
    if how == "copies":  # one name twice: not the same noise
        layers = [bayesify.to_bbb(nn.Linear(4, 4), initial_std=math.exp(-0.5)) for _ in range(2)]
        model = nn.Sequential(converted("convolutions"), *layers).eval()
    expected = in_a_loop(monkeypatch, model, IMAGES, num_samples=4, seed=1)
    watched.clear()
    found = predict(model, IMAGES, num_samples=4, seed=1)
    assert "_vmapped" in watched
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for k in range(4):
        with torch.no_grad(), bayesify.one_draw(model, seed=fold(1, k)):
            torch.testing.assert_close(model(IMAGES), expected[k], rtol=1e-6, atol=1e-7)


def test_in_chunks(watched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted("convolutions")
    expected = in_a_loop(monkeypatch, model, IMAGES, num_samples=5, seed=1)
    monkeypatch.setattr(Draws, "_together", lambda *args: 2)
    watched.clear()
    found = predict(model, IMAGES, num_samples=5, seed=1)
    assert watched == ["_one", "_vmapped", "_vmapped", "_vmapped"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# -- the rule --------------------------------------------------------------------------------


def chunk(model: nn.Module, x: Tensor, num_samples: int = 30) -> int:
    return Draws(model, num_samples, 0)._together((x,), {})


def test_what_is_large_is_run_in_a_loop() -> None:
    small = bayesify.to_bbb(nn.Linear(100, 100)).eval()
    assert chunk(small, torch.ones(1, 100)) == 30
    assert chunk(small, torch.ones(16, 100)) == 30
    assert chunk(small, torch.ones(17, 100)) == 1
    assert chunk(small, torch.ones(1, 100), num_samples=1) == 1
    assert chunk(small, torch.ones(1, 100), num_samples=1000) == 1  # 40 MB of draws
    small.register_forward_hook(lambda *args: None)
    assert chunk(small, torch.ones(1, 100)) == 1


class Stubborn(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        if self.kind == "item" and y.sum().item() > 0:
            return y.flip(0)
        if self.kind == "random":
            return y + torch.rand_like(y)
        if self.kind == "in place":
            self.seen.add_(y.sum(0))
        if self.kind == "kept":
            self.last = y * 2
        if self.kind == "no rule":
            return torch.histc(y)
        return y


@pytest.mark.parametrize("kind", ["item", "random", "in place", "kept", "no rule"])
def test_what_vmap_cannot_run_is_run_in_a_loop_and_logged(
    kind: str, watched: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model: Any = bayesify.to_bbb(Stubborn(kind), initial_std=math.exp(-1.0)).eval()
    x = torch.randn(3, 4)
    expected = []
    torch.manual_seed(1)
    for k in range(4):
        with torch.no_grad(), bayesify.one_draw(model, seed=fold(2, k)):
            expected.append(model(x))
    with caplog.at_level(logging.INFO, "bayesify"):
        torch.manual_seed(1)
        found = predict(model, x, num_samples=4, seed=2)
        if kind != "random":
            assert torch.equal(found, torch.stack(expected))
        assert watched == ["_one", "_vmapped", "_one", "_one", "_one", "_one"]
        predict(model, x, num_samples=4, seed=2)
        assert watched[6:] == ["_one"] * 4  # not tried again
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("Stubborn runs draw by draw: ")
    if kind == "kept":
        assert torch.equal(model.last, 2 * expected[-1])


def test_an_error_of_the_model_is_that_of_the_loop() -> None:
    model = converted("convolutions")
    with pytest.raises(RuntimeError, match="expected input"):
        predict(model, torch.randn(2, 5, 8, 8), num_samples=3)


def test_a_compiled_model_draws_itself(watched: list[str]) -> None:
    model = converted("convolutions")
    compiled: Any = torch.compile(model, backend="eager")
    expected = predict(model, IMAGES, num_samples=3, seed=1)
    watched.clear()
    found = predict(compiled, IMAGES, num_samples=3, seed=1)
    assert watched == ["_one"] * 3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# -- draws that are kept ---------------------------------------------------------------------


@pytest.mark.parametrize("batch", [2, 20])
def test_small_draws_are_made_once_for_all_batches(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = converted("convolutions")
    batches = [torch.randn(batch, 3, 8, 8) for _ in range(3)]
    expected = [predict(model, x, num_samples=4, seed=9) for x in batches]
    made: list[int] = []
    for name in ("draw", "stack"):
        plain = getattr(grouped.Repeated, name)

        def counted(self: Any, seeds: Any, plain: Any = plain) -> Any:
            made.append(1 if isinstance(seeds, int) else len(seeds))
            return plain(self, seeds)

        monkeypatch.setattr(grouped.Repeated, name, counted)
    predictor = Predictor(model, num_samples=4, seed=9)
    for x, wanted in zip(batches, expected, strict=True):
        torch.testing.assert_close(predictor(x), wanted, rtol=1e-5, atol=1e-6)
    assert made == [4]
    made.clear()
    monkeypatch.setattr(running, "KEPT_BYTES", 100)
    predictor = Predictor(model, num_samples=4, seed=9)
    for x, wanted in zip(batches, expected, strict=True):
        torch.testing.assert_close(predictor(x), wanted, rtol=1e-5, atol=1e-6)
    assert sum(made) == 12


@pytest.mark.parametrize("how", ["in place", "exchanged", "moved"])
def test_a_model_that_changed_is_drawn_anew(how: str) -> None:
    model = converted("convolutions")
    predictor = Predictor(model, num_samples=3, seed=2)
    before = predictor(IMAGES)
    with torch.no_grad():
        for name, parameter in list(model.named_parameters()):
            if how == "in place":
                parameter.add_(0.5)
            elif how == "exchanged":
                owner, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(owner), attribute, nn.Parameter(parameter + 0.5))
            else:
                parameter.data = parameter + 0.5
    torch.testing.assert_close(
        predictor(IMAGES), predict(model, IMAGES, num_samples=3, seed=2), rtol=1e-5, atol=1e-6
    )
    assert not torch.allclose(predictor(IMAGES), before)


@pytest.mark.parametrize("batch", [1, 20])
def test_in_inference_mode(batch: int) -> None:
    model = converted("convolutions")
    x = torch.randn(batch, 3, 8, 8)
    expected = predict(model, x, num_samples=4, seed=1)
    inside = Predictor(model, num_samples=4, seed=1)
    with torch.inference_mode():
        torch.testing.assert_close(inside(x), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(inside(x), expected, rtol=1e-5, atol=1e-6)
        made_inside = Predictor(model, num_samples=4, seed=1)
        made_inside(x)
    torch.testing.assert_close(made_inside(x), expected, rtol=1e-5, atol=1e-6)


def test_a_loop_over_draws_uses_memory_again() -> None:
    model = bayesify.to_bbb(nn.Linear(300, 300), initial_std=math.exp(-1.5)).eval()
    places = []
    draws = Draws(model, 5, 0)
    for _ in draws.outputs((torch.ones(20, 300),), {}):
        slot = next(iter(bayesify.posterior.sites(model))).slot
        places.append({storage.data_ptr() for storage in slot.buffers.kept()})
    assert all(place == places[0] for place in places)
    assert len(places[0]) == (1 if native.there() else 2)  # the draw, and sigma if it is kept
