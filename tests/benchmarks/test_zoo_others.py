"""The zoo of other libraries: a sample of it, its list and its section in docs/zoo.md."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import pytest
import torch
import transformers
import zoo_others
import zoo_others_table
from torch import nn
from zoo_libraries import rule
from zoo_libraries.entries import Entry, lib, takes

import bayesify

ROWS = zoo_others_table.read()
SAMPLE = (
    "peft:LORA",
    "peft:MULTITASK_PROMPT_TUNING",
    "peft:PREFIX_TUNING",
    "transformers:AUDIO_CLASSIFICATION:whisper",
    "transformers:CAUSAL_LM:flint",
    "transformers:IMAGE_CLASSIFICATION:deit",
)
"""Of the libraries that the other tests need too."""


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_passes(name: str) -> None:
    if name.endswith(":flint") and "flint" not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no such model")
    found = zoo_others.check(zoo_others.entries()[name])
    assert found["problems"] == []
    listed = ROWS.get(name, found)
    same = all(metadata.version(k) == v for k, v in listed.get("versions", {}).items())
    if not listed["problems"] and same:  # another version may have other layers
        assert found["tensors"] == listed["tensors"]
        assert found["all_swapped"] <= listed["all_swapped"]


def test_what_does_not_hold_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = Entry("none", "fine", lambda: (nn.Linear(3, 2), takes(3)))
    assert zoo_others.check(fine)["problems"] == []
    found = zoo_others.check(Entry("none", "broken", lambda: (nn.Linear(4, 2), takes(3))))
    assert found["own_fault"]
    assert "the original itself" in found["problems"][0]

    load = bayesify.load

    def other(*args: Any, **kwargs: Any) -> nn.Module:
        model = load(*args, **kwargs)
        with torch.no_grad():
            model.get_parameter("bias_logvar").add_(1.0)
        return model

    monkeypatch.setattr(bayesify, "load", other)
    problems = zoo_others.check(fine)["problems"]
    assert problems == ["file: bias_logvar differs", "file: another draw in a fresh model"]


def test_the_list_is_what_the_rule_takes() -> None:
    tables = rule.read()
    assert set(tables) == set(rule.TAKE)
    assert len(rule.keys()) == len(set(rule.keys())) >= 150
    assert len({zoo_others_table.library(key) for key in rule.keys()}) >= 15
    names = sorted(k.value for k in lib("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING)
    if metadata.version("peft") == tables["peft"]["version"]:
        found, passed = rule.chosen("peft", names)
        assert (found, passed) == (tables["peft"]["chosen"], tables["peft"]["passed_over"])


def test_every_model_of_the_list_can_be_built() -> None:
    assert set(rule.keys()) <= set(zoo_others.entries())


def row(name: str, **found: Any) -> dict[str, Any]:
    return {
        "name": name, "problems": [], "parameters": 10, "tensors": 2, "first_call_s": 0.5,
        "all_owners": 4, "all_swapped": 1, "owners": 2, "swap": 0, "commit": "abc",
        "fallback": ["A.forward (owns none): it asks"], "versions": {"torch": "3.0"}, **found,
    }  # fmt: skip


def test_the_section_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"version": "1.0", "names": 9, "chosen": ["X", "Y"], "passed_over": {"Z": "is none"}}
    monkeypatch.setattr(rule, "read", lambda: {"flows": table})
    rows = {
        r["name"]: r
        for r in (
            row("flows:X"),
            row("flows:Y", problems=["1b: eval: differs | much"]),
            row("flows:mine"),
        )
    }
    text = "\n".join(zoo_others_table.section(rows))
    assert "**1 of 2 models of 1 other libraries pass" in text
    assert "by hand, 1." in text
    assert "| flows | 1.0 | 9 | 1 of 2 | 1 of 1 | 12 | 3 |" in text
    assert "| `flows:Y` | 1b: eval: differs / much |  |" in text
    assert "| `flows:Z` | is none |" in text
    assert "| it asks | `flows:X`" in text
    assert "9 of 12 owners" in text
    assert "6 of 6" in text
