"""The model in a file, for the commands that run it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..models import InputConfig, ModelSpec


class Opened(NamedTuple):
    """A model from a file, how its images are prepared, and what else the file says."""

    model: nn.Module
    spec: ModelSpec
    input: InputConfig
    header: dict[str, Any]


def open_model(
    file: Path, model_name: str | None, model_args: str | None, device: torch.device
) -> Opened:
    """Build the model of a file and load it.

    Args:
        file: What ``bayesify convert`` or ``fit`` wrote.
        model_name: The function that builds it; None takes the name in the file.
        model_args: What that function is called with, as JSON.
        device: Where to.

    Raises:
        ArgumentError: The file does not say all that is needed to run it.
        CheckpointError: It cannot be read, or does not fit the model.
    """
    from .. import storage
    from ..errors import ArgumentError
    from ..models import ModelSpec
    from . import render

    header = storage.read_header(file)
    saved = header["model"]["spec"] or {}
    if "table" in header["info"]:
        raise ArgumentError(
            f"{file} is of a table, and here is work on images. bayesify eval {file} TABLE and "
            f"bayesify predict {file} TABLE take tables."
        )
    by_user = saved and ModelSpec.from_json(saved, allow_factory=True).source == "factory"
    if model_name is None and (not saved or by_user):
        known = f"of {saved['name']}" if saved else f"of the class {header['model']['class']}"
        raise ArgumentError(
            f"{file} is {known}, and a file does not choose which code runs. Say what builds the "
            "model: --model package.module:factory."
        )
    if header["input"] is None:
        raise ArgumentError(
            f"{file} does not say what size of image its model takes: write it anew by bayesify "
            "convert --img-size PIXELS."
        )
    config = storage.input_of(header)
    spec = _spec(file, saved, model_name, model_args)
    with render.status(f"Loading {file}..."):
        given = None if model_name is None else spec.build().eval()
        model = storage.load(file, given, device=device)
    return Opened(model, spec, config, header)


def _spec(
    file: Path, saved: Mapping[str, Any], model_name: str | None, model_args: str | None
) -> ModelSpec:
    """What builds the model: of a factory, neither name nor arguments come from the file alone."""
    from ..errors import ArgumentError
    from ..models import ModelSpec
    from .options import read_object

    spec = ModelSpec.from_json(
        {**saved, "name": model_name or saved["name"]}, allow_factory=model_name is not None
    )
    if model_args is None and (spec.source != "factory" or not spec.model_args):
        return spec
    given = {} if model_args is None else read_object("--model-args", model_args)
    if saved and given != spec.model_args:
        wanted = shlex.quote(json.dumps(dict(spec.model_args), sort_keys=True))
        raise ArgumentError(
            f"{file} was built with the arguments {wanted}, and a file does not choose what code "
            f"is called with. Give the same, if you trust them: --model-args {wanted}"
        )
    return replace(spec, model_args=given)


def note_on_classes(opened: Opened, file: Path, data: str) -> None:
    """Say where labels cannot be compared with outputs by name."""
    from ..classes import classes_of
    from . import render

    if classes_of(opened.model) is None:
        render.note(
            f"{file} does not say what its outputs are called: the labels of {data} are taken by "
            "their number."
        )
