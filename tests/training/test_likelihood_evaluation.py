"""What evaluate says of each likelihood, against the metrics of the whole data set at once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bayesify
from bayesify import ArgumentError
from bayesify.likelihoods import Bernoulli, Categorical, FromDistribution, Gaussian
from bayesify.metrics import classification_metrics, regression_metrics
from bayesify.training import (
    ClassEvaluation,
    DensityEvaluation,
    Evaluation,
    RegressionEvaluation,
    evaluate,
)


def model(outputs: int) -> nn.Module:
    return bayesify.to_bbb(nn.Linear(2, outputs), initial_std=math.exp(-1.0))


def predicted(net: nn.Module, x: Tensor) -> Any:
    return bayesify.predict(net, x, num_samples=5, seed=4, reduce="predictive")


X = torch.randn(25, 2)


def test_real_numbers() -> None:
    y = torch.randn(25, 3)
    y[torch.rand(25, 3) < 0.3] = torch.nan
    net = bayesify.set_likelihood_(model(3), Gaussian(0.7))
    rows = evaluate(net, TensorDataset(X, y), num_samples=5, seed=4, batch_size=7)
    assert [(r.prediction, r.num_samples) for r in rows] == [("at the means", 1), ("MC average", 5)]
    expected = regression_metrics(predicted(net, X), y)
    assert isinstance(rows[1], RegressionEvaluation)
    for name, value in expected.items():
        assert getattr(rows[1], name) == pytest.approx(value, rel=1e-5), name
    assert rows[0].rmse < rows[0].std * 5
    plain = bayesify.to_deterministic(net)
    [row] = evaluate(plain, DataLoader(TensorDataset(X, y), 10))
    assert row.prediction == "deterministic"
    assert row.nll == pytest.approx(rows[0].nll, rel=1e-6)


def test_yes_or_no_and_classes_of_pixels() -> None:
    y = torch.randint(2, (25, 3)).float()
    y[3, 1] = torch.nan
    net = bayesify.set_likelihood_(model(3), Bernoulli())
    _, row = evaluate(net, TensorDataset(X, y), num_samples=5, seed=4, batch_size=7)
    assert isinstance(row, ClassEvaluation)
    p, known = predicted(net, X).mean, ~y.isnan()
    expected = classification_metrics(torch.stack([1 - p, p], -1)[known], y[known].long())
    for name, value in expected.items():
        assert getattr(row, name) == pytest.approx(value, rel=1e-5), name
    assert row.targets == 74

    images, labels = torch.randn(6, 2, 3, 3), torch.randint(4, (6, 3, 3))
    labels[:, 0] = 9
    dense: Any = bayesify.to_bbb(nn.Conv2d(2, 4, 1), initial_std=math.exp(-1.0))
    bayesify.set_likelihood_(dense, Categorical(1, ignore_index=9))
    _, row = evaluate(dense, TensorDataset(images, labels), num_samples=5, seed=4, batch_size=4)
    probs = predicted(dense, images).mean.movedim(1, -1)
    expected = classification_metrics(probs[labels != 9], labels[labels != 9])
    assert row.accuracy == pytest.approx(expected["accuracy"])
    assert row.nll == pytest.approx(expected["nll"], rel=1e-5)
    assert row.targets == 36


def test_one_class_an_example_is_measured_as_before() -> None:
    labels = torch.arange(25) % 3
    net, data = model(3), TensorDataset(X, labels)
    before = evaluate(net, data, num_samples=5, seed=4, control=True)
    bayesify.set_likelihood_(net, Categorical())
    assert evaluate(net, data, num_samples=5, seed=4, control=True) == before
    assert isinstance(before[0], Evaluation)
    bayesify.set_likelihood_(net, Categorical(temperature=2.0))
    hot = evaluate(net, data, num_samples=5, seed=4)
    drawn = bayesify.predict(net, X, num_samples=5, seed=4)
    probs = (drawn / 2).softmax(-1).mean(0)
    assert hot[1].nll == pytest.approx(classification_metrics(probs, labels)["nll"], rel=1e-5)
    summary = bayesify.predict(net, X, num_samples=5, seed=4, reduce="probabilities")
    torch.testing.assert_close(summary.mean, probs)
    torch.testing.assert_close(bayesify.ensemble(net, 5, seed=4)(X), probs)


def test_any_other_likelihood_and_several_heads() -> None:
    counts = torch.randint(4, (25, 1)).float()
    poisson = FromDistribution(lambda f: torch.distributions.Poisson(f.exp()))
    net = bayesify.set_likelihood_(model(1), poisson)
    _, row = evaluate(net, TensorDataset(X, counts), num_samples=5, seed=4, batch_size=7)
    assert isinstance(row, DensityEvaluation)
    found = predicted(net, X)
    assert row.nll == pytest.approx(-float(found.log_prob(counts).mean()), rel=1e-5)
    assert row.rmse == pytest.approx(float((found.mean - counts).square().mean().sqrt()), rel=1e-5)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 1), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    two = bayesify.to_bbb(Two(), initial_std=math.exp(-1.0))
    bayesify.set_likelihood_(two, {0: Gaussian(1.0), 1: Categorical()})

    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 25

        def __getitem__(self, i: int) -> Any:
            return X[i], (counts[i], torch.tensor(i % 3))

    rows = evaluate(two, Rows(), num_samples=5, seed=4)
    assert [(r.output, r.prediction) for r in rows] == [
        (0, "at the means"), (0, "MC average"), (1, "at the means"), (1, "MC average")
    ]  # fmt: skip
    expected = regression_metrics(predicted(two, X)[0], counts)
    assert rows[1].crps == pytest.approx(expected["crps"], rel=1e-5)


def test_bad_input() -> None:
    net = bayesify.set_likelihood_(model(1), Gaussian(1.0))
    data = TensorDataset(X, torch.randn(25, 1))
    for options in ({"control": True}, {"ood": data}, {"resamples": 5}):
        with pytest.raises(ArgumentError, match="are for one class an example"):
            evaluate(net, data, **options)
    with pytest.raises(ArgumentError, match="do not fit"):
        evaluate(net, TensorDataset(X, torch.randn(25, 2)))
    with pytest.raises(ArgumentError, match="no target to measure"):
        evaluate(net, TensorDataset(X, torch.full((25, 1), torch.nan)))
