"""The state of work that can be gone on from, in one file without a pickle.

Nested dicts, lists, numbers, texts and tensors. The tensors are those of a safetensors file; its
metadata has one key, ``bayesify.state``, a JSON text:

======= =======================================================================================
format  version of this layout, an integer
kind    whose state it is: ``fit``, or the name of a recipe
state   all else: a dict is ``{"dict": [[key, value], ...]}``, so that its keys may be numbers;
        a tensor ``{"tensor": name}``; a number that JSON lacks ``{"float": "inf"}``
======= =======================================================================================
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from .files import replacing
from .json_text import parse_json

_KEY = "bayesify.state"
_FORMAT = 2  # 1 was one layout each of `fit` and of the recipe


@dataclass(frozen=True)
class StateKind:
    """Whose state a file holds, for its header and for messages.

    Args:
        name: Of the kind, in the header.
        words: What such a file is called.
        advice: What to do without it.
        key: In the metadata of files from before this layout.
        earlier: Reads those: from their tensors, and what their JSON says.
    """

    name: str
    words: str
    advice: str
    key: str
    earlier: Callable[[dict[str, Tensor], Any], Any]

    def damaged(self, path: Path, reason: object) -> CheckpointError:
        """The error for a file that cannot be read or gone on from."""
        if isinstance(reason, Exception):
            reason = f"{type(reason).__name__}: {reason}"
        return CheckpointError(
            f"{path} is no readable {self.words} ({reason}). It is damaged, cut short, or "
            f"something else. {self.advice}"
        )


def write_state(path: Path, state: Mapping[str, Any], kind: StateKind) -> None:
    """Write the file whole or not at all; an older one of the same name is replaced.

    Raises:
        CheckpointError: The file cannot be written; nothing is left of it.
    """
    tensors: dict[str, Tensor] = {}
    document = {"format": _FORMAT, "kind": kind.name, "state": _flatten(state, "", tensors, set())}
    with replacing(path, overwrite=True) as temporary:
        save_file(tensors, temporary, metadata={_KEY: json.dumps(document, allow_nan=False)})


def read_state(path: Path, kind: StateKind) -> dict[str, Any]:
    """Read what :func:`write_state` was given, on the CPU; tuples have become lists.

    Raises:
        CheckpointError: The file is damaged, of another kind, or of a newer version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
        if kind.key in metadata:
            state = kind.earlier(tensors, parse_json(metadata[kind.key]))
        elif _KEY not in metadata:
            raise ValueError("its metadata hold no state")
        else:
            document = parse_json(metadata[_KEY])
            if document["format"] > _FORMAT:
                raise CheckpointError(f"{path} is of a newer version of bayesify: update it.")
            if document["kind"] != kind.name:
                raise ValueError(f"it holds the state of {document['kind']!r:.60}")
            state = nested(document["state"], tensors)
        if not isinstance(state, dict):
            raise TypeError(f"it holds {type(state).__name__}")
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        raise kind.damaged(path, error) from error
    return state


def mismatched(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that one of the two lacks, or has of another shape."""
    return sorted(
        name
        for name in {*own, *saved}
        if name not in own or name not in saved or own[name].shape != saved[name].shape
    )


ADAM = frozenset({"step", "exp_avg", "exp_avg_sq"})
"""What Adam and AdamW keep of a parameter."""


def check_moments(own: Tensor, saved: Mapping[str, Tensor], names: Set[str]) -> None:
    """Refuse what an optimizer cannot keep of a parameter.

    Its fused kernels take the size of the parameter for that of each moment, and would write
    beyond a smaller one.

    Args:
        own: The parameter.
        saved: What a file says that the optimizer keeps of it.
        names: What it does keep: ``step``, one number, and moments of the parameter's shape.

    Raises:
        ValueError: Something is missing, superfluous, or of another shape.
    """
    if saved.keys() != names:
        raise ValueError(f"the optimizer keeps {', '.join(sorted(names))}, not {[*saved]}")
    for name, value in saved.items():
        shape = () if name == "step" else own.shape
        if value.shape != shape:
            raise ValueError(f"{name} is {tuple(value.shape)} in place of {tuple(shape)}")


def _flatten(value: Any, key: str, tensors: dict[str, Tensor], memories: set[int]) -> Any:
    """The JSON of a value, with its tensors in ``tensors``; no two of them share memory."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        memory = tensor.untyped_storage()
        if memory.nbytes() != tensor.nbytes or memory.data_ptr() in memories:
            tensor = tensor.clone()  # safetensors refuses parts, and tensors of one memory
        tensors[key] = tensor
        memories.add(tensor.untyped_storage().data_ptr())
        return {"tensor": key}
    if isinstance(value, Mapping):
        items = [[k, _flatten(v, f"{key}/{k}", tensors, memories)] for k, v in value.items()]
        return {"dict": items}
    if isinstance(value, list | tuple):
        return [_flatten(v, f"{key}/{i}", tensors, memories) for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{key} is a {type(value).__name__}, which a state cannot hold")


def nested(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value whose JSON this is."""
    if isinstance(value, list):
        return [nested(v, tensors) for v in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        if "float" in value:
            return float(value["float"])
        return {k: nested(v, tensors) for k, v in value["dict"]}
    return value
