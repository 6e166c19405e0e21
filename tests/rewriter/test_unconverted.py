"""What a converted model is given later: it is named, and converted by the same plan."""

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesify
from bayesify import ArgumentError, LostPosteriorWarning, UnsupportedModuleError
from bayesify.posterior import sites


class Net(nn.Module):
    """Convolution, norm, a block that is repeated, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.PReLU(4))
        self.fc = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).mean((2, 3))
        out: Tensor = self.fc(self.blocks(x))
        return out


def gaussian_kl(model: nn.Module) -> float:
    """The KL divergence of every Bayesian tensor by torch.distributions, prior N(0, 1)."""
    total = 0.0
    for _, mean, logvar, _ in bayesify.posteriors(model):
        std = (0.5 * logvar.detach()).exp().double()
        normal = torch.distributions.Normal(mean.detach().double(), std)
        prior = torch.distributions.Normal(torch.zeros(()).double(), torch.ones(()).double())
        total += float(torch.distributions.kl_divergence(normal, prior).sum())
    return total


def named(action: Callable[[], object]) -> str:
    """The text of the one warning that ``action`` gives; empty if it gives none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    texts = [str(w.message) for w in caught if issubclass(w.category, LostPosteriorWarning)]
    assert len(texts) <= 1
    assert len(caught) == len(texts)
    return texts[0] if texts else ""


def loss_of(model: nn.Module) -> Tensor:
    loss = torch.zeros(())
    return bayesify.elbo_loss(loss, model, num_data=10)


def told(model: nn.Module, folder: Path) -> list[str]:
    """What elbo_loss, check_optimizer and save say of a model."""
    optimizer = torch.optim.SGD(bayesify.param_groups(model, lr=0.1))
    return [
        named(lambda: loss_of(model)),
        named(lambda: bayesify.check_optimizer(model, optimizer)),
        named(lambda: bayesify.save(model, folder / "a", overwrite=True)),
    ]


CHANGES: dict[str, tuple[Callable[[Any], object], list[str]]] = {
    "new head": (lambda m: setattr(m, "fc", nn.Linear(4, 3)), ["fc.weight", "fc.bias"]),
    "appended": (lambda m: m.blocks.append(nn.Linear(4, 4)), ["blocks.2.weight", "blocks.2.bias"]),
    "appended block": (
        lambda m: m.blocks.append(nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU())),
        ["blocks.2.0.weight"],
    ),
    "convert_sync_batchnorm": (
        lambda m: nn.SyncBatchNorm.convert_sync_batchnorm(m), ["norm.weight", "norm.bias"],
    ),
    "a layer of the converted class": (
        lambda m: setattr(m, "fc", type(m.fc)(4, 3)), ["fc.weight", "fc.bias"],
    ),
    "a parameter of the root": (
        lambda m: m.register_parameter("scale", nn.Parameter(torch.ones(4))), ["scale"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "new"), CHANGES.values(), ids=CHANGES)
def test_what_comes_later_is_named_and_converted(
    change: Callable[[Any], object], new: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model: Any = bayesify.to_bbb(Net(), initial_std=math.exp(-3.0), estimator="local")
    assert told(model, tmp_path) == ["", "", ""]
    before = {p.name: (p.mean, p.logvar) for p in bayesify.posteriors(model)}
    change(model)
    for text in told(model, tmp_path):
        assert f"{len(new)} parameter" in text
        assert ", ".join(new) in text
        assert "extend_" in text
    assert named(lambda: loss_of(model)) == ""  # once
    assert bayesify.extend_(model) is model
    assert told(model, tmp_path) == ["", "", ""]
    after = {p.name: (p.mean, p.logvar) for p in bayesify.posteriors(model)}
    assert sorted(after) == sorted({*before, *new})
    for name, (mean, logvar) in after.items():
        if name in new:
            assert bool((logvar == -6.0).all())
        else:
            assert mean is before[name][0]
            assert logvar is before[name][1]
    assert bayesify.kl_divergence(model).item() == pytest.approx(gaussian_kl(model), rel=1e-5)
    estimators = {site.name: site.slot.estimator for site in sites(model)}
    assert "norm.weight" in new or "scale" in new or all(estimators[n] == "local" for n in new)
    keys = model.state_dict()
    assert all(f"{name}_logvar" in keys for name in new)


def test_what_comes_later_is_drawn_once_extended() -> None:
    torch.manual_seed(0)
    model: Any = bayesify.to_bbb(Net(), initial_std=math.exp(-2.0)).eval()
    x = torch.randn(2, 3, 4, 4)
    with bayesify.sampled(model):
        model(x)  # variants of before
    model.fc = nn.Linear(4, 3)
    model.blocks.append(nn.Linear(4, 4))
    bayesify.extend_(model.eval())
    drawn = bayesify.draws(model, seed=3)
    assert {"fc.weight", "blocks.2.bias"} < drawn.keys()
    assert not torch.equal(drawn["fc.weight"], model.fc.weight)
    with bayesify.one_draw(model, seed=3):
        out = model(x)
    original = bayesify.to_deterministic(model)
    assert torch.equal(out, torch.func.functional_call(original, drawn, (x,)))


def test_kl_after_the_exchange_of_batchnorm() -> None:
    """The example that was found: 319 -> 270 nats, without a word."""
    torch.manual_seed(0)
    model = bayesify.to_bbb(Net())
    whole = bayesify.kl_divergence(model).item()
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.warns(LostPosteriorWarning, match=r"norm\.weight, norm\.bias"):
        assert loss_of(model).item() < whole / 10
    # initial sigmas are functions of the means and the number of tensors: the same again
    again = bayesify.kl_divergence(bayesify.extend_(model)).item()
    assert again == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("times", [1, 2])
def test_a_warning_comes_once_for_each_state(times: int) -> None:
    model: Any = bayesify.to_bbb(Net())
    for _ in range(times):
        model.fc = nn.Linear(4, 3)
    assert "fc.weight" in named(lambda: loss_of(model))
    assert named(lambda: loss_of(model)) == ""
    model.conv = nn.Conv2d(3, 4, 1)
    assert "conv.weight" in named(lambda: loss_of(model))
    assert named(lambda: loss_of(model)) == ""


# -- what is not new ---------------------------------------------------------------------------


def frozen_conv() -> Net:
    model = Net()
    model.conv.requires_grad_(False)
    return model


@pytest.mark.parametrize("skip", ["blocks", nn.PReLU, "*.bias", "re:^fc", "@last-layer"])
def test_what_the_plan_skipped_is_not_lost(skip: Any, tmp_path: Path) -> None:
    model = bayesify.to_bbb(Net(), skip=skip)
    names = [p.name for p in bayesify.posteriors(model)]
    assert told(model, tmp_path) == ["", "", ""]
    bayesify.extend_(model)
    assert [p.name for p in bayesify.posteriors(model)] == names


def test_what_was_frozen_is_not_lost(tmp_path: Path) -> None:
    model: Any = bayesify.to_bbb(frozen_conv())
    assert told(model, tmp_path) == ["", "", ""]
    model.conv.requires_grad_(True)  # later trained without a posterior, as the plan said
    assert told(model, tmp_path) == ["", "", ""]
    bayesify.extend_(model)
    assert "conv.weight" not in [p.name for p in bayesify.posteriors(model)]


def test_new_layers_follow_the_plan(tmp_path: Path) -> None:
    model: Any = bayesify.to_bbb(Net(), skip=[nn.PReLU, "fc"])
    model.fc = nn.Linear(4, 3)
    model.blocks.append(nn.PReLU(4))
    model.blocks.append(nn.Linear(4, 4).requires_grad_(False))
    assert told(model, tmp_path) == ["", "", ""]
    model.blocks[3].requires_grad_(True)
    assert "blocks.3.weight, blocks.3.bias" in named(lambda: loss_of(model))
    bayesify.extend_(model)
    new = {p.name for p in bayesify.posteriors(model)}
    assert {n for n in new if n.startswith(("fc", "blocks"))} == {
        "blocks.0.weight", "blocks.0.bias", "blocks.3.weight", "blocks.3.bias",
    }  # fmt: skip


def test_neighbours_of_a_converted_model_are_not_its(tmp_path: Path) -> None:
    inner: Any = bayesify.to_bbb(Net())
    outer: Any = nn.Sequential(inner, nn.Linear(10, 2))
    assert told(outer, tmp_path) == ["", "", ""]
    outer.append(nn.Linear(2, 2))
    assert named(lambda: loss_of(outer)) == ""
    inner.fc = nn.Linear(4, 10)
    assert "0.fc.weight, 0.fc.bias" in named(lambda: loss_of(outer))
    bayesify.extend_(outer)
    slots = {s.name: s.slot.name for s in sites(outer)}
    assert slots["0.fc.weight"] == "fc.weight"
    assert "1.weight" not in slots


def test_a_part_is_extended_as_the_whole() -> None:
    model: Any = bayesify.to_bbb(Net(), skip="norm")
    model.blocks[0] = nn.Linear(4, 4)
    assert "2 parameters" in named(lambda: loss_of(model.blocks))
    bayesify.extend_(model.blocks)
    assert {s.name: s.slot.name for s in sites(model)}["blocks.0.bias"] == "blocks.0.bias"
    assert named(lambda: loss_of(model)) == ""


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_know_what_was_settled(copied: Any, tmp_path: Path) -> None:
    model: Any = copied(bayesify.to_bbb(frozen_conv(), skip=["norm"]))
    model.conv.requires_grad_(True)
    assert told(model, tmp_path) == ["", "", ""]
    model.fc = nn.Linear(4, 3)
    assert "fc.weight, fc.bias" in named(lambda: loss_of(model))


def test_a_loaded_model_knows_what_was_settled(tmp_path: Path) -> None:
    bayesify.save(
        bayesify.to_bbb(frozen_conv(), skip=["norm"], initial_std=math.exp(-2.5)), tmp_path / "file"
    )
    # the file does not say what is frozen
    model: Any = bayesify.load(tmp_path / "file", model=Net()).train()
    assert told(model, tmp_path) == ["", "", ""]
    model.fc = nn.Linear(4, 3)
    assert "2 parameters of Net" in named(lambda: loss_of(model))
    bayesify.extend_(model)
    assert "conv.weight" not in [p.name for p in bayesify.posteriors(model)]
    assert float(model.fc.weight_logvar.detach().max()) == pytest.approx(-5.0)


# -- parameters that are gone, of another shape, tied ---------------------------------------------


def test_a_parameter_of_the_same_shape_keeps_its_posterior(tmp_path: Path) -> None:
    model: Any = bayesify.to_bbb(Net(), initial_std=math.exp(-2.0))
    logvar = model.fc.weight_logvar
    model.fc.weight = nn.Parameter(torch.full((10, 4), 7.0))
    assert told(model, tmp_path) == ["", "", ""]
    draw = bayesify.draws(model, seed=0)["fc.weight"]
    assert model.fc.weight_logvar is logvar
    assert abs(float(draw.detach().mean()) - 7.0) < 0.2
    assert not torch.equal(draw, model.fc.weight)


@pytest.mark.parametrize("what", ["wider", "gone", "none"])
def test_a_parameter_that_is_gone_or_wider(what: str, tmp_path: Path) -> None:
    model: Any = bayesify.to_bbb(Net(), initial_std=math.exp(-2.0)).eval()
    if what == "wider":
        model.fc.weight = nn.Parameter(torch.ones(3, 4))
        model.fc.bias = nn.Parameter(torch.ones(3))
    elif what == "gone":
        del model.fc.bias
    else:
        model.fc.bias = None
    name = "fc.weight" if what == "wider" else "fc.bias"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for action in (
        lambda: loss_of(model),
        lambda: bayesify.check_optimizer(model, optimizer),
        lambda: bayesify.save(model, tmp_path / "a"),
    ):
        with pytest.raises(UnsupportedModuleError, match=rf"{name} was Bayesian, .*extend_"):
            action()
    assert not list(tmp_path.iterdir())
    if what == "gone":
        model.fc.register_parameter("bias", None)
    bayesify.extend_(model)
    found = {p.name: p.mean.shape for p in bayesify.posteriors(model)}
    assert ("fc.bias" in found) == (what == "wider")
    assert ("fc.bias_logvar" in model.state_dict()) == (what == "wider")
    with bayesify.one_draw(model, seed=1):
        out = model(x := torch.randn(2, 3, 4, 4))
    original = bayesify.to_deterministic(model)
    drawn = bayesify.draws(model, seed=1)
    assert torch.equal(out, torch.func.functional_call(original, drawn, (x,)))
    assert told(model, tmp_path) == ["", "", ""]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.out = nn.Linear(4, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.embed(x))
        return out


@pytest.mark.parametrize("skip", [(), "out"], ids=["two posteriors", "read at the mean"])
def test_weights_tied_since(skip: Any, tmp_path: Path) -> None:
    prior = bayesify.GaussianPrior(mean="initial", std=0.5)
    model: Any = bayesify.to_bbb(
        Tied(), skip=skip, initial_std=math.exp(-1.5), prior=prior, estimator="local"
    )
    model.eval()
    model.out.weight = model.embed.weight
    if skip:
        assert "out.weight" in named(lambda: loss_of(model))
    else:
        with pytest.raises(UnsupportedModuleError, match=r"two posteriors.*extend_"):
            loss_of(model)
    bayesify.extend_(model)
    assert [p.name for p in bayesify.posteriors(model)] == ["embed.weight"]
    assert model.out.weight_logvar is model.embed.weight_logvar
    x = torch.arange(5)
    with bayesify.one_draw(model, seed=2):
        out = model(x)
    drawn = bayesify.draws(model, seed=2)["embed.weight"]
    assert torch.allclose(out, drawn @ drawn.T)
    assert told(model, tmp_path) == ["", "", ""]
    tied = Tied()
    tied.out.weight = tied.embed.weight
    back: Any = bayesify.load(tmp_path / "a", model=tied)
    assert back.out.weight_logvar is back.embed.weight_logvar


def test_tables_of_another_length() -> None:
    """As transformers' resize_token_embeddings: a new table, and the head's weight tied to it."""
    tied = Tied()
    tied.out.weight = tied.embed.weight
    model: Any = bayesify.to_bbb(tied, initial_std=math.exp(-1.5))
    model.embed = nn.Embedding(7, 4)
    model.out.weight = model.embed.weight
    bayesify.extend_(model)
    assert [(p.name, tuple(p.mean.shape)) for p in bayesify.posteriors(model)] == [
        ("embed.weight", (7, 4))
    ]
    assert model.out.weight_logvar is model.embed.weight_logvar
    assert model(torch.arange(7)).shape == (7, 7)


class Forgets(nn.Linear):
    """It copies what it knows of itself."""

    def __getstate__(self) -> dict[str, Any]:
        return {"weight": self.weight, "bias": self.bias}

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias = state["weight"], state["bias"]
        self.out_features, self.in_features = self.weight.shape


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_that_lost_its_posterior(copied: Any, tmp_path: Path) -> None:
    model = copied(
        bayesify.to_bbb(nn.Sequential(nn.Linear(3, 4), Forgets(4, 2)), initial_std=math.exp(-2.0))
    )
    for text in told(model, tmp_path):
        assert "1.weight, 1.bias" in text
    bayesify.extend_(model.eval())
    assert type(model[1]).__mro__[1] is Forgets
    with bayesify.one_draw(model, seed=1):
        out = model(x := torch.randn(2, 3))
    drawn = bayesify.draws(model, seed=1)
    assert len(drawn) == 4
    assert torch.equal(out, torch.func.functional_call(bayesify.to_deterministic(model), drawn, x))


# -- errors ------------------------------------------------------------------------------------


def test_a_failed_extension_changes_nothing() -> None:
    model: Any = bayesify.to_bbb(Net())
    model.fc = nn.Linear(4, 3)
    model.conv.bias = None
    model.blocks.append(nn.Linear(4, 4))
    model.blocks[2].weight = nn.Parameter(torch.full((4, 4), float("nan")))
    before = {n: id(p) for n, p in model.named_parameters()}
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(UnsupportedModuleError, match=r"blocks\.2\.weight holds NaN"):
        bayesify.extend_(model)
    assert {n: id(p) for n, p in model.named_parameters()} == before
    assert [type(m) for m in model.modules()] == kinds
    with pytest.raises(UnsupportedModuleError, match=r"conv\.bias was Bayesian"):
        bayesify.kl_divergence(model)


def test_nothing_to_extend() -> None:
    with pytest.raises(UnsupportedModuleError, match="no conversion to extend"):
        bayesify.extend_(Net())


def test_an_optimizer_of_before_is_named() -> None:
    model: Any = bayesify.to_bbb(Net())
    optimizer = torch.optim.SGD(bayesify.param_groups(model, lr=0.1))
    model.fc = nn.Linear(4, 3)
    bayesify.extend_(model)
    with pytest.raises(ArgumentError, match=r"does not hold 2 log variances \(fc.weight_logvar"):
        bayesify.check_optimizer(model, optimizer)


def test_a_step_that_is_compiled() -> None:
    model: Any = bayesify.to_bbb(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    model[1] = nn.Linear(4, 2)
    x = torch.randn(5, 3)

    def step() -> Tensor:
        return bayesify.elbo_loss(model(x).square().mean(), model, num_data=5)

    torch._dynamo.reset()
    value = torch.compile(step, fullgraph=True, backend="eager")()
    assert bool(torch.isfinite(value))


# -- what leaves a converted layer as it is ---------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:.*quantized.*")
def test_quantize_dynamic_says_that_it_does_nothing() -> None:
    from torch.ao.quantization import quantize_dynamic

    model = bayesify.to_bbb(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), skip="1")
    with pytest.warns(UserWarning, match=r"leaves this Linear as it is.*to_deterministic"):
        quantized: Any = quantize_dynamic(model, {nn.Linear})
    assert type(quantized[1]) is not nn.Linear  # what was skipped is quantised as ever
    assert [p.name for p in bayesify.posteriors(quantized)] == ["0.weight", "0.bias"]
    assert not hasattr(quantized[0], "qconfig")
    means = quantize_dynamic(bayesify.to_deterministic(model), {nn.Linear})
    assert not list(means.parameters())
