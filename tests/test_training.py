"""The fit against exact posteriors and hand-written loops; the evaluation against plain numpy."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

import bayesify
from bayesify.data import load_dataset
from bayesify.errors import ArgumentError, BayesifyError
from bayesify.kernels.noise import fold
from bayesify.metrics import ClassificationMetrics, cross_fitted_temperature
from bayesify.models import InputConfig
from bayesify.training import Evaluation, FitResult, Progress, evaluate, fit


def blobs(n: int = 60, classes: int = 3) -> TensorDataset:
    """Points of a few overlapping classes in the plane."""
    labels = torch.arange(n) % classes
    return TensorDataset(torch.randn(n, 2) + 1.5 * labels[:, None], labels)


def small(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, classes))


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_fit_finds_the_mean_field_optimum_of_linear_regression() -> None:
    n, noise_var, prior_std = 24, 1.0, 0.25
    inputs = torch.randn(n, 3) @ torch.tensor([[1.0, 0.4, 0.0], [0.0, 1.0, 0.3], [0.0, 0.0, 1.0]])
    targets = inputs @ torch.tensor([[0.8], [-0.5], [0.2]]) + math.sqrt(noise_var) * torch.randn(
        n, 1
    )
    # The exact posterior is N(A^-1 X'y / noise_var, A^-1); the best diagonal Gaussian has the same
    # mean and the variances 1 / A_ii.
    x, y = inputs.double().numpy(), targets.double().numpy()
    precision = x.T @ x / noise_var + np.eye(3) / prior_std**2
    mean = np.linalg.solve(precision, x.T @ y / noise_var)[:, 0]
    std = 1.0 / np.sqrt(np.diag(precision))

    model = bayesify.to_bbb(
        nn.Linear(3, 1, bias=False), prior=bayesify.GaussianPrior(prior_std), logvar=-4.0
    )
    fit(
        model,
        TensorDataset(inputs, targets),
        loss=lambda output, target: F.mse_loss(output, target) / (2 * noise_var),
        epochs=1000,
        batch_size=n,
        lr=0.02,
        logvar_lr=0.04,
    )
    [found] = bayesify.posteriors(model)
    found_mean = found.mean.detach()[0].double().numpy()
    found_std = torch.exp(0.5 * found.logvar.detach())[0].double().numpy()
    # Without the prior, both would be off by more than the tolerance.
    alone = x.T @ x / noise_var
    assert np.abs(np.linalg.solve(alone, x.T @ y / noise_var)[:, 0] - mean).max() > 0.5 * std.min()
    assert (1 / np.sqrt(np.diag(alone)) / std).max() > 1.2
    assert np.abs(found_mean - mean).max() < 0.3 * std.min()
    assert np.abs(found_std / std - 1).max() < 0.1


def test_a_deterministic_fit_equals_a_loop_by_hand() -> None:
    data, model, twin = blobs(), small(), small()
    twin.load_state_dict(model.state_dict())
    inputs, targets = data.tensors
    result = fit(
        model, data, epochs=8, batch_size=60, lr=0.05, warmup=0.25, weight_decay=0.1,
        max_grad_norm=0.3,
    )  # fmt: skip

    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.05, weight_decay=0.1)
    rates = [0.025, 0.05, *(0.05 * (1 + math.cos(math.pi * t / 6)) / 2 for t in range(6))]
    losses = []
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        loss = F.cross_entropy(twin(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.3)
        optimizer.step()
        losses.append(loss.item())
    assert result.losses == pytest.approx(losses, rel=1e-5)
    for ours, theirs in zip(weights_of(model), weights_of(twin), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert (result.kl, result.kl_scale, result.noise_budget) == ((), None, None)
    assert (result.steps, result.num_data) == (8, 60)


def test_a_seed_gives_the_same_fit_and_leaves_the_global_generator_alone() -> None:
    data, start = blobs(), bayesify.to_bbb(nn.Sequential(small(), nn.Dropout(0.2)))

    def run(seed: int) -> list[Tensor]:
        model = bayesify.to_bbb(bayesify.to_deterministic(start))
        fit(model, data, epochs=3, batch_size=16, lr=0.02, seed=seed)
        return weights_of(model)

    state = torch.get_rng_state()
    first = run(1)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)  # the seed alone must decide
    second, other = run(1), run(2)
    assert all(map(torch.equal, first, second))
    assert not any(map(torch.equal, first, other))


def test_what_is_said_and_returned_of_the_kl() -> None:
    lines: list[str] = []
    model = bayesify.to_bbb(small(), logvar=-6.0)
    number = sum(p.mean.numel() for p in bayesify.posteriors(model))
    result = fit(
        model, blobs(), epochs=4, batch_size=20, lr=1e-3, kl_weight=0.3, on_start=lines.append
    )
    assert result.kl_scale == pytest.approx(1 / 60)
    assert result.noise_budget == pytest.approx(0.3 * number / 60 / 2)
    [line] = lines
    assert f"{number} weights" in line
    assert "s = 0.0167 (num_data, N = 60), beta = 0.3" in line
    assert f"= {result.noise_budget:.3g} nats" in line
    exact = sum(
        float(
            torch.distributions.kl_divergence(
                torch.distributions.Normal(p.mean.detach(), torch.exp(0.5 * p.logvar.detach())),
                torch.distributions.Normal(0.0, 1.0),
            ).sum()
        )
        for p in bayesify.posteriors(model)
    )
    assert len(result.kl) == 4
    assert result.kl[-1] == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize(("reduction", "scale"), [("num_weights", 1 / 51), ("sum", 1.0)])
def test_the_other_reductions(reduction: Any, scale: float) -> None:
    result = fit(
        bayesify.to_bbb(small()), blobs(), epochs=1, batch_size=60, lr=1e-3,
        kl_reduction=reduction,
    )  # fmt: skip
    assert result.kl_scale == pytest.approx(scale)


def test_progress_and_the_kl_warm_up() -> None:
    seen: list[Progress] = []
    fit(
        bayesify.to_bbb(small()), blobs(), epochs=5, batch_size=15, lr=1e-2, kl_weight=2.0,
        kl_warmup=0.5, warmup=0.1, on_step=seen.append,
    )  # fmt: skip
    assert [p.step for p in seen] == list(range(1, 21))
    assert [p.epoch for p in seen] == [e for e in range(5) for _ in range(4)]
    assert [p.kl_weight for p in seen] == pytest.approx([0.2 * min(i, 10) for i in range(20)])
    assert [p.lr for p in seen][:3] == pytest.approx([5e-3, 1e-2, 1e-2])
    assert seen[-1].lr < 1e-3


def test_a_larger_kl_weight_keeps_the_posterior_nearer_the_prior() -> None:
    kls = []
    for weight in (0.0, 1.0, 30.0):
        torch.manual_seed(0)
        model = bayesify.to_bbb(small(), logvar=-4.0)
        kls.append(fit(model, blobs(), epochs=60, batch_size=60, lr=0.02, kl_weight=weight).kl[-1])
    assert kls[0] > 1.5 * kls[1] > 1.5 * 1.5 * kls[2]


def test_the_logvars_have_a_rate_of_their_own() -> None:
    model = bayesify.to_bbb(small(), logvar=-6.0)
    before = [p.logvar.detach().clone() for p in bayesify.posteriors(model)]
    fit(model, blobs(), epochs=2, batch_size=60, lr=1e-3, logvar_lr=0.0)
    after = [p.logvar.detach() for p in bayesify.posteriors(model)]
    assert all(map(torch.equal, before, after))


def test_a_frozen_parameter_stays() -> None:
    model = small()
    for parameter in model[0].parameters():  # type: ignore[index]
        parameter.requires_grad_(False)
    model = bayesify.to_bbb(model)
    frozen = model.get_parameter("0.weight").clone()
    trained = model.get_parameter("2.weight").detach().clone()
    fit(model, blobs(), epochs=1, batch_size=60, lr=0.1)
    assert torch.equal(frozen, model.get_parameter("0.weight"))
    assert not torch.equal(trained, model.get_parameter("2.weight"))


def test_batchnorm_statistics_are_those_of_the_means() -> None:
    data = blobs()
    model = bayesify.to_bbb(
        nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), logvar=-1.0
    )
    fit(model, data, epochs=3, batch_size=30, lr=0.05)
    state = model.state_dict()
    activations = data.tensors[0] @ state["0.weight"].T + state["0.bias"]
    torch.testing.assert_close(state["1.running_mean"], activations.mean(0))
    assert not model.training


def test_a_last_smaller_batch_is_left_out() -> None:
    model = bayesify.to_bbb(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))
    assert fit(model, blobs(61), epochs=2, batch_size=20, lr=0.01).steps == 6
    # ... but not where it is the only one
    assert fit(model, blobs(5), epochs=2, batch_size=20, lr=0.01).steps == 2


def test_a_loss_that_is_not_finite_stops_before_the_step() -> None:
    model = bayesify.to_bbb(small())
    seen: list[list[Tensor]] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(weights_of(model))
        return F.cross_entropy(outputs, targets) + (math.nan if len(seen) == 4 else 0.0)

    with pytest.raises(BayesifyError, match=r"step 4 of 6.*loss nan.*Lower lr"):
        fit(model, blobs(), epochs=2, batch_size=20, lr=0.01, loss=loss)
    assert all(map(torch.equal, weights_of(model), seen[-1]))
    assert not torch.equal(seen[-1][0], seen[0][0])


def test_a_gradient_that_is_not_finite_stops_before_the_step() -> None:
    model = small()
    before = weights_of(model)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - outputs.detach()).abs().sum().sqrt()  # 0 with an infinite slope

    with pytest.raises(BayesifyError, match=r"step 1 of 2.*gradient norm (nan|inf)"):
        fit(model, blobs(), epochs=2, batch_size=60, lr=0.01, loss=loss)
    assert all(map(torch.equal, weights_of(model), before))


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be a whole number above 0, got 0"),
        ({"epochs": 1.5}, "epochs must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"batch_size": True}, "batch_size must be"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": math.nan}, "lr must be above 0"),
        ({"warmup": 1.0}, "warmup must be from 0 to below 1"),
        ({"kl_warmup": 1.1}, "kl_warmup must be from 0 to 1"),
        ({"kl_weight": -1.0}, "kl_weight must be"),
        ({"kl_reduction": "mean"}, "kl_reduction must be one of"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0"),
        ({"train": TensorDataset(torch.zeros(0, 2), torch.zeros(0))}, "data set is empty"),
        ({"train": Stream()}, "with a length, got Stream"),
        ({"train": [1, 2]}, "got list"),
        ({"train": TensorDataset(torch.zeros(9, 2), torch.arange(9))}, "gives 3 classes"),
        ({"train": TensorDataset(torch.zeros(9, 2), torch.arange(9) - 1)}, r"Label (-1|7) is out"),
        ({"model": nn.Tanh()}, "no trainable parameter"),
    ],
)
def test_bad_arguments_of_fit(change: dict[str, Any], message: str) -> None:
    model = bayesify.to_bbb(small())
    before = weights_of(model)
    arguments: dict[str, Any] = {
        "model": model, "train": blobs(), "epochs": 1, "batch_size": 9, "lr": 0.1
    }  # fmt: skip
    with pytest.raises(ArgumentError, match=message):
        fit(**{**arguments, **change})
    assert all(map(torch.equal, before, weights_of(model)))


def test_amp_keeps_the_posterior_in_float32() -> None:
    model = bayesify.to_bbb(small())
    dtypes = set()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        dtypes.add(outputs.dtype)
        return F.cross_entropy(outputs, targets)

    fit(model, blobs(), epochs=1, batch_size=20, lr=0.01, amp=True, loss=loss)
    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


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
    model = bayesify.to_bbb(nn.Sequential(small(), nn.Dropout(0.5)), logvar=-2.0).train()
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
    rows = evaluate(bayesify.to_bbb(model, logvar=-2.0), data, num_samples=1)
    assert rows[0].nll == pytest.approx(expected["nll"], rel=1e-6)


@pytest.mark.parametrize("bayesian", [False, True])
def test_the_control_scales_the_logits_at_the_means(bayesian: bool) -> None:
    data, model = blobs(), small()
    with torch.no_grad():
        model[2].weight.mul_(20)  # type: ignore[index]  # far too sure
    if bayesian:
        model = bayesify.to_bbb(model, logvar=-2.0)
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
        with pytest.raises(ArgumentError, match="resamples must be 0 or"):
            evaluate(model, data, resamples=resamples)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="empty"):
        evaluate(model, TensorDataset(torch.zeros(0, 2), torch.zeros(0)))
    with pytest.raises(ArgumentError, match="out of range"):
        evaluate(model, TensorDataset(torch.zeros(5, 2), torch.arange(5)))
    with pytest.raises(ArgumentError, match=r"shape \(batch, classes\).*\(60,\)"):
        evaluate(nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)), data)
    with pytest.raises(ArgumentError, match="no parameter"):
        evaluate(nn.Tanh(), data)


def test_real_images_are_prepared_and_learnt() -> None:
    config = InputConfig(size=(1, 28, 28), mean=(0.286,), std=(0.353,))
    train, test = (load_dataset("fashion-sample", split=s) for s in ("train", "test"))
    model = bayesify.to_bbb(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)))
    result = fit(
        model, train, epochs=2, batch_size=100, lr=3e-3, kl_weight=0.1, model_config=config
    )
    assert isinstance(result, FitResult)
    assert result.num_data == 6000
    mean, average = evaluate(model, test, num_samples=3, batch_size=500, model_config=config)
    assert mean.accuracy > 0.75  # 10 classes of equal size: chance is 0.1
    assert average.accuracy > 0.75


class Named(Dataset[Any]):
    """A map-style data set of the user's own."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((2,), float(index % 3)), index % 3


def test_any_map_style_data_set_will_do() -> None:
    model = bayesify.to_bbb(small())
    fit(model, Named(), epochs=60, batch_size=12, lr=0.05, kl_weight=0.01)
    assert evaluate(model, Named())[0].accuracy == 1.0
