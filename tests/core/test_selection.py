"""The package selection: what each kind of pattern takes, and what the user is told."""

from __future__ import annotations

import fnmatch
import functools
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import bayesify
from bayesify.absorbed_biases import before_batchnorm
from bayesify.errors import ArgumentError, NoMatchError
from bayesify.selection import PRESETS, Pattern, Selection, parse_patterns, select
from timm_models import without_data


class RmsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class ChannelNorm(nn.LayerNorm):
    """A subclass, as timm's LayerNorm2d is one."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(4)
        self.attn = nn.MultiheadAttention(4, 2)
        self.norm2 = ChannelNorm(4)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 4))
        self.patch_embed = nn.Conv2d(3, 4, 2)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = RmsNorm()
        self.head = nn.Linear(4, 2)
        self.steps = nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False)


def names(model: nn.Module) -> list[str]:
    return [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.is_floating_point()
    ]


def kept(model: nn.Module, **arguments: Any) -> set[str]:
    return set(names(model)) - set(select(model, **arguments).skipped)


def starting(model: nn.Module, *prefixes: str) -> set[str]:
    return {name for name in names(model) if name.startswith(prefixes)}


@functools.cache
def timm_model(name: str) -> nn.Module:
    return without_data(name)


@functools.cache
def torchvision_model(name: str) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = torchvision.models.get_model(name)
    return model


# What a pattern takes ---------------------------------------------------------------------------


def test_nothing_given_skips_nothing() -> None:
    assert select(Small()) == Selection({}, (), ())


@pytest.mark.parametrize(
    ("pattern", "prefixes"),
    [
        (nn.LayerNorm, ["blocks.0.norm", "blocks.1.norm"]),
        (ChannelNorm, ["blocks.0.norm2.", "blocks.1.norm2."]),
        ("LayerNorm", ["blocks.0.norm", "blocks.1.norm"]),
        ("ChannelNorm", ["blocks.0.norm2.", "blocks.1.norm2."]),
        ("*Norm", ["blocks.0.norm", "blocks.1.norm", "norm."]),
        ("_ConvNd", ["patch_embed."]),
        (nn.MultiheadAttention, ["blocks.0.attn.", "blocks.1.attn."]),
        ("Block", ["blocks."]),
        ("Small", [""]),
        (nn.Module, [""]),
        ("patch_embed", ["patch_embed."]),
        ("blocks.1", ["blocks.1."]),
        ("blocks.*.attn", ["blocks.0.attn.", "blocks.1.attn."]),
        ("blocks.*.attn.*", ["blocks.0.attn.", "blocks.1.attn."]),
        ("blocks.[1-9].mlp.?", ["blocks.1.mlp."]),
        ("head.bias", ["head.bias"]),
        ("token", ["token"]),
        ("re:^blocks\\.1\\..*norm[12]", ["blocks.1.norm"]),
        ("re:embed", ["patch_embed."]),
        ("@last-layer", ["head."]),
    ],
)
def test_each_kind_of_pattern(pattern: Pattern, prefixes: list[str]) -> None:
    model = Small()
    expected = starting(model, *prefixes)
    assert expected
    selection = select(model, skip=pattern)
    assert set(selection.skipped) == expected
    reason = pattern if isinstance(pattern, str) else pattern.__name__
    assert set(selection.skipped.values()) == {reason}
    assert kept(model, only=pattern) == expected
    assert set(select(model, only=pattern).skipped.values()) <= {"not in only"}


def test_glob_on_parameter_names() -> None:
    model = Small()
    assert set(select(model, skip="*.bias").skipped) == {
        name for name in names(model) if name.endswith(".bias")
    }


def test_matching_is_case_sensitive() -> None:
    assert select(Small(), skip="layernorm").unmatched == ("layernorm",)
    assert select(Small(), skip="BLOCKS.*").unmatched == ("BLOCKS.*",)


def test_a_generated_subclass_matches_as_its_original() -> None:
    layer = nn.LayerNorm(4)
    layer.__class__ = type("LayerNorm", (nn.LayerNorm,), {})
    model = nn.Sequential(layer, nn.Linear(4, 4))
    assert kept(model, skip="LayerNorm") == kept(model, skip=nn.LayerNorm) == starting(model, "1.")


def test_the_model_itself_can_match() -> None:
    assert kept(nn.Linear(2, 2), skip="Linear") == set()
    assert kept(nn.Linear(2, 2), only="weight") == {"weight"}


def test_skip_beats_only_and_reasons_name_the_pattern() -> None:
    model = Small()
    skipped = select(model, skip=["head.bias", nn.Linear], only=["head", "blocks.0.mlp"]).skipped
    assert set(skipped) == set(names(model))
    assert skipped["head.bias"] == "head.bias"
    assert skipped["head.weight"] == skipped["blocks.0.mlp.0.weight"] == "Linear"
    assert skipped["token"] == "not in only"


def test_skipped_is_in_the_order_of_the_model() -> None:
    model = Small()
    skipped = select(model, skip=["head", "*.bias", "blocks.0"]).skipped
    assert list(skipped) == [name for name in names(model) if name in skipped]


def test_integer_parameters_are_nobodys_business() -> None:
    model = Small()
    assert "steps" not in select(model, skip="*").skipped
    assert select(model, skip="steps").unmatched == ("steps",)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.body = nn.Linear(4, 4)
        self.body_again = self.body
        self.decoder = nn.Linear(4, 5)
        self.decoder.weight = self.embed.weight


def test_any_name_of_a_tied_parameter_counts() -> None:
    model = Tied()
    assert select(model, skip="decoder").skipped == dict.fromkeys(
        ["embed.weight", "decoder.weight", "decoder.bias"], "decoder"
    )
    assert set(select(model, skip=nn.Embedding).skipped) == {"embed.weight", "decoder.weight"}
    assert kept(model, only="embed") == {"embed.weight", "decoder.weight"}
    assert kept(model, only="decoder", skip="embed") == {"decoder.bias"}
    shared = {"body.weight", "body.bias", "body_again.weight", "body_again.bias"}
    assert set(select(model, skip="body_again").skipped) == shared
    assert set(select(model, skip="re:^body\\.").skipped) == shared


def by_hand(model: nn.Module, pattern: str, name: str) -> bool:
    """Whether the parameter of this name matches, read off the definition of the patterns."""
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    parts = name.split(".")
    for length in range(len(parts)):
        path = ".".join(parts[:length])
        kinds = type(model.get_submodule(path)).__mro__
        kinds = kinds[: kinds.index(nn.Module)]
        if any(fnmatch.fnmatchcase(kind.__name__, pattern) for kind in kinds):
            return True
        if path and fnmatch.fnmatchcase(path, pattern):
            return True
    return fnmatch.fnmatchcase(name, pattern)


PATTERNS = ["LayerNorm", "Batch*", "Attention", "*.bias", "blocks.1*", "layer?.0", "fc", "conv1"]
PATTERNS += ["re:weight$", "re:^(blocks|layer)", "*qkv*", "_ConvNd", "Basic*", "head.bias", "Mlp"]


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["resnet18", "vit_tiny_patch16_224"]),
    skip=st.lists(st.sampled_from(PATTERNS), max_size=3),
    only=st.lists(st.sampled_from(PATTERNS), max_size=3),
)
def test_against_the_definition(name: str, skip: list[str], only: list[str]) -> None:
    model = timm_model(name)

    def matches(patterns: Sequence[str], parameter: str) -> bool:
        return any(by_hand(model, pattern, parameter) for pattern in patterns)

    assert kept(model, skip=skip, only=only) == {
        parameter
        for parameter in names(model)
        if not matches(skip, parameter) and (not only or matches(only, parameter))
    }


# The parser -------------------------------------------------------------------------------------


def test_parser_takes_one_or_many() -> None:
    assert parse_patterns(()) == parse_patterns([]) == ()
    assert parse_patterns("LayerNorm") == ("LayerNorm",)
    assert parse_patterns(nn.LayerNorm) == (nn.LayerNorm,)
    assert parse_patterns([nn.LayerNorm, "head", "head"]) == (nn.LayerNorm, "head")
    assert parse_patterns("LayerNorm, patch_embed") == ("LayerNorm", "patch_embed")
    assert parse_patterns(["a,b", "c"]) == ("a", "b", "c")
    assert parse_patterns("re:a{1,2}") == ("re:a{1,2}",)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("", "Empty pattern in ''"),
        (" ", "Empty pattern"),
        ("head,", "Empty pattern in 'head,'"),
        ("re:", "Empty pattern 're:'"),
        ("re:(", r"'re:\(' is not a valid regular expression: missing \)"),
        ("re:a{99999999999999999999}", "not a valid regular expression"),
        ("head,re:a{1,2}", "a pattern of its own"),
        ("@first", "Unknown token '@first'"),
        (3, "Bad pattern: 3"),
        (None, "Bad pattern: None"),
        ([["head"]], r"Bad pattern: \['head'\]"),
        (int, "Bad pattern: <class 'int'>"),
        (nn.Linear(1, 1), "Bad pattern: a Linear module"),
        (nn.Sequential(), "Bad pattern: a Sequential module"),
    ],
)
def test_bad_patterns(bad: Any, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        parse_patterns(bad)
    with pytest.raises(ArgumentError, match=says):
        select(nn.Linear(2, 2), skip=bad)
    with pytest.raises(ArgumentError, match=says):
        select(nn.Linear(2, 2), only=bad)


# What the user is told --------------------------------------------------------------------------


def test_layernorm_on_resnet50() -> None:
    selection = select(timm_model("resnet50"), skip="LayerNorm")
    assert selection == Selection(
        {},
        (
            "skip='LayerNorm' matches nothing in this model (ResNet). "
            "Its normalisation layers: 53 BatchNorm2d.",
        ),
        ("LayerNorm",),
        ("LayerNorm",),
    )
    assert select(timm_model("resnet50"), skip=nn.LayerNorm).notes == (
        "skip=LayerNorm matches nothing in this model (ResNet). "
        "Its normalisation layers: 53 BatchNorm2d.",
    )


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("BatchNorm*", "Its normalisation layers: 2 ChannelNorm, 2 LayerNorm, 1 RmsNorm."),
        ("ConvTranspose2d", "Its convolutions: 1 Conv2d."),
        ("Bilinear", "Its linear layers: 5 Linear, 2 NonDynamicallyQuantizableLinear."),
        ("SelfAttention", "Its attention modules: 2 MultiheadAttention."),
        ("MultiHeadAttention", "Its attention modules: 2 MultiheadAttention."),
        ("Blok", "Close names: 'Block'."),
        ("patch_embd", "Close names: 'patch_embed'"),
        ("attn", "Close names: 'blocks.*.attn'"),
        ("block.*.attn", "Close names: 'blocks.*.attn'"),
        ("blocks.7.mlp", "Close names: 'blocks.*.mlp'"),
        ("re:^encoder", "names such as 'token', 'patch_embed.weight', 'patch_embed.bias'."),
        ("zzz.y", "Its top names: 'patch_embed', 'blocks', 'norm', 'head', 'token'."),
        ("Zzz", "Its layers: 5 Linear, 2 ChannelNorm,"),
        ("GELU", "only modules without floating-point parameters in this model (Small): 2 GELU."),
    ],
)
def test_no_match_names_what_there_is(pattern: str, says: str) -> None:
    selection = select(Small(), skip=pattern)
    assert selection.unmatched == (pattern,)
    (note,) = selection.notes
    assert note.startswith(f"skip={pattern!r} matches ")
    assert says in note


def test_an_only_that_matches_nothing_selects_nothing() -> None:
    selection = select(Small(), only="Zzz")
    assert set(selection.skipped) == set(names(Small()))
    assert selection.notes[0].startswith("only='Zzz' matches nothing")


def test_models_with_little_or_nothing_in_them() -> None:
    assert "has no floating-point parameters" in select(nn.ReLU(), skip="Linear").notes[0]
    assert "Its top names: 'weight', 'bias'" in select(nn.Linear(2, 2), skip="a.b").notes[0]
    bias_only = nn.Sequential(nn.LayerNorm(3))
    assert "no layer with a tensor" in select(bias_only, only="@last-layer").notes[0]


class _Normalised(nn.Module):
    """Biases that BatchNorm takes off again, and such that it does not."""

    taken_off = ("squeeze.bias", "stem.0.bias")

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.before_relu = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
        self.without = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.squeeze = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.grouped = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4))
        self.head = nn.Linear(6, 5)
        self.elsewhere = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.without(self.before_relu(self.stem(x)))).relu().mean((2, 3))
        y: Tensor = self.head(self.norm(self.squeeze(self.elsewhere(x).relu())).relu())
        return y


def test_no_loss_depends_on_a_bias_before_batchnorm() -> None:
    torch.manual_seed(0)
    model = _Normalised().double().train()
    assert tuple(before_batchnorm(model)) == model.taken_off
    assert set(select(model, skip="@before-batchnorm").skipped) == set(model.taken_off)
    model(torch.randn(8, 3, 7, 7, dtype=torch.float64)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        flat = float(parameter.grad.abs().max()) < 1e-10
        assert flat == (name in model.taken_off), name


def test_the_plan_tells_of_biases_before_batchnorm_that_get_a_posterior() -> None:
    model = _Normalised()
    [hint] = bayesify.plan(model).hints
    assert "squeeze.bias, stem.0.bias. " in hint
    assert hint in str(bayesify.plan(model))
    many = nn.Sequential(*[m for _ in range(5) for m in (nn.Linear(2, 2), nn.BatchNorm1d(2))])
    assert "0.bias, 2.bias, 4.bias and 2 more. " in bayesify.plan(many).hints[0]
    with pytest.warns(bayesify.BiasBeforeNormWarning, match="squeeze.bias, stem.0.bias"):
        bayesify.to_bbb(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bayesify.to_bbb(model, skip="@before-batchnorm")
    assert bayesify.plan(model, skip="@before-batchnorm").hints == ()
    assert bayesify.plan(model, only="head").hints == ()
    [note] = select(nn.Linear(2, 2), skip="@before-batchnorm").notes
    assert "no bias right before a BatchNorm" in note


def test_another_class_of_the_same_name() -> None:
    other = type("LayerNorm", (RmsNorm,), {})
    (note,) = select(nn.Sequential(other()), skip=nn.LayerNorm).notes
    assert "Its LayerNorm is another class; the string 'LayerNorm' takes it by name." in note
    assert select(nn.Sequential(other()), skip="LayerNorm").unmatched == ()


def test_strict_names_all_at_once() -> None:
    with pytest.raises(NoMatchError) as caught:
        select(Small(), skip=["BatchNorm2d", "head"], only="zzz", strict=True, preset="full")
    message = str(caught.value)
    assert "skip='BatchNorm2d' matches nothing" in message
    assert "only='zzz' matches nothing" in message
    assert "skip='head'" not in message
    assert select(Small(), skip="head", strict=True).skipped


def test_near_misses() -> None:
    model = Small()
    assert select(model, skip="LayerNorm").notes == (
        "skip='LayerNorm' takes 2 ChannelNorm, 2 LayerNorm, not 1 RmsNorm.",
    )
    assert select(model, only=RmsNorm).notes == (
        "only=RmsNorm takes 1 RmsNorm, not 2 ChannelNorm, 2 LayerNorm.",
    )
    # Not where the rest is dealt with, by a class, by a name, or by `only`.
    assert select(model, skip=["LayerNorm", "RmsNorm"]).notes == ()
    assert select(model, skip=["LayerNorm", "norm"]).notes == ()
    assert select(model, skip="LayerNorm", only="blocks").notes == ()
    assert select(model, only="LayerNorm", skip="norm.*").notes == ()
    assert select(model, preset="no-layernorm").notes == ()
    assert select(model, skip="norm").notes == ()
    assert select(model, preset="no-layernorm", skip="RmsNorm").notes == ()
    assert select(model, preset="linear-only", only="LayerNorm").notes == ()
    assert select(model, preset="linear-only", only="NonDynamicallyQuantizableLinear").notes == (
        "only='NonDynamicallyQuantizableLinear' takes 2 NonDynamicallyQuantizableLinear, "
        "not 5 Linear.",
    )


def test_near_misses_name_layers_not_what_holds_them() -> None:
    # convnext: ConvNeXtBlock owns a layer scale, and its name holds "conv".
    assert select(timm_model("convnext_atto"), skip="Conv2d").notes == ()
    assert select(timm_model("convnext_atto"), skip="ConvNeXtBlock").notes == ()


class head(nn.Linear):
    pass


class TwoMeanings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)
        self.tail = head(2, 2)
        self.body = nn.Linear(2, 2)


def test_two_meanings_take_both_and_say_so() -> None:
    selection = select(TwoMeanings(), skip="head")
    assert set(selection.skipped) == starting(TwoMeanings(), "head.", "tail.")
    assert selection.notes == (
        "skip='head' has two meanings and takes both: the class (1 head) and the name ('head').",
    )


def test_class_glob_that_takes_containers() -> None:
    assert select(timm_model("convnext_atto"), skip="Conv*").notes == (
        "skip='Conv*' also takes what is inside the model itself: 17 LayerNorm2d, 1 Linear.",
    )
    assert select(torchvision_model("mobilenet_v3_small"), skip="Conv*").notes == (
        "skip='Conv*' also takes what is inside 34 Conv2dNormActivation: 34 BatchNorm2d.",
    )
    assert select(timm_model("resnet18"), skip="BatchNorm*").notes == ()
    # What is meant to hold other layers is no surprise.
    assert select(timm_model("vit_tiny_patch16_224"), skip="Att*").notes == ()


def test_parametrized_layers_count_as_layers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), weight_norm(nn.Conv1d(2, 2, 1)))
    (note,) = select(model, skip="Conv2d").notes
    assert note.endswith("Its convolutions: 1 ParametrizedConv1d.")
    assert kept(model, skip="Conv1d") == starting(model, "0.")


def test_every_module_is_a_module_so_its_name_matches_none() -> None:
    assert select(Small(), skip="Module").unmatched == ("Module",)
    assert select(Small(), skip="object").unmatched == ("object",)


# Presets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "name", "expected"),
    [
        (timm_model, "resnet18", ["fc."]),
        (timm_model, "vit_tiny_patch16_224", ["head."]),
        (timm_model, "deit_tiny_distilled_patch16_224", ["head.", "head_dist."]),
        (timm_model, "convnext_atto", ["head.fc."]),
        (torchvision_model, "mobilenet_v3_small", ["classifier.3."]),
        (torchvision_model, "vit_b_16", ["heads.head."]),
        (torchvision_model, "squeezenet1_0", ["classifier.1."]),
    ],
)
def test_last_layer_of_real_models(
    build: Callable[[str], nn.Module], name: str, expected: list[str]
) -> None:
    model = build(name)
    selection = select(model, preset="last-layer", strict=True)
    assert set(names(model)) - set(selection.skipped) == starting(model, *expected)
    assert selection.notes == ()
    for weight in starting(model, *(f"{prefix}weight" for prefix in expected)):
        assert model.get_parameter(weight).shape[0] == 1000


def test_last_layer_of_models_in_awkward_forms() -> None:
    parametrized = nn.Sequential(nn.Linear(2, 2), weight_norm(nn.Linear(2, 3)))
    assert kept(parametrized, preset="last-layer") == starting(parametrized, "1.")
    alone = weight_norm(nn.Linear(2, 3))
    assert kept(alone, preset="last-layer") == set(names(alone))
    # An alias of an early layer, registered after the head, is not a later layer.
    aliased = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    aliased.add_module("first", aliased[0])
    assert kept(aliased, preset="last-layer") == starting(aliased, "1.")
    headless = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1)
    assert kept(headless, preset="last-layer") == starting(headless, "blocks.0.mlp.fc2.")


def owners(model: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...]) -> set[str]:
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, kinds)
        for name, _ in module.named_parameters(recurse=False)
    }


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (timm_model, "resnet18"),
        (timm_model, "vit_tiny_patch16_224"),
        (timm_model, "convnext_atto"),
        (torchvision_model, "vit_b_16"),
        (torchvision_model, "mobilenet_v3_small"),
    ],
)
def test_presets_on_real_models(build: Callable[[str], nn.Module], name: str) -> None:
    model = build(name)
    everything = set(names(model))
    convs = owners(model, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    in_proj = {name for name in everything if "in_proj_" in name}
    assert kept(model, preset="full") == everything
    assert kept(model, preset="no-conv") == everything - convs
    assert kept(model, preset="linear-only") == owners(model, nn.Linear) | in_proj
    assert kept(model, preset="no-layernorm") == everything - owners(model, nn.LayerNorm)


def test_linear_only_counts_all_projections_of_attention() -> None:
    attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True)
    assert kept(attention, preset="linear-only") == set(names(attention)) - {"bias_k", "bias_v"}
    model = nn.Sequential(attention)
    assert kept(model, preset="linear-only") == set(names(model)) - {"0.bias_k", "0.bias_v"}


def test_a_preset_is_its_printed_patterns() -> None:
    model = Small()
    for name, preset in PRESETS.items():
        assert parse_patterns(preset.skip) == preset.skip
        assert parse_patterns(preset.only) == preset.only
        spelled = select(model, skip=preset.skip, only=preset.only)
        assert select(model, preset=name).skipped == spelled.skipped


def test_a_preset_combines_with_patterns() -> None:
    model = Small()
    assert kept(model, preset="linear-only", only="blocks.0", skip="*.bias") == {
        "blocks.0.attn.in_proj_weight",
        "blocks.0.attn.out_proj.weight",
        "blocks.0.mlp.0.weight",
        "blocks.0.mlp.2.weight",
        "blocks.0.attn.in_proj_bias",  # "*.bias" does not match it: the dot
    }
    assert kept(model, preset="no-conv", skip="blocks") == starting(
        model, "token", "norm.", "head."
    )


def test_a_preset_without_effect_is_reported_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    selection = select(model, preset="no-conv")
    assert selection.unmatched == PRESETS["no-conv"].skip
    (note,) = selection.notes
    assert note.startswith("preset='no-conv' (_ConvNd, CondConv2d, DeformConv2d) matches nothing")
    with pytest.raises(NoMatchError, match=r"preset='no-layernorm'.*53 BatchNorm2d"):
        select(timm_model("resnet50"), preset="no-layernorm", strict=True)
    # One of its patterns is enough: a ViT of timm has no in_proj.
    assert select(timm_model("vit_tiny_patch16_224"), preset="linear-only").notes == ()


def test_unknown_preset() -> None:
    with pytest.raises(ArgumentError, match=r"'no-convs'.*full, no-conv, linear-only"):
        select(Small(), preset="no-convs")


# Beyond -----------------------------------------------------------------------------------------


def test_a_model_is_left_untouched() -> None:
    model = Small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = list(model.modules())
    select(model, skip=["LayerNorm", "zzz"], only="blocks", preset="linear-only")
    assert all(old is new for old, new in zip(modules, model.modules(), strict=True))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
