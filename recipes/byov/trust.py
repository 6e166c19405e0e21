"""What the file of a run may name, and what only the user may.

A file never chooses which code runs. It may name networks of timm and of this recipe's presets, and
data that is images and labels and nothing else. A factory of Python, all that it is called with,
and a data set that timm opens come from the command line.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bayesify import ArgumentError

from .config import BYOVConfig
from .presets import PRESETS


def read_arguments(text: str) -> dict[str, Any]:
    """The JSON object that ``--encoder-args`` was given.

    Raises:
        ArgumentError: It is none.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ArgumentError(
            f"encoder_args must be a JSON object such as '{{\"depth\": 6}}' ({error})."
        ) from error
    if not isinstance(found, dict):
        raise ArgumentError(f"encoder_args must be a JSON object, not {text!r}.")
    return found


def check_encoder(
    path: Path,
    config: BYOVConfig,
    encoder: str | None = None,
    encoder_args: Mapping[str, Any] | None = None,
) -> None:
    """Refuse an encoder that a file names and that would run code which the user did not name.

    Args:
        path: The file.
        config: What the file says.
        encoder: The factory that the user named.
        encoder_args: What the user said it is called with.

    Raises:
        ArgumentError: The file names a factory and the user did not name the same, with the same
            arguments; or the user named another encoder than that of the run.
    """
    from bayesify import ModelSpec

    named = _call(config.encoder, config.encoder_args)
    given = None
    if encoder is not None or encoder_args is not None:
        given = _call(encoder or "", encoder_args or {})
    if given == named:
        return
    own = {preset.config.encoder for preset in PRESETS.values()}
    factory = ModelSpec(config.encoder).source == "factory" and config.encoder not in own
    if factory:
        raise ArgumentError(
            f"{path} names the factory {config.encoder!r} as its encoder, and a file does not "
            "choose which code runs. Give it yourself, if you trust what this imports and calls: "
            f"{named}"
        )
    if given is not None:
        raise ArgumentError(
            f"{path} was trained with {named}, not with {given}. Leave --encoder and "
            "--encoder-args out: they are for runs of a factory of your own."
        )


def check_data(path: Path, spec: str) -> None:
    """Refuse a data set that a file names and that more than reading images would open.

    Raises:
        ArgumentError: It is one of timm's, which may download, unpickle, or run another library.
    """
    if spec.startswith("timm:"):
        raise ArgumentError(
            f"{path} names the data set {spec!r}, which code of other libraries opens, and a file "
            f"does not choose which code runs. Give it yourself: --data {shlex.quote(spec)}"
        )


def _call(encoder: str, arguments: Mapping[str, Any]) -> str:
    """The options for an encoder, as a shell takes them."""
    shown = f"--encoder {shlex.quote(encoder)}"
    if arguments:
        shown += f" --encoder-args {shlex.quote(json.dumps(arguments, sort_keys=True))}"
    return shown
