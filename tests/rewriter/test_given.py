"""A forward that writes into its input, or takes its containers apart, is called many times."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayesify
from bayesify import one_draw, to_bbb
from bayesify.scope import as_seed
from bayesify.seeds import fold

X = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) * 255
Y = torch.arange(6) % 3


class Scales(nn.Module):
    """Writes into its input; ``apart`` is the same without."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.apart = apart
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x / 255 if self.apart else x.div_(255)
        out: Tensor = self.linear(x)
        return out


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    writes = to_bbb(Scales(False), initial_std=math.exp(-2.0))
    torch.manual_seed(0)
    return writes, to_bbb(Scales(True), initial_std=math.exp(-2.0))


@pytest.mark.parametrize("batch", [6, 40])  # draws together by vmap, and one by one
def test_every_draw_sees_the_input_as_it_was_given(batch: int) -> None:
    writes, apart = pair()
    x = X.repeat(7, 1)[:batch]
    given = x.clone()
    for _ in range(2):
        found = bayesify.predict(writes, x, num_samples=5, seed=1)
        assert torch.equal(x, given)
        torch.testing.assert_close(found, bayesify.predict(apart, x, num_samples=5, seed=1))
    for k in range(5):  # and those are what one_draw gives
        with one_draw(apart.eval(), seed=fold(int(as_seed(1)), k)):
            torch.testing.assert_close(found[k], apart(x.clone()))


def test_an_input_of_inference_mode() -> None:
    writes, apart = pair()
    with torch.inference_mode():
        x = X.clone() + 0
        found = bayesify.predict(writes, x, num_samples=3, seed=1)
        torch.testing.assert_close(found, bayesify.predict(apart, x, num_samples=3, seed=1))


class WritesLater(Scales):
    """Writes from its second call on."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.apart = self.calls == 1
        return super().forward(x)


def test_a_forward_that_writes_from_its_second_call_on() -> None:
    _, apart = pair()
    torch.manual_seed(0)
    writes = to_bbb(WritesLater(True), initial_std=math.exp(-2.0))
    x = X.repeat(7, 1)
    expected = bayesify.predict(apart, x.clone(), num_samples=5, seed=1)
    torch.testing.assert_close(bayesify.predict(writes, x, num_samples=5, seed=1), expected)


class TakesApart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        out: Tensor = self.linear(batch.pop("x"))
        return out


def test_each_draw_gets_containers_of_its_own() -> None:
    model = to_bbb(TakesApart())
    batch: dict[str, Any] = {"x": X}
    assert bayesify.predict(model, batch, num_samples=3).shape == (3, 6, 3)
    assert batch["x"] is X


def test_evaluate_calibrate_laplace_and_ensemble_see_it_too() -> None:
    writes, apart = pair()
    data = torch.utils.data.TensorDataset(X, Y)
    for a, b in zip(
        bayesify.evaluate(writes, data, num_samples=4, resamples=0),
        bayesify.evaluate(apart, data, num_samples=4, resamples=0),
        strict=True,
    ):
        assert a.nll == pytest.approx(b.nll, rel=1e-6), a.prediction
    many = [bayesify.ensemble(model, 4, seed=0)(X.clone()) for model in (writes, apart)]
    torch.testing.assert_close(*many)
    factors = [
        bayesify.calibrate_(m, X.clone(), target_change=0.1, num_samples=4, seed=0)
        for m in (writes, apart)
    ]
    assert factors[0] == pytest.approx(factors[1])
    for model in (writes, apart):
        bayesify.fit_laplace_(model, data, seed=0)
    for p, q in zip(bayesify.posteriors(writes), bayesify.posteriors(apart), strict=True):
        torch.testing.assert_close(p.logvar, q.logvar)


@pytest.mark.parametrize("draws", [1, 3])
def test_fit_averages_the_draws_of_the_same_batch(draws: int) -> None:
    results = []
    for model in pair():
        data = torch.utils.data.TensorDataset(X.clone(), Y)
        results.append(
            bayesify.fit(
                model, data, epochs=2, batch_size=3, lr=1e-2, draws_per_step=draws, seed=0,
                loss=F.cross_entropy,
            )
        )  # fmt: skip
    assert results[0].losses == pytest.approx(results[1].losses, rel=1e-5)
