"""Models that another tool has wrapped first: parametrize, prune, peft, fx, quantization, compile.

What a wrapper of one layer keeps is in test_invariants; whole models and the wrappers' own
operations, before and after a conversion, are here.
"""

from __future__ import annotations

import copy
import math
import pickle
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import bayesify
from bayesify import BayesifyError, UnsupportedModuleError, one_draw, sampled
from bayesify.posterior import sites
from reference import check, functional_call

Call = tuple[tuple[Any, ...], dict[str, Any]]


def images(batch: int) -> Call:
    generator = torch.Generator().manual_seed(batch)
    return (torch.randn(batch, 1, 5, 5, generator=generator),), {}


def rows(batch: int) -> Call:
    return (torch.randn(batch, 4, generator=torch.Generator().manual_seed(batch)),), {}


PICTURES = images(2)[0][0]
ROWS = rows(2)[0][0]


class Net(nn.Module):
    """A convolution, a norm with statistics, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.act(self.norm(self.conv(x))).mean((2, 3)))
        return y


class Bare(nn.Module):
    """A parameter of its own, and one of its child that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4, 3))
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) @ self.scale + self.layer.bias.sum()
        return y


# torch 2.11 pickles no graph of a forward whose annotations are text
Bare.forward.__annotations__ = typing.get_type_hints(Bare.forward)


def names(model: nn.Module) -> set[str]:
    return {site.name for site in sites(model)}


def draw(model: Any, x: Tensor, seed: int = 1) -> Tensor:
    with one_draw(model, seed=seed):
        return model(x)  # type: ignore[no-any-return]


# -- torch.nn.utils.parametrize --------------------------------------------------------------


class LowRank(nn.Module):
    """Adds a product of two parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(4, 1))
        self.b = nn.Parameter(torch.randn(1, 4))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.a @ self.b


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


def weight_norm(model: Net) -> None:
    parametrizations.weight_norm(model.conv)
    parametrizations.weight_norm(model.head, dim=1)


def spectral_norm(model: Net) -> None:
    parametrizations.spectral_norm(model.conv)
    parametrizations.spectral_norm(model.head)


def orthogonal(kind: str) -> Callable[[Net], None]:
    return lambda model: void(parametrizations.orthogonal(model.head, orthogonal_map=kind))


def void(value: object) -> None:
    """For a lambda that is called for its effect."""


def chained(model: Net) -> None:
    parametrize.register_parametrization(model.head, "weight", LowRank())
    parametrize.register_parametrization(model.head, "weight", Symmetric())
    parametrize.register_parametrization(model.head, "bias", nn.Softplus())


HEAD = "head.parametrizations"
PARAMETRIZED: dict[str, tuple[Callable[[Net], None], set[str]]] = {
    "weight_norm": (
        weight_norm,
        {f"{m}.parametrizations.weight.original{k}" for m in ("conv", "head") for k in "01"},
    ),
    "spectral_norm": (
        spectral_norm, {f"{m}.parametrizations.weight.original" for m in ("conv", "head")}
    ),
    "householder": (orthogonal("householder"), {f"{HEAD}.weight.original"}),
    "cayley": (orthogonal("cayley"), {f"{HEAD}.weight.original"}),
    "matrix_exp": (orthogonal("matrix_exp"), {f"{HEAD}.weight.original"}),
    "chained": (
        chained,
        {f"{HEAD}.weight.original", f"{HEAD}.weight.0.a", f"{HEAD}.weight.0.b",
         f"{HEAD}.bias.original"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETRIZED)
def test_parametrized(name: str) -> None:
    wrap, originals = PARAMETRIZED[name]
    model = Net()
    wrap(model)
    report = check(model, images)
    assert report.problems == []
    assert report.swapped == []
    found = names(bayesify.to_bbb(model))
    assert {n for n in found if "parametrizations" in n} == originals
    assert found == {n for n, _ in model.named_parameters()}


def test_an_orthogonal_weight_is_orthogonal_in_every_draw() -> None:
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4, bias=False)))
    converted: Any = bayesify.to_bbb(model, initial_std=math.exp(-1.0))
    weights = []
    for seed in (1, 2):
        weight = draw(converted, torch.eye(4), seed).detach()
        torch.testing.assert_close(weight @ weight.mT, torch.eye(4), rtol=0, atol=1e-5)
        weights.append(weight)
    assert float((weights[0] - weights[1]).abs().max()) > 0.1


def with_weight_norm() -> Any:
    model = Net()
    parametrizations.weight_norm(model.head)
    return model


def test_reading_a_parametrized_weight_reads_the_draw() -> None:
    model = with_weight_norm()
    converted: Any = bayesify.to_bbb(model, initial_std=math.exp(-1.5)).eval()
    drawn = bayesify.draws(converted, seed=1)
    g, v = (drawn[f"{HEAD}.weight.original{k}"] for k in "01")
    with one_draw(converted, seed=1):
        found = converted.head.weight
    expected = v * (g / v.norm(dim=1, keepdim=True))
    torch.testing.assert_close(found, expected)
    assert torch.equal(converted.head.weight, model.head.weight)  # at the means


@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize("called_before", [False, True])
def test_parametrize_cached(called_before: bool, read_before: bool) -> None:
    converted: Any = bayesify.to_bbb(with_weight_norm(), initial_std=math.exp(-1.5)).eval()
    other = copy.deepcopy(converted)
    if called_before:
        draw(converted, PICTURES)
    if read_before:
        with one_draw(converted, seed=1):
            assert float(converted.head.weight.detach().sum()) != 0
    with parametrize.cached():
        found = draw(converted, PICTURES)
        again = draw(converted, PICTURES, seed=2)
        weight = converted.head.weight
    assert type(found) is Tensor
    assert type(weight) is Tensor  # no stand-in of a trace stays in the cache
    assert torch.equal(found, draw(other, PICTURES))
    assert not torch.equal(found, again)


def test_parametrizations_are_removed_after_the_conversion_back() -> None:
    model = with_weight_norm()
    expected = model.eval()(PICTURES)
    back: Any = bayesify.to_deterministic(bayesify.to_bbb(model))
    parametrize.remove_parametrizations(back.head, "weight")
    assert type(back.head) is nn.Linear
    assert set(back.state_dict()) == set(Net().state_dict())
    assert torch.equal(back(PICTURES), expected)


@pytest.mark.xfail(
    strict=True, raises=AttributeError,
    reason="torch deletes the weight from the generated class, which does not hold it",
)  # fmt: skip
def test_parametrization_removed_from_a_converted_model() -> None:
    model = with_weight_norm()
    expected = model.eval()(PICTURES)
    converted: Any = bayesify.to_bbb(model, initial_std=math.exp(-1.5)).eval()
    try:
        parametrize.remove_parametrizations(converted.head, "weight")
    except BayesifyError:
        assert parametrize.is_parametrized(converted.head)
    assert torch.equal(converted(PICTURES), expected)
    draw(converted, PICTURES)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: parametrizations.weight_norm(model.head),
        lambda model: parametrize.register_parametrization(model.head, "weight", Symmetric()),
        lambda model: prune.l1_unstructured(model.head, "weight", 0.5),
    ],
    ids=["weight_norm", "parametrization", "prune"],
)
def test_wrapped_after_the_conversion(wrap: Callable[[Any], object]) -> None:
    converted: Any = bayesify.to_bbb(Net(), initial_std=math.exp(-1.5)).train()
    wrap(converted)
    # either works: the moved parameter goes on to be drawn, or an error names it
    try:
        first, second = converted(PICTURES), converted(PICTURES)
    except BayesifyError as error:
        assert "head.weight" in str(error)  # noqa: PT017
    else:
        assert not torch.equal(first, second)


# -- torch.nn.utils.prune --------------------------------------------------------------------


def test_pruned() -> None:
    model: Any = Net()
    prune.l1_unstructured(model.head, "weight", 0.5)
    prune.random_structured(model.conv, "weight", 0.5, dim=0)
    report = check(model, images)
    assert report.problems == []
    assert report.swapped == []
    converted: Any = bayesify.to_bbb(model, initial_std=math.exp(-1.0))
    assert names(converted) >= {"head.weight_orig", "conv.weight_orig"}
    mask = converted.head.weight_mask == 0
    assert int(mask.sum()) == 8
    converted.norm.eval()  # else the zero channels' statistics matter
    with one_draw(converted, seed=1):
        converted(PICTURES)
        weight = converted.head.weight.detach()
    assert torch.equal(weight == 0, mask)
    drawn = bayesify.draws(converted, seed=1)["head.weight_orig"]
    assert torch.equal(weight, drawn.detach() * converted.head.weight_mask)
    back: Any = bayesify.to_deterministic(converted)
    prune.remove(back.head, "weight")
    prune.remove(back.conv, "weight")
    assert set(back.state_dict()) == set(Net().state_dict())
    assert torch.equal(back.eval()(PICTURES), model.eval()(PICTURES))


# -- peft ------------------------------------------------------------------------------------


class Base(nn.Module):
    """Every kind of layer that LoRA wraps, and one whose weight its parent reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.first = nn.Linear(16, 8)
        self.second = nn.Linear(8, 8)
        self.words = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(self.conv(x[:, None]).flatten(1)))
        h = self.second(h) + self.words(torch.arange(5)).sum(0)
        y: Tensor = self.head(h) + self.head.weight.sum()
        return y


TARGETS = ["conv", "first", "second", "words"]


def lora(**options: Any) -> Any:
    return peft().LoraConfig(**options)


def peft() -> Any:
    return pytest.importorskip("peft", reason="peft is not installed")


def with_lora(model: nn.Module | None = None, **options: Any) -> Any:
    settings = {
        "target_modules": TARGETS, "r": 2, "lora_alpha": 4, "lora_dropout": 0.1,
        "init_lora_weights": False, **options,
    }  # fmt: skip
    return peft().get_peft_model(Base() if model is None else model, lora(**settings))


@pytest.mark.parametrize(
    "options",
    [
        {}, {"use_rslora": True}, {"use_dora": True, "target_modules": ["first", "second"]},
        {"lora_bias": True, "bias": "all", "target_modules": ["first", "second"]},
        {"modules_to_save": ["head"]},
    ],
    ids=lambda o: next(iter(o), "plain"),
)  # fmt: skip
def test_lora(options: dict[str, Any]) -> None:
    model = with_lora(**options)
    report = check(model, rows)
    assert report.problems == []
    if "use_dora" in options:  # its layers are given a module as an argument
        assert all("an argument of type Linear" in line for line in report.swapped)
    else:
        assert report.fx_owners == report.owners > 0
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names(bayesify.to_bbb(model)) == trained


def test_lora_draws_the_adapters_only() -> None:
    model = with_lora(lora_dropout=0.0)
    converted: Any = bayesify.to_bbb(model, only="*lora_*", initial_std=math.exp(-1.5)).train()
    assert len(names(converted)) == 2 * len(TARGETS)
    assert all("lora_" in n for n in names(converted))
    plan = {row.name: row.action for row in bayesify.plan(model).rows}
    assert plan["base_model.model.first.base_layer.weight"] == "frozen"
    assert plan["base_model.model.head.weight"] == "frozen"
    converted(ROWS).sum().backward()
    for name, parameter in converted.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
    # the effective weight of a draw is W + alpha / r * B A
    drawn = bayesify.draws(converted, seed=1)
    layer, x = "base_model.model.first.", torch.eye(16)
    product = drawn[f"{layer}lora_B.default.weight"] @ drawn[f"{layer}lora_A.default.weight"]
    first = converted.base_model.model.first
    with one_draw(converted, seed=1):
        found = first(x) - first.base_layer.bias
    torch.testing.assert_close(found, (first.base_layer.weight + 2.0 * product).mT)


def test_lora_over_a_posterior_of_everything() -> None:
    config = bayesify.BBBConfig(include_frozen=True)
    model = with_lora(lora_dropout=0.0)
    converted: Any = bayesify.to_bbb(model, config=config, initial_std=math.exp(-1.5)).train()
    drawn = bayesify.draws(converted, seed=1)
    assert torch.equal(draw(converted, ROWS), functional_call(model, drawn, (ROWS,), {}))
    assert names(converted) == {n for n, _ in model.named_parameters()}
    frozen = converted.base_model.model.first.base_layer.weight
    converted(ROWS).sum().backward()
    assert frozen.grad is None
    assert not frozen.requires_grad


def test_lora_is_switched_off_and_on() -> None:
    model = with_lora().eval()
    converted: Any = bayesify.to_bbb(model, initial_std=math.exp(-1.5)).eval()
    with sampled(converted):
        assert not torch.equal(converted(ROWS), converted(ROWS))
        with converted.disable_adapter(), model.disable_adapter():
            assert torch.equal(converted(ROWS), model(ROWS))
        assert not torch.equal(converted(ROWS), converted(ROWS))


def test_lora_with_two_adapters() -> None:
    model = with_lora(lora_dropout=0.0)
    model.add_adapter("other", lora(target_modules=["second"], r=3, init_lora_weights=False))
    model.requires_grad_(True)
    converted: Any = bayesify.to_bbb(model, only="*lora_*", initial_std=math.exp(-1.5)).train()
    drawn = bayesify.draws(converted, seed=1)
    for adapter in ("default", "other", "default"):
        for each in (model, converted):
            each.set_adapter(adapter)
        found = draw(converted, ROWS)
        assert torch.equal(found, functional_call(model, drawn, (ROWS,), {})), adapter


@torch.no_grad()
def test_lora_is_merged() -> None:
    model = with_lora().eval()
    expected = model(ROWS)
    converted: Any = bayesify.to_bbb(model, initial_std=math.exp(-1.5)).eval()
    back: Any = bayesify.to_deterministic(converted)
    for merged in (back.merge_and_unload(), converted.merge_and_unload()):
        assert isinstance(merged, Base)
        assert isinstance(merged.first, nn.Linear)
        assert set(merged.state_dict()) == set(Base().state_dict())
        torch.testing.assert_close(merged(ROWS), expected, rtol=1e-4, atol=1e-5)
        assert names(merged) == set()


def test_lora_over_a_converted_model() -> None:
    base = Base()
    converted: Any = bayesify.to_bbb(base, initial_std=math.exp(-1.5))
    converted(ROWS)
    model = with_lora(converted, lora_dropout=0.0).train()
    assert len(names(model)) == len(list(base.parameters()))
    assert not any("lora_" in n for n in names(model))
    assert not torch.equal(model(ROWS), model(ROWS))
    model.requires_grad_(True)
    draw(model, ROWS).sum().backward()
    without = {
        n for n, p in model.named_parameters() if p.grad is None or not float(p.grad.abs().max())
    }
    assert without == set()
    back = bayesify.to_deterministic(model).eval()
    assert torch.equal(model.eval()(ROWS), back(ROWS))
    assert {n for n in names(bayesify.to_bbb(back)) if "lora_" in n}


# -- torch.fx --------------------------------------------------------------------------------


def exported(model: nn.Module) -> Any:
    batch = torch.export.Dim("batch", min=2)
    return torch.export.export(model, (ROWS,), dynamic_shapes={"x": {0: batch}}).module()


GRAPHS: dict[str, Callable[[nn.Module], Any]] = {
    "traced": torch.fx.symbolic_trace,
    "exported": exported,
}


# torch 2.11 says so of its own copy of an exported program
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("kind", GRAPHS)
def test_graph_module(kind: str, in_place: bool) -> None:
    model = Bare()
    graph = GRAPHS[kind](copy.deepcopy(model))
    converted: Any = (bayesify.to_bbb_ if in_place else bayesify.to_bbb)(
        graph, initial_std=math.exp(-1.5)
    )
    assert isinstance(converted, torch.fx.GraphModule)
    assert names(converted) == {n for n, _ in model.named_parameters()}
    drawn = bayesify.draws(converted, seed=1)
    for batch in (2, 3):
        x = rows(batch)[0][0]
        assert torch.equal(draw(converted, x), functional_call(model, drawn, (x,), {}))
        with bayesify.at_mean(converted):
            assert torch.equal(converted(x), model(x))
    draw(converted, ROWS).square().sum().backward()
    assert all(p.grad is not None for p in converted.parameters())


def back_and_forth(converted: Any) -> Any:
    back = bayesify.to_deterministic(converted)
    assert not any("logvar" in key for key in back.state_dict())
    return bayesify.to_bbb(back, initial_std=math.exp(-1.5))


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda model: pickle.loads(pickle.dumps(model)), id="pickle"),
        back_and_forth,
        pytest.param(lambda model: (model.recompile(), model)[1], id="recompile"),
    ],
)
def test_graph_module_lives_on(act: Callable[[Any], Any]) -> None:
    model = Bare()
    converted = bayesify.to_bbb(torch.fx.symbolic_trace(model), initial_std=math.exp(-1.5))
    expected = draw(converted, ROWS)
    other = act(converted)
    assert names(other) == {n for n, _ in model.named_parameters()}
    assert torch.equal(draw(other, ROWS), expected)


# -- torch.ao.quantization -------------------------------------------------------------------

QUANTIZED = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor.*deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:must run observer before calling:UserWarning"),
]


def quantized(test: Any) -> Any:
    for mark in QUANTIZED:
        test = mark(test)
    return test


class Stubbed(nn.Module):
    """A net between the stubs that quantization wants."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = quantization.QuantStub()
        self.net = Net()
        self.dequant = quantization.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dequant(self.net(self.quant(x)))
        return y


def prepared(*, training: bool, fused: bool = False) -> Any:
    model: Any = Stubbed().train(training)
    engine = torch.backends.quantized.engine
    if fused:
        fuse: Any = quantization.fuse_modules_qat if training else quantization.fuse_modules
        model.net = fuse(model.net, ["conv", "norm", "act"])
    if training:
        model.qconfig = quantization.get_default_qat_qconfig(engine)
        quantization.prepare_qat(model, inplace=True)
    else:
        model.qconfig = quantization.get_default_qconfig(engine)
        quantization.prepare(model, inplace=True)
    model(images(4)[0][0])  # its observers have seen something
    return model


@quantized
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_ready_for_quantization(training: bool, fused: bool) -> None:
    model = prepared(training=training, fused=fused)
    report = check(model, images)
    assert report.problems == []
    assert report.fx_owners == report.owners > 1
    assert names(bayesify.to_bbb(model)) == {n for n, _ in model.named_parameters()}


@quantized
def test_fake_quantization_sees_the_draw() -> None:
    converted: Any = bayesify.to_bbb(prepared(training=True), initial_std=math.exp(-1.0))
    converted.apply(quantization.disable_observer)
    head = converted.net.head
    x = torch.eye(4)
    with one_draw(converted, seed=1), torch.no_grad():
        found = head(x)
        drawn = bayesify.draws(converted, seed=1)
        expected = F.linear(
            x, head.weight_fake_quant(drawn["net.head.weight"]), drawn["net.head.bias"]
        )
        assert torch.equal(found, head.activation_post_process(expected))


@quantized
def test_quantized_after_the_conversion_back() -> None:
    model = prepared(training=False)
    back = bayesify.to_deterministic(bayesify.to_bbb(model)).eval()
    found, expected = quantization.convert(back), quantization.convert(model)
    assert torch.equal(found(PICTURES), expected(PICTURES))
    linear = nn.Sequential(nn.Linear(4, 4))
    quantization.quantize_dynamic(linear, inplace=True)
    with pytest.raises(UnsupportedModuleError, match="has no parameter"):
        bayesify.to_bbb(linear)


# -- torch.compile and torch.jit before the conversion ---------------------------------------


@pytest.fixture(autouse=True)
def _no_compiled_code_stays() -> Any:
    yield
    torch._dynamo.reset()


# torch says so of any compiled part whose input is not a leaf
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_in_place_before_the_conversion(in_place: bool, part: bool) -> None:
    """Module.compile keeps the class, so that this is a model like any other."""
    model: Any = nn.Sequential(Net(), nn.Linear(4, 2)).eval()
    original = copy.deepcopy(model)
    (model[0] if part else model).compile(backend="eager")
    assert torch.equal(model(PICTURES), original(PICTURES))  # it is compiled now
    converted: Any = (bayesify.to_bbb_ if in_place else bayesify.to_bbb)(
        model, initial_std=math.exp(-1.5)
    )
    for seed in (1, 2):
        drawn = bayesify.draws(converted, seed=seed)
        found = draw(converted, PICTURES, seed)
        assert torch.equal(found, functional_call(original, drawn, (PICTURES,), {}))
    with sampled(converted):
        assert not torch.equal(converted(PICTURES), converted(PICTURES))
    assert torch.equal(converted(PICTURES), original(PICTURES))


@pytest.mark.parametrize("in_place", [False, True])
def test_wrapper_of_compile_in_a_model(in_place: bool) -> None:
    inner = Net()
    compiled: Any = torch.compile(inner, backend="eager")
    model = nn.Sequential(compiled, nn.Linear(4, 2))
    original = nn.Sequential(copy.deepcopy(inner), copy.deepcopy(model[1]))
    # either works: it draws as it would without, or one error names the part
    try:
        converted: Any = (bayesify.to_bbb_ if in_place else bayesify.to_bbb)(
            model, initial_std=math.exp(-1.5)
        )
    except UnsupportedModuleError as error:
        assert "'0'" in str(error)  # noqa: PT017
        assert "compile" in str(error)  # noqa: PT017
        assert names(model) == set()
        return
    drawn = bayesify.draws(converted, seed=1)
    drawn = {k.replace("_orig_mod.", ""): v for k, v in drawn.items()}
    found = draw(converted, PICTURES)
    assert torch.equal(found, functional_call(original, drawn, (PICTURES,), {}))


@pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated")
def test_what_torch_jit_traced_is_refused() -> None:
    traced = torch.jit.trace(nn.Linear(4, 4), ROWS)
    with pytest.raises(UnsupportedModuleError, match=r"before torch\.jit"):
        bayesify.to_bbb(traced)
    model = nn.Sequential(nn.Linear(4, 4), traced)
    with pytest.raises(UnsupportedModuleError, match=r"ScriptModule '1'.*skip='1'"):
        bayesify.to_bbb(model)
    converted = bayesify.to_bbb(model, skip="1")
    drawn = bayesify.draws(converted, seed=1)
    expected = traced(F.linear(ROWS, drawn["0.weight"], drawn["0.bias"]))
    assert torch.equal(draw(converted, ROWS), expected)


# -- several devices -----------------------------------------------------------------------------


def distributed(module: nn.Module) -> nn.Module:
    """As DistributedDataParallel holds it, without the processes."""
    wrapper = object.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = module
    return wrapper


@pytest.mark.parametrize(
    ("wrap", "named", "advice"),
    [
        (nn.DataParallel, "nn.DataParallel, which is not supported", "FSDP2"),
        (distributed, "DistributedDataParallel, which would not average", "wrap what comes out"),
    ],
)
def test_what_runs_on_several_devices_is_wrapped_afterwards(
    wrap: Callable[[nn.Module], nn.Module], named: str, advice: str
) -> None:
    inner = nn.Sequential(wrap(nn.Linear(4, 4)), nn.Linear(4, 2))
    for model, where in ((wrap(Net()), "The model is inside"), (inner, "'0', which is")):
        before = {k: type(v) for k, v in model.named_modules()}
        for convert in (bayesify.to_bbb, bayesify.to_bbb_, bayesify.plan):
            with pytest.raises(UnsupportedModuleError, match=f"{where} {named}.*{advice}"):
                convert(model)
        assert {k: type(v) for k, v in model.named_modules()} == before
    assert {p.name for p in bayesify.posteriors(bayesify.to_bbb_(inner, skip="0"))} == {
        "1.weight", "1.bias",
    }  # fmt: skip


def test_data_parallel_around_a_converted_model() -> None:
    model = bayesify.to_bbb(Net())
    one = nn.DataParallel(model)  # on one device, or none, it calls the module itself
    with one_draw(model, seed=1):
        assert torch.equal(one(PICTURES), model(PICTURES))
    for module in (model, model.get_submodule("head")):
        with pytest.raises(UnsupportedModuleError, match=r"DataParallel .* FSDP2"):
            module._replicate_for_data_parallel()  # as it does for each of several devices
    again = bayesify.to_deterministic(model)
    assert again._replicate_for_data_parallel().head is again.head
