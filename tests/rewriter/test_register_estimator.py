"""An estimator of one's own: registered, used and stored by name, refused where unknown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bayesify
from bayesify import ArgumentError, CheckpointError
from bayesify.estimators import Posterior, registry
from bayesify.posterior import sites


def antithetic(
    operation: registry.Operation, input: Tensor, weight: Posterior, bias: Any
) -> Tensor:
    """Every other example has the deviation of the one before it with its sign turned."""
    shift, of_bias = (bias.mean, bias.deviation()) if isinstance(bias, Posterior) else (bias, None)
    center = operation(input, weight.mean, shift)
    sign = 1.0 - 2.0 * (torch.arange(len(center)) % 2).to(center.dtype)
    deviating = operation(input, weight.deviation(), of_bias)
    return center + sign.view(-1, *[1] * (center.dim() - 1)) * deviating


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ESTIMATORS", dict(registry._ESTIMATORS))
    bayesify.register_estimator("antithetic", linear=antithetic)


def forget() -> None:
    del registry._ESTIMATORS["antithetic"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.conv = nn.Conv1d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, index: Tensor) -> Tensor:
        x = self.conv(self.table(index).transpose(1, 2)).mean(2)
        out: Tensor = self.head(x)
        return out


def test_it_computes_the_output_of_each_layer() -> None:
    layer = nn.Linear(3, 2)
    model = bayesify.to_bbb(layer, estimator="antithetic", initial_std=0.6)
    x = torch.randn(4, 3)
    drawn = bayesify.draws(model, seed=3)
    with torch.no_grad(), bayesify.one_draw(model, seed=3):
        found = model(x)
    twice = {name: 2 * getattr(layer, name).detach() - drawn[name] for name in ("weight", "bias")}
    torch.testing.assert_close(found[::2], F.linear(x[::2], drawn["weight"], drawn["bias"]))
    torch.testing.assert_close(found[1::2], F.linear(x[1::2], twice["weight"], twice["bias"]))
    assert not torch.allclose(found[1::2], F.linear(x[1::2], drawn["weight"], drawn["bias"]))
    assert torch.equal(model.eval()(x), layer(x))


def test_gradients_reach_mean_and_spread() -> None:
    model = bayesify.to_bbb(nn.Linear(3, 2), estimator="antithetic", initial_std=0.6)
    x = torch.randn(4, 3)
    drawn = bayesify.draws(model, seed=3)
    with bayesify.one_draw(model, seed=3):
        model(x).sum().backward()
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0])
    for site in sites(model):
        inputs = x if site.attribute == "weight" else torch.ones(4, 1)
        by_mean, turned = inputs.sum(0), (sign[:, None] * inputs).sum(0)
        by_logvar = 0.5 * (drawn[site.name] - site.mean.detach()) * turned  # d(sigma eps) / dlogvar
        torch.testing.assert_close(site.mean.grad, by_mean.expand_as(site.mean))
        torch.testing.assert_close(site.raw.grad, by_logvar)


def test_what_it_has_no_form_for_is_drawn_whole() -> None:
    net = Net()
    rows = {row.name: row.estimator for row in bayesify.plan(net, estimator="antithetic").rows}
    assert rows == {
        "table.weight": "weight", "conv.weight": "antithetic", "conv.bias": "antithetic",
        "head.weight": "antithetic", "head.bias": "antithetic",
    }  # fmt: skip
    model = bayesify.to_bbb(net, estimator="antithetic")
    model(torch.randint(5, (2, 6)))
    told = {entry.owner: entry.reason for entry in bayesify.rungs(model)}
    assert "2 estimated" in told["conv"]
    assert "estimated" not in told["table"]
    assert (
        "estimate('antithetic', torch.conv1d"
        in bayesify.generated_code(model.get_submodule("conv"))["forward"]
    )


class Looks(nn.Module):
    """Its code may look something up, and multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (
            F.embedding(x, self.weight) if not x.is_floating_point() else F.linear(x, self.weight)
        )


def test_one_layer_may_read_in_two_ways() -> None:
    model = bayesify.to_bbb(Looks(), estimator="antithetic")
    model(torch.randn(2, 3))
    model(torch.tensor([0, 1]))
    [multiplied, looked] = [entry.reason for entry in bayesify.rungs(model)]
    assert "1 estimated" in multiplied
    assert "weight is drawn whole: estimator 'antithetic' has no form for embedding" in looked


def test_a_patterns_own_and_compiled() -> None:
    model = bayesify.to_bbb(Net(), estimator={"head": "antithetic", "*": "flipout"})
    assert {s.name: s.slot.estimator for s in sites(model)}["head.bias"] == "antithetic"
    index = torch.randint(5, (4, 6))
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), bayesify.one_draw(model, seed=2):
        torch.testing.assert_close(compiled(index), model(index))


def test_a_file_names_it(tmp_path: Path) -> None:
    path = tmp_path / "m.bbb.safetensors"
    model = bayesify.to_bbb(Net(), estimator="antithetic")
    bayesify.save(model, path)
    loaded = bayesify.load(path, model=Net())
    assert {s.slot.estimator for s in sites(loaded)} == {"antithetic", "weight"}
    forget()
    with pytest.raises(CheckpointError) as caught:
        bayesify.load(path, model=Net())
    message = str(caught.value)
    assert message.startswith(f"{path} ")
    assert "'antithetic'" in message
    assert "register_estimator" in message
    assert "damaged" not in message


def test_a_model_whose_estimator_is_unknown_here() -> None:
    model = bayesify.to_bbb(Net(), estimator="antithetic")
    forget()
    with pytest.raises(ArgumentError, match=r"'antithetic': there are 'weight', .*register_estim"):
        model(torch.randint(5, (2, 6)))
    assert model.eval()(torch.randint(5, (2, 6))).shape == (2, 2)


@pytest.mark.parametrize(
    ("name", "functions", "message"),
    [
        ("local", {"linear": antithetic}, "called 'local' already"),
        ("antithetic", {"linear": antithetic}, "called 'antithetic' already"),
        ("weight", {"linear": antithetic}, "called 'weight' already"),
        ("two words", {"linear": antithetic}, "must be an identifier.*'two words'"),
        (3, {"linear": antithetic}, "must be an identifier.*3"),
        ("new", {}, "needs a function for linear=, for embedding="),
        ("new", {"linear": "local"}, "needs a function.*'local'"),
        ("new", {"linear": antithetic, "embedding": 3}, "needs a function.*3"),
    ],
)
def test_what_cannot_be_registered(name: Any, functions: Any, message: str) -> None:
    before = dict(registry._ESTIMATORS)
    with pytest.raises(ArgumentError, match=message):
        bayesify.register_estimator(name, **functions)
    assert before == registry._ESTIMATORS


@pytest.mark.parametrize("name", ["antithetical", "", None, ["local"]])
def test_a_name_that_nobody_has(name: Any) -> None:
    with pytest.raises(ArgumentError, match="No estimator is called"):
        bayesify.to_bbb(Net(), estimator=name)
