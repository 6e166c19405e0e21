"""pruning/: which weights are pruned, that they stay pruned, and what is counted."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from timm.models import vision_transformer
from torch import Tensor, fx, nn
from torch.nn.utils import prune as torch_prune
from torch.utils.data import TensorDataset

import bayesify
from bayesify import (
    keep_pruned_,
    multiply_adds,
    prune_,
    prune_n_of_m_,
    prune_units_,
    sparsity,
    sparsity_schedule,
)
from bayesify.errors import ArgumentError, NoMatchError, UnsupportedModuleError
from bayesify.posterior import Site, bayesian_sites

# of timm.layers from timm 1.0.16 on
Attention: Any = vars(vision_transformer)["Attention"]
Array = npt.NDArray[np.float64]


class Net(nn.Module):
    """A classifier of images of 8 x 8 pixels; the first convolution has no multiple of 4 inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.fc = nn.Linear(12, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.conv(x).relu().mean((2, 3))
        result: Tensor = self.head(self.fc(x).relu())
        return result


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.out = nn.Linear(4, 10, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.embedding(x))
        return result


def bayesian(model: nn.Module | None = None, **options: Any) -> nn.Module:
    """A converted model whose sigmas differ from weight to weight."""
    converted = bayesify.to_bbb(Net() if model is None else model, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for site in bayesian_sites(converted):
            noise = torch.randn(site.raw.shape, generator=generator)
            site.raw.copy_(-6.0 + noise)
    return converted


def by_name(model: nn.Module) -> dict[str, Site]:
    return {site.name: site for site in bayesian_sites(model)}


def numbers(model: nn.Module) -> dict[str, tuple[Array, Array]]:
    """Mean and sigma of each tensor, sigma by numpy."""
    result = {}
    for site in bayesian_sites(model):
        raw = site.raw.detach().double().numpy()
        std = np.exp(raw / 2) if site.slot.parameterization == "exp" else np.log1p(np.exp(raw))
        result[site.name] = (site.mean.detach().double().numpy(), std)
    return result


def is_pruned(model: nn.Module, name: str) -> npt.NDArray[np.bool_]:
    """What is 0 with a sigma of 0; nothing is 0 in one of them only."""
    site = by_name(model)[name]
    zero = (site.mean == 0).numpy()
    np.testing.assert_array_equal((site.std == 0).detach().numpy(), zero)
    return zero


def lowest(scores: Array, share: float) -> npt.NDArray[np.bool_]:
    """The lowest scores by a full sort."""
    mask = np.zeros(scores.size, dtype=bool)
    mask[np.argsort(scores.ravel(), kind="stable")[: round(share * scores.size)]] = True
    return mask.reshape(scores.shape)


WEIGHTS = ("stem.weight", "conv.weight", "fc.weight", "head.weight")


# -- which weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("parameterization", ["exp", "softplus"])
@pytest.mark.parametrize("share", [0.0, 0.123, 0.5, 0.98])
def test_the_lowest_snr_of_each_tensor(parameterization: Any, share: float) -> None:
    model = bayesian(config=bayesify.BBBConfig(parameterization=parameterization))
    before = numbers(model)
    assert prune_(model, share) is model
    for name, (mean, std) in before.items():
        snr = np.abs(mean) / std
        expected = lowest(snr, share) if name in WEIGHTS else np.zeros(mean.shape, dtype=bool)
        if name.startswith("norm") or name.endswith("bias"):
            np.testing.assert_array_equal(by_name(model)[name].std.detach() == 0, expected)
            continue
        np.testing.assert_array_equal(is_pruned(model, name), expected)
        kept = ~expected
        np.testing.assert_array_equal(numbers(model)[name][0][kept], mean[kept])
        np.testing.assert_array_equal(numbers(model)[name][1][kept], std[kept])
        if share:
            limit = np.quantile(snr, round(share * snr.size) / snr.size, method="inverted_cdf")
            assert snr[expected].max() <= limit < snr[kept].min()


@pytest.mark.parametrize("score", ["snr", "magnitude", "variance"])
def test_the_lowest_of_all_tensors(score: Any) -> None:
    model = bayesian()
    before = numbers(model)
    formula: dict[str, Callable[[Array, Array], Array]] = {
        "snr": lambda mean, std: np.abs(mean) / std,
        "magnitude": lambda mean, std: np.abs(mean),
        "variance": lambda mean, std: -(std**2),
    }
    scores = [formula[score](*before[name]) for name in WEIGHTS]
    mask = lowest(np.concatenate([s.ravel() for s in scores]), 0.7)
    prune_(model, 0.7, score=score, scope="global")
    for name, part in zip(
        WEIGHTS, np.split(mask, np.cumsum([s.size for s in scores])[:-1]), strict=True
    ):
        np.testing.assert_array_equal(is_pruned(model, name).ravel(), part)


@pytest.mark.parametrize("share", [0.1, 0.333, 0.8])
def test_magnitude_is_that_of_torch(share: float) -> None:
    net = Net()
    model = prune_(bayesian(net), share, score="magnitude")
    everywhere = prune_(bayesian(net), share, score="magnitude", scope="global")
    for name in WEIGHTS:
        pruned: Any = torch_prune.l1_unstructured(
            copy.deepcopy(net).get_submodule(name.removesuffix(".weight")), "weight", share
        )
        assert torch.equal(bayesify.to_deterministic(model).get_parameter(name), pruned.weight)
    twin = copy.deepcopy(net)
    layers: list[tuple[Any, str]] = [
        (twin.get_submodule(name.removesuffix(".weight")), "weight") for name in WEIGHTS
    ]
    torch_prune.global_unstructured(layers, pruning_method=torch_prune.L1Unstructured, amount=share)
    back = bayesify.to_deterministic(everywhere)
    assert type(back) is Net
    for name, (layer, _) in zip(WEIGHTS, layers, strict=True):
        assert torch.equal(back.get_parameter(name), layer.weight)
    # what is 0 already is what torch would prune next
    head: Any = back.head
    ours = head.weight != 0
    torch_prune.l1_unstructured(head, "weight", int((~ours).sum()))
    assert torch.equal(head.weight_mask.bool(), ours)


def test_random_is_a_function_of_the_seed() -> None:
    masks = []
    for seed in (0, 0, 1):
        model = prune_(bayesian(), 0.5, score="random", seed=seed)
        masks.append(np.concatenate([is_pruned(model, name).ravel() for name in WEIGHTS]))
    np.testing.assert_array_equal(masks[0], masks[1])
    assert 0.4 < (masks[0] == masks[2]).mean() < 0.6
    drawn = bayesify.draws(bayesian(), seed=0)["conv.weight"].detach()
    noise = (drawn - bayesian().get_parameter("conv.weight").detach()).numpy().ravel()
    correlation = np.corrcoef(noise, is_pruned(prune_(bayesian(), 0.5, score="random"),
                                               "conv.weight").ravel())  # fmt: skip
    assert abs(correlation[0, 1]) < 0.2  # the draw of the same seed has other noise


def test_a_score_of_ones_own() -> None:
    def position(site: Site) -> Tensor:
        return torch.arange(site.mean.numel()).view_as(site.mean)

    model = prune_(bayesian(), 0.25, score=position, only="fc.weight")
    expected = (np.arange(192) < 48).reshape(16, 12)
    np.testing.assert_array_equal(is_pruned(model, "fc.weight"), expected)
    assert sparsity(model).pruned == 48


def test_equal_scores_are_cut_at_the_share() -> None:
    model = prune_(bayesian(), 0.3, score=lambda site: torch.ones_like(site.mean), only="fc.weight")
    np.testing.assert_array_equal(is_pruned(model, "fc.weight").ravel(), np.arange(192) < 58)


def test_a_mean_of_zero_goes_first_whatever_its_sigma() -> None:
    model = bayesify.to_bbb(
        nn.Linear(4, 1, bias=False), initial_std=math.exp(-500.0)
    )  # sigma is 0: 0 / 0
    with torch.no_grad():
        model.get_parameter("weight").copy_(torch.tensor([[1.0, 0.0, 2.0, 3.0]]))
    prune_(model, 0.25)
    assert sparsity(model).pruned == 1
    assert model.get_parameter("weight_logvar").argmin() == 1


def test_patterns_and_dimensions() -> None:
    def taken(**options: Any) -> list[str]:
        rows = sparsity(prune_(bayesian(), 0.5, **options)).rows
        return [row.name for row in rows if row.pruned]

    assert taken() == list(WEIGHTS)
    assert taken(only=("Conv2d", "head")) == ["stem.weight", "conv.weight", "head.weight"]
    assert taken(only=nn.Conv2d, skip="stem") == ["conv.weight"]
    assert taken(only="head", min_dim=1) == ["head.weight", "head.bias"]
    assert set(taken(min_dim=1)) == set(by_name(bayesian()))


def test_a_part_of_a_model() -> None:
    model = bayesian()
    prune_(model.get_submodule("fc"), 0.5)
    assert [row.name for row in sparsity(model).rows if row.pruned] == ["fc.weight"]


# -- what pruned means -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::bayesify.SigmaBelowSpacingWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("parameterization", ["exp", "softplus"])
def test_every_draw_of_a_pruned_weight_is_0(dtype: torch.dtype, parameterization: Any) -> None:
    config = bayesify.BBBConfig(parameterization=parameterization)
    model = prune_(bayesian(Net().to(dtype), config=config), 0.5)
    for seed in range(3):
        for name, drawn in bayesify.draws(model, seed).items():
            mask = torch.from_numpy(is_pruned(model, name)) if name in WEIGHTS else None
            if mask is not None:
                assert int((drawn == 0).sum()) == int(mask.sum())
                assert bool((drawn[mask] == 0).all())


def test_tied_weights_are_pruned_once() -> None:
    model = prune_(bayesian(Tied()), 0.5)
    [row] = sparsity(model).rows
    assert (row.elements, row.pruned) == (40, 20)
    assert bayesify.to_deterministic(model).get_parameter("out.weight").eq(0).sum() == 20
    model.train()
    optimizer = torch.optim.SGD(bayesify.param_groups(model, lr=0.1), momentum=0.9)
    step(model, optimizer, torch.arange(10), torch.arange(10))
    assert (is_pruned(model, "embedding.weight")).sum() == 20
    assert sum(1 for _ in bayesian_sites(model)) == 1
    model.embedding = nn.Embedding(10, 4)  # where it was pruned is gone, its twin is not
    gc.collect()
    keep_pruned_(model)
    step(model, optimizer, torch.arange(10), torch.arange(10))
    assert is_pruned(model, "out.weight").sum() == 20


def test_the_keys_of_the_state_dict_are_those_of_before() -> None:
    assert prune_(bayesian(), 0.5).state_dict().keys() == bayesian().state_dict().keys()


def test_pruning_further_revives_nothing() -> None:
    model = bayesian()
    masks = []
    for share in (0.2, 0.5, 0.3, 0.9):
        prune_(model, share, score="random" if share == 0.9 else "snr")
        masks.append(np.concatenate([is_pruned(model, name).ravel() for name in WEIGHTS]))
    shares = [mask.mean() for mask in masks]
    np.testing.assert_allclose(shares, [0.2, 0.5, 0.5, 0.9], atol=0.01)
    np.testing.assert_array_equal(masks[1], masks[2])
    assert all((later >= earlier).all() for earlier, later in itertools.pairwise(masks))


@pytest.mark.parametrize("parameterization", ["exp", "softplus"])
@pytest.mark.parametrize("mean", [0.0, "initial"])
@pytest.mark.parametrize("drawn", [False, True])
def test_the_kl_leaves_pruned_weights_out(parameterization: Any, mean: Any, drawn: bool) -> None:
    config = bayesify.BBBConfig(parameterization=parameterization)
    model = bayesian(prior=bayesify.GaussianPrior(0.5, mean=mean), config=config)
    initial = numbers(model)
    prune_(model, 0.5)
    expected = 0.0
    for name, (mu, std) in numbers(model).items():
        kept = std > 0
        m = initial[name][0][kept] if mean == "initial" else 0.0
        terms = (std[kept] ** 2 + (mu[kept] - m) ** 2) / 0.25 - 1 - np.log(std[kept] ** 2 / 0.25)
        expected += 0.5 * terms.sum()
    if drawn:  # the KL may then ride along in the backward of the draw
        loss = model.train()(batch()[0]).sum()
    kl = bayesify.kl_divergence(model)
    np.testing.assert_allclose(kl.item(), expected, rtol=1e-5)
    for site in bayesian_sites(model):
        total = 0.0 * loss + kl if drawn else kl
        for grad in torch.autograd.grad(total, (site.mean, site.raw), retain_graph=True):
            assert bool(grad.isfinite().all())
            assert not grad[(site.std == 0) & (site.mean == 0)].any()


def test_the_drawn_kl_leaves_pruned_weights_out() -> None:
    model = bayesify.to_bbb(nn.Linear(4, 2, bias=False), initial_std=math.exp(-1.0))
    bayesify.set_prior_(model, bayesify.ScaleMixturePrior())
    half = bayesify.to_bbb(nn.Linear(4, 2, bias=False), initial_std=math.exp(-1.0))
    half.load_state_dict(model.state_dict())
    prune_(model, 0.5)
    kept = torch.from_numpy(~is_pruned(model, "weight"))
    with bayesify.one_draw(model, seed=0):
        found = bayesify.kl_divergence(model)
    for grad in torch.autograd.grad(found, list(model.parameters()), retain_graph=True):
        assert bool(grad.isfinite().all())
        assert bool(grad[kept].all())
        assert not grad[~kept].any()
    drawn = bayesify.draws(half, seed=0)["weight"][kept]
    log_q = torch.distributions.Normal(half.get_parameter("weight")[kept], math.exp(-1.0))
    log_p = bayesify.ScaleMixturePrior().log_density(drawn)
    torch.testing.assert_close(found, (log_q.log_prob(drawn) - log_p).sum())


class Caching(nn.Module):
    """Keeps a function of its weight in eval(), as timm's levit does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.kept is None:
            self.kept = 2.0 * self.weight.detach()
        return nn.functional.linear(x, self.kept)


def test_what_was_computed_from_the_weights_is_computed_anew() -> None:
    model = bayesian(Caching()).eval()
    x = torch.randn(2, 4)
    before = model(x)
    prune_(model, 0.5)
    assert not torch.equal(model(x), before)
    torch.testing.assert_close(model(x), x @ (2.0 * model.get_parameter("weight").T))


# -- training --------------------------------------------------------------------------------


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    optimizer.step()
    return norm


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(16, 3, 8, 8), torch.randint(5, (16,))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True),
    "AdamW": lambda groups: torch.optim.AdamW(groups, amsgrad=True),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("parameterization", ["exp", "softplus"])
def test_masks_survive_training(name: str, parameterization: Any) -> None:
    model = bayesian(config=bayesify.BBBConfig(parameterization=parameterization))
    model.train()
    groups = bayesify.param_groups(model, lr=0.05, logvar_lr=0.5, weight_decay=0.1)
    groups[-1]["weight_decay"] = 0.1  # against all advice
    optimizer = OPTIMIZERS[name](groups)
    x, y = batch()
    for _ in range(3):
        step(model, optimizer, x, y)  # momentum points away from 0
    prune_(model, 0.5)
    before = {weight: is_pruned(model, weight) for weight in WEIGHTS}
    means = {weight: by_name(model)[weight].mean.detach().clone() for weight in WEIGHTS}
    raws = {weight: by_name(model)[weight].raw.detach().clone() for weight in WEIGHTS}
    for _ in range(4):
        step(model, optimizer, x, y)
        for weight, mask in before.items():
            np.testing.assert_array_equal(is_pruned(model, weight), mask)
    for weight, mask in before.items():
        kept = torch.from_numpy(~mask)
        assert not torch.equal(by_name(model)[weight].mean[kept], means[weight][kept])
        assert not torch.equal(by_name(model)[weight].raw[kept], raws[weight][kept])


def test_training_is_that_of_torch_prune() -> None:
    net = Net()
    model = bayesify.to_bbb(net, initial_std=math.exp(-500.0))  # sigma is 0: a deterministic model
    prune_(model, 0.5, score="magnitude").train()
    for name in WEIGHTS:
        torch_prune.l1_unstructured(net.get_submodule(name.removesuffix(".weight")), "weight", 0.5)
    ours = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    x, y = batch()
    for _ in range(5):
        torch.testing.assert_close(step(model, ours, x, y), step(net, theirs, x, y))
    back = bayesify.to_deterministic(model)
    for name in WEIGHTS:
        layer: Any = net.get_submodule(name.removesuffix(".weight"))
        torch.testing.assert_close(back.get_parameter(name), layer.weight_orig * layer.weight_mask)


def copied_by_pickle(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def copied_by_torch(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def copied_by_state_dict(model: nn.Module) -> Any:
    fresh = bayesian()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    fresh.load_state_dict(state, assign=True)
    return keep_pruned_(fresh)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copied_by_pickle, copied_by_torch, copied_by_state_dict]
)
def test_a_copy_stays_pruned_by_itself(copied: Callable[[nn.Module], Any]) -> None:
    model = prune_(bayesian(), 0.5)
    masks = {name: is_pruned(model, name) for name in WEIGHTS}
    twin = copied(model)
    prune_(model, 0.9)
    del model  # the copy does not need it
    twin.train()
    optimizer = torch.optim.AdamW(bayesify.param_groups(twin, lr=0.1))
    for _ in range(2):
        step(twin, optimizer, *batch())
    for name, mask in masks.items():
        np.testing.assert_array_equal(is_pruned(twin, name), mask)
    step(twin, optimizer, *batch())
    grad = twin.get_parameter("fc.weight").grad.numpy()
    assert not grad[masks["fc.weight"]].any()
    assert grad[~masks["fc.weight"]].any()


def test_a_model_without_its_posterior_is_not_held() -> None:
    back = bayesify.to_deterministic(prune_(bayesian(), 0.5))
    zeros = back.get_parameter("fc.weight") == 0
    assert int(zeros.sum()) == 96
    optimizer = torch.optim.SGD(back.parameters(), lr=0.1)
    step(back.train(), optimizer, *batch())
    assert bool((back.get_parameter("fc.weight")[zeros] != 0).any())
    assert b"PrunedSlot" not in pickle.dumps(back)
    assert b"PrunedSlot" in pickle.dumps(prune_(bayesian(), 0.5))


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = prune_(bayesian(), 0.5)
    path = tmp_path / "a.bbb.safetensors"
    bayesify.save(model, path)
    loaded = bayesify.load(path, model=Net())
    assert sparsity(loaded) == sparsity(model)
    assert bayesify.posterior_stats(loaded)["fc.weight"]["mean_snr"] > 0.0
    first, second = bayesify.draws(model, seed=3), bayesify.draws(loaded, seed=3)
    assert all(torch.equal(first[name], second[name]) for name in first)
    loaded.train()
    step(loaded, torch.optim.AdamW(bayesify.param_groups(loaded, lr=0.1)), *batch())
    assert [row.pruned for row in sparsity(loaded).rows] == [
        row.pruned for row in sparsity(model).rows
    ]
    assert is_pruned(loaded, "fc.weight").sum() == 96


def test_fitted_pruned_and_fitted_again() -> None:
    x, y = batch()
    data = TensorDataset(x, y)
    model = bayesian()
    for share in sparsity_schedule(0.8, 2):
        bayesify.fit(model, data, epochs=2, batch_size=8, lr=1e-2)
        prune_(model, share, scope="global")
    bayesify.fit(model, data, epochs=2, batch_size=8, lr=1e-2)
    total = sum(by_name(model)[name].mean.numel() for name in WEIGHTS)
    assert sum(int(is_pruned(model, name).sum()) for name in WEIGHTS) == round(0.8 * total)


def test_a_fit_keeps_what_a_state_dict_has_pruned() -> None:
    model = bayesian()
    model.load_state_dict(prune_(bayesian(), 0.5).state_dict())
    bayesify.fit(model, TensorDataset(*batch()), epochs=1, batch_size=8, lr=1e-2)
    assert is_pruned(model, "fc.weight").sum() == 96


def test_a_graph_module() -> None:
    root, graph = nn.Module(), fx.Graph()
    root.weight = nn.Parameter(torch.randn(3, 4))
    linear = (graph.placeholder("x"), graph.get_attr("weight"))
    graph.output(graph.call_function(nn.functional.linear, linear))
    model = prune_(bayesian(fx.GraphModule(root, graph)), 0.5)
    for twin in (copy.deepcopy(model), keep_pruned_(copied_by_pickle(model))):
        gc.collect()
        twin.train()
        step(twin, torch.optim.Adam(twin.parameters()), torch.ones(5, 4), torch.arange(5) % 3)
        np.testing.assert_array_equal(is_pruned(twin, "weight"), is_pruned(model, "weight"))
        assert not torch.equal(twin.get_parameter("weight"), model.get_parameter("weight"))


# -- iterative -------------------------------------------------------------------------------


@pytest.mark.parametrize(("final", "rounds", "initial"), [(0.9, 1, 0.0), (0.9, 4, 0.2), (0, 3, 0)])
def test_the_schedule_is_cubic(final: float, rounds: int, initial: float) -> None:
    t = np.arange(1, rounds + 1) / rounds
    expected = final + (initial - final) * (1 - t) ** 3
    found = sparsity_schedule(final, rounds, initial=initial)
    np.testing.assert_allclose(found, expected)
    assert found[-1] == final


# -- units -----------------------------------------------------------------------------------


def test_channels_of_the_lowest_mean_snr() -> None:
    model = bayesian()
    before = numbers(model)
    prune_units_(model, 0.25)
    for name in ("stem", "conv", "fc"):
        mean, std = before[f"{name}.weight"]
        scores = (np.abs(mean) / std).reshape(len(mean), -1).mean(axis=1)
        dead = lowest(scores, 0.25)
        mask = is_pruned(model, f"{name}.weight").reshape(len(mean), -1)
        np.testing.assert_array_equal(mask.all(axis=1), dead)
        np.testing.assert_array_equal(mask.any(axis=1), dead)
        np.testing.assert_array_equal(is_pruned(model, f"{name}.bias"), dead)
    assert not is_pruned(model, "head.weight").any()
    with bayesify.one_draw(model, seed=0):
        out = model.get_submodule("stem")(torch.randn(2, 3, 8, 8))
    np.testing.assert_array_equal((out == 0).all((0, 2, 3)).numpy(), is_pruned(model, "stem.bias"))


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_channels_by_magnitude_are_those_of_torch(share: float) -> None:
    net = Net()
    back = bayesify.to_deterministic(prune_units_(bayesian(net), share, score="magnitude"))
    for name in ("stem", "conv", "fc"):
        layer = torch_prune.ln_structured(net.get_submodule(name), "weight", share, n=1, dim=0)
        assert torch.equal(back.get_submodule(name).get_parameter("weight"), layer.weight)


def test_a_layer_keeps_one_channel() -> None:
    def worst(site: Site) -> Tensor:
        level = 0.0 if site.name == "fc.weight" else 1.0
        return torch.full_like(site.mean, level)

    model = prune_units_(bayesian(), 0.5, scope="global", score=worst)
    rows = {row.name: row.dead_outputs for row in sparsity(model).rows}
    assert rows["fc.weight"] == 15
    assert rows["stem.weight"] + rows["conv.weight"] == 2  # 18 of 36, less the one that stays


def test_random_channels_do_not_depend_on_their_size() -> None:
    counts = {"stem.weight": 0, "fc.weight": 0}
    for seed in range(40):
        model = prune_units_(bayesian(), 0.1, scope="global", score="random", seed=seed)
        for row in sparsity(model).rows:
            if row.name in counts:
                counts[row.name] += row.dead_outputs
    np.testing.assert_allclose(counts["stem.weight"] / (40 * 8), 0.1, atol=0.05)
    np.testing.assert_allclose(counts["fc.weight"] / (40 * 16), 0.1, atol=0.05)


def head_scores(inputs: Array, outputs: Array, heads: int) -> Array:
    """Mean over each head's queries, keys, values and output columns, index by index."""
    width = outputs.shape[1] // heads
    scores = []
    for head in range(heads):
        own = [outputs[:, head * width : (head + 1) * width].ravel()]
        for part in range(3):
            start = part * heads * width + head * width
            own.append(inputs[start : start + width].ravel())
        scores.append(np.concatenate(own).mean())
    return np.array(scores)


def test_heads_of_timm() -> None:
    model = bayesian(Attention(12, num_heads=4, qkv_bias=True))
    before = numbers(model)
    snr = {name: np.abs(mean) / std for name, (mean, std) in before.items()}
    dead = lowest(head_scores(snr["qkv.weight"], snr["proj.weight"], 4), 0.5)
    prune_units_(model, 0.5, unit="heads")
    seen: list[Tensor] = []
    model.get_submodule("proj").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with bayesify.one_draw(model, seed=0), torch.no_grad():
        model(torch.randn(2, 5, 12))
    silent = (seen[0].view(2, 5, 4, 3) == 0).all((0, 1, 3))
    np.testing.assert_array_equal(silent.numpy(), dead)
    assert not is_pruned(model, "proj.bias").any()
    columns = is_pruned(model, "proj.weight").reshape(12, 4, 3)
    np.testing.assert_array_equal(columns.all(axis=(0, 2)), dead)
    np.testing.assert_array_equal(columns.any(axis=(0, 2)), dead)
    assert sparsity(model).pruned == 2 * 3 * (3 * (12 + 1) + 12)


def test_heads_of_torch() -> None:
    model = bayesian(nn.MultiheadAttention(12, 3, batch_first=True)).eval()
    with torch.no_grad():
        model.get_parameter("in_proj_bias").uniform_(0.5, 1.0)
    snr = {name: np.abs(mean) / std for name, (mean, std) in numbers(model).items()}
    dead = lowest(head_scores(snr["in_proj_weight"], snr["out_proj.weight"], 3), 1 / 3)
    [head] = np.flatnonzero(dead)
    expected = copy.deepcopy(bayesify.to_deterministic(model))
    with torch.no_grad():
        expected.get_parameter("out_proj.weight")[:, head * 4 : head * 4 + 4] = 0.0
    prune_units_(model, 1 / 3, unit="heads")
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(model(x, x, x)[0], expected(x, x, x)[0])
    assert sparsity(model).pruned == 4 * (3 * (12 + 1) + 12)


# -- N out of M ------------------------------------------------------------------------------


def test_two_of_four() -> None:
    model = bayesian()
    before = numbers(model)
    with pytest.warns(UserWarning, match=r"1 tensors are not pruned.*multiple of 4: stem.weight\."):
        prune_n_of_m_(model)
    for name in ("conv.weight", "fc.weight", "head.weight"):
        mean, std = before[name]
        snr = (np.abs(mean) / std).reshape(*mean.shape[:2], -1)
        mask = is_pruned(model, name).reshape(snr.shape)
        for out, start, place in np.ndindex(len(snr), snr.shape[1] // 4, snr.shape[2]):
            group = (out, slice(4 * start, 4 * start + 4), place)
            assert mask[group].sum() == 2
            assert snr[group][mask[group]].max() < snr[group][~mask[group]].min()


def test_one_of_three() -> None:
    model = prune_n_of_m_(bayesian(), 1, 3, only="fc", score="magnitude")
    mask = is_pruned(model, "fc.weight").reshape(16, 4, 3)
    assert (mask.sum(-1) == 2).all()
    assert [row.name for row in sparsity(model).rows if row.pruned] == ["fc.weight"]


# -- counts ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::bayesify.SigmaBelowSpacingWarning")
def test_sparsity_counts() -> None:
    model = prune_(bayesian(Net().to(torch.bfloat16)), 0.5)
    prune_units_(model, 0.5, only="fc")
    found = sparsity(model)
    row = next(row for row in found.rows if row.name == "fc.weight")
    assert (row.elements, row.outputs, row.dead_outputs) == (192, 16, 8)
    assert row.pruned == is_pruned(model, "fc.weight").sum()
    assert row.share == row.pruned / 192
    assert row.dense_bytes == 384
    assert row.sparse_bytes == 2 * (192 - row.pruned) + 24
    assert found.elements == sum(p.numel() for p in Net().parameters())
    assert found.dense_bytes == 2 * found.elements
    assert found.share == found.pruned / found.elements
    untouched = sparsity(bayesian())
    assert (untouched.share, untouched.sparse_bytes) == (0.0, untouched.dense_bytes)


def test_multiply_adds_of_channels() -> None:
    model = bayesian()
    model.train()
    model.get_submodule("norm").eval()
    statistics = model.get_buffer("norm.running_mean").clone()
    images = torch.randn(2, 3, 8, 8)
    stem, conv, fc, head = 64 * 8 * 27, 64 * 12 * 4 * 9, 12 * 16, 16 * 5
    found = multiply_adds(model, images)
    assert (found.dense, found.remaining) == (2 * (stem + conv + fc + head),) * 2
    prune_(model, 0.5)
    assert multiply_adds(model, images).remaining == found.dense  # no unit as a whole
    prune_units_(model, 0.25)
    with torch.no_grad():
        prune_(model, 0.8, score=lambda site: torch.arange(12.0).expand_as(site.mean), only="fc")
    inputs = sum(bool(c) for c in (model.get_parameter("fc.weight") != 0).any(0))
    expected = 2 * (stem * 0.75 + conv * 0.75 + 12 * inputs + head)
    assert multiply_adds(model, images).remaining == expected
    assert inputs < 12
    assert model.training
    assert not model.get_submodule("norm").training
    assert torch.equal(model.get_buffer("norm.running_mean"), statistics)


@pytest.mark.parametrize("kind", ["timm", "torch"])
def test_multiply_adds_of_heads(kind: str) -> None:
    tokens, width = 5, 12

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            if kind == "timm":
                self.attn: nn.Module = Attention(width, num_heads=4)
            else:
                self.attn = nn.MultiheadAttention(width, 4, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            return self.attn(x) if kind == "timm" else self.attn(x, x, x, need_weights=False)[0]

    model = bayesian(Both())
    x = torch.randn(1, tokens, width)
    dense = tokens * width * 4 * width + 2 * tokens * tokens * width
    assert multiply_adds(model, x).dense == dense
    prune_units_(model, 0.5, unit="heads")
    assert multiply_adds(model, x).remaining == dense / 2


# -- bad input -------------------------------------------------------------------------------


def wrong_shape(site: Site) -> Tensor:
    return torch.zeros(3)


def not_a_number(site: Site) -> Tensor:
    return torch.full_like(site.mean, math.nan)


def nothing(site: Site) -> Any:
    return None


WRONG: Any = bayesify  # called with arguments of the wrong type


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: prune_(m, 1.0), r"sparsity must be a number in \[0, 1\), got 1.0"),
        (lambda m: prune_(m, -0.1), "got -0.1"),
        (lambda m: prune_(m, math.nan), "got nan"),
        (lambda m: WRONG.prune_(m, "half"), "got 'half'"),
        (lambda m: prune_(m, True), "got True"),
        (lambda m: WRONG.prune_(m, 0.5, score="sn"), "score must be one of 'snr', 'magnitude'"),
        (lambda m: WRONG.prune_(m, 0.5, scope="layer"), "scope must be 'tensor' or 'global'"),
        (
            lambda m: WRONG.prune_(m, 0.5, min_dim=1.5),
            "min_dim must be a whole number",
        ),
        (lambda m: prune_(m, 0.5, only="norm"), "and 2 have fewer than 2 dimensions"),
        (lambda m: prune_(m, 0.5, skip="Net"), "10 are left out by only and skip"),
        (lambda m: prune_(m, 0.5, score=wrong_shape), r"shape \(8, 3, 3, 3\), got \(3,\)"),
        (lambda m: prune_(m, 0.5, score=not_a_number), "is NaN for 216 weights: correct the func"),
        (lambda m: prune_(m, 0.5, score=nothing), "got NoneType"),
        (lambda m: prune_(m, 0.5, score="random", seed=-1), "seed must be"),
        (lambda m: prune_units_(m, 1.5), "sparsity must be"),
        (lambda m: WRONG.prune_units_(m, 0.5, unit="rows"), "unit must be 'channels' or 'heads'"),
        (lambda m: prune_units_(m, 0.5, unit="heads"), "Net has no heads to prune among its 4"),
        (lambda m: prune_units_(m, 0.5, only="head"), "No tensor of Net is chosen"),
        (lambda m: prune_n_of_m_(m, 4, 4), "1 <= n < m, got 4"),
        (lambda m: prune_n_of_m_(m, 0, 4), "1 <= n < m"),
        (lambda m: prune_n_of_m_(m, only="stem"), "no multiples of 4"),
        (lambda m: sparsity_schedule(1.0, 3), "sparsity must be"),
        (lambda m: sparsity_schedule(0.5, 0), "rounds must be an integer of at least 1"),
        (lambda m: sparsity_schedule(0.5, 2, initial=0.6), "initial must be at most final"),
    ],
)
def test_bad_arguments(call: Callable[[nn.Module], object], message: str) -> None:
    model = bayesian()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ArgumentError, match=message):
        call(model)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(NoMatchError, match="LayerNorm"):
        prune_(bayesian(), 0.5, skip="LayerNorm")


def test_a_diverged_model() -> None:
    model = bayesian()
    with torch.no_grad():
        model.get_parameter("fc.weight")[0, 0] = math.nan
    with pytest.raises(ArgumentError, match=r"'fc.weight' is NaN for 1 weights.*diverged"):
        prune_(model, 0.5)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: prune_(m, 0.5), lambda m: prune_units_(m, 0.5), prune_n_of_m_, sparsity,
        keep_pruned_, lambda m: multiply_adds(m, torch.ones(1, 3, 8, 8)),
    ],
)  # fmt: skip
def test_a_model_that_is_not_converted(call: Callable[[nn.Module], object]) -> None:
    with pytest.raises(UnsupportedModuleError, match="to_bbb"):
        call(Net())
