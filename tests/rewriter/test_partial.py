"""Partial conversion over the zoo's families, and models that cannot be converted.

What a selection should take is worked out from the classes and names of the original model.
"""

from __future__ import annotations

import ast
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torchvision
from timm.layers.cond_conv2d import CondConv2d
from timm.layers.norm import LayerNorm2d, RmsNorm
from timm.layers.norm_act import BatchNormAct2d, LayerNormAct2d
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from typer.testing import CliRunner

import bayesify
from bayesify import (
    UnsupportedModuleError,
    draws,
    one_draw,
    plan,
    sampled,
    to_bbb,
    to_bbb_,
)
from bayesify.cli.app import app
from bayesify.posterior import root_mean_square
from reference import functional_call, perturb_
from timm_models import without_data

FAMILIES = [
    "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224",
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "beit_base_patch16_224",
    "eva02_tiny_patch14_336", "convnext_atto", "resnet18", "resnetv2_50", "efficientnet_b0",
    "mobilenetv3_small_050", "regnety_002", "levit_128s", "pit_ti_distilled_224",
    "cait_xxs24_224", "xcit_nano_12_p8_224", "coat_lite_tiny", "maxvit_tiny_tf_224",
    "mixer_s32_224", "nfnet_f0", "densenet121", "vgg11_bn", "hiera_tiny_224",
    "efficientformer_l1", "mambaout_femto", "sequencer2d_s", "vitamin_small_224",
    "vit_dwee_patch16_reg1_gap_256", "test_vit4", "efficientvit_b0",
]  # fmt: skip
FAMILIES = [name for name in FAMILIES if timm.is_model(name)]  # timm 1.0.15 lacks vit_dwee
# The last layers of torchvision's models, which keep no record of them. Of a detector it is the
# regression of boxes, not the classifier: the last in definition order.
TORCHVISION = {
    "vit_b_16": "heads.head",
    "swin_t": "head",
    "resnet50": "fc",
    "deeplabv3_resnet50": "classifier.4",
    "fasterrcnn_resnet50_fpn": "roi_heads.box_predictor.bbox_pred",
}
ALL_FAMILIES = [*FAMILIES, *(f"torchvision:{name}" for name in TORCHVISION)]


@functools.cache
def family(name: str) -> nn.Module:
    """A model without data; nothing may change it."""
    source, _, inner = name.rpartition(":")
    if not source:
        return without_data(name)
    with torch.device("meta"):
        dense = {"weights_backbone": None} if "resnet50_" in inner or "lab" in inner else {}
        model: nn.Module = torchvision.models.get_model(inner, weights=None, **dense)
    return model


# -- what each thing that users say should take ----------------------------------------------


def names(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.is_floating_point() and p.requires_grad}


def within(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> set[str]:
    """The parameters of the modules that are wanted, and of all that is inside these."""
    found = {id(p) for m in model.modules() if wanted(m) for p in m.parameters()}
    return {n for n in names(model) if id(model.get_parameter(n)) in found}


def of(model: nn.Module, *kinds: type[nn.Module]) -> set[str]:
    return within(model, lambda module: isinstance(module, kinds))


def layer_norms(model: nn.Module) -> set[str]:
    return of(model, nn.LayerNorm)


def batch_norms(model: nn.Module) -> set[str]:
    return of(model, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def convolutions(model: nn.Module) -> set[str]:
    return of(model, nn.modules.conv._ConvNd, CondConv2d, torchvision.ops.DeformConv2d)


def linears(model: nn.Module) -> set[str]:
    """Linear layers, and what nn.MultiheadAttention keeps of its own."""
    found = of(model, nn.Linear)
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            found |= {f"{path}.{name}" for name in ("in_proj_weight", "in_proj_bias")}
    return found


def starting(prefix: str) -> Callable[[nn.Module], set[str]]:
    return lambda model: {n for n in names(model) if n.startswith(prefix)}


def late_blocks(model: nn.Module) -> set[str]:
    """What lies in number 10 or 11 of a list of blocks."""
    found = set()
    for name in names(model):
        parts = name.split(".")
        pairs = list(itertools.pairwise(parts))[:-1]
        if any(a.endswith("blocks") and b in ("10", "11") for a, b in pairs):
            found.add(name)
    return found


def biases(model: nn.Module) -> set[str]:
    return {n for n in names(model) if n.split(".")[-1] == "bias"}


def attention_modules(model: nn.Module) -> set[str]:
    return {n for n in names(model) if "attn" in n.split(".")[1:-1]}


def attention_classes(model: nn.Module) -> set[str]:
    return within(model, lambda m: any("Attention" in k.__name__ for k in type(m).__mro__))


def heads(model: Any) -> tuple[str, ...]:
    """The classifiers that timm records with the weights it publishes."""
    recorded = model.pretrained_cfg["classifier"]
    found: tuple[str, ...] = (recorded,) if isinstance(recorded, str) else tuple(recorded)
    if type(model).__name__.startswith("Levit"):  # its classifier is a norm and a linear layer
        return tuple(name.removesuffix(".linear") for name in found)
    return found


def classifiers(model: nn.Module) -> set[str]:
    inner = next((n for n in TORCHVISION if model is family(f"torchvision:{n}")), None)
    paths = heads(model) if inner is None else (TORCHVISION[inner],)
    return {n for n in names(model) if n.startswith(tuple(f"{path}." for path in paths))}


# What a user says, the parameters that this means, and whether these are left out or taken.
Case = tuple[dict[str, str], Callable[[nn.Module], set[str]], bool]
CASES: dict[str, Case] = {
    "full": ({"preset": "full"}, lambda model: set(), False),
    "no-conv": ({"preset": "no-conv"}, convolutions, False),
    "linear-only": ({"preset": "linear-only"}, linears, True),
    "no-layernorm": ({"preset": "no-layernorm"}, layer_norms, False),
    "last-layer": ({"preset": "last-layer"}, classifiers, True),
    "skip LayerNorm": ({"skip": "LayerNorm"}, layer_norms, False),
    "skip BatchNorm*": ({"skip": "BatchNorm*"}, batch_norms, False),
    "skip patch_embed": ({"skip": "patch_embed"}, starting("patch_embed."), False),
    "skip biases": ({"skip": "*.bias"}, biases, False),
    "skip biases re": ({"skip": r"re:(^|\.)bias$"}, biases, False),
    "only head": ({"only": "head.*"}, starting("head."), True),
    "only late": ({"only": r"re:blocks\.1[01]\."}, late_blocks, True),
    "only attn": ({"only": "*.attn"}, attention_modules, True),
    "only Attention": ({"only": "*Attention*"}, attention_classes, True),
}


def expected_of(model: nn.Module, case: str) -> set[str]:
    _, meant, taken = CASES[case]
    return meant(model) if taken else names(model) - meant(model)


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_what_users_say_on_every_family(name: str) -> None:
    model = family(name)
    for case, (options, meant, _) in CASES.items():
        result = plan(model, **options)  # type: ignore[arg-type]
        assert {r.name for r in result.rows if r.bayes} == expected_of(model, case), case
        told = any("matches nothing" in note for note in result.notes)
        assert told == (case != "full" and not meant(model)), (case, result.notes)


def test_every_case_is_news_to_some_families() -> None:
    for case, (_, meant, _) in CASES.items():
        told = [n for n in ALL_FAMILIES if 0 < len(meant(family(n))) < len(names(family(n)))]
        assert case == "full" or len(told) >= 5, (case, told)


def test_subclasses_are_among_them() -> None:
    def kinds(name: str, base: type[nn.Module]) -> set[type]:
        return {type(m) for m in family(name).modules() if isinstance(m, base)}

    assert LayerNorm2d in kinds("convnext_atto", nn.LayerNorm)
    assert LayerNormAct2d in kinds("vitamin_small_224", nn.LayerNorm)
    assert kinds("regnety_002", nn.BatchNorm2d) == {BatchNormAct2d}
    assert not issubclass(RmsNorm, nn.LayerNorm)


@pytest.mark.parametrize(
    ("name", "note"),
    [
        pytest.param(
            "vit_dwee_patch16_reg1_gap_256",
            "skip='LayerNorm' takes 29 LayerNorm, not 14 RmsNorm.",
            marks=pytest.mark.skipif(
                not timm.is_model("vit_dwee_patch16_reg1_gap_256"),
                reason="this timm has no vit_dwee_patch16_reg1_gap_256",
            ),
        ),
        (
            "test_vit4",
            "skip='LayerNorm' matches nothing in this model (VisionTransformer). Its normalisation "
            "layers: 19 RmsNorm.",
        ),
        (
            "levit_128s",
            "skip='LayerNorm' matches nothing in this model (LevitDistilled). Its normalisation "
            "layers: 48 BatchNorm1d, 4 BatchNorm2d. Close names: 'LinearNorm'.",
        ),
        (
            "maxvit_tiny_tf_224",
            "skip='LayerNorm' takes 44 LayerNorm, 1 LayerNorm2d, not 34 BatchNormAct2d.",
        ),
    ],
)
def test_norms_that_are_no_layer_norm_are_named(name: str, note: str) -> None:
    assert plan(family(name), skip="LayerNorm").notes == (note,)


def test_heads_of_distilled_models_are_two() -> None:
    for name in ("deit_tiny_distilled_patch16_224", "levit_128s", "pit_ti_distilled_224"):
        model = family(name)
        rows = plan(model, preset="last-layer").rows
        assert {r.name.split(".")[0] for r in rows if r.bayes} == {"head", "head_dist"}


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_what_is_left_out_stays_as_it_was(name: str) -> None:
    model = family(name)
    before, named = dict(model.named_modules()), list(model.named_parameters())
    for case in ("last-layer", "skip biases"):
        expected = expected_of(model, case)
        converted = to_bbb(model, **CASES[case][0])  # type: ignore[arg-type]
        added = {n for n, _ in converted.named_parameters()} - {n for n, _ in named}
        assert added == {f"{n}_logvar" for n in expected}, case
        assert set(draws(converted, seed=0)) == expected, case
        for path, module in converted.named_modules():
            prefix = f"{path}." if path else ""
            holds = any(n.startswith(prefix) for n in expected)
            assert (type(module) is type(before[path])) == (not holds), (case, path)


# -- on data ---------------------------------------------------------------------------------

SMALL: dict[str, dict[str, Any]] = {
    "test_vit": {"img_size": 64},
    "test_vit4": {"img_size": 64},
    "test_resnet": {},
    "test_convnext3": {},
    "test_efficientnet": {},
    "test_nfnet": {},
    "test_mambaout": {},
    "test_byobnet": {},
    "deit_tiny_distilled_patch16_224": {
        "img_size": 32, "embed_dim": 24, "num_heads": 2, "depth": 2,
    },
    "sequencer2d_s": {
        "layers": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 16), "hidden_sizes": (2, 4, 4, 4),
    },
}  # fmt: skip


def image(options: dict[str, Any]) -> Tensor:
    size = options.get("img_size", 64)
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SMALL)
def test_a_forward_changes_with_the_selected_tensors_only(name: str) -> None:
    model = perturb_(timm.create_model(name, num_classes=5, **SMALL[name]).eval())
    x = image(SMALL[name])
    plain = model(x)
    for case in ("last-layer", "linear-only", "no-conv", "skip biases", "only attn"):
        options, meant, _ = CASES[case]
        if not meant(model):
            continue
        expected = expected_of(model, case)
        converted = to_bbb(model, initial_std=math.exp(-2.0), **options)  # type: ignore[arg-type]
        drawn = draws(converted, seed=3)
        assert set(drawn) == expected
        # Both without a graph: an LSTM has another kernel then, which rounds differently.
        with torch.no_grad(), one_draw(converted, seed=3):
            y = converted(x)
            assert torch.equal(y, functional_call(model, drawn, (x,), {})), case
        assert not torch.equal(y, plain)
        assert torch.equal(converted(x), plain)  # in eval, at the means


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext3"])
def test_the_last_layer_leaves_the_features_alone(name: str) -> None:
    model: Any = timm.create_model(name, **SMALL[name]).eval()
    converted: Any = to_bbb(model, preset="last-layer", initial_std=math.exp(-2.0))
    x = image(SMALL[name])
    with torch.no_grad(), sampled(converted):
        assert torch.equal(converted.forward_features(x), model.forward_features(x))
        assert not torch.equal(converted(x), converted(x))


# -- on the command line ---------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: object, code: int = 0) -> Any:
    environment = {"COLUMNS": "400", "NO_COLOR": "1", "TERM": "dumb"}
    result = CliRunner().invoke(app, [str(a) for a in arguments], env=environment)
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", ["test_vit", "test_byobnet"])
def test_the_command_line_takes_the_same(name: str) -> None:
    model = without_data(name)
    for case, (options, meant, taken) in CASES.items():
        flags = [word for key, value in options.items() for word in (f"--{key}", value)]
        command = ("convert", name, *flags, "--dry-run", "--json")
        if taken and not meant(model):
            result = run(*command, code=1)
            assert "No parameter" in result.stdout + result.stderr
            continue
        document = json.loads(run(*command).stdout)
        found = {row["name"] for row in document["rows"] if row["action"] == "bayes"}
        assert found == expected_of(model, case), case
        told = any("matches nothing" in note for note in document["notes"])
        assert told == (case != "full" and not meant(model)), case


@pytest.mark.usefixtures("folder")
def test_a_file_holds_the_part_that_was_said() -> None:
    options = ("--preset", "no-layernorm", "--skip", "patch_embed", "--skip", "*.bias")
    run("convert", "test_vit", *options, "--only", "blocks.*,head", "--quiet")
    document = json.loads(run("inspect", "test_vit.bbb.safetensors", "--json").stdout)
    model = without_data("test_vit")
    inside = {n for n in names(model) if n.startswith(("blocks.", "head."))}
    assert set(document["posterior"]) == inside - layer_norms(model) - biases(model)


# -- models that cannot be converted ---------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({f"p{i}": nn.Linear(3, 3) for i in range(4)})
        self.list = nn.ParameterList([torch.ones(3), torch.ones(3)])
        self.dict = nn.ParameterDict({"a": torch.ones(3), "b": torch.ones(3)})
        self.good = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.good(x) * self.list[0] + self.dict["b"]
        return y


GOOD = names(Net())


class Special(nn.Parameter):
    pass


class Wrapped(Tensor):
    pass


class Sealed(nn.Module):
    """A class without subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        raise TypeError("sealed")


def put(path: str, make: Callable[[], Tensor]) -> Callable[[Any], None]:
    """Exchange one parameter for another."""
    owner, _, attribute = path.rpartition(".")

    def change(model: Any) -> None:
        tensor = make()
        parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
        model.get_submodule(owner)._parameters[attribute] = parameter

    return change


def add(build: Callable[[], nn.Module]) -> Callable[[Any], None]:
    return lambda model: model.parts.update({f"n{len(model.parts)}": build()})


def take_name(model: Any) -> None:
    model.parts["p3"].weight_logvar = "taken"


def sharded() -> Tensor:
    return distribute_tensor(torch.ones(3, 3), init_device_mesh("cpu", (1,)))


# What makes a model bad, and what each parameter that it makes so is said to be. An `n` part is
# added last, in the order of this table.
BAD: dict[str, tuple[Callable[[Any], None], dict[str, str]]] = {
    "nan": (
        put("parts.p0.weight", lambda: torch.full((3, 3), torch.nan)),
        {"parts.p0.weight": "holds NaN or Inf"},
    ),
    "inf": (
        put("list.1", lambda: torch.tensor([0.0, 0.0, torch.inf])),
        {"list.1": "holds NaN or Inf"},
    ),
    "sparse": (
        put("parts.p1.weight", lambda: torch.eye(3).to_sparse()),
        {"parts.p1.weight": "is sparse (torch.sparse_coo): make it dense"},
    ),
    "float8": (
        put("dict.a", lambda: torch.ones(3).to(torch.float8_e4m3fn)),
        {"dict.a": "is of torch.float8_e4m3fn, a storage type"},
    ),
    "parameter subclass": (
        put("parts.p0.bias", lambda: Special(torch.ones(3))),
        {"parts.p0.bias": "is a Special, not a plain nn.Parameter"},
    ),
    "tensor subclass": (
        put("parts.p1.bias", lambda: torch.ones(3).as_subclass(Wrapped)),
        {"parts.p1.bias": "is a Wrapped, not a plain nn.Parameter"},
    ),
    "DTensor": (
        put("parts.p2.weight", sharded),
        {"parts.p2.weight": "is a DTensor, not a plain nn.Parameter: convert before sharding"},
    ),
    "name taken": (take_name, {"parts.p3.weight": "cannot get a posterior under that name"}),
    "scripted": (
        add(lambda: torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False)))),
        {f"parts.n4.{n}": "belongs to the ScriptModule 'parts.n4'"
         for n in ("0.weight", "0.bias", "1.weight")},
    ),
    "lazy": (
        add(lambda: nn.LazyLinear(3)),
        {f"parts.n5.{n}": "is not initialised yet" for n in ("weight", "bias")},
    ),
    "sealed class": (
        add(lambda: nn.Sequential(Sealed())),
        {"parts.n6.0.w": "Sealed does not allow a subclass in its place (sealed)"},
    ),
}  # fmt: skip


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# torch cannot copy these.
UNCOPYABLE: dict[str, Callable[[Any], None]] = {
    **{name: BAD[name][0] for name in ("sparse", "tensor subclass")},
    "lazy norm": lambda model: model.parts.update({"lazy": nn.LazyBatchNorm1d()}),
}

SCRIPTED = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
IN_ONE_PROCESS = pytest.mark.usefixtures("one_process")


def snapshot(model: nn.Module) -> list[Any]:
    """Classes, attributes and tensors of a model, by identity."""
    found: list[Any] = []
    for path, module in model.named_modules(remove_duplicate=False):
        found.append((path, id(module), type(module)))
        if not isinstance(module, torch.jit.ScriptModule):
            found.append(sorted(vars(module)))
            for table in (module._parameters, module._buffers, module._modules):
                found.append([(key, id(value)) for key, value in table.items()])
    return found


def refusal(model: nn.Module, **options: Any) -> str:
    """The one error of the dry run and the conversion, which leave the model alone."""
    before = snapshot(model)
    told = set()
    for function in (plan, to_bbb_):
        with pytest.raises(UnsupportedModuleError, match="cannot be converted") as caught:
            function(model, **options)
        told.add(str(caught.value))
        assert snapshot(model) == before
    [message] = told
    return message


def suggestion(message: str) -> Any:
    """The ``skip`` at the end of an error, as it would be pasted."""
    found = re.findall(r"skip=('[^\n]*?'|\[[^\n]*\])(?: leaves all of these out)?\.$", message)
    return ast.literal_eval(found[-1])


def posterior_names(model: nn.Module) -> set[str]:
    return {p.name for p in bayesify.posteriors(model)}


@SCRIPTED
@IN_ONE_PROCESS
@pytest.mark.parametrize("name", BAD)
def test_one_bad_thing(name: str) -> None:
    change, reasons = BAD[name]
    model = Net()
    for _ in range(int(next(iter(reasons))[7:8]) - 4 if "parts.n" in str(reasons) else 0):
        model.parts[f"p{len(model.parts)}"] = nn.Identity()  # so that the name is the table's
    change(model)
    first, *lines = refusal(model).splitlines()
    assert first == "Net cannot be converted:"
    for bad, reason in reasons.items():
        [line] = [line for line in lines if line.split()[0].startswith(bad)]
        assert reason in line
        assert "skip=" in line
    skip = suggestion(lines[-1])
    assert posterior_names(to_bbb_(model, skip=skip)) == GOOD - set(reasons)
    assert model(torch.ones(2, 3)).shape == (2, 3)


@SCRIPTED
@IN_ONE_PROCESS
def test_all_bad_things_are_told_at_once() -> None:
    model = Net()
    reasons: dict[str, str] = {}
    for change, said in BAD.values():
        change(model)
        reasons |= said
    message = refusal(model)
    lines = message.splitlines()[1:-1]
    assert len(lines) == len(reasons)
    for bad, reason in reasons.items():
        [line] = [line for line in lines if line.split()[0].startswith(bad)]
        assert reason in line
    good = GOOD - set(reasons)
    assert "good.weight" in good
    assert not any(name in message for name in good)
    skip = suggestion(message)
    assert skip.startswith("parts.p0.weight,")
    assert posterior_names(to_bbb_(model, skip=skip)) == good
    assert model(torch.ones(2, 3)).shape == (2, 3)


@SCRIPTED
@IN_ONE_PROCESS
@pytest.mark.parametrize("name", BAD)
def test_bad_things_that_are_left_out_are_in_nobodys_way(name: str) -> None:
    model = Net()
    BAD[name][0](model)
    model.good.bias = nn.Parameter(torch.zeros(3))
    assert posterior_names(to_bbb_(model, only="good")) == {"good.weight", "good.bias"}


def test_a_frozen_parameter_is_not_judged() -> None:
    model = Net()
    model.good.weight = Special(torch.full((3, 3), torch.nan), requires_grad=False)
    assert posterior_names(to_bbb_(model)) == GOOD - {"good.weight"}


def test_the_skip_comes_beside_ones_own() -> None:
    model = Net()
    for path in ("parts.p0.weight", "parts.p1.weight", "good.weight"):
        put(path, lambda: torch.full((3, 3), torch.nan))(model)
    message = refusal(model, skip=["parts.p0", "*.bias"])
    assert message.splitlines()[-1].startswith("Beside what you skip already, skip='")
    assert "parts.p0.weight" not in message
    skip = ["parts.p0", "*.bias", *suggestion(message).split(",")]
    found = posterior_names(to_bbb_(model, skip=skip))
    assert found == {n for n in GOOD if n.startswith(("list", "dict", "parts.p2.w", "parts.p3.w"))}


def test_names_that_look_like_patterns() -> None:
    model = nn.ModuleDict({"a[0]": nn.Linear(2, 2), "a0": nn.Linear(2, 2), "b, c*": Special_()})
    model["a[0]"].weight = Special(torch.ones(2, 2))
    message = refusal(model)
    skip = suggestion(message)
    assert isinstance(skip, list)
    assert posterior_names(to_bbb_(model, skip=skip)) == {"a[0].bias", "a0.weight", "a0.bias"}


def Special_() -> nn.Module:
    layer = nn.Linear(2, 2, bias=False)
    layer.weight = Special(torch.ones(2, 2))
    return layer


def test_a_tied_parameter_is_bad_under_all_its_names() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[1].weight_logvar = "taken"
    message = refusal(model)
    assert "1.weight_logvar exists already" in message
    assert "0.weight" not in posterior_names(to_bbb_(model, skip=suggestion(message)))


def test_a_sealed_model_offers_no_skip() -> None:
    message = refusal(Sealed())
    assert message.splitlines() == [
        "Sealed cannot be converted:",
        "  w: Sealed does not allow a subclass in its place (sealed).",
    ]


def test_a_lazy_layer_left_out_initialises_itself_later() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(2))
    converted: Any = to_bbb(model, skip=suggestion(refusal(model)), initial_std=math.exp(-1.5))
    drawn = draws(converted, seed=1)
    x = torch.ones(4, 3)
    with one_draw(converted, seed=1):
        y = converted(x)
    hidden = x @ drawn["0.weight"].T + drawn["0.bias"]
    torch.testing.assert_close(y, hidden @ converted[1].weight.T + converted[1].bias)
    assert posterior_names(converted) == {"0.weight", "0.bias"}


def test_complex_and_integer_parameters_are_rows_and_no_error() -> None:
    model = Net()
    model.good.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    model.good.index = nn.Parameter(torch.arange(2), requires_grad=False)
    actions = {row.name: row.action for row in plan(model).rows}
    assert (actions["good.phase"], actions["good.index"]) == ("complex", "integer")
    assert posterior_names(to_bbb_(model)) == GOOD


def test_parameters_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = nn.Linear(3, 3)
    x = torch.ones(2, 3)
    for converted in (
        to_bbb(model, initial_std=math.exp(-1.0)),
        to_bbb_(model, initial_std=math.exp(-1.0)),
    ):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode(), sampled(converted):
                assert not torch.equal(converted(x), converted(x))


class Delegates(nn.Module):
    """What it has not, its inner module has."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self._parameters["weight"] = nn.Parameter(torch.full((3,), 2.0))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "inner":
                raise
            return getattr(self.inner, name)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x) * self.weight + self.bias
        return y


class HasEverything(nn.Linear):
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return None


def test_a_module_with_a_getattr_of_its_own() -> None:
    model = to_bbb_(Delegates(nn.Linear(3, 3)), initial_std=math.exp(-1.0))
    assert posterior_names(model) == {"weight", "inner.weight", "inner.bias"}
    w, x = draws(model, seed=1), torch.ones(2, 3)
    with one_draw(model, seed=1):
        inner = x @ w["inner.weight"].T + w["inner.bias"]
        torch.testing.assert_close(model(x), inner * w["weight"] + w["inner.bias"])
    layer = nn.Linear(2, 2)
    layer.__class__ = HasEverything
    assert "  weight_logvar exists already" in refusal(layer)


def test_a_getattr_that_leads_to_a_converted_module() -> None:
    inner = nn.Linear(3, 3)
    to_bbb_(nn.Sequential(inner, Delegates(inner)))


@SCRIPTED
@IN_ONE_PROCESS
@pytest.mark.parametrize("change", [
    *(pytest.param(BAD[name][0], id=name) for name in BAD if name not in UNCOPYABLE),
    *(pytest.param(change, id=name)
      for name, change in UNCOPYABLE.items()),
])  # fmt: skip
def test_the_copying_conversion_says_the_same(change: Callable[[Any], None]) -> None:
    model = Net()
    change(model)
    message = refusal(model)
    before = snapshot(model)
    with pytest.raises(UnsupportedModuleError) as caught:
        to_bbb(model)
    assert snapshot(model) == before
    assert str(caught.value) == message


FACTORY = """
import torch
from torch import nn


def broken():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(torch.full((3, 3), torch.nan))
    model[2].bias_logvar = "taken"
    return model
"""


def test_the_command_line_says_it_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "brokenfactory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(folder)
    command = ("convert", "brokenfactory:broken", "--img-size", 4)
    error = run(*command, code=1).stderr
    text = " ".join(line.strip("│╭╮╰╯─ ") for line in error.splitlines())
    assert "1.weight holds NaN or Inf: repair the weights, or skip='1.weight'." in text
    assert "2.bias_logvar exists already" in text
    assert "skip='1.weight,2.bias' leaves all of these out." in text
    assert not list(folder.glob("*.safetensors"))
    document = json.loads(run(*command, "--skip", "1.weight,2.bias", "--json").stdout)
    assert Path(document["file"]).exists()


# -- the scale of each tensor ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sigma_is_a_share_of_the_exact_rms(dtype: torch.dtype) -> None:
    model = nn.Conv2d(64, 40_000, 1, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.uniform_(50.0, 300.0)  # the squares leave float16
    numbers = model.weight.detach().double().numpy().ravel().tolist()
    rms = math.sqrt(math.fsum(np.square(numbers).tolist()) / len(numbers))
    for layout in (model, model.to(memory_format=torch.channels_last)):
        [row] = plan(layout, initial_std=bayesify.RelativeStd(0.5)).rows
        assert row.std == pytest.approx(0.5 * rms, rel=1e-12)


def test_a_tensor_of_zeros_takes_the_scale_beside_it() -> None:
    def std(weight: Tensor, **options: Any) -> float | None:
        layer = nn.Linear(2, 2)
        layer.weight = nn.Parameter(weight)
        nn.init.zeros_(layer.bias)
        rows = plan(layer, initial_std=bayesify.RelativeStd(0.5), **options).rows
        return {row.name: row.std for row in rows}["bias"]

    assert std(torch.full((2, 2), 3.0)) == 1.5
    assert std(torch.full((2, 2), 3.0), skip="weight") == 1.5
    for useless in (torch.zeros(2, 2), torch.full((2, 2), torch.nan), torch.eye(2).to_sparse()):
        assert std(useless, skip="weight") == 0.5


def test_each_tensor_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def reading(tensor: Tensor) -> float:
        read.append(id(tensor))
        return root_mean_square(tensor)

    monkeypatch.setattr("bayesify.planning.root_mean_square", reading)
    model = timm.create_model("test_vit")  # its biases are zeros
    plan(model)
    assert sorted(read) == sorted(id(p) for p in model.parameters())
