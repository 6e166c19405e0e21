"""A model that is as it was before, when something that changes it in place has failed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..posterior import OwnerState, Slot, owner_state

Undo = list[Callable[[], object]]


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Take back all that the block has done to ``model``, if it ends with an error.

    Classes, attributes, hooks, parameters, buffers and their values, and what a conversion keeps.
    The values are held in the CPU's memory until the block ends.
    """
    undo: Undo = []
    tensors: dict[int, Tensor] = {}
    for module in model.modules():
        _keep_module(module, undo)
        for held in (*module._parameters.values(), *module._buffers.values()):
            if held is not None:
                tensors[id(held)] = held
    for tensor in tensors.values():
        _keep_values(tensor, undo)
    try:
        yield
    except BaseException:
        for step in undo:
            step()
        raise


def _keep_module(module: nn.Module, undo: Undo) -> None:
    kind = type(module)
    attributes = dict(module.__dict__)
    state = owner_state(module)

    def back() -> None:
        module.__class__ = kind
        module.__dict__.clear()
        module.__dict__.update(attributes)

    undo.append(back)
    for value in attributes.values():
        _keep_items(value, undo)
    if state is not None:
        _keep_state(state, undo)


def _keep_state(state: OwnerState, undo: Undo) -> None:
    attributes = dict(vars(state))
    undo.append(lambda: vars(state).update(attributes))
    for value in attributes.values():
        _keep_items(value, undo)
    for slot in state.slots.values():
        _keep_slot(slot, undo)


def _keep_slot(slot: Slot, undo: Undo) -> None:
    kind = type(slot)
    attributes = {name: getattr(slot, name) for name in Slot.__slots__}

    def back() -> None:
        slot.__class__ = kind
        for name, value in attributes.items():
            setattr(slot, name, value)

    undo.append(back)


def _keep_items(value: Any, undo: Undo) -> None:
    """What stands in a dict, a set or a list, such as hooks and parameters."""
    if type(value) not in (dict, OrderedDict, set, list):
        return
    items: Any = value.copy()

    def back() -> None:
        value.clear()
        value.extend(items) if isinstance(value, list) else value.update(items)

    undo.append(back)


def _keep_values(tensor: Tensor, undo: Undo) -> None:
    if tensor.device.type == "meta" or isinstance(
        tensor, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer
    ):
        return
    if tensor.is_inference() or any(
        n > 1 and not s for n, s in zip(tensor.shape, tensor.stride(), strict=True)
    ):
        return  # nothing can write to these in place
    own = tensor.detach()
    values = own.clone() if type(own) is not Tensor else own.to("cpu", copy=True)
    memory = tensor.data

    def back() -> None:
        with torch.no_grad():
            if tensor.data_ptr() != memory.data_ptr():  # moved to another device
                tensor.data = memory
            tensor.copy_(values)

    undo.append(back)
