"""The evaluation against plain numpy."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import bayesify
from bayesify.errors import ArgumentError
from bayesify.metrics import ClassificationMetrics, cross_fitted_temperature, ood_metrics
from bayesify.seeds import fold
from bayesify.training import Evaluation, evaluate


def blobs(n: int = 60, classes: int = 3) -> TensorDataset:
    """Points of a few overlapping classes in the plane."""
    labels = torch.arange(n) % classes
    return TensorDataset(torch.randn(n, 2) + 1.5 * labels[:, None], labels)


def small(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, classes))


def expected_numbers(probs: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> dict[str, float]:
    """The metrics by their definitions, on numpy arrays."""
    n = len(y)
    confidence, hit = probs.max(1), probs.argmax(1) == y
    ece = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            ece += inside.sum() / n * abs(hit[inside].mean() - confidence[inside].mean())
    wrong = ~hit[np.argsort(-confidence)]
    return {
        "accuracy": hit.mean(),
        "nll": -np.log(probs[np.arange(n), y]).mean(),
        "ece": ece,
        "brier": ((probs - np.eye(probs.shape[1])[y]) ** 2).sum(1).mean(),
        "top5": 1.0,  # of three classes
        "aurc": (wrong.cumsum() / np.arange(1, n + 1)).mean(),
        "entropy": -(probs * np.log(probs)).sum(1).mean(),
    }


def assert_row_equals(row: Evaluation, kind: str, k: int, expected: dict[str, float]) -> None:
    assert (row.prediction, row.num_samples) == (kind, k)
    found = {name: getattr(row, name) for name in expected}
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert row.parts is not None
    assert row.parts.brier == pytest.approx(row.brier)


@pytest.mark.parametrize("batch_size", [7, 100])
def test_evaluation_against_numpy(batch_size: int) -> None:
    data = blobs()
    inputs, labels = data.tensors[0], data.tensors[1].numpy()
    model = bayesify.to_bbb(
        nn.Sequential(small(), nn.Dropout(0.5)), initial_std=math.exp(-1.0)
    ).train()
    steps: list[tuple[int, int]] = []
    at_means, averaged = evaluate(
        model, data, num_samples=6, seed=3, batch_size=batch_size,
        on_step=lambda done, all_: steps.append((done, all_)),
    )  # fmt: skip
    assert model.training
    assert steps[-1] == (len(steps), len(steps)) == (math.ceil(60 / batch_size),) * 2

    model.eval()
    means = model(inputs).softmax(-1).detach().double().numpy()
    drawn = torch.stack(
        [
            torch.func.functional_call(model, bayesify.draws(model, seed=fold(3, k)), (inputs,))
            for k in range(6)
        ]
    )
    each = drawn.softmax(-1).detach().double().numpy()
    average = each.mean(0)
    assert not np.allclose(means, average, atol=1e-3)
    assert_row_equals(at_means, "at the means", 1, expected_numbers(means, labels))
    assert_row_equals(averaged, "MC average", 6, expected_numbers(average, labels))
    # the other form of the mutual information: the mean divergence from the average
    information = (each * np.log(each / average)).sum(-1).mean()
    assert averaged.mutual_information == pytest.approx(information, rel=1e-4)
    assert at_means.mutual_information is None
    assert (averaged.temperature, averaged.intervals) == (None, None)


def test_evaluation_of_a_deterministic_model() -> None:
    data, model = blobs(), small()
    probs = model(data.tensors[0]).softmax(-1).detach().double().numpy()
    expected = expected_numbers(probs, data.tensors[1].numpy())
    [row] = evaluate(model, data)
    assert_row_equals(row, "deterministic", 1, expected)
    # ... which is what a converted model gives at its means
    rows = evaluate(bayesify.to_bbb(model, initial_std=math.exp(-1.0)), data, num_samples=1)
    assert rows[0].nll == pytest.approx(expected["nll"], rel=1e-6)


@pytest.mark.parametrize("bayesian", [False, True])
def test_the_control_scales_the_logits_at_the_means(bayesian: bool) -> None:
    data, model = blobs(), small()
    with torch.no_grad():
        model[2].weight.mul_(20)  # type: ignore[index]  # far too sure
    if bayesian:
        model = bayesify.to_bbb(model, initial_std=math.exp(-1.0))
    rows = evaluate(model, data, num_samples=2, batch_size=7, seed=4, control=True, resamples=20)
    kinds = ["at the means", "temperature scaled", "MC average"]
    assert [row.prediction for row in rows] == (kinds if bayesian else ["deterministic", kinds[1]])
    logits, labels = model.eval()(data.tensors[0]).detach(), data.tensors[1]
    probs, temperatures = cross_fitted_temperature(logits, labels, folds=5, seed=4)
    assert_row_equals(
        rows[1], "temperature scaled", 1, expected_numbers(probs.numpy(), labels.numpy())
    )
    assert rows[1].temperature == pytest.approx(temperatures.mean().item())
    assert temperatures.min() > 3
    measured = ClassificationMetrics()
    measured.update(probs, labels)
    found, expected = rows[1].intervals, measured.intervals(20, seed=4)
    assert found is not None
    for name in expected:
        assert found[name] == pytest.approx(expected[name])
    assert rows[1].nll < rows[0].nll / 2
    for row in rows:
        assert row.intervals is not None
        for name in ("accuracy", "nll", "brier"):
            assert row.intervals[name].low < getattr(row, name) < row.intervals[name].high


@pytest.mark.parametrize("bayesian", [False, True])
def test_ood_images_are_told_apart_by_each_score(bayesian: bool) -> None:
    data, model = blobs(), small()
    others = torch.randn(37, 2) * 3
    if bayesian:
        model = bayesify.to_bbb(model, initial_std=math.exp(-1.0))
    rows = evaluate(
        model, data, ood=TensorDataset(others), num_samples=6, seed=3, batch_size=25,
        control=True,
    )  # fmt: skip

    def scores(inputs: Tensor, row: Evaluation) -> dict[str, Tensor]:
        logits = model.eval()(inputs).detach().double()
        each = logits[None] / (row.temperature or 1.0)
        if row.prediction == "MC average":
            each = bayesify.predict(model, inputs, num_samples=6, seed=3).double()
        probs = each.softmax(-1).mean(0)
        entropy = -(probs * probs.log()).sum(-1)
        found = {"max probability": 1 - probs.max(-1).values, "entropy": entropy}
        if row.prediction == "MC average":
            of_each = -(each.softmax(-1) * each.log_softmax(-1)).sum(-1).mean(0)
            found["mutual information"] = entropy - of_each
        return found

    assert len(rows) == (3 if bayesian else 2)
    for row in rows:
        if row.temperature is not None:  # five temperatures inside, their mean outside
            assert row.ood is not None
            assert set(row.ood) == {"max probability", "entropy"}
            continue
        inside, outside = scores(data.tensors[0], row), scores(others, row)
        assert row.ood is not None
        assert set(row.ood) == set(inside)
        for name, found in row.ood.items():
            assert found == pytest.approx(ood_metrics(inside[name], outside[name]), abs=1e-6)
    assert evaluate(model, data)[0].ood is None


def test_scores_that_rounding_would_tie() -> None:
    # at these logits 1 - p is 0 in float64 for both, and the order of the rest is what counts
    class Sure(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, torch.zeros_like(x)], 1)

    inside, outside = torch.full((4, 1), 60.0), torch.full((4, 1), 50.0)
    data = TensorDataset(inside, torch.tensor([0, 0, 0, 1]))
    [row] = evaluate(Sure(1, 1), data, ood=TensorDataset(outside))
    assert row.ood is not None
    assert row.ood["max probability"]["auroc"] == 1.0


def test_the_control_wants_two_images_for_its_folds() -> None:
    data = blobs(3)
    assert len(evaluate(small(), data, control=True)) == 2  # fewer folds than five
    with pytest.raises(ArgumentError, match="at least 2 images"):
        evaluate(small(), blobs(1), control=True)


def test_bad_arguments_of_evaluate() -> None:
    model, data = bayesify.to_bbb(small()), blobs()
    with pytest.raises(ArgumentError, match="num_samples"):
        evaluate(model, data, num_samples=0)
    with pytest.raises(ArgumentError, match="batch_size must be"):
        evaluate(model, data, batch_size=0)
    for resamples in (1, -5, True, 2.5):
        with pytest.raises(ArgumentError, match="resamples must be"):
            evaluate(model, data, resamples=resamples)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="empty"):
        evaluate(model, TensorDataset(torch.zeros(0, 2), torch.zeros(0)))
    with pytest.raises(ArgumentError, match="out of range"):
        evaluate(model, TensorDataset(torch.zeros(5, 2), torch.arange(5)))
    with pytest.raises(ArgumentError, match=r"shape \(batch, classes\).*\(60,\)"):
        evaluate(nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)), data)
    with pytest.raises(ArgumentError, match="no parameter"):
        evaluate(nn.Tanh(), data)
