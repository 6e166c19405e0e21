"""Lists, dicts and sets that a traced method must leave as they are: no graph changes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .guards import HOOKS, INTERNAL, MISSING
from .trace_context import attributes_of_objects
from .values import TraceFailure


class Containers:
    """The containers that modules and their plain objects hold, as they were before a trace."""

    def __init__(self, modules: list[nn.Module]) -> None:
        seen: set[int] = set()
        self._before = [
            (name, value, value.copy() if value else type(value)())
            for module in modules
            for name, value in (
                *(
                    (n, v) for n, v in module.__dict__.items()
                    if (type(v) in (list, dict, set) and n not in INTERNAL) or n in HOOKS
                ),
                *attributes_of_objects(module, seen),
            )
        ]  # fmt: skip

    def check(self, made_of_draws: Callable[[Any], bool]) -> None:
        """What a forward does to a list or dict of its module must happen at every call.

        Raises:
            TraceFailure: One was changed, other than by a cache of draws, which is not kept.
        """
        for name, value, content in self._before:
            if isinstance(value, dict):
                changed = [
                    k for k, v in value.items()
                    if content.get(k, MISSING) is not v and not made_of_draws(v)
                ]  # fmt: skip
                different = bool(changed) or any(k not in value for k in content)
            elif type(value) is list:
                different = len(value) != len(content) or any(
                    a is not b for a, b in zip(value, content, strict=True)
                )
            else:
                different = len(value ^ content) > 0
            if different:
                raise TraceFailure(f"it changes its {type(value).__name__} {name!r}")


def outline(value: Any) -> Any:
    """The structure of containers, with the identity of what they hold."""
    if isinstance(value, list | tuple):
        return type(value), [outline(v) for v in tuple(value)]
    if isinstance(value, dict):
        return type(value), [(k, outline(v)) for k, v in value.items()]
    return id(value)
