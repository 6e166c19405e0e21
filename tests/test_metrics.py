"""bayesify.metrics against numpy ports of the published definitions and against known answers."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from bayesify.errors import ArgumentError
from bayesify.metrics import (
    ClassificationMetrics,
    classification_metrics,
    entropy,
    mutual_information,
)

Floats = NDArray[np.float64]


def reference_ece(probs: Floats, labels: NDArray[np.int64], bins: int) -> float:
    """Guo et al. 2017, equation 3, with the bins ((m-1)/M, m/M] of their section 2, in a loop."""
    confidence = probs.max(axis=1)
    hit = probs.argmax(axis=1) == labels
    edges = np.linspace(0, 1, bins + 1)
    total = 0.0
    for m in range(bins):
        inside = (edges[m] < confidence) & (confidence <= edges[m + 1])
        if inside.any():
            total += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    return total


def reference(probs: Floats, labels: NDArray[np.int64], bins: int = 15) -> dict[str, float]:
    one_hot = np.eye(probs.shape[1])[labels]
    return {
        "accuracy": float((probs.argmax(axis=1) == labels).mean()),
        "nll": float(-np.log(probs[np.arange(len(labels)), labels]).mean()),
        "ece": reference_ece(probs, labels, bins),
        "brier": float(((probs - one_hot) ** 2).sum(axis=1).mean()),
    }


def softmax_case(
    seed: int, n: int, classes: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, classes, generator=g, dtype=torch.float64)
    return logits.softmax(1), torch.randint(classes, (n,), generator=g)


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 60),
    classes=st.integers(1, 12),
    scale=st.floats(0, 10),
    bins=st.integers(1, 40),
)
def test_agrees_with_the_numpy_port(
    seed: int, n: int, classes: int, scale: float, bins: int
) -> None:
    probs, labels = softmax_case(seed, n, classes, scale)
    expected = reference(probs.numpy(), labels.numpy(), bins)
    assert classification_metrics(probs, labels, bins) == pytest.approx(expected, abs=1e-12)


@given(seed=st.integers(0, 10_000), cuts=st.lists(st.integers(1, 99), max_size=5))
def test_batches_add_up_to_the_whole(seed: int, cuts: list[int]) -> None:
    probs, labels = softmax_case(seed, 100, 5, 2.0)
    streamed = ClassificationMetrics()
    edges = [0, *sorted(set(cuts)), 100]
    for start, stop in pairwise(edges):
        streamed.update(probs[start:stop], labels[start:stop])
    assert streamed.compute() == pytest.approx(classification_metrics(probs, labels), abs=1e-12)


def test_known_answers_by_hand() -> None:
    # Two bins: the first holds 0.5 (right), the second 0.8 (right), 0.6 (wrong) and 1.0 (right).
    probs = torch.tensor([[0.5, 0.5], [0.8, 0.2], [0.4, 0.6], [0.0, 1.0]], dtype=torch.float64)
    found = classification_metrics(probs, torch.tensor([0, 0, 0, 1]), bins=2)
    assert found["accuracy"] == 0.75
    assert found["nll"] == pytest.approx(-math.log(0.5 * 0.8 * 0.4) / 4)
    assert found["ece"] == pytest.approx(0.25 * 0.5 + 0.75 * abs(2 / 3 - 0.8))
    assert found["brier"] == pytest.approx((0.5 + 0.08 + 0.72 + 0.0) / 4)


@pytest.mark.parametrize("classes", [2, 10])
def test_certain_and_always_right_or_always_wrong(classes: int) -> None:
    probs = torch.eye(classes)
    right = classification_metrics(probs, torch.arange(classes))
    assert right == {"accuracy": 1.0, "nll": 0.0, "ece": 0.0, "brier": 0.0}
    wrong = classification_metrics(probs, (torch.arange(classes) + 1) % classes)
    # A confidence of exactly 1 is in the last bin; -log of the smallest normal float64.
    assert wrong == {
        "accuracy": 0.0,
        "nll": pytest.approx(-math.log(np.finfo(np.float64).tiny)),
        "ece": 1.0,
        "brier": 2.0,
    }


def test_uniform_predictions_have_the_closed_form() -> None:
    found = classification_metrics(torch.full((20, 10), 0.1), torch.arange(20) % 10)
    assert found == pytest.approx(
        {"accuracy": 0.1, "nll": math.log(10), "ece": 0.0, "brier": 0.9}, abs=1e-7
    )


@pytest.mark.parametrize("m", range(2, 16))
def test_a_confidence_on_an_edge_belongs_to_the_bin_below(m: int) -> None:
    # 15 classes, so that every edge from 1/15 up can be a confidence. A sure hit just below the
    # edge and a sure miss on it share a bin and cancel in part; in two bins they could not.
    def row(confidence: float) -> list[float]:
        rest = (1 - confidence) / 14
        return [confidence] + [rest] * 14

    below = m / 15 - 1e-4
    probs = torch.tensor([row(below), row(m / 15)], dtype=torch.float64)
    found = classification_metrics(probs, torch.tensor([0, 1]))["ece"]
    assert found == pytest.approx(abs(0.5 - (below + m / 15) / 2), abs=1e-12)


def test_confidences_of_a_calibrated_model_give_no_error_and_overconfidence_gives_its_size() -> (
    None
):
    # 1,000 images at confidence 0.7 each, of which exactly 700 or 400 are right.
    probs = torch.tensor([[0.7, 0.3]], dtype=torch.float64).expand(1000, 2)
    for right, gap in ((700, 0.0), (400, 0.3)):
        labels = (torch.arange(1000) >= right).long()
        assert classification_metrics(probs, labels)["ece"] == pytest.approx(gap, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_probabilities_are_counted_in_float64(dtype: torch.dtype) -> None:
    probs, labels = softmax_case(0, 5000, 10, 2.0)
    low = probs.to(dtype)
    expected = reference(low.double().numpy(), labels.numpy())
    assert classification_metrics(low, labels) == pytest.approx(expected, abs=1e-11)


def test_many_small_batches_do_not_drift() -> None:
    probs, labels = softmax_case(1, 8, 10, 3.0)
    streamed = ClassificationMetrics()
    for _ in range(3000):
        streamed.update(probs.float(), labels)
    once = reference(probs.float().double().numpy(), labels.numpy())
    assert streamed.compute() == pytest.approx(once, abs=1e-10)


def test_no_gradient_is_kept() -> None:
    probs = torch.full((4, 2), 0.5, requires_grad=True)
    metrics = ClassificationMetrics()
    metrics.update(probs, torch.zeros(4, dtype=torch.uint8))
    assert all(isinstance(value, float) for value in metrics.compute().values())


PROBS = torch.full((3, 4), 0.25)
LABELS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        (PROBS, torch.tensor([0, 4, 2]), "Label 4 at row 1 is out of range: probs has 4 classes"),
        (PROBS, torch.tensor([0, 1, -1]), "Label -1 at row 2"),
        (PROBS, torch.tensor([0.0, 1.0, 2.0]), "soft labels"),
        (PROBS, torch.tensor([True, False, True]), "whole class numbers"),
        (PROBS, PROBS, "soft labels"),
        (PROBS, torch.eye(4, dtype=torch.int64)[:3], r"shape \(3,\)"),
        (PROBS, LABELS[:2], r"shape \(3,\).*not \(2,\)"),
        (PROBS[0], LABELS, r"\(images, classes\)"),
        (PROBS[None], LABELS, r"\(images, classes\)"),
        (PROBS[:0], LABELS[:0], "at least one image"),
        (PROBS[:, :0], LABELS, "at least one image"),
        (PROBS * 2, LABELS, "sum to one.*off by 1"),
        (PROBS - 0.5, LABELS, "negative"),
        (torch.log(PROBS), LABELS, "not logits"),
        (PROBS.masked_fill(torch.eye(3, 4, dtype=torch.bool), math.nan), LABELS, "NaN"),
        (PROBS.masked_fill(torch.eye(3, 4, dtype=torch.bool), math.inf), LABELS, "sum to one"),
        (PROBS.long(), LABELS, "floating-point"),
    ],
)
def test_bad_input_is_named_and_leaves_the_sums_alone(
    probs: torch.Tensor, labels: torch.Tensor, message: str
) -> None:
    metrics = ClassificationMetrics()
    metrics.update(PROBS, LABELS)
    before = metrics.compute()
    with pytest.raises(ArgumentError, match=message):
        metrics.update(probs, labels)
    assert metrics.compute() == before


@pytest.mark.parametrize("bins", [0, -1, 1.5, True, "15"])
def test_bins_must_be_a_whole_number_above_zero(bins: int) -> None:
    with pytest.raises(ArgumentError, match="bins must be"):
        classification_metrics(PROBS, LABELS, bins)


def test_compute_without_a_batch_says_so() -> None:
    with pytest.raises(ArgumentError, match="nothing to measure"):
        ClassificationMetrics().compute()


@given(seed=st.integers(0, 10_000), classes=st.integers(1, 20), scale=st.floats(0, 30))
def test_entropy_agrees_with_scipy(seed: int, classes: int, scale: float) -> None:
    probs, _ = softmax_case(seed, 12, classes, scale)
    found = entropy(probs.view(3, 4, classes))
    assert found.shape == (3, 4)
    np.testing.assert_allclose(
        found.numpy(), stats.entropy(probs.view(3, 4, classes).numpy(), axis=-1), atol=1e-12
    )


def test_entropy_at_its_ends() -> None:
    assert entropy(torch.eye(5)).tolist() == [0.0] * 5
    assert float(entropy(torch.full((8,), 0.125))) == pytest.approx(math.log(8))


@given(seed=st.integers(0, 10_000), draws=st.integers(1, 9), scale=st.floats(0, 8))
def test_mutual_information_is_the_mean_divergence_from_the_mean(
    seed: int, draws: int, scale: float
) -> None:
    # The other form of the definition: mean_j KL(p_j || mean p).
    probs = softmax_case(seed, draws * 6, 4, scale)[0].view(draws, 6, 4)
    mean = probs.numpy().mean(axis=0)
    expected = stats.entropy(probs.numpy(), mean[None], axis=-1).mean(axis=0)
    np.testing.assert_allclose(mutual_information(probs).numpy(), expected, atol=1e-12)


def test_mutual_information_at_its_ends() -> None:
    disagree = torch.eye(3)[:, None]  # three draws, each certain of another class
    assert float(mutual_information(disagree)) == pytest.approx(math.log(3))
    agree = mutual_information(softmax_case(0, 1000, 10, 1.0)[0].expand(3, 1000, 10))
    assert (agree >= 0).all()  # rounding would give a few of them -1e-16
    assert float(agree.max()) < 1e-14


def test_tiny_mutual_information_of_float32_draws_survives() -> None:
    # p = 1/2 +- d has MI = 2 d^2 + O(d^4); float32 sums would lose it in their rounding.
    d = 2.0**-13
    probs = torch.tensor([[[0.5 + d, 0.5 - d]], [[0.5 - d, 0.5 + d]]])
    assert float(mutual_information(probs)) == pytest.approx(2 * d * d, rel=1e-6)


@pytest.mark.parametrize(
    ("function", "probs"),
    [
        (entropy, torch.tensor(1.0)),
        (entropy, torch.empty(0, 3)),
        (entropy, torch.tensor([2.0, -1.0])),
        (mutual_information, torch.tensor([0.5, 0.5])),
        (mutual_information, torch.empty(0, 4, 2)),
        (mutual_information, torch.ones(2, 3, 2)),
    ],
)
def test_entropies_refuse_what_is_no_distribution(
    function: type[object], probs: torch.Tensor
) -> None:
    with pytest.raises(ArgumentError, match="probs"):
        function(probs)  # type: ignore[call-arg]
