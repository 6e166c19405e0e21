"""What a forward writes into its parameters while the fallback draws: the means get it.

So a layer that sets a shift from its first batch, or clamps its weights, does to the mean what it
does to its parameter before the conversion, and the draw follows: the same noise around the new
mean. A value that was computed from the very draw would put its noise into the mean: an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .. import torch_private
from ..errors import UnsupportedModuleError
from ..posterior import STATE, Slot, tensors_of
from ..scope import LOCAL
from ..torch_private import pytree


def target_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The tensor that a torch function writes into, None if it writes into none."""
    name = getattr(func, "__name__", "")
    if isinstance(kwargs.get("out"), Tensor):
        return kwargs["out"]
    writes = name in ("__setitem__", "__set__") or (
        name.endswith("_") and not name.endswith("__") and name not in _HARMLESS
    )
    if not writes or not args or not isinstance(args[0], Tensor):
        return None
    if name == "__set__" and func.__self__.__name__ != "data":
        return None
    return args[0]


_HARMLESS = {"requires_grad_", "retain_grad_", "rename_", "share_memory_"}


class Writes:
    """Watches the torch functions of one call for writes into the draws of some parameters."""

    def __init__(self, where: dict[int, tuple[nn.Module, str]]) -> None:
        self.where = {
            module.__dict__[STATE].slots[name].uid: (module, name)
            for module, name in where.values()
        }
        self.met = False
        self._came_of: Any = WeakIdKeyDictionary()  # of which draws a tensor was computed
        self._draws: dict[int, int] = {}
        self._known = -1

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one function, on the mean where it writes into a draw."""
        target = target_of(func, args, kwargs)
        uid = None if target is None else self._of(target)
        if uid is not None:
            self.met = True
            self._write(uid, func, target, args, kwargs)
            name = getattr(func, "__name__", "")
            if id(target) in self._draws and not name.startswith("__"):
                # self.shift += ... assigns this; where it is used, the mode gives the draw
                return tensors_of(*(found := self.where[uid]), _slot(*found))[0]
            return None if name in ("__set__", "__setitem__") else target
        result = func(*args, **kwargs)
        came_of = self._sources((args, kwargs))
        if came_of:
            for tensor in _tensors(result):
                self._came_of[tensor] = came_of | self._came_of.get(tensor, frozenset())
        return result

    def _sources(self, values: Any) -> frozenset[int]:
        scope = LOCAL.scope
        if scope is not None and len(scope.realised) != self._known:
            self._known = len(scope.realised)
            self._draws = {id(t): index[0] for index, t in scope.realised.items()}
        found: set[int] = set()
        for tensor in _tensors(values):
            uid = self._draws.get(id(tensor))
            if uid is not None:
                found.add(uid)
            found |= self._came_of.get(tensor, frozenset())
        return frozenset(found)

    def _of(self, target: Tensor) -> int | None:
        """The slot into whose draw a tensor leads."""
        scope = LOCAL.scope
        if scope is None or target.layout != torch.strided or _is_wrapped(target):
            return None
        with torch_private.DisableTorchFunction():
            start = target.data_ptr()
            if start == 0:  # no memory: on the meta device all tensors seem to lie at one place
                return None
            for index, draw in scope.realised.items():
                if _is_wrapped(draw):
                    continue
                inside = start - draw.data_ptr()
                if 0 <= inside < max(1, draw.nbytes) and index[0] in self.where:
                    return int(index[0])
        return None

    def _write(
        self, uid: int, func: Any, target: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        module, attribute = self.where[uid]
        slot = _slot(module, attribute)
        mean = tensors_of(module, attribute, slot)[0]
        others = {k: v for k, v in kwargs.items() if k != "out"}
        given = args if "out" in kwargs else args[1:]
        if uid in self._sources((given, others)):
            raise UnsupportedModuleError(
                f"{type(module).__name__} sets its parameter {slot.name!r} in its forward to what "
                "it computes of it. While drawing that would put the noise of the draw into the "
                "mean. Skip this module in the conversion, or let torch.nn.utils.parametrize "
                "compute the weight, or call the model in bayesify.at_mean(model) once, if it does "
                "so in its first call alone."
            )
        scope = LOCAL.scope
        assert scope is not None
        with torch_private.DisableTorchFunction(), torch.no_grad():
            # no version: the backward of a draw does not depend on what the mean was
            mean = mean.data  # type: ignore[assignment]
            if getattr(func, "__name__", "") == "__set__":
                if given[0].shape != mean.shape:
                    raise UnsupportedModuleError(
                        f"{type(module).__name__} gives its parameter {slot.name!r} the shape "
                        f"{tuple(given[0].shape)} in its forward; its posterior has "
                        f"{tuple(mean.shape)}. Call it once before the conversion."
                    )
                mean.copy_(given[0])
            else:
                draw = next(t for i, t in scope.realised.items() if i[0] == uid and _in(target, t))
                offset = target.storage_offset() - draw.storage_offset() + mean.storage_offset()
                part = mean.as_strided(target.shape, target.stride(), offset)
                if "out" in kwargs:
                    func(*args, **{**others, "out": part})
                else:
                    func(part, *given, **kwargs)
            fresh = scope.empty()
            value = fresh.draw(module, attribute, slot)
            for index, draw in scope.realised.items():
                if index[0] == uid and "deviation" not in index:
                    draw.data.copy_(value)


def _is_wrapped(tensor: Tensor) -> bool:
    """Whether a transform of torch.func has wrapped it: it has no memory of its own."""
    return bool(torch_private.is_functorch_wrapped_tensor(tensor))


def _slot(module: nn.Module, attribute: str) -> Slot:
    found: Slot = module.__dict__[STATE].slots[attribute]
    return found


def _in(target: Tensor, draw: Tensor) -> bool:
    return 0 <= target.data_ptr() - draw.data_ptr() < max(1, draw.nbytes)


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
