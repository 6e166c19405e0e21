"""bayesify.metrics against numpy ports of the published definitions and against known answers."""

import math
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import special, stats
from scipy.optimize import minimize_scalar

from bayesify.errors import ArgumentError
from bayesify.metrics import (
    BrierDecomposition,
    ClassificationMetrics,
    adaptive_calibration_error,
    area_under_risk_coverage,
    bootstrap_interval,
    brier_decomposition,
    brier_score,
    classification_metrics,
    classwise_calibration_error,
    cross_fitted_temperature,
    entropy,
    expected_calibration_error,
    fit_temperature,
    maximum_calibration_error,
    mutual_information,
    ood_metrics,
    reliability_bins,
    risk_coverage,
    selective_accuracy,
    top_label_decomposition,
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


def reference_gaps(confidence: Floats, hit: Floats, edges: Floats) -> list[tuple[float, float]]:
    """Share of the examples and |accuracy - confidence| in each bin ``(edge, next edge]``."""
    gaps = []
    for low, high in pairwise(edges):
        inside = (low < confidence) & (confidence <= high)
        if inside.any():
            gaps.append((inside.mean(), abs(hit[inside].mean() - confidence[inside].mean())))
    return gaps


def reference_aurc(confidence: Floats, hit: Floats) -> float:
    """Mean over all coverages of the expected risk where ties are broken at random, in a loop."""
    risks = []
    for j in range(1, len(hit) + 1):
        threshold = np.sort(confidence)[-j]
        above, at = confidence > threshold, confidence == threshold
        wrong = (1 - hit[above]).sum() + (j - above.sum()) * (1 - hit[at]).mean()
        risks.append(wrong / j)
    return float(np.mean(risks))


def reference(probs: Floats, labels: NDArray[np.int64], bins: int = 15) -> dict[str, float]:
    n, classes = probs.shape
    one_hot = np.eye(classes)[labels]
    confidence, hit = probs.max(axis=1), (probs.argmax(axis=1) == labels).astype(float)
    order = np.argsort(-probs, axis=1, kind="stable")
    widths = np.linspace(0, 1, bins + 1)
    widths[0] = -1  # the first bin also holds 0
    masses = [-1.0, *(np.sort(confidence)[math.ceil(m * n / bins) - 1] for m in range(1, bins + 1))]
    return {
        "accuracy": float(hit.mean()),
        "top5": float((order[:, :5] == labels[:, None]).any(axis=1).mean()),
        "nll": float(-np.log(probs[np.arange(n), labels]).mean()),
        "ece": reference_ece(probs, labels, bins),
        "mce": max(gap for _, gap in reference_gaps(confidence, hit, widths)),
        "adaptive_ece": sum(w * g for w, g in reference_gaps(confidence, hit, np.array(masses))),
        "classwise_ece": sum(
            w * g
            for k in range(classes)
            for w, g in reference_gaps(probs[:, k], one_hot[:, k], widths)
        )
        / classes,
        "brier": float(((probs - one_hot) ** 2).sum(axis=1).mean()),
        "aurc": reference_aurc(confidence, hit),
        "entropy": float(special.entr(probs).sum(axis=1).mean()),
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
    confidence, predicted = probs.max(1)
    ranked = confidence, predicted == labels
    assert expected_calibration_error(*ranked, bins) == pytest.approx(expected["ece"], abs=1e-12)
    assert classwise_calibration_error(probs, labels, bins) == pytest.approx(
        expected["classwise_ece"], abs=1e-12
    )


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
    assert found["mce"] == pytest.approx(0.5)
    # Halves by rank: 0.5 (right) and 0.6 (wrong), 0.8 and 1.0 (both right).
    assert found["adaptive_ece"] == pytest.approx(0.5 * abs(0.5 - 0.55) + 0.5 * abs(1 - 0.9))
    # Class 0: 0.5, 0.4, 0 of which two are it, and 0.8, which is it; class 1: the complements.
    assert found["classwise_ece"] == pytest.approx(
        (0.75 * abs(2 / 3 - 0.3) + 0.25 * 0.2 + 0.5 * 0.35 + 0.5 * abs(0.5 - 0.8)) / 2
    )
    assert found["aurc"] == pytest.approx((0 + 0 + 1 / 3 + 1 / 4) / 4)
    assert found["top5"] == 1.0


@pytest.mark.parametrize("classes", [2, 10])
def test_certain_and_always_right_or_always_wrong(classes: int) -> None:
    probs = torch.eye(classes)
    right = classification_metrics(probs, torch.arange(classes))
    assert right == {name: float(name in ("accuracy", "top5")) for name in right}
    wrong = classification_metrics(probs, (torch.arange(classes) + 1) % classes)
    # A confidence of exactly 1 is in the last bin; -log of the smallest normal float64.
    assert wrong == pytest.approx(
        {
            "accuracy": 0.0,
            # of the impossible classes the first come first; the true one follows the predicted one
            "top5": 1.0 if classes == 2 else 0.5,
            "nll": -math.log(np.finfo(np.float64).tiny),
            "ece": 1.0,
            "mce": 1.0,
            "adaptive_ece": 1.0,
            # each class: one image at 1 that is not it, one at 0 that is
            "classwise_ece": 2 / classes,
            "brier": 2.0,
            "aurc": 1.0,
            "entropy": 0.0,
        }
    )


def test_uniform_predictions_have_the_closed_form() -> None:
    found = classification_metrics(torch.full((20, 10), 0.1), torch.arange(20) % 10)
    zero = dict.fromkeys(("ece", "mce", "adaptive_ece", "classwise_ece"), 0.0)
    known = {"accuracy": 0.1, "top5": 0.5, "nll": math.log(10), "brier": 0.9, "aurc": 0.9}
    assert found == pytest.approx(known | zero | {"entropy": math.log(10)}, abs=1e-7)


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
        found = classification_metrics(probs, labels)
        for name in ("ece", "mce", "adaptive_ece", "classwise_ece"):
            assert found[name] == pytest.approx(gap, abs=1e-12), name


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
    found = streamed.compute()
    for name in set(once) - {"aurc"}:  # copies are ties, which an area does not take for one
        assert found[name] == pytest.approx(once[name], abs=1e-10), name


def test_no_gradient_is_kept() -> None:
    probs = torch.full((4, 2), 0.5, requires_grad=True)
    metrics = ClassificationMetrics()
    metrics.update(probs, torch.zeros(4, dtype=torch.uint8))
    assert all(isinstance(value, float) for value in metrics.compute().values())


def test_tensors_with_a_gradient_are_measured_without_a_warning() -> None:
    probs, labels = softmax_case(0, 9, 3, 1.0)
    probs, sure = probs.requires_grad_(), torch.linspace(0, 1, 9, requires_grad=True)
    hits = labels == 0
    found = [
        *classification_metrics(probs, labels).values(),
        *asdict(brier_decomposition(probs, labels)).values(),
        brier_score(probs, labels),
        classwise_calibration_error(probs, labels),
        area_under_risk_coverage(sure, hits),
        *ood_metrics(sure, sure).values(),
        fit_temperature(probs, labels),
        *bootstrap_interval(torch.mean, sure, resamples=2),
    ]
    assert all(math.isfinite(value) for value in found)
    for function in BINNED:
        function(sure, hits)
    assert not cross_fitted_temperature(probs, labels).probs.requires_grad
    assert entropy(probs).requires_grad  # which a loss may hold
    with pytest.raises(ArgumentError, match="sum to one"):
        entropy(2 * probs)


PROBS = torch.full((3, 4), 0.25)
LABELS = torch.tensor([0, 1, 2])
SURE, HITS = torch.tensor([0.5, 0.7]), torch.tensor([True, False])
BINNED: tuple[Callable[..., Any], ...] = (
    expected_calibration_error,
    maximum_calibration_error,
    adaptive_calibration_error,
    reliability_bins,
    top_label_decomposition,
)


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
    for function in BINNED:
        with pytest.raises(ArgumentError, match="bins must be"):
            function(SURE, HITS, bins)
    with pytest.raises(ArgumentError, match="bins must be"):
        classwise_calibration_error(PROBS, LABELS, bins)


def test_compute_without_a_batch_says_so() -> None:
    metrics = ClassificationMetrics()
    calls = (metrics.compute, metrics.top_label, metrics.intervals, BrierDecomposition().compute)
    for call in calls:
        with pytest.raises(ArgumentError, match="nothing to measure"):
            call()


def test_another_number_of_classes_in_a_later_batch_is_refused() -> None:
    for metrics in (ClassificationMetrics(), BrierDecomposition()):
        metrics.update(PROBS, LABELS)
        before = metrics.compute()
        with pytest.raises(ArgumentError, match="probs has 2 classes, and 4 in the batches before"):
            metrics.update(torch.full((3, 2), 0.5), torch.zeros(3, dtype=torch.int64))
        assert metrics.compute() == before


@pytest.mark.parametrize(
    ("confidence", "hits", "message"),
    [
        (torch.empty(0), torch.empty(0), r"confidence.*\(examples,\).*not \(0,\)"),
        (torch.ones(2, 2), torch.ones(2, 2), r"confidence must have the shape"),
        (torch.tensor(1.0), torch.tensor(1.0), r"confidence must have the shape"),
        (torch.ones(3), torch.ones(2), "they have 3 and 2"),
        (torch.tensor([math.nan]), torch.ones(1), "confidence holds NaN"),
        (torch.ones(1), torch.tensor([math.nan]), "hits holds NaN"),
        (torch.ones(2), torch.tensor([0, 2]), "hits must be 0 or 1"),
        (torch.ones(2), torch.tensor([0.5, 1]), "hits must be 0 or 1"),
        (torch.ones(2, dtype=torch.complex64), torch.ones(2), "must be real"),
    ],
)
def test_bad_confidences_and_hits_are_named(
    confidence: torch.Tensor, hits: torch.Tensor, message: str
) -> None:
    for function in (*BINNED, risk_coverage, area_under_risk_coverage):
        with pytest.raises(ArgumentError, match=message):
            function(confidence, hits)


@pytest.mark.parametrize("confidence", [[0.5, 1.2], [-0.1, 0.5], [0.5, math.inf]])
def test_a_binned_confidence_is_a_probability(confidence: list[float]) -> None:
    for function in BINNED:
        with pytest.raises(ArgumentError, match="must be a probability from 0 to 1; it goes from"):
            function(torch.tensor(confidence), HITS)


def test_a_confidence_that_rounding_put_above_one_is_in_the_last_bin() -> None:
    found = reliability_bins(torch.tensor([1.0039, 1.0, 0.0]), torch.tensor([1, 0, 0]), 4)
    assert found.size.tolist() == [1, 0, 0, 2]


def test_reliability_bins_by_hand() -> None:
    confidence = torch.tensor([0.0, 0.25, 0.2, 0.75, 1.0, 0.9], dtype=torch.float64)
    found = reliability_bins(confidence, torch.tensor([0, 1, 0, 1, 1, 0]), 4)
    assert found.lower.tolist() == [0, 0.25, 0.5, 0.75]
    assert found.upper.tolist() == [0.25, 0.5, 0.75, 1]
    assert found.size.tolist() == [3, 0, 1, 2]
    nan = math.nan
    np.testing.assert_allclose(found.confidence.numpy(), [0.15, nan, 0.75, 0.95])
    np.testing.assert_allclose(found.accuracy.numpy(), [1 / 3, nan, 1, 0.5])


def test_adaptive_bins_are_groups_of_one_size_where_nothing_is_tied() -> None:
    g = torch.Generator().manual_seed(0)
    confidence = torch.rand(60, generator=g, dtype=torch.float64)
    hits = torch.rand(60, generator=g) < 0.5
    groups = np.array_split(np.argsort(confidence.numpy()), 15)
    gaps = [abs(hits.numpy()[i].mean() - confidence.numpy()[i].mean()) for i in groups]
    assert adaptive_calibration_error(confidence, hits) == pytest.approx(np.mean(gaps))


def test_adaptive_bins_do_not_depend_on_the_order_of_tied_examples() -> None:
    confidence = torch.tensor([0.6] * 50 + [0.9] * 50)
    hits = torch.arange(100) % 50 < 30
    found = adaptive_calibration_error(confidence, hits, 10)
    # cut after every ten, the examples at 0.6 would give groups that are all right or all wrong
    assert found == pytest.approx(0.5 * 0 + 0.5 * 0.3, abs=1e-7)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    assert adaptive_calibration_error(confidence[order], hits[order], 10) == found


def test_more_adaptive_bins_than_examples() -> None:
    confidence = torch.tensor([0.75, 0.5, 0.25])
    assert adaptive_calibration_error(confidence, torch.tensor([1, 0, 0]), 40) == pytest.approx(
        1 / 3
    )


def test_examples_are_kept_in_order_and_on_the_cpu() -> None:
    probs, labels = softmax_case(0, 30, 7, 2.0)
    metrics = ClassificationMetrics()
    for part in (slice(0, 11), slice(11, 30)):
        metrics.update(probs[part], labels[part])
    kept = metrics.examples
    np.testing.assert_array_equal(kept.confidence.numpy(), probs.numpy().max(1))
    np.testing.assert_array_equal(kept.hit.numpy(), probs.argmax(1) == labels)
    nll = -np.log(probs.numpy()[np.arange(30), labels.numpy()])
    np.testing.assert_allclose(kept.nll.numpy(), nll)
    assert metrics.examples.nll.mean() == metrics.compute()["nll"]


@pytest.mark.parametrize("strided", [False, True])
def test_tensors_of_any_layout_will_do(strided: bool) -> None:
    probs, labels = softmax_case(2, 40, 4, 1.0)
    wide = probs.T.contiguous().T if strided else probs.expand(2, 40, 4)[1]
    assert wide.is_contiguous() != strided
    assert classification_metrics(wide, labels) == classification_metrics(probs, labels)
    column = torch.stack([probs.max(1).values] * 2, 1)[:, 0]  # torch warns of such a thing
    hits = probs.argmax(1) == labels
    for function in BINNED[:3]:
        assert function(column, hits) == function(column.contiguous(), hits)


# -- the Brier score ---------------------------------------------------------------------------


@given(seed=st.integers(0, 10_000), classes=st.integers(1, 9), scale=st.floats(0, 9))
def test_the_names_of_the_brier_score(seed: int, classes: int, scale: float) -> None:
    probs, labels = softmax_case(seed, 20, classes, scale)
    p, y = probs.numpy(), labels.numpy()
    total = ((p - np.eye(classes)[y]) ** 2).sum(1).mean()
    assert brier_score(probs, labels) == pytest.approx(total)
    assert brier_score(probs, labels, "half") == pytest.approx(total / 2)
    quadratic = ((p**2).sum(1) - 2 * p[np.arange(20), y]).mean()
    assert brier_score(probs, labels, "quadratic") == pytest.approx(quadratic)


def test_half_the_brier_score_of_two_classes_is_the_binary_one() -> None:
    probs, labels = softmax_case(3, 50, 2, 2.0)
    binary = ((probs[:, 1] - labels) ** 2).mean()
    assert brier_score(probs, labels, "half") == pytest.approx(float(binary))
    with pytest.raises(ArgumentError, match="'sum', 'half' or 'quadratic', not 'mean'"):
        brier_score(probs, labels, "mean")  # type: ignore[arg-type]


def reference_parts(probs: Floats, labels: NDArray[np.int64]) -> dict[str, float]:
    """Broecker 2009 with the partition by predicted class, example by example."""
    classes = probs.shape[1]
    one_hot, predicted = np.eye(classes)[labels], probs.argmax(1)
    overall = one_hot.mean(0)
    own = np.stack([one_hot[predicted == k].mean(0) for k in predicted])
    return {
        "brier": float(((probs - one_hot) ** 2).sum(1).mean()),
        "uncertainty": float((overall * (1 - overall)).sum()),
        "resolution": float(((own - overall) ** 2).sum(1).mean()),
        "reliability": float(((probs - own) ** 2).sum(1).mean()),
        "residual": float(-2 * ((probs - own) * (one_hot - own)).sum(1).mean()),
    }


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 60),
    classes=st.integers(1, 12),
    scale=st.floats(0, 10),
)
def test_the_parts_of_the_brier_score(seed: int, n: int, classes: int, scale: float) -> None:
    probs, labels = softmax_case(seed, n, classes, scale)
    parts = brier_decomposition(probs, labels)
    assert asdict(parts) == pytest.approx(reference_parts(probs.numpy(), labels.numpy()), abs=1e-12)
    total = parts.uncertainty - parts.resolution + parts.reliability + parts.residual
    assert total == pytest.approx(parts.brier, abs=1e-13)
    streamed = BrierDecomposition()
    for rows, classes_ in zip(probs.split(7), labels.split(7), strict=True):
        streamed.update(rows, classes_)
    assert asdict(streamed.compute()) == pytest.approx(asdict(parts), abs=1e-12)


def test_known_parts_of_the_brier_score() -> None:
    zero = pytest.approx(0, abs=1e-15)
    labels = torch.arange(8) % 4
    certain = asdict(brier_decomposition(torch.eye(4)[labels], labels))
    assert certain == {
        "brier": 0, "uncertainty": 0.75, "resolution": 0.75, "reliability": zero, "residual": zero
    }  # fmt: skip
    # the base rates say all that a constant can: nothing is resolved, all is reliable
    rates = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).expand(4, 3)
    constant = asdict(brier_decomposition(rates, torch.tensor([0, 0, 1, 2])))
    assert constant == {
        "brier": 0.625, "uncertainty": 0.625, "resolution": zero, "reliability": zero,
        "residual": zero,
    }  # fmt: skip


def test_a_calibrated_model_has_a_reliability_and_a_residual_by_predicted_class() -> None:
    # 100 images at 0.9 and 100 at 0.6, right 90 and 60 times: calibrated, one predicted class.
    first = torch.tensor([0.9] * 100 + [0.6] * 100, dtype=torch.float64)
    probs = torch.stack([first, 1 - first], 1)
    labels = torch.tensor([0] * 90 + [1] * 10 + [0] * 60 + [1] * 40)
    parts = brier_decomposition(probs, labels)
    assert parts.reliability == pytest.approx(2 * 0.15**2)
    assert parts.residual == pytest.approx(-4 * 0.15**2)
    exact = top_label_decomposition(first, labels == 0)
    assert exact.reliability == pytest.approx(0, abs=1e-15)
    assert exact.resolution == pytest.approx(0.15**2)
    assert exact.uncertainty == pytest.approx(0.75 * 0.25)
    assert exact.variance == pytest.approx(0)
    assert exact.covariance == pytest.approx(0)


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 60),
    scale=st.floats(0, 10),
    bins=st.integers(1, 40),
)
def test_the_exact_parts_of_the_predicted_class(seed: int, n: int, scale: float, bins: int) -> None:
    probs, labels = softmax_case(seed, n, 4, scale)
    p, hit = probs.numpy().max(1), (probs.numpy().argmax(1) == labels.numpy()).astype(float)
    parts = top_label_decomposition(torch.tensor(p), torch.tensor(hit), bins)
    edges = np.linspace(0, 1, bins + 1)
    expected = dict.fromkeys(("resolution", "reliability", "variance", "covariance"), 0.0)
    for low, high in pairwise(edges):
        inside = (low < p) & (p <= high)
        if inside.any():
            w, c, h = inside.mean(), p[inside], hit[inside]
            expected["resolution"] += w * (h.mean() - hit.mean()) ** 2
            expected["reliability"] += w * (c.mean() - h.mean()) ** 2
            expected["variance"] += w * np.var(c)
            expected["covariance"] += w * np.cov(c, h, bias=True)[0, 1]
    expected |= {"uncertainty": np.var(hit), "brier": ((p - hit) ** 2).mean()}
    assert asdict(parts) == pytest.approx(expected, abs=1e-12)
    total = parts.uncertainty - parts.resolution + parts.reliability + parts.variance
    assert total - 2 * parts.covariance == pytest.approx(parts.brier, abs=1e-13)
    metrics = ClassificationMetrics(bins)
    metrics.update(probs, labels)
    assert metrics.top_label() == parts


# -- selective prediction ----------------------------------------------------------------------


def test_ties_count_as_the_mean_over_all_their_orders() -> None:
    confidence, hits = [3, 3, 3, 2, 2, 1], [1, 0, 1, 0, 1, 0]
    curves = []
    for order in permutations(range(6)):
        if all(confidence[i] >= confidence[j] for i, j in pairwise(order)):
            wrong = [1 - hits[i] for i in order]
            curves.append(np.cumsum(wrong) / np.arange(1, 7))
    found = risk_coverage(torch.tensor(confidence), torch.tensor(hits))
    np.testing.assert_allclose(found.risk.numpy(), np.mean(curves, axis=0))
    np.testing.assert_allclose(found.coverage.numpy(), np.arange(1, 7) / 6)
    mean = area_under_risk_coverage(torch.tensor(confidence), torch.tensor(hits))
    assert mean == pytest.approx(np.mean(curves))


def test_known_risks() -> None:
    hits = torch.tensor([1, 1, 1, 0, 0], dtype=torch.bool)
    best = torch.tensor([5, 4, 3, 2, 1])
    assert area_under_risk_coverage(best, hits) == pytest.approx((1 / 4 + 2 / 5) / 5)
    worst = (1 + 1 + 2 / 3 + 2 / 4 + 2 / 5) / 5
    assert area_under_risk_coverage(-best, hits) == pytest.approx(worst)
    assert area_under_risk_coverage(torch.zeros(5), hits) == pytest.approx(0.4)
    infinite = torch.tensor([math.inf, 1, 1, 0, -math.inf])
    assert area_under_risk_coverage(infinite, hits) == pytest.approx((1 / 4 + 2 / 5) / 5)
    for coverage, accuracy in ((0.01, 1.0), (0.6, 1.0), (0.61, 0.75), (0.8, 0.75), (1, 0.6)):
        assert selective_accuracy(best, hits, coverage) == pytest.approx(accuracy), coverage


def test_a_coverage_is_not_rounded_up_by_the_error_of_its_float() -> None:
    assert 0.07 * 100 > 7
    hits = torch.arange(100) < 7
    assert selective_accuracy(-torch.arange(100), hits, 0.07) == 1.0


@pytest.mark.parametrize("coverage", [0, -0.5, 1.01, math.nan])
def test_a_coverage_is_a_share(coverage: float) -> None:
    with pytest.raises(ArgumentError, match="coverage must be above 0 and at most 1"):
        selective_accuracy(SURE, HITS, coverage)


# -- detection ---------------------------------------------------------------------------------


def reference_precision(positive: Floats, negative: Floats) -> float:
    """Average precision, sum over the distinct thresholds from the highest down, in a loop."""
    total, before = 0.0, 0.0
    for threshold in sorted({*positive, *negative}, reverse=True):
        true, false = (positive >= threshold).sum(), (negative >= threshold).sum()
        total += (true / len(positive) - before) * true / (true + false)
        before = true / len(positive)
    return total


@given(
    inside=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    outside=st.lists(st.integers(2, 12), min_size=1, max_size=40),
    noise=st.sampled_from([0.0, 1.0]),
)
def test_detection_agrees_with_scipy_and_loops(
    inside: list[int], outside: list[int], noise: float
) -> None:
    rng = np.random.default_rng(0)
    a, b = (np.array(v) + noise * rng.random(len(v)) for v in (inside, outside))
    thresholds = sorted({*a, *b}, reverse=True)
    # in counts, as 0.95 * 20 is not 19 in every arithmetic
    first = next(t for t in thresholds if 100 * (b >= t).sum() >= 95 * len(b))
    expected = {
        "auroc": stats.mannwhitneyu(b, a).statistic / (len(a) * len(b)),
        "aupr_out": reference_precision(b, a),
        "aupr_in": reference_precision(-a, -b),
        "fpr95": (a >= first).mean(),
    }
    assert ood_metrics(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, abs=1e-12)


def test_known_detections() -> None:
    low, high = torch.arange(30.0), torch.arange(30.0, 50.0)
    perfect = {"auroc": 1.0, "aupr_out": 1.0, "aupr_in": 1.0, "fpr95": 0.0}
    assert ood_metrics(low, high) == pytest.approx(perfect)
    assert ood_metrics(torch.zeros(3), torch.tensor([math.inf])) == pytest.approx(perfect)
    swapped = ood_metrics(high, low)
    assert (swapped["auroc"], swapped["fpr95"]) == (0.0, 1.0)
    nothing = ood_metrics(torch.ones(30), torch.ones(10))
    assert nothing == pytest.approx({"auroc": 0.5, "aupr_out": 0.25, "aupr_in": 0.75, "fpr95": 1.0})
    # 19 of 20 OOD images are enough: the one below all others costs nothing, a second one does
    one = torch.cat([torch.tensor([-1.0]), torch.full((19,), 99.0)])
    two = torch.cat([torch.tensor([-1.0, -1.0]), torch.full((18,), 99.0)])
    assert (ood_metrics(low, one)["fpr95"], ood_metrics(low, two)["fpr95"]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("inside", "outside", "message"),
    [
        (torch.empty(0), torch.ones(1), "inside must have the shape"),
        (torch.ones(1), torch.empty(0), "outside must have the shape"),
        (torch.ones(2, 1), torch.ones(1), "inside must have the shape"),
        (torch.ones(1), torch.tensor([math.nan]), "outside holds NaN"),
    ],
)
def test_bad_scores_are_named(inside: torch.Tensor, outside: torch.Tensor, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ood_metrics(inside, outside)


# -- temperature scaling -----------------------------------------------------------------------


def logits_case(seed: int, n: int, classes: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are ``scale`` times too large, and labels drawn from what they should be."""
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=g, dtype=torch.float64)
    labels = logits.softmax(1).multinomial(1, generator=g)[:, 0]
    return scale * logits, labels


@pytest.mark.parametrize("scale", [0.3, 1.0, 8.0])
def test_the_temperature_is_that_of_scipy_and_about_the_true_one(scale: float) -> None:
    logits, labels = logits_case(0, 5000, 6, scale)

    def nll(log_t: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits / math.exp(log_t), labels))

    best = minimize_scalar(nll, bracket=(-1, 1), tol=1e-10).x
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(math.exp(best), rel=1e-6)
    assert found == pytest.approx(scale, rel=0.05)
    shifted = fit_temperature(logits + torch.randn(5000, 1), labels)  # softmax does not see it
    assert shifted == pytest.approx(found, rel=1e-9)
    assert fit_temperature(logits.float(), labels.int()) == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("sure", [0.01, 4.0, 500.0])
def test_the_temperature_of_two_classes_has_a_closed_form(sure: float) -> None:
    # always the first class by the same logit, right three times in four: sigmoid(z / T) = 3/4
    logits = torch.tensor([[sure, 0.0]], dtype=torch.float64).expand(4, 2)
    found = fit_temperature(logits, torch.tensor([0, 0, 0, 1]))
    assert found == pytest.approx(max(0.01, min(100, sure / math.log(3))), rel=1e-9)


def test_temperatures_without_an_optimum_are_at_the_limits() -> None:
    labels = torch.arange(5)
    assert fit_temperature(torch.eye(5), labels) == pytest.approx(0.01)
    assert fit_temperature(torch.eye(5), (labels + 1) % 5) == pytest.approx(100)
    assert fit_temperature(torch.ones(5, 5), labels) == 1
    assert fit_temperature(1e30 * torch.eye(5), labels) <= 100  # no overflow


def test_rows_are_worked_on_in_parts() -> None:
    logits, labels = logits_case(1, 3, 4, 2.0)
    many = fit_temperature(logits.repeat(3000, 1), labels.repeat(3000))
    assert many == pytest.approx(fit_temperature(logits, labels), rel=1e-9)


@pytest.mark.parametrize(("n", "folds"), [(2, 2), (23, 5), (40, 40)])
def test_each_fold_is_scaled_by_what_the_others_say(n: int, folds: int) -> None:
    logits, labels = logits_case(2, n, 3, 3.0)
    probs, temperatures = cross_fitted_temperature(logits, labels, folds=folds, seed=1)
    assert temperatures.shape == (folds,)
    # each row says itself by which temperature it was scaled
    candidates = torch.stack([(logits / t).softmax(1) for t in temperatures])
    fold = (candidates - probs).abs().amax(2).argmin(0)
    assert (candidates[fold, torch.arange(n)] - probs).abs().max() < 1e-12
    if len(set(temperatures.tolist())) == folds:
        sizes = torch.bincount(fold, minlength=folds)
        assert int(sizes.max() - sizes.min()) <= 1
        for f in range(folds):
            others = fit_temperature(logits[fold != f], labels[fold != f])
            assert float(temperatures[f]) == pytest.approx(others, rel=1e-9)


def test_no_label_reaches_the_probabilities_of_its_own_example() -> None:
    logits, labels = logits_case(3, 60, 3, 3.0)
    probs, _ = cross_fitted_temperature(logits, labels)
    for i in (0, 17, 59):
        other = labels.clone()
        other[i] = (other[i] + 1) % 3
        changed = (cross_fitted_temperature(logits, other).probs - probs).abs().amax(1) > 1e-12
        assert not changed[i]
        assert int(changed.sum()) == 48  # all but its fold


def test_cross_fitting_calibrates_and_follows_its_seed() -> None:
    logits, labels = logits_case(4, 4000, 5, 4.0)
    probs, temperatures = cross_fitted_temperature(logits.bfloat16(), labels)
    assert probs.dtype == torch.float64
    assert temperatures.tolist() == pytest.approx([4.0] * 5, rel=0.1)
    before = classification_metrics(logits.softmax(1), labels)["ece"]
    assert classification_metrics(probs, labels)["ece"] < 0.02 < before / 5
    again, other = (cross_fitted_temperature(logits.bfloat16(), labels, seed=s) for s in (0, 1))
    assert torch.equal(again.probs, probs)
    assert not torch.equal(other.probs, probs)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), "logits must have the shape"),
        (torch.zeros(3), LABELS, "logits must have the shape"),
        (torch.zeros(3, 3, dtype=torch.int64), LABELS, "floating-point numbers, not torch.int64"),
        (torch.zeros(3, 3).fill_diagonal_(math.nan), LABELS, "NaN or infinity"),
        (torch.zeros(3, 3).fill_diagonal_(-math.inf), LABELS, "NaN or infinity"),
        (torch.zeros(3, 2), LABELS, "Label 2 at row 2 is out of range: logits has 2 classes"),
        (torch.zeros(3, 3), LABELS[:2], "one for each row of logits"),
        (torch.zeros(3, 3), torch.zeros(3), "soft labels"),
    ],
)
def test_bad_logits_are_named(logits: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    for function in (fit_temperature, cross_fitted_temperature):
        with pytest.raises(ArgumentError, match=message):
            function(logits, labels)


@pytest.mark.parametrize("folds", [1, 0, 2.0, True, 4])
def test_bad_folds_are_named(folds: int) -> None:
    with pytest.raises(ArgumentError, match="folds must be"):
        cross_fitted_temperature(torch.randn(3, 3), LABELS, folds=folds)


# -- bootstrap ---------------------------------------------------------------------------------


def test_the_bootstrap_agrees_with_scipy_and_with_the_normal_interval() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()
    theirs = stats.bootstrap(
        (values.numpy(),), np.mean, confidence_level=0.9, method="percentile", n_resamples=4000,
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    found = bootstrap_interval(torch.mean, values, resamples=4000, level=0.9)
    error = float(values.std()) / 20
    assert found.low == pytest.approx(theirs.low, abs=0.1 * error)
    assert found.high == pytest.approx(theirs.high, abs=0.1 * error)
    assert found.high - found.low == pytest.approx(2 * 1.645 * error, rel=0.06)


def test_the_values_of_an_example_stay_together_and_the_seed_decides() -> None:
    values = torch.randn(50, 3)
    labels = torch.arange(50)

    def together(rows: torch.Tensor, index: torch.Tensor) -> float:
        return float((rows - values[index]).abs().max()) + len(index)

    assert bootstrap_interval(together, values, labels, resamples=10) == (50, 50)
    first, again, other = (bootstrap_interval(torch.mean, values, seed=s) for s in (1, 1, 2))
    assert first == again != other
    wide = bootstrap_interval(torch.mean, values, seed=1, level=0.99)
    assert wide.low < first.low < first.high < wide.high


def test_the_ends_are_quantiles_of_the_resamples() -> None:
    given_ = iter(range(5))
    found = bootstrap_interval(lambda _: next(given_), torch.ones(1), resamples=5, level=0.5)
    assert found == (1, 3)


def test_the_intervals_of_the_metrics() -> None:
    probs, labels = softmax_case(5, 300, 4, 2.0)
    metrics = ClassificationMetrics(10)
    for rows, classes in zip(probs.split(64), labels.split(64), strict=True):
        metrics.update(rows, classes)
    found = metrics.intervals(200, level=0.8, seed=3)
    for name, interval in found.items():

        def metric(p: torch.Tensor, y: torch.Tensor, name: str = name) -> float:
            return classification_metrics(p, y, 10)[name]

        expected = bootstrap_interval(metric, probs, labels, resamples=200, level=0.8, seed=3)
        assert interval == pytest.approx(expected, abs=1e-12), name
    assert list(found) == ["accuracy", "nll", "ece", "brier"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resamples": 1}, "resamples must be a whole number of at least 2"),
        ({"resamples": 10.0}, "resamples must be"),
        ({"level": 0}, "level must be between 0 and 1"),
        ({"level": 95}, "level must be between 0 and 1"),
        ({"level": math.nan}, "level must be"),
        ({"values": ()}, "same number of examples"),
        ({"values": (torch.empty(0),)}, "at least one"),
        ({"values": (torch.tensor(1.0),)}, "at least one"),
        ({"values": (torch.ones(2), torch.ones(3))}, r"\[\(2,\), \(3,\)\]"),
        ({"values": (torch.tensor([math.nan]),)}, "The statistic is nan"),
    ],
)
def test_bad_arguments_of_the_bootstrap(change: dict[str, Any], message: str) -> None:
    values = change.pop("values", (torch.ones(3),))
    with pytest.raises(ArgumentError, match=message):
        bootstrap_interval(torch.mean, *values, **change)


# -- devices -----------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_gpu_gives_the_same_numbers() -> None:
    probs, labels = softmax_case(6, 500, 7, 2.0)
    logits, outside = probs.log(), softmax_case(7, 300, 7, 1.0)[0]

    def numbers(device: str) -> list[Any]:
        p, y, z = probs.to(device), labels.to(device), logits.to(device)
        confidence, hits = p.max(1).values, p.argmax(1) == y
        metrics = ClassificationMetrics()
        metrics.update(p[:200], y[:200])
        metrics.update(p[200:], labels[200:])  # labels of a loader may be on the CPU
        return [
            *metrics.compute().values(),
            *asdict(brier_decomposition(p, y)).values(),
            *asdict(top_label_decomposition(confidence, hits)).values(),
            adaptive_calibration_error(confidence, hits),
            area_under_risk_coverage(confidence, hits),
            *ood_metrics(entropy(p), entropy(outside.to(device))).values(),
            fit_temperature(z, y),
            float(cross_fitted_temperature(z, labels).probs.square().sum()),
            *bootstrap_interval(torch.mean, confidence, resamples=20),
        ]

    assert numbers("cuda") == pytest.approx(numbers("cpu"), rel=1e-10)


# -- entropies ---------------------------------------------------------------------------------


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
