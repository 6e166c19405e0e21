"""One plan and one application, and settings that stand once."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math
import pickle
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bayesify
from bayesify import (
    ArgumentError,
    BBBConfig,
    GaussianPrior,
    LostPosteriorWarning,
    NoMatchError,
    NoMatchWarning,
    RelativeStd,
    plan,
    planning,
    posterior,
    to_bbb,
    to_bbb_,
    validation,
)
from bayesify.conversion import Conversion, read_initial_std
from bayesify.selection import Filter, parse_patterns
from bayesify.selection.patterns import Recorded


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def bayesian(model: nn.Module) -> set[str]:
    return {p.name for p in bayesify.posteriors(model)}


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each step of a conversion ran, wherever it was called from."""
    found: Counter[str] = Counter()

    def counting(name: str, real: Callable[..., Any], *args: Any, **options: Any) -> Any:
        found[name] += 1
        return real(*args, **options)

    homes: dict[str, Any] = {
        "check_model": validation, "make_plan": planning, "classify": planning, "sites": posterior,
    }  # fmt: skip
    for name, home in homes.items():
        real: Callable[..., Any] = getattr(home, name)
        for file in list(sys.modules.values()):
            ours = getattr(file, "__name__", "").startswith("bayesify.")
            if ours and vars(file).get(name) is real:
                monkeypatch.setattr(file, name, functools.partial(counting, name, real))
    return found


# sites: whether it is Bayesian already, and afterwards what its own lists leave out
@pytest.mark.parametrize(("function", "sites"), [(to_bbb, 2), (to_bbb_, 2), (plan, 1)])
@pytest.mark.parametrize("options", [{}, {"estimator": "local", "skip": lambda m, n: n == "1"}])
def test_a_conversion_checks_and_plans_once(
    function: Callable[..., object], sites: int, options: dict[str, Any], counts: Counter[str]
) -> None:
    function(net(), **options)
    assert counts == {"check_model": 1, "make_plan": 1, "classify": 1, "sites": sites}


def test_the_settings_of_a_conversion_stand_once() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(Conversion)}
    signatures = [inspect.signature(f).parameters for f in (to_bbb, to_bbb_, plan)]
    for parameters in signatures:
        settings = {name: p for name, p in parameters.items() if name != "model"}
        assert list(settings) == list(fields)
        assert all(p.kind is p.KEYWORD_ONLY for p in settings.values())
        assert parameters == signatures[0]
        assert Conversion(**{name: p.default for name, p in settings.items()}) == Conversion()


@pytest.mark.parametrize("function", [to_bbb, to_bbb_, plan])
def test_help_says_what_each_setting_is(function: Callable[..., object]) -> None:
    text = inspect.getdoc(function) or ""
    args = text.partition("Args:\n")[2].partition("\n\n")[0]
    described = [line.split(":")[0].strip() for line in args.splitlines() if line[4:5] != " "]
    assert described == ["model", *(field.name for field in dataclasses.fields(Conversion))]
    assert all(word in text for word in ("flipout", "linear-only", "RelativeStd", "Raises:"))


# -- the initial sigma -----------------------------------------------------------------------


def test_one_setting_is_the_initial_sigma() -> None:
    layer = nn.Linear(200, 100, bias=False)
    rms = layer.weight.detach().double().square().mean().sqrt().item()
    for asked, expected in ((0.02, 0.02), (RelativeStd(0.1), 0.1 * rms), (None, 0.003 * rms)):
        found = bayesify.stddev(to_bbb(layer, initial_std=asked))["weight"]
        assert found.unique().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0.01", 0.01), ("1e-3", 0.001), ("0.05rms", RelativeStd(0.05)), (" 1 rms", RelativeStd(1.0))],
)
def test_an_initial_sigma_in_a_text(text: str, expected: float | RelativeStd) -> None:
    assert read_initial_std(text) == expected
    assert read_initial_std(str(expected)) == expected


@pytest.mark.parametrize("text", ["", "rms", "5%", "0.1 sd", "0", "-1", "nan", "0rms", "infrms"])
def test_a_bad_initial_sigma_in_a_text(text: str) -> None:
    with pytest.raises(ArgumentError, match=r"initial_std must be|RelativeStd: fraction must be"):
        read_initial_std(text)


# -- functions as patterns -------------------------------------------------------------------


def is_norm(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.LayerNorm)


class Wide:
    def __init__(self, width: int) -> None:
        self.width = width
        self.asked: list[str] = []

    def __call__(self, module: nn.Module, name: str) -> bool:
        self.asked.append(name)
        return getattr(module, "out_features", 0) >= self.width


def test_a_function_chooses_what_a_module_holds_itself() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))
            self.linear = nn.Linear(2, 2)
            self.norm = nn.LayerNorm(2)

    model = nn.Sequential(Block(), Block())
    named = [name for name, _ in model.named_modules()]
    asked = Wide(2)
    assert bayesian(to_bbb(model, only=asked)) == {
        "0.linear.weight", "0.linear.bias", "1.linear.weight", "1.linear.bias",
    }  # fmt: skip
    assert asked.asked == named  # each module once
    assert bayesian(to_bbb(model, skip=lambda m, n: not n.startswith("1"))) == {
        "1.scale", "1.linear.weight", "1.linear.bias", "1.norm.weight", "1.norm.bias",
    }  # fmt: skip
    # what is inside a Block is asked about by itself
    assert bayesian(to_bbb(model, only=lambda m, n: isinstance(m, Block))) == {"0.scale", "1.scale"}
    assert bayesian(to_bbb(model, only=lambda m, n: not is_norm(m, n), skip=["*.bias", asked])) == {
        "0.scale", "1.scale",
    }  # fmt: skip


def test_functions_of_every_kind_stand_beside_patterns() -> None:
    class Chooser:
        def of(self, module: nn.Module, name: str) -> bool:
            return name == "2"

    for chosen in (Chooser().of, functools.partial(lambda last, m, n: n == last, "2")):
        assert bayesian(to_bbb(net(), skip=[chosen, nn.LayerNorm, "0.bias"])) == {"0.weight"}
    rows = plan(net(), skip=is_norm, estimator={"2": "local", "*": "weight"}).rows
    assert {row.action for row in rows if row.name.startswith("1")} == {"skipped: is_norm()"}
    estimators: dict[Any, Any] = {lambda m, n: n == "2": "local", "*": "flipout"}
    found = {row.name: row.estimator for row in plan(net(), estimator=estimators).rows}
    assert (found["2.weight"], found["0.weight"]) == ("local", "flipout")


def test_a_tied_parameter_counts_in_all_its_places() -> None:
    model = net()
    model[2] = nn.Linear(4, 4)
    model[2].weight = model[0].weight
    assert bayesian(to_bbb(model, skip=lambda m, n: n == "2")) == {"0.bias", "1.weight", "1.bias"}


def test_pruning_takes_functions_too() -> None:
    model = to_bbb(net())
    bayesify.prune_(model, 0.5, skip=lambda m, n: n == "0")
    assert not (model.get_parameter("0.weight") == 0).any()
    assert (model.get_parameter("2.weight") == 0).sum() == 4


def test_a_function_that_chooses_nothing() -> None:
    for chosen, message in (
        (lambda m, n: False, r"<lambda>\(\) is true of no module of this model \(Sequential\)"),
        (lambda m, n: n == "", r"only of modules that hold no .* 1 Sequential.* for itself"),
    ):
        with pytest.warns(NoMatchWarning, match=message):
            to_bbb(net(), skip=chosen)
        with pytest.raises(NoMatchError, match=message):
            to_bbb(net(), skip=chosen, config=BBBConfig(strict=True))


def fails(module: nn.Module, name: str) -> bool:
    raise KeyError(name)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: True, r"<lambda>\(\) cannot be called with a module and its name"),
        (lambda module: True, r"\(module, name\) -> bool"),
        (lambda m, n, threshold: True, "missing a required argument: 'threshold'"),
        (lambda m, n: None, r"gave a NoneType for the Sequential.*True or False"),
        (lambda m, n: n and 1, r"gave a str for the Sequential"),
        (lambda m, n: torch.tensor(True), "gave a Tensor"),
        (fails, r"The pattern fails\(\) failed on the Sequential: KeyError"),
        (int, "Bad pattern: <class 'int'>"),
        (nn.Linear(2, 2), "a Linear module"),
    ],
)
@pytest.mark.parametrize("side", ["skip", "only"])
def test_a_bad_function_is_one_clear_error(bad: Any, message: str, side: str) -> None:
    model = net()
    for function in (to_bbb, to_bbb_, plan):
        for given in (bad, ["LayerNorm", bad]):
            options: dict[str, Any] = {side: given}
            with pytest.raises(ArgumentError, match=message):
                function(model, **options)
    assert type(model[0]) is nn.Linear


def test_what_is_added_is_asked_about_while_the_function_is_there() -> None:
    asked = Wide(3)
    for model in (to_bbb(net(), only=asked), copy.deepcopy(to_bbb(net(), only=asked))):
        assert bayesian(model) == {"0.weight", "0.bias"}
        module: Any = model
        module.append(nn.Linear(2, 3))
        module.append(nn.Linear(3, 2))
        with pytest.warns(LostPosteriorWarning, match="3.weight, 3.bias. No call draws"):
            bayesify.check_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
        bayesify.extend_(model)
        assert bayesian(model) == {"0.weight", "0.bias", "3.weight", "3.bias"}


def test_a_pickle_holds_what_a_function_chose() -> None:
    model: Any = to_bbb(net(), skip=lambda m, n: is_norm(m, n))
    back: Any = pickle.loads(pickle.dumps(model))
    assert bayesian(back) == bayesian(model)
    [pattern] = back.__dict__["_bayesify"].spec.skip
    assert isinstance(pattern, Recorded)
    assert pattern.names == {"1.weight", "1.bias"}
    with pytest.raises(Exception, match="pickle"):
        pickle.dumps(lambda: 0)  # which is why


def written(model: Any, folder: Path) -> Any:
    """Through a file, and what was read through another one."""
    for name in ("a", "b"):
        bayesify.save(model, folder / name)
        model = bayesify.load(folder / name, net())
    return model


@pytest.mark.parametrize("way", ["file", "pickle"])
def test_what_is_added_without_the_function_is_said_to_be_undecided(
    way: str, tmp_path: Path
) -> None:
    model: Any = to_bbb(net(), skip=is_norm, initial_std=0.1)
    back = written(model, tmp_path) if way == "file" else pickle.loads(pickle.dumps(model))
    assert bayesian(back) == bayesian(model)
    bayesify.extend_(back)  # nothing new, nothing said
    back.append(nn.LayerNorm(2))
    message = r"'is_norm\(\)' of the conversion .*a function is in no file.* 3.weight, 3.bias"
    optimizer = torch.optim.SGD(back.parameters(), lr=0.1)
    with pytest.warns(LostPosteriorWarning, match=message):
        bayesify.check_optimizer(back, optimizer)
    with pytest.warns(NoMatchWarning, match=message):
        bayesify.extend_(back)
    # what it had chosen stays as it was
    assert bayesian(back) == {*bayesian(model), "3.weight", "3.bias"}


def test_after_an_extension_the_file_holds_what_was_chosen_then(tmp_path: Path) -> None:
    model: Any = to_bbb(net(), skip=is_norm)
    model.append(nn.LayerNorm(2))
    model.append(nn.Linear(2, 2))
    bayesify.extend_(model)
    bayesify.save(model, tmp_path / "a")
    [conversion] = bayesify.storage.read_header(tmp_path / "a")["conversions"]
    assert conversion["arguments"]["skip"] == [
        {"function": "is_norm()", "names": ["1.bias", "1.weight", "3.bias", "3.weight"]}
    ]
    back = bayesify.load(tmp_path / "a", nn.Sequential(*net(), nn.LayerNorm(2), nn.Linear(2, 2)))
    assert bayesian(back) == {"0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"}


def test_functions_are_parsed_once_and_compared() -> None:
    [one] = parse_patterns([is_norm, is_norm])
    assert isinstance(one, Filter)
    assert parse_patterns(one) == (one,)
    assert copy.deepcopy(one) is one
    assert Conversion(skip=parse_patterns(is_norm)) == Conversion(skip=(one,))
    wide = Wide(1)
    wide.__class__.__hash__ = None  # type: ignore[assignment]
    try:
        assert len(parse_patterns([wide, wide, is_norm])) == 2
    finally:
        del wide.__class__.__hash__


def test_what_a_plan_knows_is_what_is_applied() -> None:
    prior = GaussianPrior(0.5)
    options: dict[str, Any] = {"skip": is_norm, "prior": prior, "initial_std": RelativeStd(0.1)}
    model = net()
    rows = {row.name: row for row in plan(model, **options).rows if row.bayes}
    converted = to_bbb(model, **options)
    for found in bayesify.posteriors(converted):
        row = rows.pop(found.name)
        assert row.prior == str(found.prior)
        assert row.std is not None
        assert found.logvar.unique().item() == pytest.approx(2 * math.log(row.std), rel=1e-6)
    assert not rows
