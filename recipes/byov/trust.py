"""What the file of a run may name, and what only the user may.

A file never chooses which code runs. It may name networks of timm and of this recipe's presets, and
data that is images and labels and nothing else. A factory of Python, all that it is called with,
and a data set that timm opens come from the command line.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from bayesify import ArgumentError
from bayesify.settings.files import check_data as check_data

from .config import BYOVConfig, RunConfig
from .presets import PRESETS


def check_config(path: Path, config: BYOVConfig, run: RunConfig, by_file: Collection[str]) -> None:
    """Refuse what the file of ``--config`` names and what only the user may.

    Args:
        path: The file.
        config: What is to be trained.
        run: On what.
        by_file: The settings that are as the file says.

    Raises:
        ArgumentError: The file has an encoder that is a factory, or arguments of one, or data that
            timm opens.
    """
    if "data" in by_file:
        check_data(path, run.data)
    if {"encoder", "encoder_args"} & {*by_file} and _runs_code(config):
        raise _code_refused(path, config)


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
    named = _call(config.encoder, config.encoder_args)
    given = None
    if encoder is not None or encoder_args is not None:
        given = _call(encoder or "", encoder_args or {})
    if given == named:
        return
    if _runs_code(config):
        raise _code_refused(path, config)
    if given is not None:
        raise ArgumentError(
            f"{path} was trained with {named}, not with {given}. Leave --encoder and "
            "--encoder-args out: they are for runs of a factory of your own."
        )


def _runs_code(config: BYOVConfig) -> bool:
    """Whether the encoder is a factory that is not one of this recipe's own."""
    from bayesify import ModelSpec

    own = {preset.config.encoder for preset in PRESETS.values()}
    return ModelSpec(config.encoder).source == "factory" and config.encoder not in own


def _code_refused(path: Path, config: BYOVConfig) -> ArgumentError:
    return ArgumentError(
        f"{path} names the factory {config.encoder!r} as its encoder, and a file does not choose "
        "which code runs. Give it yourself, if you trust what this imports and calls: "
        f"{_call(config.encoder, config.encoder_args)}"
    )


def _call(encoder: str, arguments: Mapping[str, Any]) -> str:
    """The options for an encoder, as a shell takes them."""
    shown = f"--encoder {shlex.quote(encoder)}"
    if arguments:
        shown += f" --encoder-args {shlex.quote(json.dumps(arguments, sort_keys=True))}"
    return shown
