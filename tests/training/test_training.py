"""The fit against exact posteriors and hand-written loops."""

import copy
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

import bayesify
from bayesify.data import ImageData, InMemory, load_dataset
from bayesify.errors import ArgumentError, BayesifyError
from bayesify.likelihoods import Categorical
from bayesify.models import InputConfig
from bayesify.training import FitResult, Progress, evaluate, fit
from bayesify.training.batches import Order, split
from bayesify.training.holdout import held_out_loss


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
        nn.Linear(3, 1, bias=False),
        prior=bayesify.GaussianPrior(prior_std),
        initial_std=math.exp(-2.0),
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
    model = bayesify.to_bbb(small(), initial_std=math.exp(-3.0))
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


def test_the_kl_may_rise_as_a_cosine() -> None:
    seen: list[Progress] = []
    fit(
        bayesify.to_bbb(small()), blobs(), epochs=10, batch_size=60, lr=1e-2, kl_weight=3.0,
        kl_warmup=0.8, kl_shape="cosine", on_step=seen.append,
    )  # fmt: skip
    expected = [1.5 * (1 - math.cos(math.pi * min(i, 8) / 8)) for i in range(10)]
    assert [p.kl_weight for p in seen] == pytest.approx(expected)


@pytest.mark.parametrize(("draws", "accumulate"), [(3, 1), (1, 2), (2, 2)])
def test_several_draws_and_batches_a_step_equal_a_loop_by_hand(draws: int, accumulate: int) -> None:
    data = blobs()
    model = bayesify.to_bbb(small(), initial_std=math.exp(-1.5))
    twin = bayesify.to_bbb(bayesify.to_deterministic(model), initial_std=math.exp(-1.5))
    seen: list[tuple[Tensor, Tensor]] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append((outputs.detach(), targets))
        return F.cross_entropy(outputs, targets)

    batch = 60 // accumulate
    result = fit(
        model, data, epochs=2, batch_size=batch, lr=0.03, logvar_lr=0.1, kl_weight=0.5, seed=3,
        draws_per_step=draws, accumulate=accumulate, max_grad_norm=math.inf, loss=loss,
    )  # fmt: skip
    assert result.steps == 2
    assert len(seen) == 2 * draws * accumulate

    optimizer = torch.optim.AdamW(bayesify.param_groups(twin, lr=0.03, logvar_lr=0.1))
    torch.manual_seed(3)  # of the draws
    twin.train()
    rates = [1.0, 1.0]
    row_of = {tuple(x.tolist()): x for x in data.tensors[0]}
    assert len(row_of) == 60
    orders = orders_of(60, batch, accumulate, epochs=2, seed=3)
    calls = iter(seen)
    for epoch, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate * (0.1 if group["name"] == "logvars" else 0.03)
        total = bayesify.kl_divergence(twin) * 0.5 / 60
        for indices in orders[epoch]:
            for _ in range(draws):
                outputs = twin(data.tensors[0][indices])
                expected, targets = next(calls)
                torch.testing.assert_close(outputs.detach(), expected)
                total = total + F.cross_entropy(outputs, targets) / (draws * accumulate)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    for ours, theirs in zip(weights_of(model), weights_of(twin), strict=True):
        torch.testing.assert_close(ours, theirs)


def orders_of(
    size: int, batch_size: int, accumulate: int, epochs: int, seed: int
) -> list[list[list[int]]]:
    """The batches of each epoch as the fit takes them."""
    order = Order(range(size), batch_size, size // batch_size, seed, False)
    found = []
    for epoch in range(epochs):
        order.epoch = epoch
        found.append(list(order))
    return found


def test_every_epoch_has_an_order_of_its_own() -> None:
    first, second = orders_of(10, 3, 1, epochs=2, seed=0)
    assert first != second
    assert orders_of(10, 3, 1, epochs=2, seed=0) == [first, second]
    assert orders_of(10, 3, 1, epochs=2, seed=1) != [first, second]
    for epoch in (first, second):
        assert [len(batch) for batch in epoch] == [3, 3, 3]
        assert len({index for batch in epoch for index in batch}) == 9
    # ... and may begin at any batch
    order = Order(range(10), 3, 3, 0, False)
    order.first = 2
    assert list(order) == first[2:]
    assert len(order) == 1


def test_the_last_batches_that_make_no_step_wait_for_another_epoch() -> None:
    model = small()
    assert fit(model, blobs(70), epochs=2, batch_size=10, accumulate=3, lr=0.01).steps == 4


def test_the_best_epoch_on_held_out_examples_is_kept() -> None:
    torch.manual_seed(1)
    labels = torch.arange(40) % 2
    noise = TensorDataset(torch.randn(40, 30), labels)  # nothing to learn: later is worse
    model = bayesify.to_bbb(nn.Linear(30, 2), initial_std=math.exp(-4.0))
    kept: list[list[Tensor]] = []
    arguments: dict[str, Any] = {
        "epochs": 12, "batch_size": 30, "lr": 0.1, "holdout": 0.25, "kl_weight": 0.0
    }  # fmt: skip
    result = fit(
        model, noise, **arguments, patience=3, on_step=lambda p: kept.append(weights_of(model))
    )
    assert result.num_data == 30
    best = result.best_epoch
    assert best is not None
    assert result.holdout_losses[best - 1] == min(result.holdout_losses)
    assert len(result.losses) == len(result.holdout_losses) == best + 3 < 12  # out of patience
    # on_step comes before the end of the epoch: the weights are those of its only step
    assert all(map(torch.equal, weights_of(model), kept[best - 1]))
    again = bayesify.to_bbb(nn.Linear(30, 2), initial_std=math.exp(-4.0))
    assert len(fit(again, noise, **arguments).losses) == 12


def test_the_held_out_loss_is_that_of_the_average_of_the_draws() -> None:
    data, model = blobs(), bayesify.to_bbb(small(), initial_std=math.exp(-0.5))
    inputs, targets = data.tensors
    found = held_out_loss(model, [(inputs[:40], targets[:40]), (inputs[40:], targets[40:])],
                          Categorical(), torch.device("cpu"), False, seed=2)  # fmt: skip
    probs = bayesify.predict(model, inputs, num_samples=10, seed=2).softmax(-1).mean(0)
    assert found == pytest.approx(F.nll_loss(probs.log(), targets).item(), rel=1e-5)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    of_each = held_out_loss(model, [(inputs, targets)], loss, torch.device("cpu"), False, seed=2)
    drawn = bayesify.predict(model, inputs, num_samples=10, seed=2)
    expected = [F.cross_entropy(outputs, targets).item() for outputs in drawn]
    assert of_each == pytest.approx(np.mean(expected), rel=1e-5)
    assert of_each > found  # Jensen


def test_held_out_examples_are_not_trained_on() -> None:
    train, held = split(40, 0.25, seed=1)
    assert len(held) == 10
    assert sorted(train + held) == list(range(40))
    assert split(40, 0.25, seed=2) != (train, held)
    seen: set[float] = set()

    class Watched(Dataset[Any]):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.tensor([float(index), 1.0]), index % 3

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            seen.update(last[0][:, 0].tolist())
        return F.cross_entropy(outputs, targets)

    last: list[Tensor] = []
    model = small()
    model.register_forward_pre_hook(lambda _, given: last.__setitem__(slice(None), [given[0]]))
    fit(model, Watched(), epochs=3, batch_size=30, lr=0.01, holdout=0.25, seed=1, loss=loss)
    assert seen == set(map(float, train))


def test_how_far_the_log_variances_went() -> None:
    model = bayesify.to_bbb(small(), initial_std=math.exp(-3.0))
    bayesify.prune_(model, 0.5)
    before = [p.logvar.detach().clone() for p in bayesify.posteriors(model)]
    rates: list[float] = []
    result = fit(
        model, blobs(), epochs=30, batch_size=60, lr=1e-3, logvar_lr=0.02,
        on_step=lambda p: rates.append(20 * p.lr),
    )  # fmt: skip
    after = [p.logvar.detach() for p in bayesify.posteriors(model)]
    pairs = zip(before, after, strict=True)
    moves = torch.cat([(b - a)[b > -100].abs().flatten() for b, a in pairs]).double().numpy()
    assert len(moves) < 51
    found = result.logvars
    assert found is not None
    assert found.bound == pytest.approx(sum(rates))
    assert found.mean == pytest.approx(moves.mean())
    assert found.largest == pytest.approx(moves.max())
    assert found.moved == pytest.approx((moves > 0.1).mean())
    assert 0.1 < found.largest < 1.02 * found.bound  # Adam keeps to it, give or take little
    assert fit(small(), blobs(), epochs=1, batch_size=60, lr=1e-3).logvars is None


def test_batchnorm_may_keep_its_statistics() -> None:
    model = bayesify.to_bbb(
        nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)),
        initial_std=math.exp(-1.5),
    )
    norm = model.get_submodule("1")
    with torch.no_grad():
        norm.running_mean.fill_(0.7)  # type: ignore[operator]
    seen: list[bool] = []
    norm.register_forward_hook(lambda module, *_: seen.append(module.training))
    before = {k: v.clone() for k, v in norm.named_buffers()}
    weight = model.get_parameter("1.weight").detach().clone()
    fit(model, blobs(), epochs=2, batch_size=30, lr=0.05, freeze_batchnorm=True)
    assert all(torch.equal(v, before[k]) for k, v in norm.named_buffers())
    assert seen == [False] * 4
    assert not torch.equal(weight, model.get_parameter("1.weight"))


class Poisoned(nn.Module):
    """Gives infinity from its third call on, or a gradient that is none."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.kind, self.calls = kind, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x * self.scale
        if self.kind == "output" and self.calls > 2:
            return x / 0.0
        if self.kind == "gradient" and self.calls > 2:
            return x + (x - x.detach()).abs().sqrt()  # 0 with an infinite slope
        return x


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("output", r"step 3 of 6.*first layer whose output is not finite is '1' \(Poisoned\)"),
        ("gradient", r"step 3 of 6.*the gradient of '1.scale' is not"),
        ("input", r"step \d of 6.*the batch itself holds NaN"),
        ("parameter", r"step 1 of 6.*the parameter '3.bias' holds NaN"),
        ("loss", r"step 1 of 6.*outputs are finite, so look at the loss"),
    ],
)
@pytest.mark.parametrize("bayesian", [False, True])
def test_the_message_says_where_nan_came_from(kind: str, message: str, bayesian: bool) -> None:
    data = blobs()
    first = nn.Sequential(nn.Linear(2, 4), Poisoned(kind), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model = bayesify.to_bbb(first, initial_std=math.exp(-3.0), only="Linear") if bayesian else first
    if kind == "input":
        data.tensors[0][3, 0] = math.nan
    if kind == "parameter":
        with torch.no_grad():
            model.get_parameter("3.bias")[1] = math.nan

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        broken = math.nan if kind == "loss" else 0.0
        return F.cross_entropy(outputs, targets) + broken

    states: list[dict[str, Tensor]] = [copy.deepcopy(model.state_dict())]
    with pytest.raises(BayesifyError, match=message):
        fit(
            model, data, epochs=2, batch_size=20, lr=0.01, loss=loss,
            on_step=lambda p: states.append(copy.deepcopy(model.state_dict())),
        )  # fmt: skip
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, states[-1][name], rtol=0, atol=0, equal_nan=True)


def test_a_larger_kl_weight_keeps_the_posterior_nearer_the_prior() -> None:
    kls = []
    for weight in (0.0, 1.0, 30.0):
        torch.manual_seed(0)
        model = bayesify.to_bbb(small(), initial_std=math.exp(-2.0))
        kls.append(fit(model, blobs(), epochs=60, batch_size=60, lr=0.02, kl_weight=weight).kl[-1])
    assert kls[0] > 1.5 * kls[1] > 1.5 * 1.5 * kls[2]


def test_the_logvars_have_a_rate_of_their_own() -> None:
    model = bayesify.to_bbb(small(), initial_std=math.exp(-3.0))
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
        nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)),
        initial_std=math.exp(-0.5),
    )
    fit(model, data, epochs=3, batch_size=30, lr=0.05)
    state = model.state_dict()
    activations = data.tensors[0] @ state["0.weight"].T + state["0.bias"]
    torch.testing.assert_close(state["1.running_mean"], activations.mean(0))
    assert not model.training


@pytest.mark.parametrize("average", [0.0, 0.5])
@pytest.mark.parametrize("bayesian", [True, False])
def test_batchnorm_statistics_are_those_of_the_images_that_trained(
    bayesian: bool, average: float
) -> None:
    """Augmented ones: the layers behind have learnt from these, and are handed nothing else."""
    stored = torch.randint(128, 256, (60, 1, 4, 4), dtype=torch.uint8)
    data = ImageData("x", "train", ("0", "1"), InMemory(stored, torch.arange(60) % 2))
    config = InputConfig((1, 4, 4), (0.5,), (0.25,))
    network: Any = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 2))
    model = bayesify.to_bbb(network, initial_std=math.exp(-2.0)) if bayesian else network
    settings: Any = {"batch_size": 30, "lr": 0.01, "model_config": config, "average": average}
    settings |= {"epochs": 80, "accumulate": 2} if average == 0.0 else {"epochs": 4}
    fit(model, data, augment=lambda image: image // 2, **settings)
    pixels = ((stored // 2).float() / 255 - 0.5) / 0.25
    mean, var = pixels.flatten(1).mean(0), pixels.flatten(1).var(0)
    found: Any = model[1]  # type: ignore[index]
    torch.testing.assert_close(found.running_mean, mean, atol=0.02, rtol=0)
    torch.testing.assert_close(found.running_var, var, atol=0.02, rtol=0.05)


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
        ({"average": 1.1}, "average must be from 0 to 1, got 1.1"),
        ({"average": math.nan}, "average must be from 0 to 1"),
        ({"kl_weight": -1.0}, "kl_weight must be"),
        ({"kl_reduction": "mean"}, "kl_reduction must be one of"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0"),
        ({"train": TensorDataset(torch.zeros(0, 2), torch.zeros(0))}, "data set is empty"),
        ({"train": Stream()}, "Stream is a stream.* give num_data="),
        ({"train": [1, 2]}, "got list"),
        ({"kl_shape": "sine"}, "kl_shape must be 'linear' or 'cosine'"),
        ({"logvar_lr": -1.0}, "logvar_lr must be None or at least 0"),
        ({"draws_per_step": 0}, "draws_per_step must be"),
        ({"accumulate": 9}, "accumulate=9 batches of batch_size=9 are more than the 60 training"),
        ({"holdout": 1.0}, "holdout must be from 0"),
        ({"holdout": 0.999}, "leaves none to train on"),
        ({"patience": 2}, "held-out training examples to watch"),
        ({"patience": 0, "holdout": 0.5}, "patience must be None or a whole number"),
        ({"augment": "flip-crop"}, "augment works on an ImageData"),
        ({"train": TensorDataset(torch.zeros(9, 2))}, r"1 values \(Tensor\). Labels missing"),
        ({"train": TensorDataset(torch.zeros(9, 2), torch.zeros(9, 3))}, "soft or one-hot"),
        ({"train": TensorDataset(torch.zeros(9, 2), torch.eye(3).long().repeat(3, 1))}, "one-hot"),
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


def test_labels_of_one_class_are_refused_after_an_epoch() -> None:
    data = TensorDataset(torch.zeros(9, 2), torch.ones(9).long())
    with pytest.raises(ArgumentError, match="first epoch is 1: to classify takes at least two"):
        fit(small(), data, epochs=99, batch_size=3, lr=0.1)


@pytest.mark.parametrize(("capability", "warned"), [("AVX2", 2), ("AVX512", 0)])
def test_amp_warns_on_a_processor_without_bfloat16(
    monkeypatch: pytest.MonkeyPatch, capability: str, warned: int
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model = bayesify.to_bbb(small())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, blobs(), epochs=1, batch_size=20, lr=0.01, amp=True)
        evaluate(model, blobs(), num_samples=2, amp=True)
    found = [w for w in caught if "has no bfloat16 arithmetic" in str(w.message)]
    assert len(found) == warned
    assert all(w.filename == __file__ for w in found)


def test_soft_labels_with_a_loss_that_takes_them() -> None:
    soft = TensorDataset(torch.randn(9, 2), torch.rand(9, 3).softmax(-1))
    assert fit(small(), soft, epochs=1, batch_size=3, lr=0.1, loss=nn.CrossEntropyLoss()).steps == 3


@pytest.mark.filterwarnings("ignore:amp. this processor")
def test_amp_keeps_the_posterior_in_float32() -> None:
    model = bayesify.to_bbb(small())
    dtypes = set()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        dtypes.add(outputs.dtype)
        return F.cross_entropy(outputs, targets)

    fit(model, blobs(), epochs=1, batch_size=20, lr=0.01, amp=True, loss=loss)
    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


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
