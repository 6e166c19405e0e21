"""What frozen features are worth: nearest neighbours by their definition, a probe by scipy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax
from torch import Tensor, nn

from bayesify.errors import ArgumentError
from bayesify.metrics import knn_accuracy, knn_scores, linear_probe
from clusters import clusters

# kNN


def brute_force_scores(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, classes: int, k: int, temperature: float
) -> Any:
    """The definition, one test feature and one neighbour at a time, in float64."""
    bank, queries = train_x.double().numpy(), test_x.double().numpy()
    scores = np.zeros((len(queries), classes))
    for row, query in enumerate(queries):
        cosine = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        for i in np.argsort(-cosine)[:k]:
            scores[row, train_y[i]] += math.exp(cosine[i] / temperature)
    return scores / scores.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (50, 0.5), (200, 0.1)])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_knn_is_its_definition(k: int, temperature: float, chunk: int) -> None:
    (x, y), (z, t) = clusters(200, noise=3), clusters(30, noise=3)
    options: dict[str, Any] = {"k": k, "temperature": temperature, "chunk": chunk}
    found = knn_scores(x, y, z, num_classes=5, **options)
    expected = brute_force_scores(x, y, z, 5, k, temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    share = (expected.argmax(1) == t.numpy()).mean()
    assert knn_accuracy(x, y, z, t, **options) == pytest.approx(share)


def test_a_low_temperature_does_not_overflow() -> None:
    (x, y), (z, _) = clusters(50), clusters(5)
    scores = knn_scores(x, y, z, num_classes=4, k=5, temperature=1e-3)
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(5))


def test_knn_that_cannot_work_is_refused() -> None:
    x, y = clusters(10)
    with pytest.raises(ArgumentError, match="k must be from 1 to the 10"):
        knn_accuracy(x, y, x, y, k=11)
    with pytest.raises(ArgumentError, match="temperature above 0"):
        knn_accuracy(x, y, x, y, k=1, temperature=0)
    with pytest.raises(ArgumentError, match="Expected train_x"):
        knn_accuracy(x, y[:5], x, y, k=1)
    x[0, 0] = math.nan
    with pytest.raises(ArgumentError, match="NaN or infinite"):
        knn_accuracy(x, y, x, y, k=1)


# Linear probe


def test_a_linear_probe_reaches_the_optimum_of_its_loss() -> None:
    """Standardised features and a softmax: a convex problem that scipy solves as well."""
    (x, y), (z, t) = clusters(600, classes=3, width=4, noise=2), clusters(300, 3, 4, noise=2)
    options: dict[str, Any] = {"epochs": 100, "batch_size": 64, "learning_rates": (0.03, 0.1)}
    result = linear_probe(x, y, z, t, num_classes=3, **options)

    def loss(theta: Any) -> float:
        weight, bias = theta[:12].reshape(3, 4), theta[12:]
        scores = log_softmax(x.numpy() @ weight.T + bias, axis=1)
        return float(-scores[np.arange(len(y)), y.numpy()].mean())

    best = minimize(loss, np.zeros(15)).fun
    with torch.no_grad():
        found = nn.functional.cross_entropy(result.classifier(x), y).item()
        logits = result.classifier(z)
    assert best <= found + 1e-4
    assert found < best + 0.005
    assert result.accuracy == pytest.approx((logits.argmax(1) == t).float().mean().item())
    assert result.top5 == 1.0  # of three classes
    assert result.held_out[result.lr] == max(result.held_out.values())


def test_nothing_is_chosen_by_the_test_features() -> None:
    (x, y), (z, t) = clusters(200), clusters(50)
    options: dict[str, Any] = {"num_classes": 4, "epochs": 3, "learning_rates": (0.01, 1.0)}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = linear_probe(x, y, z, t, **options)
    assert torch.equal(torch.get_rng_state(), state)
    other = linear_probe(x, y, -z, t, **options)
    assert torch.equal(one.classifier.weight, other.classifier.weight)
    assert one.accuracy > 0.8 > other.accuracy


def test_a_rate_that_diverges_is_not_chosen() -> None:
    (x, y), (z, t) = clusters(400, noise=2), clusters(100, noise=2)
    options: dict[str, Any] = {"num_classes": 4, "epochs": 5, "learning_rates": (1e30, 0.1)}
    result = linear_probe(x, y, z, t, **options)
    assert result.lr == 0.1
    assert result.accuracy > 0.8


def test_a_probe_that_cannot_work_is_refused() -> None:
    x, y = clusters(20)
    for options in ({"held_out": 0.0}, {"held_out": 0.99}, {"epochs": 0}):
        with pytest.raises(ArgumentError, match="held_out = "):
            linear_probe(x, y, x, y, num_classes=4, **options)
    with pytest.raises(ArgumentError, match="learning_rates must be above 0"):
        linear_probe(x, y, x, y, num_classes=4, learning_rates=(0.1, 0.0))
    with pytest.raises(ArgumentError, match="NaN or infinite"):
        linear_probe(x / 0, y, x, y, num_classes=4)
