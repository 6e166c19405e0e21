"""The table of the zoo: what it says, and that a model of every family still is as it says."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import zoo
import zoo_checks
import zoo_models
import zoo_table
from torch import nn

from bayesify.zoo import verified

ROWS = zoo.read()


def cheapest_by_family() -> dict[str, str]:
    """Of every family the model whose structure took the least time to check."""
    found: dict[str, Any] = {}
    for row in ROWS.values():
        check = row.get("structural", {})
        if check and not check["problems"]:
            best = found.setdefault(row["family"], row)
            if check["seconds"] < best["structural"]["seconds"]:
                found[row["family"]] = row
    return {family: row["name"] for family, row in found.items()}


SAMPLE = cheapest_by_family()
QUICK = 1.6
"""Seconds that the whole check of a model took, up to which it is one of the fast tests."""


def families() -> list[Any]:
    """Those checked fast with one of all equal layers, and all of them whole."""
    found = []
    for family, name in sorted(SAMPLE.items()):
        if ROWS[name]["structural"]["seconds"] <= QUICK:
            found.append(pytest.param(family, True, id=f"{family}, short"))
        found.append(pytest.param(family, False, id=family, marks=pytest.mark.slow))
    return found


# googlenet and inception_v3 say so whenever they are built
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
@pytest.mark.parametrize(("family", "short"), families())
def test_a_model_of_every_family_is_as_listed(family: str, short: bool) -> None:
    """With one of all equal layers, as the whole model: what a layer does, its like does too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = zoo_checks.structural(
            SAMPLE[family], short=short, batches=(3,) if short else zoo_checks.BATCHES
        )
    finally:
        torch.set_num_threads(threads)
    listed = ROWS[SAMPLE[family]]
    assert found["problems"] == []
    assert found["drawn"] == found["used"]
    assert found["used"] == listed["structural"]["used"] or short
    assert found["group"] == listed["group"]
    assert found["tensors"] == listed["tensors"]
    assert found["parameters"] == listed["parameters"]
    assert found["swap"] <= listed["structural"]["swap"]


def test_every_family_has_a_sample() -> None:
    families = {zoo_models.family(name) for name in zoo_models.names()}
    assert len(families) > 90
    assert families == set(SAMPLE)


def test_what_is_shipped_is_made_of_the_result_file() -> None:
    assert list(verified().values()) == zoo_table.verified(ROWS)
    page = (zoo_table.ROOT / "docs" / "zoo.md").read_text()
    assert page == zoo_table.page(ROWS, zoo_table.verified(ROWS))


def row(name: str, group: str, parameters: int, numeric: Any = None, **structural: Any) -> Any:
    found: dict[str, Any] = {
        "name": name, "group": group, "parameters": parameters, "tensors": 2,
        "structural": {"problems": [], "owners": 4, "swap": 1, "date": "2030-01-01",
                       "versions": {"torch": "3.0", "timm": "2.0"}, **structural},
    }  # fmt: skip
    if numeric is not None:
        found["numeric"] = {"problems": [], "options": {}, **numeric}
    return found


def test_outcomes() -> None:
    rows = {
        r["name"]: r
        for r in (
            row("small", "a", 10, {}),
            row("tiny but failed", "a", 5, {"problems": ["5: no gradient"]}),
            row("wide", "a", 99),
            row("deep", "b", 999, {"options": {"depth": 2}}),
            row("deeper", "b", 9999),
            row("alone", "c", 7),
            row("leaks", "d", 7, {}, problems=["2: weight reaches add"]),
        )
    }
    found = {v.name: v for v in zoo_table.verified(rows)}
    assert {n: (v.structural, v.numeric, v.numeric_of) for n, v in found.items()} == {
        "small": ("ok", "ok", "small"),
        "tiny but failed": ("ok", "failed", ""),
        "wide": ("ok", "alike", "small"),
        "deep": ("ok", "shallow", "deep"),
        "deeper": ("ok", "alike", "deep"),
        "alone": ("ok", "not run", ""),
        "leaks": ("failed", "ok", "leaks"),
    }
    assert [v.name for v in found.values() if v.failed] == ["leaks", "tiny but failed"]
    assert found["leaks"].note == "2: weight reaches add"
    assert found["tiny but failed"].note == "5: no gradient"
    assert found["small"].graphs == 0.75
    assert found["small"].versions == "torch ?, timm ?"
    assert found["wide"].versions == "torch 3.0, timm 2.0"


def test_the_order_of_the_numbers() -> None:
    rows = {
        r["name"]: r
        for r in (
            row("a1", "a", 40_000_000),
            row("a2", "a", 35_000_000),
            row("b1", "b", 500_000_000),
            row("c1", "c", 2_000_000),
            row("c2", "c", 1_000_000),
        )
    }
    assert zoo.numeric_queue(rows) == [
        ("c2", False), ("a2", False), ("b1", True), ("c1", False),
    ]  # fmt: skip


# -- the checks notice what is wrong ---------------------------------------------------------


class Small(nn.Module):
    """Two layers, one of which a fault may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.conv(x).mean((2, 3)))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo_checks, "build_on_meta", lambda name: Small().to("meta"))
    monkeypatch.setattr(zoo_checks, "native_size", lambda name, model: 16)
    monkeypatch.setattr(zoo_checks, "family", lambda name: "none")


@pytest.mark.usefixtures("small")
def test_a_sound_model_passes() -> None:
    found = zoo_checks.structural("small")
    assert found["problems"] == []
    assert (found["used"], found["drawn"], found["owners"], found["swap"]) == (4, 4, 2, 0)


@pytest.mark.usefixtures("small")
def test_a_read_of_the_mean_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from bayesify import scope

    def mean_of_bias(module: nn.Module, attribute: str, autocast: bool = False) -> Any:
        if attribute == "bias":
            return module._parameters[attribute]
        slot = module.__dict__["_bayesify"].slots[attribute]
        assert scope.LOCAL.scope is not None
        return scope.LOCAL.scope.read(module, attribute, slot)

    monkeypatch.setattr(scope, "read", mean_of_bias)
    problems = "\n".join(zoo_checks.structural("small")["problems"])
    assert "conv.bias reaches aten.convolution" in problems
    assert "conv.bias is used, not drawn" in problems
    assert "weight" not in problems


@pytest.mark.usefixtures("small")
def test_a_lost_method_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import bayesify

    convert = bayesify.to_bbb

    def forgetful(model: nn.Module) -> nn.Module:
        converted = convert(model)
        converted.head.__class__ = nn.Identity
        return converted

    monkeypatch.setattr(bayesify, "to_bbb", forgetful)
    assert "3: class of head changed" in zoo_checks.structural("small")["problems"]


def test_groups_see_modules_not_sizes() -> None:
    narrow = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    wide = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    other = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU())
    assert zoo_models.signature(narrow) == zoo_models.signature(wide)
    assert zoo_models.signature(narrow) != zoo_models.signature(other)
    named = copy.deepcopy(narrow)
    named.add_module("head", nn.ReLU())
    assert zoo_models.signature(narrow) != zoo_models.signature(named)


def test_the_result_file_is_whole() -> None:
    lines = zoo.RESULT.read_text().splitlines()
    names = [json.loads(line)["name"] for line in lines]
    assert names == sorted(set(names))
    assert set(zoo_models.names()) <= set(names)
