"""The weights of a file, of which every key and shape must be the model's own."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from ..errors import ModelError


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the file into a new model, strictly; after an error the model is of no use."""
    state = _read_state(path)
    own = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    for prefix in ("module.", "_orig_mod."):  # left by DistributedDataParallel and torch.compile
        if not any(key.startswith(prefix) for key in own):
            consume_prefix_in_state_dict_if_present(state, prefix)
    missing: Iterable[str] = own.keys() - state
    unexpected: Iterable[str] = state.keys() - own
    reshaped = [
        f"{key} (file {tuple(state[key].shape)}, model {tuple(own[key].shape)})"
        for key in own.keys() & state
        if state[key].shape != own[key].shape
    ]
    strange = [
        f"{key} ({reason})"
        for key, value in state.items()
        if (reason := _strange(value, own.get(key)))
    ]
    broken = [
        key for key in (own.keys() & state if not strange else ()) if _broken(state[key], own[key])
    ]
    if not reshaped and not strange:
        # The model's own answer: some modules complete or rename the keys of older files.
        missing, unexpected = model.load_state_dict(state, strict=False)
    problems = {
        "missing from the file": sorted(missing),
        "not in the model": sorted(unexpected),
        "of another shape": sorted(reshaped),
        "that hold no numbers of the model's kind": sorted(strange),
        "with NaN or infinity": sorted(broken),
    }
    found = [
        f"{len(keys)} {what}: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}"
        for what, keys in problems.items()
        if keys
    ]
    if found:
        raise ModelError(
            f"The weights in {path} cannot be loaded into {type(model).__name__}. Tensors: "
            f"{'; '.join(found)}. Check the model's name and num_classes"
            f"{', and whether the training diverged.' if broken else '.'}"
        )


def _strange(value: Tensor, own: Tensor | None) -> str | None:
    """Why a tensor of a file cannot be a weight, or None."""
    if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
        return f"{value.layout}, {value.dtype}, {value.device}: make it dense, with data"
    if own is None or value.dtype == own.dtype:
        return None
    if value.is_complex() or own.is_complex():
        return f"{value.dtype} in the file, {own.dtype} in the model"
    if value.is_floating_point() and value.element_size() < 2:
        return f"{value.dtype}, which needs a scale that no model here has: save it wider"
    return None


def _broken(value: Tensor, own: Tensor) -> bool:
    """Whether a tensor of a file holds NaN, or infinity where the model has none."""
    if not value.is_floating_point() and not value.is_complex():
        return False
    if value.element_size() < 2:  # torch does not look into these
        value, own = value.float(), own.float()
    # A mask saved as a buffer may hold infinity, as it then does in the new model too.
    return bool(value.isnan().any() or (value.isinf().any() and not own.isinf().any()))


def _read_state(path: Path) -> dict[str, Tensor]:
    """Read the state_dict in a file, without unpickling anything but tensors."""
    if not os.path.isfile(path):
        raise ModelError(f"There is no weights file {path}.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:  # also a dtype that torch does not have
            raise ModelError(
                f"{path} is no readable safetensors file ({error}); it may be cut short."
            ) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{path} cannot be read as a torch file of tensors ({reason}). It is damaged, or holds "
            "Python objects, which are never loaded: save its state_dict alone."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state:
        raise ModelError(f"{path} holds {type(state).__name__}; expected a non-empty state_dict.")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ModelError(
                f"{path} holds no state_dict: its entry {key!r} is a {type(value).__name__}."
            )
    return dict(state)
