"""Local reparameterisation and Flipout: the distribution of one draw, gradients that vary less."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch._dynamo.testing
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

import bayesify
from bayesify import ArgumentError, NoMatchError, NoMatchWarning
from bayesify.posterior import Estimator, sites
from bayesify.rewriter.variants import rungs
from reference import functional_call

ESTIMATORS: tuple[Estimator, ...] = ("local", "flipout")
LOGVAR = -1.0


def converted(layer: nn.Module, estimator: Any, **options: Any) -> nn.Module:
    options.setdefault("initial_std", math.exp(LOGVAR / 2))
    model = bayesify.to_bbb(layer, estimator=estimator, **options)
    with torch.no_grad():  # no two weights of one sigma
        generator = torch.Generator().manual_seed(4)
        for site in sites(model):
            noise = torch.empty(site.raw.shape).normal_(generator=generator)
            site.raw.add_(noise, alpha=0.5)
    return model


def taken(model: nn.Module) -> dict[str, str]:
    return {site.name: site.slot.estimator for site in sites(model)}


def samples(model: nn.Module, x: Tensor, count: int) -> Tensor:
    with torch.no_grad(), bayesify.sampled(model):
        return torch.stack([model(x) for _ in range(count)])


# -- the distribution of the output ----------------------------------------------------------


LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Linear(5, 4), torch.randn(3, 5)),
    "linear, tokens": lambda: (nn.Linear(3, 4), torch.randn(2, 3, 3)),
    "linear, no batch": lambda: (nn.Linear(5, 4), torch.randn(5)),
    "linear, no bias": lambda: (nn.Linear(5, 4, bias=False), torch.randn(3, 5)),
    "conv1d, same": lambda: (nn.Conv1d(2, 3, 3, padding="same"), torch.randn(2, 2, 4)),
    "conv2d, groups": lambda: (
        nn.Conv2d(4, 4, 2, stride=2, groups=2, padding=1), torch.randn(2, 4, 3, 3)
    ),
    "conv2d, circular": lambda: (
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), torch.randn(2, 2, 3, 3)
    ),
    "conv2d, no batch": lambda: (nn.Conv2d(2, 3, 2), torch.randn(2, 3, 3)),
    "conv3d, dilated": lambda: (nn.Conv3d(1, 2, 2, dilation=2), torch.randn(2, 1, 3, 3, 3)),
    "transposed": lambda: (
        nn.ConvTranspose2d(2, 4, 3, stride=2, groups=2, output_padding=1), torch.randn(2, 2, 2, 2)
    ),
    "embedding": lambda: (nn.Embedding(6, 4, padding_idx=1), torch.tensor([[0, 1, 1], [5, 2, 0]])),
}  # fmt: skip


def moments(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the output of one layer, by the linearity of its operation."""
    plain = bayesify.to_deterministic(model)
    with torch.no_grad():
        mean = plain(x)
        for name, std in bayesify.stddev(model).items():
            plain.get_parameter(name).copy_(std.square())
        return mean, plain(x.square() if x.is_floating_point() else x)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", LAYERS)
def test_mean_and_variance_are_those_of_the_weights(name: str, estimator: Estimator) -> None:
    layer, x = LAYERS[name]()
    model = converted(layer.double(), estimator)
    assert set(taken(model).values()) == {estimator}
    x = x.double() if x.is_floating_point() else x
    mean, variance = moments(model, x)
    count = 800
    torch.manual_seed(1)
    found = samples(model, x, count)
    assert [r.reason for r in rungs(model)] == [f"0 draws, {len(taken(model))} estimated"]
    drawn = variance > 0  # all but padding
    torch.testing.assert_close(found[:, ~drawn], mean[~drawn].expand(count, -1), rtol=0, atol=0)
    found, mean, variance = found[:, drawn], mean[drawn], variance[drawn]
    error = (found.mean(0) - mean) / (variance / count).sqrt()
    assert error.abs().max() < 5.0
    error = (found.var(0) / variance - 1.0) / math.sqrt(2.0 / (count - 1))
    assert error.abs().max() < 5.0


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


@pytest.mark.parametrize("name", ["linear", "conv2d, circular", "embedding"])
@pytest.mark.parametrize("estimator", ["weight", *ESTIMATORS])
def test_examples_are_independent(name: str, estimator: Estimator) -> None:
    layer, x = LAYERS[name]()
    model = converted(layer.double(), estimator)
    x = (x.double() if x.is_floating_point() else x)[:1].expand(2, *x.shape[1:])
    one, two = samples(model, x, 1000).flatten(2).movedim(1, 0)
    if estimator == "weight":
        torch.testing.assert_close(one, two)
        return
    assert not torch.equal(one, two)
    for column in (one.var(0) > 0).nonzero().flatten().tolist():
        assert abs(correlation(one[:, column], two[:, column])) < 5.0 / math.sqrt(1000)


@pytest.mark.parametrize("estimator", ["weight", *ESTIMATORS])
def test_positions_of_one_example(estimator: Estimator) -> None:
    """Flipout has one weight for all tokens of an example; local reparameterisation has not."""
    model = converted(nn.Linear(5, 1, bias=False).double(), estimator)
    x = (torch.randn(1, 2, 5) + 1.0).double()
    variance = bayesify.stddev(model)["weight"].square().double()[0]
    wanted = float((x[0, 0] * x[0, 1] * variance).sum())
    scale = ((x[0].square() * variance).sum(-1)).sqrt().prod()
    found = samples(model, x, 2000).reshape(2000, 2)
    covariance = float(found.T.cov()[0, 1])
    assert abs(covariance - wanted * (estimator != "local")) < 5.0 * scale * math.sqrt(2.0 / 2000)
    assert abs(wanted) > 10.0 * scale * math.sqrt(2.0 / 2000)


def test_flipout_of_one_example_is_a_call_with_its_weights() -> None:
    """Within a scope every read of a layer sees the same weights of an example."""
    model = converted(nn.Linear(4, 4).double(), "flipout")
    x, other = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    with torch.no_grad(), bayesify.one_draw(model, seed=1):
        zero, a, b, both = (model(v) for v in (torch.zeros_like(x), x, other, x + other))
    torch.testing.assert_close(both - zero, (a - zero) + (b - zero))  # affine


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_call_is_a_function_of_the_seed(estimator: Estimator) -> None:
    model = converted(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)), estimator)
    x = torch.randn(6, 5)
    found = []
    for seed in (3, 3, 4):
        with bayesify.one_draw(model, seed=seed):
            first = model(x)
            assert torch.equal(first, model(x))  # the same draw, not the next
            found.append(first)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    state = torch.get_rng_state()
    with bayesify.one_draw(model, seed=3):
        model(x)
    assert torch.equal(state, torch.get_rng_state())


# -- gradients -------------------------------------------------------------------------------


def gradient_variance(model: nn.Module, x: Tensor, y: Tensor, count: int) -> dict[str, float]:
    found: dict[str, list[Tensor]] = {"mean": [], "raw": []}
    for _ in range(count):
        model.zero_grad()
        F.mse_loss(model(x), y).backward()
        for site in sites(model):
            for kind, tensor in (("mean", site.mean), ("raw", site.raw)):
                assert tensor.grad is not None
                found[kind].append(tensor.grad.flatten().clone())
    parts = len(list(sites(model)))
    return {
        kind: sum(
            float(torch.stack(grads[index::parts]).var(0).sum()) for index in range(parts)
        )
        for kind, grads in found.items()
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_vary_less(kind: str, estimator: Estimator) -> None:
    if kind == "linear":
        layer: nn.Module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        x, y = torch.randn(32, 8) + 0.5, torch.randn(32, 2)
    else:
        layer = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 2))
        x, y = torch.randn(16, 2, 4, 4) + 0.5, torch.randn(16, 2, 1, 1)
    one = gradient_variance(converted(layer, "weight", initial_std=math.exp(-2.0)), x, y, 300)
    other = gradient_variance(converted(layer, estimator, initial_std=math.exp(-2.0)), x, y, 300)
    # of 300 draws the error of a variance is some 8 %, less of a sum over tensors
    assert other["mean"] < 0.8 * one["mean"]
    assert other["raw"] < 0.8 * one["raw"]


@pytest.mark.parametrize("parameterization", ["exp", "softplus"])
@pytest.mark.parametrize("name", ["linear", "conv2d, groups", "transposed", "embedding"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_of_a_held_seed(name: str, estimator: Estimator, parameterization: Any) -> None:
    layer, x = LAYERS[name]()
    config = bayesify.BBBConfig(parameterization=parameterization)
    model = converted(layer.double(), estimator, config=config)
    for site in sites(model):  # finite differences want more than float32
        raw = nn.Parameter(site.raw.detach().double())
        site.module._parameters[next(k for k, p in model.named_parameters() if p is site.raw)] = raw
    tensors = list(model.parameters())
    if x.is_floating_point():
        x = x.double().requires_grad_()
        tensors.append(x)  # type: ignore[arg-type]

    def call(*_: Tensor) -> Tensor:
        with bayesify.one_draw(model, seed=2):
            found: Tensor = model(x)
            return found

    if name == "embedding":  # the row of padding has no gradient, whatever it does to the output
        call().square().sum().backward()
        for parameter in tensors:
            assert parameter.grad is not None
            assert [bool(row.any()) for row in parameter.grad[:2]] == [True, False]
        model.__dict__["padding_idx"] = None
    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_variance_has_a_finite_gradient(estimator: Estimator) -> None:
    model = converted(nn.Linear(4, 3, bias=False), estimator)
    x = torch.zeros(2, 4, requires_grad=True)
    model(x).sum().backward()
    tensors = [x, *model.parameters()]
    assert all(t.grad is not None and bool(t.grad.isfinite().all()) for t in tensors)
    pruned = bayesify.prune_(converted(nn.Linear(4, 3), estimator), 0.5)
    pruned(torch.randn(2, 4)).square().sum().backward()
    site = next(sites(pruned))
    assert site.held is not None
    assert site.held.any()
    assert site.raw.grad is not None
    assert bool(site.raw.grad.isfinite().all())
    assert not site.raw.grad[site.held].any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_sparse_gradients_of_an_embedding(estimator: Estimator) -> None:
    tokens = torch.tensor([[1, 2], [1, 1]])
    found = []
    for sparse in (False, True):
        model = converted(nn.Embedding(6, 3, sparse=sparse), estimator)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.linspace(-1.0, 0.0, 18).view(6, 3))
        with bayesify.one_draw(model, seed=1):
            model(tokens).square().sum().backward()
        grads = [p.grad for p in model.parameters()]
        assert all(g is not None and g.is_sparse == sparse for g in grads)
        found.append([g.to_dense() for g in grads if g is not None])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_add_up(estimator: Estimator) -> None:
    model = converted(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)), estimator)
    batches = torch.randn(2, 6, 5)
    single = []
    for seed, batch in enumerate(batches):
        model.zero_grad()
        with bayesify.one_draw(model, seed=seed):
            model(batch).square().sum().backward()
        single.append([p.grad for p in model.parameters()])
    model.zero_grad()
    for seed, batch in enumerate(batches):
        with bayesify.one_draw(model, seed=seed):
            model(batch).square().sum().backward()
    for parameter, *parts in zip(model.parameters(), *single, strict=True):
        torch.testing.assert_close(parameter.grad, sum(parts))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.embedding, self.stem = nn.Embedding(7, 6), nn.Linear(6, 6)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.reentrant = reentrant

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.stem(self.embedding(tokens))
        found: Tensor
        if self.reentrant is None:
            found = self.body(x) + self.body(x)
            return found
        run = torch.utils.checkpoint.checkpoint
        found = run(self.body, x, use_reentrant=self.reentrant) + run(
            self.body, x, use_reentrant=self.reentrant
        )
        return found


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_checkpointing_recomputes_the_same_noise(estimator: Estimator, reentrant: bool) -> None:
    model = converted(Checkpointed(None), estimator)
    other = converted(Checkpointed(reentrant), estimator)
    other.load_state_dict(model.state_dict())
    tokens = torch.randint(7, (3, 4))
    for each in (model, other):
        with bayesify.one_draw(each, seed=8):
            loss = each(tokens).square().sum()
        loss.backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


# -- what takes an estimator -----------------------------------------------------------------


class Mixed(nn.Module):
    """A weight that a linear layer reads, one that others read too, and tied ones."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.scaled = nn.Parameter(torch.randn(4, 4))
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.embedding = nn.Embedding(4, 4)
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embedding(x)) + self.token
        x = F.linear(x, self.weight) + F.linear(x, 2.0 * self.scaled)
        found: Tensor = self.head(x)
        return found


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_only_reads_that_can_take_it_do(estimator: Estimator) -> None:
    model = converted(Mixed(), estimator)
    assert taken(model) == {
        "weight": estimator, "scaled": estimator, "token": "weight", "embedding.weight": "weight",
        "norm.weight": "weight", "norm.bias": "weight",
    }  # fmt: skip
    model(torch.randint(4, (2, 3)))
    reason = next(r.reason for r in rungs(model) if not r.owner)
    assert reason == "2 draws, 1 estimated; scaled is drawn whole: mul reads it"
    code = bayesify.generated_code(model)["forward"]
    assert f"estimate('{estimator}', torch._C._nn.linear, self, 'weight', None, add)" in code
    assert "scaled = draw(self, 'scaled')" in code


class ReadsItsBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, weight=self.weight, bias=self.bias) - self.bias


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_bias_that_others_read_is_one_draw(estimator: Estimator) -> None:
    model = converted(ReadsItsBias(), estimator)
    with torch.no_grad(), bayesify.sampled(model):
        weight_logvar = model.get_parameter("weight_logvar")
        weight_logvar.fill_(-80.0)
        x = torch.randn(2, 4)
        torch.testing.assert_close(model(x), x @ model.get_parameter("weight").T)
    assert (
        rungs(model)[0].reason == "1 draws, 1 estimated; bias is drawn whole: 2 operations read it"
    )


def test_a_read_that_cannot_take_it_is_the_draw() -> None:
    """Whole draws of a seed are the same, whatever estimator was asked for."""
    torch.manual_seed(1)
    plain = Mixed()
    plain.weight.requires_grad_(False)
    model = converted(plain, "flipout")
    tokens = torch.randint(4, (2, 3))
    with bayesify.one_draw(model, seed=5):
        found = model(tokens)
    expected = functional_call(plain, bayesify.draws(model, seed=5), (tokens,), {})
    torch.testing.assert_close(found, expected)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x) * self.scale * float(x.sum().item() > -1e9)
        return found


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_layer_inside_the_fallback(estimator: Estimator) -> None:
    model = converted(Untraceable(), estimator, skip="scale")
    x = torch.ones(4000, 3)
    with torch.no_grad():
        found = model(x)
    assert {r.owner: r.rung for r in rungs(model)} == {"": "swap", "inner": "plain"}
    mean = bayesify.to_deterministic(model)(x[:1]).detach()
    error = (found.mean(0) - mean[0]) / (found.std(0) / math.sqrt(len(x)))
    assert error.abs().max() < 5.0


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return found


def test_a_layer_whose_parent_reads_its_weight() -> None:
    model = converted(Attends(), "flipout")
    model(torch.randn(2, 3, 4))
    reason = next(r.reason for r in rungs(model) if r.owner == "attention")
    assert reason == (
        "4 draws; weight is drawn whole: multi_head_attention_forward reads it; "
        "bias is drawn whole: multi_head_attention_forward reads it"
    )


def test_max_norm_stays_a_draw() -> None:
    model = converted(nn.Embedding(4, 3, max_norm=1.0), "local")
    with torch.no_grad():
        model(torch.tensor([1, 2]))
    assert "weight is drawn whole: max_norm" in rungs(model)[0].reason


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_all_layers_of_a_network_take_it(estimator: Estimator) -> None:
    net = timm.create_model("resnet18", num_classes=3, zero_init_last=False)
    model = bayesify.to_bbb(net, skip="BatchNorm2d", estimator=estimator)
    assert set(taken(model).values()) == {estimator}
    x = torch.randn(2, 3, 64, 64)
    model(x).square().sum().backward()
    reasons = {r.reason for r in rungs(model) if r.own_parameters and "BatchNorm" not in r.type}
    assert reasons == {"0 draws, 1 estimated", "0 draws, 2 estimated"}
    for site in sites(model):
        assert site.raw.grad is not None
        assert site.raw.grad.any(), site.name


# -- choice ----------------------------------------------------------------------------------


def test_patterns_choose() -> None:
    net = nn.Sequential()
    net.add_module("stem", nn.Conv2d(1, 2, 1))
    net.add_module("body", nn.Linear(2, 2))
    net.add_module("head", nn.Linear(2, 2))
    choice = {"head": "local", nn.Conv2d: "weight", "*": "flipout"}
    rows = bayesify.plan(net, estimator=choice, skip="body.bias").rows
    assert {row.name: row.estimator for row in rows} == {
        "stem.weight": "weight", "stem.bias": "weight", "body.weight": "flipout", "body.bias": "",
        "head.weight": "local", "head.bias": "local",
    }  # fmt: skip
    shown = str(bayesify.plan(net, estimator="local"))
    assert [line.split()[-2] for line in shown.splitlines()[1:7]] == ["local"] * 6


def test_choice_that_cannot_work() -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match=r"'lokal': there are 'weight', .*'flipout'"):
        bayesify.to_bbb(net, estimator={"*": "lokal"})
    with pytest.warns(NoMatchWarning, match=r"estimator=\{'haed': 'local'\} matches nothing"):
        bayesify.to_bbb(net, estimator={"haed": "local", "*": "flipout"})
    config = bayesify.BBBConfig(strict=True)
    with pytest.raises(NoMatchError, match="haed"):
        bayesify.to_bbb(net, estimator={"haed": "local"}, config=config)
    with pytest.warns(NoMatchWarning, match="no weight can take it"):
        bayesify.to_bbb(nn.LayerNorm(3), estimator="local")


def test_file_keeps_the_estimators(tmp_path: Path) -> None:
    net = timm.create_model("test_vit", num_classes=3)
    model = bayesify.to_bbb(net, estimator={"head": "local", nn.Linear: "flipout"})
    kinds = taken(model)
    assert set(kinds.values()) == {"weight", "local", "flipout"}
    bayesify.save(model, tmp_path / "m.safetensors")
    fresh = bayesify.to_bbb(timm.create_model("test_vit", num_classes=3))
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad(), bayesify.sampled(fresh):
        fresh(x)  # generated for other estimators
    for target in (timm.create_model("test_vit", num_classes=3), fresh):
        loaded = bayesify.load(tmp_path / "m.safetensors", model=target)
        assert taken(loaded) == kinds
        with torch.no_grad(), bayesify.one_draw(loaded, seed=1):
            found = loaded(x)
        with torch.no_grad(), bayesify.one_draw(model.eval(), seed=1):
            assert torch.equal(found, model(x))
        loaded.reset_classifier(5)  # type: ignore[operator]
        assert taken(loaded)["head.weight"] == "local"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("pruned", [False, True])
def test_copies_keep_the_estimators(copied: Callable[[Any], Any], pruned: bool) -> None:
    model = converted(nn.Linear(3, 2), "local")
    if pruned:
        bayesify.prune_(model, 0.5)
    assert taken(copied(model)) == taken(model) == {"weight": "local", "bias": "local"}


# -- what holds for every model --------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_at_the_means_it_is_the_original(estimator: Estimator) -> None:
    net = timm.create_model("test_vit", num_classes=3)
    model = bayesify.to_bbb(net, estimator=estimator, initial_std=math.exp(-3.0))
    x = torch.randn(2, 3, 160, 160)
    for training in (False, True):
        for each in (net, model):
            each.train(training)
        torch.manual_seed(7)
        expected, state = net(x), torch.get_rng_state()
        torch.manual_seed(7)
        with bayesify.at_mean(model):
            assert torch.equal(model(x), expected)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(bayesify.to_deterministic(model)(x), net(x))
    model(x).square().sum().backward()
    for site in sites(model):
        assert site.mean.grad is not None
        assert site.raw.grad is not None
        assert bool(site.mean.grad.any() and site.raw.grad.any()), site.name


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_is_that_of_the_posterior(estimator: Estimator) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    one, other = converted(net, "weight"), converted(net, estimator)
    x = torch.randn(2, 4)
    grads = []
    for model in (one, other):
        loss = bayesify.elbo_loss(0.0 * model(x).sum(), model, num_data=10)
        loss.backward()
        grads.append((loss.detach(), *(p.grad for p in model.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_compiled_without_a_break(estimator: Estimator) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 3))
    model = converted(net, estimator)
    counter: Any = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(4, 1, 3, 3)
    for seed in (1, 2, 1):
        with bayesify.one_draw(model, seed=seed):
            expected = model(x)
        with bayesify.one_draw(model, seed=seed):
            found = compiled(x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        expected.square().sum().backward()
        wanted = [p.grad for p in model.parameters()]
        model.zero_grad()
        found.square().sum().backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], wanted)
        model.zero_grad()
    assert counter.frame_count == 1


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_batched_over_seeds(estimator: Estimator) -> None:
    model = converted(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), estimator)
    x = torch.randn(5, 4)

    def call(seed: Tensor) -> Tensor:
        with bayesify.one_draw(model, seed=seed):
            found: Tensor = model(x)
            return found

    seeds = torch.arange(3)
    torch.testing.assert_close(torch.vmap(call)(seeds), torch.stack([call(s) for s in seeds]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision(estimator: Estimator, dtype: torch.dtype, autocast: bool) -> None:
    """Also the squares of a small sigma, which float16 cannot hold."""
    model = converted(nn.Linear(64, 32), estimator, initial_std=1e-5)
    with torch.no_grad():
        for site in sites(model):
            site.mean.zero_()
    x = torch.randn(64, 64)
    _, variance = moments(model, x)
    if not autocast:
        model, x = model.to(dtype), x.to(dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        y = model(x)
        y.float().square().sum().backward()
    assert y.dtype == dtype
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert float((y.detach().float().square() / variance).mean()) == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_predict(estimator: Estimator) -> None:
    model = converted(nn.Linear(4, 3), estimator)
    x = torch.ones(2, 4)
    found = bayesify.predict(model, x, num_samples=5, seed=1)
    assert torch.equal(found, bayesify.predict(model, x, num_samples=5, seed=1))
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[:, 0], found[:, 1])  # each example has its own draw
