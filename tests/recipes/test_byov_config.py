"""Configs that cannot work are refused by the name of the field; presets build what they say."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bayesify import ArgumentError
from bayesify.settings.fields import described
from byov_small import CONFIG
from recipes.byov.config import BYOVConfig, RunConfig, differences
from recipes.byov.model import Student, build_student, convert_
from recipes.byov.presets import PRESETS


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"batch_size": 1}, "batch_size 1 leaves BatchNorm"),
        ({"tau_base": 1.2}, "tau_base"),
        ({"beta_end": -0.1}, "beta_end"),
        ({"beta_start": -1.0}, "beta_start"),
        ({"warmup_epochs": 3.0}, "warmup_epochs"),
        ({"image_size": 30}, "image_size"),
        ({"beta_shape": "constant"}, "beta_shape"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"channels": 2}, "channels"),
        ({"conversion": "some"}, "conversion"),
        ({"prior": "teacher", "objective": "supervised"}, "prior"),
        ({"lr": float("nan")}, "lr"),
        ({"epochs": 2.5}, "epochs"),
        ({"betas": (0.9,)}, "betas"),
        ({"encoder_args": {"x": torch.zeros(1)}}, "encoder_args"),
        ({"min_crop": 0.0}, "min_crop"),
        ({"parameterization": "log"}, "parameterization"),
        ({"skip": "LayerNorm"}, "skip must be a list"),
        ({"skip": ("a",), "conversion": "none"}, "skip has no use"),
        ({"relative_std": -0.01}, "relative_std"),
        ({"relative_std": 0.01, "logvar_init": -6.0}, "logvar_init has no use"),
    ],
)
def test_what_cannot_work_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(field)):
        replace(CONFIG, **changes)


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(ArgumentError, match=r"(?s)beta_end.*tau_base"):
        replace(CONFIG, tau_base=2.0, beta_end=-1.0)


def test_batch_of_one_works_without_batchnorm() -> None:
    assert replace(CONFIG, batch_size=1, head_norm="layer").batch_size == 1


@pytest.mark.parametrize("changes", [{"workers": -1}, {"accumulate": 0}, {"keep_last": 0}])
def test_a_run_that_cannot_work_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(changes))):
        RunConfig(**changes)


def test_tau_follows_the_batch_size() -> None:
    config = replace(CONFIG, tau_base=0.99, batch_size=64, tau_batch=16)
    assert config.tau_start == pytest.approx(0.99**4)
    assert replace(config, tau_batch=0).tau_start == 0.99


@pytest.mark.parametrize("cls", [BYOVConfig, RunConfig])
def test_every_field_is_described(cls: type) -> None:
    assert list(described(cls)) == [f.name for f in fields(cls)]
    assert all(text.strip() for text in described(cls).values())


@pytest.mark.parametrize("indentation", ["", " " * 4])
def test_descriptions_do_not_depend_on_the_indentation(indentation: str) -> None:
    # Python 3.13 takes it off a docstring, older ones keep it
    lines = (
        "What.",
        "",
        "Args:",
        "    one: First",
        "        line. 2: x.",
        "    two: Second.",
    )
    documented = type("Documented", (), {"__doc__": f"\n{indentation}".join(lines)})
    assert described(documented) == {"one": "First line. 2: x.", "two": "Second."}


def test_json_both_ways() -> None:
    config = replace(CONFIG, betas=(0.8, 0.9), prior="teacher", skip=("LayerNorm",))
    assert BYOVConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert differences(config.to_json(), CONFIG.to_json()) == [
        "betas: [0.8, 0.9] here, [0.9, 0.95] there",
        "prior: 'teacher' here, 'zero' there",
        "skip: ['LayerNorm'] here, [] there",
    ]
    with pytest.raises(ArgumentError, match="colour"):
        BYOVConfig.from_json({"colour": 1})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_their_model(name: str) -> None:
    config = PRESETS[name].config
    student = build_student(config, 10).to("meta")
    with torch.device("meta"):
        model = convert_(student, config)
        assert isinstance(model, Student)
        images = torch.zeros(2, config.channels, config.image_size, config.image_size)
        first, second = model(images, images)
    assert first.prediction.shape == second.projection.shape == (2, config.projector_out)
    widths = [
        layer.out_features for layer in model.projector.children() if hasattr(layer, "out_features")
    ]
    assert widths == [config.projector_hidden, config.projector_out]


def test_presets_know_where_they_write() -> None:
    folders = {preset.run.out for preset in PRESETS.values()}
    assert len(folders) == len(PRESETS)
    assert all(isinstance(folder, Path) for folder in folders)
