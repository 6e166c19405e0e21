"""``fit(average=...)`` against means of the iterates that were kept on the way."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import bayesify
from bayesify.likelihoods import Categorical
from bayesify.training import fit
from bayesify.training.holdout import held_out_loss


def points(n: int = 60) -> TensorDataset:
    labels = torch.arange(n) % 3
    return TensorDataset(torch.randn(n, 2) + labels[:, None], labels)


def network(bayesian: bool) -> nn.Module:
    layers = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    return bayesify.to_bbb(layers, initial_std=math.exp(-2.0)) if bayesian else layers


def values(model: nn.Module) -> list[Any]:
    return [p.detach().double().numpy().copy() for p in model.parameters()]


@pytest.mark.parametrize("bayesian", [True, False])
@pytest.mark.parametrize(("share", "averaged"), [(0.0, 1), (0.1, 2), (0.5, 10), (1.0, 20)])
def test_the_model_gets_the_mean_of_the_last_steps(
    bayesian: bool, share: float, averaged: int
) -> None:
    model, kept = network(bayesian), []
    fit(
        model, points(), epochs=5, batch_size=15, lr=0.05, logvar_lr=0.3, average=share,
        on_step=lambda _: kept.append(values(model)),
    )  # fmt: skip
    assert len(kept) == 20
    for tensor, *iterates in zip(values(model), *kept[-averaged:], strict=True):
        np.testing.assert_allclose(tensor, np.mean(iterates, 0), rtol=1e-5, atol=1e-6)


def test_averaging_leaves_the_way_of_the_fit_alone() -> None:
    start = network(True).state_dict()

    def way(share: float) -> list[Any]:
        model, kept = network(True), []
        model.load_state_dict(start)
        fit(model, points(), epochs=4, batch_size=15, lr=0.05, average=share, holdout=0.2,
            on_step=lambda _: kept.append(values(model)))  # fmt: skip
        return kept

    torch.manual_seed(0)
    plain = way(0.0)
    torch.manual_seed(0)
    for step, same in zip(plain, way(0.7), strict=True):
        assert all(map(np.array_equal, step, same))


@pytest.mark.parametrize("bayesian", [True, False])
def test_batchnorm_statistics_are_those_of_the_mean(bayesian: bool) -> None:
    data, model = points(), network(bayesian)
    fit(model, data, epochs=4, batch_size=60, lr=0.1, average=0.5)
    state = model.state_dict()
    activations = data.tensors[0] @ state["0.weight"].T + state["0.bias"]
    torch.testing.assert_close(state["1.running_mean"], activations.mean(0))
    torch.testing.assert_close(state["1.running_var"], activations.var(0))


def test_held_out_losses_are_those_of_the_mean() -> None:
    data, kept = points(), []
    model = bayesify.to_bbb(nn.Linear(2, 3), initial_std=math.exp(-2.0))
    result = fit(model, data, epochs=4, batch_size=48, lr=0.5, average=0.5, holdout=0.2, seed=2,
                 on_step=lambda _: kept.append(values(model)))  # fmt: skip
    assert result.steps == 4
    # the first two epochs, of one step each, are not averaged
    expected = [kept[0], kept[1], kept[2], [np.mean(v, 0) for v in zip(*kept[2:], strict=True)]]
    held: list[tuple[Tensor, Tensor]] = [data[i] for i in held_indices(60, 0.2, 2)]
    inputs, targets = (torch.stack(part) for part in zip(*held, strict=True))
    for tensors, loss in zip(expected, result.holdout_losses, strict=True):
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), tensors, strict=True):
                parameter.copy_(torch.from_numpy(value))
        again = held_out_loss(
            model, [(inputs, targets)], Categorical(), torch.device("cpu"), False, 2
        )
        assert math.isclose(loss, again, rel_tol=1e-5)


def held_indices(size: int, share: float, seed: int) -> list[int]:
    from bayesify.training.batches import split

    return split(size, share, seed)[1]
