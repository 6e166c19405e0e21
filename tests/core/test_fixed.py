"""Weights that get no gradient: fixed at their means, without draw and KL."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune
from torch.utils.data import TensorDataset

import bayesify
from bayesify import ArgumentError, GaussianPrior, LivePrior, ScaleMixturePrior
from bayesify.posterior import sites

WORDS, WIDTH = 7, 4
TOKENS = torch.tensor([[3, 1, 0, 0], [2, 5, 6, 0], [4, 1, 2, 3]])


class Text(nn.Module):
    """The mean of a sentence's vectors, padding included, and a layer."""

    def __init__(self, classes: int = 3, **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, padding_idx=0, **options)
        self.out = nn.Linear(WIDTH, classes)
        with torch.no_grad():
            self.words.weight[0] = torch.arange(1.0, WIDTH + 1.0)  # as from_pretrained may give it

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.out(self.words(tokens).mean(1))
        return logits


def kl_by_torch(model: nn.Module, left_out: dict[str, Tensor] | None = None) -> Tensor:
    """KL to N(0, 1) of all weights but those left out."""
    total = torch.zeros((), dtype=torch.float64)
    for p in bayesify.posteriors(model):
        q = torch.distributions.Normal(p.mean.double(), torch.exp(0.5 * p.logvar.double()) + 1e-300)
        each = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
        drop = (left_out or {}).get(p.name)
        total = total + (each if drop is None else each[~drop]).sum()
    return total


def row_mask(row: int = 0) -> Tensor:
    mask = torch.zeros(WORDS, WIDTH, dtype=torch.bool)
    mask[row] = True
    return mask


@pytest.mark.parametrize("parameterization", ["exp", "softplus"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_is_read_at_its_mean(parameterization: Any, dtype: torch.dtype) -> None:
    config = bayesify.BBBConfig(parameterization=parameterization)
    model: Any = bayesify.to_bbb(Text().to(dtype), initial_std=1.0, config=config)
    for _ in range(3):
        drawn = bayesify.draws(model)["words.weight"]
        assert torch.equal(drawn[0], torch.arange(1.0, WIDTH + 1.0).to(dtype))
        assert (drawn[1:] != model.words.weight[1:]).all()
    stacked = bayesify.predict(model.words, torch.zeros(2, 3, dtype=torch.long), num_samples=5)
    assert torch.equal(stacked, model.words.weight[0].expand(5, 2, 3, WIDTH))


def test_the_kl_leaves_the_row_out_with_its_gradient() -> None:
    model: Any = bayesify.to_bbb(Text(), initial_std=math.exp(-1.5))
    model.train()
    outputs = model(TOKENS)
    kl = bayesify.kl_divergence(model)
    torch.testing.assert_close(kl.double(), kl_by_torch(model, {"words.weight": row_mask()}))
    (0.0 * outputs.sum() + kl).backward()
    mean, raw = next(s for s in sites(model) if s.name == "words.weight").tensors
    assert mean.grad is not None
    assert raw.grad is not None
    assert (mean.grad[0] == 0).all()
    assert (raw.grad[0] == 0).all()
    torch.testing.assert_close(mean.grad[1:], mean.detach()[1:])
    torch.testing.assert_close(raw.grad[1:], 0.5 * (raw.detach()[1:].exp() - 1.0))


def test_a_mixture_prior_leaves_the_row_out() -> None:
    prior = ScaleMixturePrior(0.5, 1.0, 0.1)
    model: Any = bayesify.to_bbb(Text(), initial_std=math.exp(-1.5), prior=prior)
    with bayesify.one_draw(model, seed=5), bayesify.sampled(model):
        found = bayesify.kl_divergence(model)
        expected = torch.zeros(())
        for p in bayesify.posteriors(model):
            value = bayesify.draws(model, seed=5)[p.name]
            std = torch.exp(0.5 * p.logvar)
            keep = std > 0
            q = torch.distributions.Normal(p.mean[keep], std[keep]).log_prob(value[keep])
            expected = expected + (q - prior.log_density(value[keep])).sum()
    torch.testing.assert_close(found, expected)


def test_a_live_prior_of_a_model_that_is_fixed_too_has_a_gradient() -> None:
    teacher = {
        p.name: p for p in bayesify.posteriors(bayesify.to_bbb(Text(), initial_std=math.exp(-1.5)))
    }
    prior = LivePrior(lambda name: (teacher[name].mean, teacher[name].logvar.exp()))
    model: Any = bayesify.to_bbb(Text(), initial_std=math.exp(-1.5), prior=prior)
    bayesify.kl_divergence(model).backward()
    for p in model.parameters():
        assert p.grad is not None
        assert torch.isfinite(p.grad).all()


def test_a_fit_leaves_the_row_as_it_was() -> None:
    """The fault: by the KL alone sigma became 1.000 and the mean that of the prior."""
    torch.manual_seed(0)
    tokens = torch.randint(0, WORDS, (256, 6))
    labels = (tokens == 3).sum(1).clamp(max=2)
    plain: Any = Text()
    model: Any = bayesify.to_bbb(plain)
    bayesify.fit(model, TensorDataset(tokens, labels), epochs=30, batch_size=32, lr=0.03)
    std = bayesify.stddev(model)["words.weight"]
    assert torch.equal(model.words.weight[0], plain.words.weight[0])
    assert (std[0] == 0).all()
    assert (std[1:] > 0).all()
    with torch.no_grad():
        empty = bayesify.predict(model, torch.zeros(1, 4, dtype=torch.long), num_samples=64)
        expected = bayesify.predict(
            model.out, plain.words.weight[:1].detach(), num_samples=64, seed=None
        )
    # what is left is the noise of the layer
    assert float(empty.std(0).mean()) < 2.0 * float(expected.std(0).mean())


def test_weight_decay_moves_it_as_it_moves_the_original() -> None:
    plain: Any = Text()
    model: Any = bayesify.to_bbb(plain)
    groups = bayesify.param_groups(model, lr=0.1, weight_decay=0.5)
    ours, theirs = torch.optim.AdamW(groups), torch.optim.AdamW(
        plain.parameters(), lr=0.1, weight_decay=0.5
    )  # fmt: skip
    for _ in range(3):
        for net, optimizer in ((model, ours), (plain, theirs)):
            optimizer.zero_grad()
            net(TOKENS).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(model.words.weight[0], plain.words.weight[0])
    assert (bayesify.stddev(model)["words.weight"][0] == 0).all()


@pytest.mark.parametrize("estimator", ["weight", "local", "flipout"])
@pytest.mark.parametrize("sparse", [False, True])
def test_every_estimator_reads_padding_at_its_mean(estimator: Any, sparse: bool) -> None:
    model: Any = bayesify.to_bbb(
        Text(sparse=sparse), initial_std=1.0, estimator={"words": estimator}
    )
    read: list[Tensor] = []
    model.words.register_forward_hook(lambda *a: read.append(a[-1]))
    model.train()
    loss = model(TOKENS).sum() + bayesify.kl_divergence(model)
    loss.backward()
    assert torch.equal(read[0][TOKENS == 0], model.words.weight[0].expand(3, WIDTH))
    for p in model.words.parameters():
        assert p.grad is not None
        grad = p.grad.to_dense() if p.grad.is_sparse else p.grad
        assert torch.isfinite(grad).all()
        assert (grad[0] == 0).all()


@pytest.mark.parametrize("bag", ["sum", "mean", "max"])
def test_a_bag_without_its_padding(bag: Any) -> None:
    model: Any = bayesify.to_bbb(
        nn.EmbeddingBag(WORDS, WIDTH, mode=bag, padding_idx=2), initial_std=1.0
    )
    assert (bayesify.stddev(model)["weight"] == 0).all(1).tolist() == [i == 2 for i in range(WORDS)]
    torch.testing.assert_close(
        bayesify.kl_divergence(model).double(), kl_by_torch(model, {"weight": row_mask(2)})
    )


def test_counts_leave_fixed_weights_out() -> None:
    model: Any = bayesify.to_bbb(Text())
    weights = WORDS * WIDTH - WIDTH + 3 * WIDTH + 3
    assert bayesify.kl_scale(model, kl_reduction="num_weights") == 1 / weights
    assert bayesify.noise_budget(model, num_data=10) == pytest.approx(0.05 * weights)
    plan = bayesify.plan(Text())
    assert plan.bayesian_elements == weights
    assert plan.elements == weights + WIDTH
    assert [row.fixed for row in plan.rows] == [WIDTH, 0, 0]
    said = "words.weight: row 0 (padding_idx) gets no gradient and is fixed: no draw, no KL."
    assert plan.fixed == (said,)
    assert said in str(plan)
    assert plan.to_json()["fixed"] == [said]
    stats = bayesify.posterior_stats(model)["words.weight"]
    assert (stats["elements"], stats["fixed"]) == (WORDS * WIDTH, WIDTH)
    std = bayesify.stddev(model)["words.weight"][1:]
    assert stats["mean_std"] == pytest.approx(std.mean().item())
    assert stats["mean_snr"] == pytest.approx(
        (model.words.weight[1:].abs() / std).mean().item(), rel=1e-5
    )


class Tied(Text):
    """The output layer reads the rows as well, so that each gets a gradient."""

    def __init__(self) -> None:
        super().__init__(WORDS)
        self.out.weight = self.words.weight


def test_a_row_that_a_head_reads_too_is_drawn() -> None:
    plan = bayesify.plan(Tied())
    assert plan.fixed == (
        "words.weight: row 0 (padding_idx) gets no gradient there, but out.weight is the same "
        "tensor: it is drawn, as all of it.",
    )
    model: Any = bayesify.to_bbb(Tied())
    assert (bayesify.stddev(model)["words.weight"] > 0).all()
    model.train()
    model(TOKENS).square().sum().backward()
    assert (model.words.weight.grad[0] != 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bayesify.check_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_two_tables_of_one_padding_are_one() -> None:
    model: Any = nn.ModuleList([nn.Embedding(WORDS, WIDTH, padding_idx=1) for _ in range(2)])
    model[1].weight = model[0].weight
    std = bayesify.stddev(bayesify.to_bbb(model))["0.weight"]
    assert (std == 0).all(1).tolist() == [i == 1 for i in range(WORDS)]
    model[1].padding_idx = 3
    assert (bayesify.stddev(bayesify.to_bbb(model))["0.weight"] > 0).all()


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "state_dict", "file"])
def test_it_goes_where_the_posterior_goes(way: str, tmp_path: Path) -> None:
    model: Any = bayesify.to_bbb(Text(), initial_std=math.exp(-1.5))
    if way == "deepcopy":
        other: Any = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif way == "torch.save":
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    elif way == "state_dict":
        other = bayesify.to_bbb(Text())
        other.load_state_dict(model.state_dict())
    else:
        bayesify.save(model, tmp_path / "a.safetensors")
        other = bayesify.load(tmp_path / "a.safetensors", Text())
    assert (bayesify.stddev(other)["words.weight"][0] == 0).all()
    torch.testing.assert_close(bayesify.kl_divergence(other), bayesify.kl_divergence(model))
    back: Any = bayesify.to_deterministic(other)
    assert torch.equal(back.words.weight, model.words.weight)


def test_what_a_state_dict_fixes_is_kept() -> None:
    fixed = bayesify.fix_(bayesify.to_bbb(nn.Linear(2, 2)), {"weight": torch.eye(2).bool()})
    model: Any = bayesify.to_bbb(nn.Linear(2, 2))
    model.load_state_dict(fixed.state_dict())
    bayesify.keep_pruned_(model)
    assert torch.equal(bayesify.kl_divergence(model), bayesify.kl_divergence(fixed))
    assert bayesify.sparsity(model).pruned == 0


def test_calibrate_leaves_it() -> None:
    for parameterization in ("exp", "softplus"):
        config = bayesify.BBBConfig(parameterization=parameterization)
        model: Any = bayesify.to_bbb(Text(), config=config)
        bayesify.prune_(model, 0.3, only="words")
        before = bayesify.sparsity(model)
        raws = [site.raw.detach().clone() for site in sites(model)]
        bayesify.calibrate_(model, TOKENS)
        assert bayesify.sparsity(model) == before
        for site, raw in zip(sites(model), raws, strict=True):
            held = raw < -1000
            assert torch.equal(site.raw[held], raw[held])
            assert (site.raw[~held] != raw[~held]).all()


def test_a_laplace_approximation_leaves_it() -> None:
    tokens = torch.randint(1, WORDS, (40, 5))
    data = TensorDataset(tokens, torch.randint(3, (40,)))
    for precision in (1.0, "marglik"):
        model: Any = bayesify.to_bbb(Text())
        found = bayesify.fit_laplace_(model, data, prior_precision=precision)
        std = bayesify.stddev(model)
        assert (std["words.weight"][0] == 0).all()
        assert (std["words.weight"][1:] > 0).all()
        total = sum(float(each.double().sum()) for each in std.values())
        assert found.mean_std == pytest.approx(total / (WORDS * WIDTH - WIDTH + 3 * WIDTH + 3))


@pytest.mark.parametrize("score", ["snr", "magnitude", "variance", "random"])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_pruning_passes_it_over(score: Any, scope: Any) -> None:
    model: Any = bayesify.to_bbb(Text())
    padding = model.words.weight[0].clone()
    bayesify.prune_(model, 0.5, score=score, scope=scope)
    assert bayesify.sparsity(model).pruned == (WORDS * WIDTH + 3 * WIDTH) / 2
    assert torch.equal(model.words.weight[0], padding)
    bayesify.prune_(model, 0.99, score=score, scope=scope)
    assert bayesify.sparsity(model).pruned == {
        "tensor": WORDS * WIDTH - WIDTH + 3 * WIDTH, "global": WORDS * WIDTH - WIDTH + 3 * WIDTH,
    }[scope]  # fmt: skip
    assert torch.equal(model.words.weight[0], padding)
    assert (bayesify.stddev(model)["words.weight"] == 0).all()


def test_what_a_mask_of_torch_prunes_has_no_kl() -> None:
    layer: Any = nn.Linear(6, 4)
    torch_prune.random_unstructured(layer, "weight", amount=0.5)
    mask: Tensor = layer.weight_mask == 0
    assert int(mask.sum()) == 12
    model: Any = bayesify.to_bbb(layer, initial_std=math.exp(-1.5))
    torch.testing.assert_close(
        bayesify.kl_divergence(model).double(), kl_by_torch(model, {"weight_orig": mask})
    )
    assert bayesify.plan(layer).fixed == (
        "weight_orig: 12 elements (weight_mask) gets no gradient and is fixed: no draw, no KL.",
    )


def test_a_new_table_is_fixed_as_well() -> None:
    class Resets(Text):
        def reset_classifier(self, count: int) -> None:
            self.table = nn.EmbeddingBag(count, WIDTH, padding_idx=1)

    model: Any = bayesify.to_bbb(Resets())
    model.reset_classifier(3)
    assert (bayesify.stddev(model)["table.weight"] == 0).all(1).tolist() == [False, True, False]


class Functional(nn.Module):
    """A table of its own, which the conversion cannot know to be one with padding."""

    def __init__(self, bag: bool) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(WORDS, WIDTH))
        self.bag = bag

    def forward(self, tokens: Tensor) -> Tensor:
        if self.bag:
            return F.embedding_bag(tokens, self.table, mode="sum", padding_idx=0)
        return F.embedding(tokens, self.table, padding_idx=0)


@pytest.mark.parametrize("bag", [False, True])
def test_a_lookup_of_a_modules_own_is_named(bag: bool) -> None:
    model: Any = bayesify.to_bbb(nn.Sequential(Functional(bag))).train()
    with pytest.warns(UserWarning, match=r"Functional\.forward looks up '0\.table' with padding_i"):
        model(TOKENS)
    model = bayesify.to_bbb(nn.Sequential(Functional(bag))).train()
    bayesify.fix_(model, {"0.table": row_mask()})
    assert model(TOKENS).shape == ((3, WIDTH) if bag else (3, 4, WIDTH))


def test_check_optimizer_names_padding_that_came_later() -> None:
    model: Any = bayesify.to_bbb(nn.Sequential(nn.Embedding(WORDS, WIDTH)))
    model[0].padding_idx = 2
    optimizer = torch.optim.Adam(bayesify.param_groups(model, lr=0.1))
    with pytest.warns(UserWarning, match=r"0\.weight: row 2 \(padding_idx\)"):
        bayesify.check_optimizer(model, optimizer)
    bayesify.fix_(model, {"0.weight": row_mask(2)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bayesify.check_optimizer(model, optimizer)


def test_noise_is_told_beside_fixed_rows() -> None:
    model: Any = bayesify.to_bbb(Text(), initial_std=math.exp(-1.5))
    for state in model.modules():
        if "_bayesify" in state.__dict__:
            state.__dict__["_bayesify"].spec = None
    with torch.no_grad():
        model.words.weight_logvar[1:] = 0.0
    with pytest.warns(UserWarning, match=r"1 log variance \(words.weight_logvar\)"):
        bayesify.check_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("masks", "said"),
    [
        ({"weights": torch.ones(2, 2) > 0}, "'weights' is not the name"),
        ({"weight": torch.ones(2, 2)}, "torch.float32 of the shape (2, 2)"),
        ({"weight": torch.ones(3, 2) > 0}, "torch.bool of the shape (3, 2)"),
        ({"bias": torch.ones(1, 2) > 0}, "torch.bool of the shape (1, 2)"),
        ({"weight": [True]}, "got list"),
    ],
)
def test_fix_refuses(masks: Any, said: str) -> None:
    model: Any = bayesify.to_bbb(nn.Linear(2, 2), prior=GaussianPrior(1.0))
    before = bayesify.kl_divergence(model)
    with pytest.raises(ArgumentError) as caught:
        bayesify.fix_(model, {"weight": torch.ones(2, 2) > 0, **masks})
    assert said in str(caught.value)
    assert torch.equal(bayesify.kl_divergence(model), before)


class Gaps(nn.Module):
    """Words that no example has, masked weights, a detached tensor, a layer that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        self.masked = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.mask: Tensor
        self.register_buffer("mask", torch.ones(WIDTH, WIDTH).tril())
        self.detached = nn.Parameter(torch.randn(WIDTH))
        self.unread = nn.Linear(2, 2)
        self.frozen = nn.Parameter(torch.randn(WIDTH), requires_grad=False)
        self.sliced = nn.Parameter(torch.randn(2, WIDTH))
        self.sliced.register_hook(lambda grad: grad * torch.tensor([[1.0], [0.0]]))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = F.linear(self.words(tokens).mean(1), self.masked * self.mask)
        return hidden * self.sliced[0] + self.detached.detach() + self.frozen


def test_weights_without_gradient_are_found_and_can_be_fixed() -> None:
    model: Any = bayesify.to_bbb(Gaps()).train()
    batches = [(TOKENS % 4, torch.tensor([0, 1, 2])), (TOKENS % 5, torch.tensor([0, 1, 2]))]
    found = bayesify.without_gradient(model, batches)
    assert model.training
    assert model.words.weight.grad is None
    assert {name: mask.tolist() for name, mask in found.items()} == {
        "words.weight": [[row in (5, 6)] * WIDTH for row in range(WORDS)],
        "masked": (torch.ones(WIDTH, WIDTH).tril() == 0).tolist(),
        "detached": [True] * WIDTH,
        "unread.weight": [[True] * 2] * 2,
        "unread.bias": [True] * 2,
        "sliced": [[False] * WIDTH, [True] * WIDTH],
    }
    weights = bayesify.noise_budget(model, 2.0, kl_reduction="sum")
    bayesify.fix_(model, found)
    assert bayesify.without_gradient(model, batches) == {}
    fixed = sum(int(mask.sum()) for mask in found.values())
    assert bayesify.noise_budget(model, 2.0, kl_reduction="sum") == weights - fixed
    with pytest.raises(ArgumentError, match="at least one batch"):
        bayesify.without_gradient(model, [])
