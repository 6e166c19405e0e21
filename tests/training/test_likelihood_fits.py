"""What a fit does with a likelihood: guessing, masks, weights, loaders, resumption."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import bayesify
from bayesify import ArgumentError
from bayesify.likelihoods import (
    Bernoulli,
    Categorical,
    FromDistribution,
    Gaussian,
    Likelihood,
    likelihood_of,
)
from bayesify.training import Interrupted, Progress, fit


def points(n: int = 24, outputs: int = 1) -> TensorDataset:
    x = torch.randn(n, 2)
    return TensorDataset(x, x @ torch.randn(2, outputs) + 0.3 * torch.randn(n, outputs))


def labelled(n: int = 24) -> TensorDataset:
    return TensorDataset(torch.randn(n, 2), torch.arange(n) % 3)


def net(outputs: int = 1) -> nn.Module:
    return bayesify.to_bbb(nn.Linear(2, outputs), initial_std=math.exp(-2.0))


def twins(outputs: int = 1) -> tuple[nn.Module, nn.Module]:
    one, other = net(outputs), net(outputs)
    other.load_state_dict(one.state_dict())
    return one, other


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


OPTIONS: dict[str, Any] = {"epochs": 3, "batch_size": 8, "lr": 0.02}


# -- guessing ------------------------------------------------------------------------------------


def test_a_guessed_classifier_is_trained_as_by_cross_entropy_bit_for_bit() -> None:
    data, lines = labelled(), list[str]()
    guessed, by_loss = twins(3)
    found = fit(guessed, data, **OPTIONS, holdout=0.25, on_start=lines.append)
    expected = fit(by_loss, data, **OPTIONS, holdout=0.25, loss=lambda f, y: F.cross_entropy(f, y))
    assert same(guessed, by_loss)
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert repr(likelihood_of(guessed)) == "Categorical(dim=-1, ignore_index=-100)"
    assert likelihood_of(by_loss) is None
    [line] = lines
    assert line.startswith("Likelihood Categorical(dim=-1, ignore_index=-100), guessed from whole")
    assert "KL of 9 weights" in line
    again, given = twins(3)
    fit(again, data, **OPTIONS)
    fit(given, data, **OPTIONS, likelihood=Categorical())
    assert same(again, given)


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        (3, torch.randn(24), "soft or one-hot, or none"),
        (3, torch.rand(24, 3), "soft or one-hot"),
        (1, torch.randn(24, 1), "needs logits of the shape"),
        (1, torch.arange(24) % 2, "needs logits of the shape"),
        (3, torch.randint(2, (24, 3)), "soft or one-hot"),
        (2, torch.arange(24) % 3, "Label 2 is out of range"),
    ],
)
def test_anything_else_names_the_likelihoods(outputs: int, targets: Tensor, message: str) -> None:
    data, model = TensorDataset(torch.randn(24, 2), targets), net(outputs)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ArgumentError, match=message) as caught:
        fit(model, data, **OPTIONS)
    if "range" not in message:
        for name in ("Gaussian()", "Bernoulli()", "Categorical(dim=...)", "FromDistribution(f)"):
            assert name in str(caught.value)
    assert all(map(torch.equal, before, model.parameters()))
    assert likelihood_of(model) is None


def test_the_likelihood_of_the_model_is_taken() -> None:
    data, (one, other) = points(), twins()
    fit(one, data, **OPTIONS, likelihood=Gaussian(0.5))
    bayesify.set_likelihood_(other, Gaussian(0.5))
    fit(other, data, **OPTIONS)
    assert same(one, other)


def test_learned_noise_is_trained_without_decay_and_kept(tmp_path: Path) -> None:
    likelihood, model = Gaussian(), net()
    result = fit(model, points(), epochs=100, batch_size=24, lr=0.1, likelihood=likelihood,
                 average=0.25)  # fmt: skip
    assert likelihood_of(model) is likelihood
    assert likelihood.log_noise is not None
    assert float(likelihood.log_noise.detach()) < -0.3
    assert result.logvars is not None
    assert result.logvars.bound == pytest.approx(sum(_rate(t, 100) for t in range(100)))
    bayesify.save(model, tmp_path / "a")
    again = likelihood_of(bayesify.load(tmp_path / "a", nn.Linear(2, 1)))
    assert isinstance(again, Gaussian)
    assert torch.equal(again.std(), likelihood.std())


def _rate(step: int, steps: int) -> float:
    warm = max(1, round(0.05 * steps))
    return (step + 1) / warm if step < warm else 0.5 * (
        1 + math.cos(math.pi * (step - warm) / (steps - warm))
    )  # fmt: skip


def test_a_deterministic_model_learns_noise_too() -> None:
    model, likelihood = nn.Linear(2, 1), Gaussian()
    fit(model, points(), epochs=100, batch_size=24, lr=0.1, likelihood=likelihood)
    assert float(likelihood.std().detach()) < 0.8


# -- targets -------------------------------------------------------------------------------------


def test_losses_are_shown_for_one_target() -> None:
    x, y = torch.randn(16, 2), torch.randn(16, 5)
    y[:, 3:] = torch.nan
    model, lines, shown = (
        bayesify.to_bbb(nn.Linear(2, 5), initial_std=math.exp(-10.0)),
        list[str](),
        list[float](),
    )
    with torch.no_grad():
        before = model(x)
    result = fit(model, TensorDataset(x, y), likelihood=Gaussian(1.0), epochs=1, batch_size=16,
                 lr=1e-9, on_start=lines.append,
                 on_step=lambda p: shown.append(p.loss))  # fmt: skip
    expected = 0.5 * (before - y)[:, :3].square().mean() + 0.5 * math.log(2 * math.pi)
    assert result.losses == pytest.approx([float(expected)], rel=1e-4)
    assert shown == pytest.approx(result.losses)
    weights = 15
    assert result.noise_budget == pytest.approx(weights / 16 / 2 / 3)
    assert lines[0].endswith(f"= {weights / 16 / 2 / 3:.3g} nats a target (3 targets an example)")


def test_a_wholly_masked_batch_counts_nothing_and_an_epoch_of_them_is_refused() -> None:
    x, y = torch.randn(24, 2), torch.randn(24, 1)
    y[8:] = torch.nan
    losses: list[float] = []
    loader = DataLoader(TensorDataset(x, y), 8)
    model = net()
    fit(model, loader, likelihood=Gaussian(1.0), epochs=1, lr=0.01,
        on_step=lambda p: losses.append(p.loss))  # fmt: skip
    assert losses[0] > 0
    assert losses[1:] == [0, 0]
    assert all(p.isfinite().all() for p in model.parameters())
    nothing = TensorDataset(x, torch.full((24, 1), torch.nan))
    with pytest.raises(ArgumentError, match="Every target of an epoch is masked"):
        fit(net(), nothing, likelihood=Gaussian(), **OPTIONS)
    none = TensorDataset(x, torch.full((24,), -100))
    with pytest.raises(ArgumentError, match="Every target of an epoch is masked"):
        fit(net(3), none, likelihood=Categorical(), **OPTIONS)


def test_dense_labels_with_an_ignored_one() -> None:
    images, labels = torch.randn(8, 3, 4, 4), torch.randint(5, (8, 4, 4))
    labels[:, :2] = 11
    model = bayesify.to_bbb(nn.Conv2d(3, 5, 1))
    twin = bayesify.to_bbb(bayesify.to_deterministic(model))
    data, likelihood = TensorDataset(images, labels), Categorical(dim=1, ignore_index=11)

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f, y, ignore_index=11, reduction="sum") / len(y)

    options: dict[str, Any] = {"epochs": 2, "batch_size": 4, "lr": 0.01, "max_grad_norm": math.inf}
    result = fit(model, data, likelihood=likelihood, **options)
    other = fit(twin, data, loss=loss, **options)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert result.losses == pytest.approx([v / 8 for v in other.losses], rel=1e-5)


def test_yes_or_no_and_counts() -> None:
    x = torch.randn(32, 2)
    several = TensorDataset(x, (x @ torch.randn(2, 3) > 0).float())
    model = net(3)
    result = fit(model, several, likelihood=Bernoulli(), epochs=40, batch_size=32, lr=0.1)
    assert result.losses[-1] < 0.6 < result.losses[0]
    poisson = FromDistribution(lambda f: torch.distributions.Poisson(f.exp()))
    counts = TensorDataset(x, torch.poisson((0.5 * x[:, :1]).exp()))
    fit(net(), counts, likelihood=poisson, **OPTIONS)


# -- data ----------------------------------------------------------------------------------------


def test_a_loader_gives_its_own_batches() -> None:
    data, seen = points(20), list[Tensor]()
    model = net()
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    result = fit(model, DataLoader(data, 8), likelihood=Gaussian(1.0), epochs=2, lr=0.01)
    assert (result.steps, result.num_data) == (6, 20)
    x = data.tensors[0]
    for got, expected in zip(seen, [*x.split(8)] * 2, strict=True):
        assert torch.equal(got, expected)
    dropped = fit(net(), DataLoader(data, 8, drop_last=True), likelihood=Gaussian(1.0), epochs=2,
                  lr=0.01, accumulate=2)  # fmt: skip
    assert dropped.steps == 2


def test_how_many_examples_a_sampler_gives() -> None:
    data = points(20)

    def number(**options: Any) -> int:
        loader = DataLoader(data, 5, **options)
        return fit(net(), loader, likelihood=Gaussian(1.0), epochs=1, lr=0.01).num_data

    assert number() == number(shuffle=True) == 20
    assert number(sampler=SubsetRandomSampler(range(15))) == 15
    for sampler in (
        WeightedRandomSampler([1.0] * 20, 40), RandomSampler(data, replacement=True, num_samples=9)
    ):  # fmt: skip
        with pytest.warns(UserWarning, match=r"posterior is that of the resampled data.*N = 20"):
            assert number(sampler=sampler) == 20
    loader = DataLoader(data, 5)
    assert fit(net(), loader, likelihood=Gaussian(1.0), epochs=1, lr=0.01,
               num_data=1000).kl_scale == 1 / 1000  # fmt: skip


class Stream(IterableDataset[Any]):
    def __init__(self, data: TensorDataset) -> None:
        self.data, self.begun = data, 0

    def __iter__(self) -> Any:
        self.begun += 1
        return iter([self.data[i] for i in range(len(self.data))])


def test_streams_begin_again_where_they_end() -> None:
    data, (one, other) = points(16), twins()
    stream = Stream(data)
    result = fit(one, stream, likelihood=Gaussian(1.0), num_data=16, **OPTIONS)
    assert (result.steps, result.num_data, stream.begun) == (6, 16, 3)
    fit(other, DataLoader(data, 8), likelihood=Gaussian(1.0), epochs=3, lr=0.02)
    assert same(one, other)
    longer = Stream(points(40))  # an epoch is num_data examples, wherever it is
    assert fit(net(), longer, likelihood=Gaussian(1.0), num_data=16, **OPTIONS).steps == 6
    assert longer.begun == 2
    empty = Stream(points(0))
    with pytest.raises(ArgumentError, match="gave no example"):
        fit(net(), empty, likelihood=Gaussian(1.0), num_data=16, **OPTIONS)


class Dicts(Dataset[Any]):
    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        x, y = self.data[i]
        return {"x": x, "offset": 0 * x[:1], "y": y}


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        out: Tensor = self.norm(self.linear(x))
        return out if offset is None else out + offset


@pytest.mark.parametrize("bayesian", [True, False])
def test_batches_that_are_dicts(bayesian: bool) -> None:
    data, start = points(), Named()

    def run(train: Any, inputs: Any) -> nn.Module:
        model: nn.Module = Named()
        model.load_state_dict(start.state_dict())
        model = bayesify.to_bbb(model) if bayesian else model
        fit(model, train, likelihood=Gaussian(0.5), inputs=inputs, **OPTIONS, average=0.5,
            holdout=0.25)  # fmt: skip
        return model

    plain = run(data, None)
    by_names = run(Dicts(data), ("x", "offset"))
    by_function = run(Dicts(data), lambda batch: (batch["x"], batch["y"]))
    assert same(plain, by_names)
    assert same(plain, by_function)
    for (name, ours), theirs in zip(by_names.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": Dicts(points())}, "a mapping with 'x', 'offset', 'y': say which"),
        ({"train": Dicts(points()), "inputs": "z"}, "inputs names 'z', and a batch has 'x'"),
        ({"train": Dicts(points()), "inputs": ("x", "offset", "y")}, "the target is missing"),
        ({"inputs": "x"}, "names entries of a batch, and batches are list"),
        ({"train": Stream(points())}, "Stream is a stream.*give num_data="),
        ({"train": DataLoader(points(), 8)}, "a DataLoader has a batch_size of its own"),
        ({"train": DataLoader(points(), 8), "batch_size": None, "holdout": 0.5}, "give the data s"),
        ({"train": DataLoader(points(), 8), "batch_size": None, "checkpoint": "x"}, "the data set"),
        ({"train": DataLoader(points(), 8), "batch_size": None, "accumulate": 4}, "the 3 of the D"),
        ({"batch_size": None}, "batch_size is missing"),
        ({"num_data": 0}, "num_data must be a whole number above 0"),
        ({"loss": F.mse_loss}, "a likelihood or a loss, not both"),
        ({"likelihood": "Gaussian"}, "A likelihood is needed"),
        ({"likelihood": Bernoulli()}, "0 or 1, and one is"),
        ({"likelihood": Gaussian(1.0, outputs=None, dim=2)}, "has the axes 1 to 1"),
        ({"likelihood": Gaussian(outputs=3)}, "learned noise is of 3 outputs"),
        ({"train": TensorDataset(torch.zeros(8, 2), torch.zeros(8, 1), torch.ones(8).neg())},
         "third value of a batch must be the weights"),
        ({"train": TensorDataset(torch.zeros(8, 2), torch.zeros(8, 1), torch.arange(8))},
         "third value of a batch must be the weights"),
        ({"train": TensorDataset(torch.zeros(8, 2), torch.zeros(8, 1), torch.ones(8)),
          "likelihood": None, "loss": F.mse_loss}, "weights, and a loss gives one number"),
    ],
)  # fmt: skip
def test_bad_input(options: dict[str, Any], message: str) -> None:
    model = net()
    before = [p.clone() for p in model.parameters()]
    arguments: dict[str, Any] = {**OPTIONS, "train": points(), "likelihood": Gaussian(1.0)}
    with pytest.raises(ArgumentError, match=message):
        fit(model, **{**arguments, **options})
    assert all(map(torch.equal, before, model.parameters()))


# -- resumption ----------------------------------------------------------------------------------


def interrupting(at: int) -> Any:
    def on_step(progress: Progress) -> None:
        if progress.step == at:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step


@pytest.mark.filterwarnings("ignore:The fit in .* has ended")  # one is stopped at its last step
@pytest.mark.parametrize("stop", [1, 4, 6])
def test_an_interrupted_fit_goes_on_with_its_noise(tmp_path: Path, stop: int) -> None:
    x, y = torch.randn(24, 2), torch.randn(24, 3)
    y[torch.rand(24, 3) < 0.4] = torch.nan
    data = TensorDataset(x, y)
    options: dict[str, Any] = {**OPTIONS, "holdout": 0.3, "average": 0.5}
    start = net(3)

    def make() -> tuple[nn.Module, Gaussian]:
        model = net(3)
        model.load_state_dict(start.state_dict())
        return model, Gaussian()

    whole, noise = make()
    expected = fit(whole, data, likelihood=noise, **options)
    path = tmp_path / "state"
    model, first = make()
    with pytest.raises(Interrupted):
        fit(model, data, likelihood=first, checkpoint=path, on_step=interrupting(stop), **options)
    model, again = make()
    found = fit(model, data, likelihood=again, checkpoint=path, resume=True, **options)
    assert same(model, whole)
    assert torch.equal(again.std(), noise.std())
    assert found.losses == expected.losses
    assert found.holdout_losses == expected.holdout_losses
    assert found.noise_budget == expected.noise_budget
    other, _ = make()
    with pytest.raises(ArgumentError, match="cannot go on with likelihood="):
        fit(other, data, likelihood=Gaussian(1.0), checkpoint=path, resume=True, **options)


def test_the_best_epoch_has_its_noise() -> None:
    """Held-out examples choose weights and noise together."""
    model, likelihood = net(), Gaussian()
    kept: list[float] = []

    def on_step(_: Progress) -> None:
        kept.append(float(likelihood.std().detach()))

    data = TensorDataset(torch.randn(20, 2), torch.randn(20, 1))
    result = fit(model, data, likelihood=likelihood, epochs=8, batch_size=10, lr=0.2, holdout=0.5,
                 on_step=on_step)  # fmt: skip
    assert result.best_epoch is not None
    assert float(likelihood.std().detach()) == pytest.approx(kept[result.best_epoch - 1])


@pytest.mark.parametrize(
    ("likelihood", "outputs", "targets"),
    [
        (Gaussian(0.7), 1, torch.randn(10, 1)),
        (Categorical(), 3, torch.arange(10) % 3),
        (Bernoulli(), 2, torch.randint(2, (10, 2))),
    ],
)
def test_the_held_out_loss_is_that_of_the_mixture(
    likelihood: Likelihood, outputs: int, targets: Tensor
) -> None:
    from bayesify.training.holdout import held_out_loss

    model, x = (
        bayesify.to_bbb(nn.Linear(2, outputs), initial_std=math.exp(-0.5)),
        torch.randn(10, 2),
    )
    batches = [(x[:7], targets[:7]), (x[7:], targets[7:])]
    found = held_out_loss(model, batches, likelihood, torch.device("cpu"), False, seed=3)
    drawn = bayesify.predict(model, x, num_samples=10, seed=3)
    each = torch.stack([likelihood.log_densities(f, targets) for f in drawn]).double()
    expected = -(each.logsumexp(0) - math.log(10)).mean()
    assert found == pytest.approx(float(expected), rel=1e-5)
