"""Context variables that a forward sets for the modules which it calls, and their hooks."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

from .guards import MISSING, PRIMITIVES, copy_plain, plain
from .values import TraceFailure

Variables = tuple[tuple["contextvars.ContextVar[Any]", Any], ...]


def changed(before: contextvars.Context) -> Variables:
    """What was set in the present context since ``before`` was copied of it."""
    now = contextvars.copy_context()
    return tuple((v, x) for v, x in now.items() if before.get(v, MISSING) is not x)


def constants(variables: Variables, hooked: bool) -> Variables:
    """What a graph sets anew at every call, in place of ``variables``.

    Raises:
        TraceFailure: A value is no plain one, or one that hooks may fill for the forward to read.
    """
    for variable, value in variables:
        if not plain(value) or (hooked and not isinstance(value, PRIMITIVES)):
            raise TraceFailure(f"it sets the context variable {variable.name!r} around a submodule")
    return tuple((variable, copy_plain(value)) for variable, value in variables)


def check(variables: Variables, copies: Variables) -> None:
    """Refuse a forward whose submodule fills what a variable holds."""
    if any(a != b for (_, a), (_, b) in zip(variables, copies, strict=True)):
        raise TraceFailure("a submodule fills what a context variable holds")


def in_context(variables: Variables, callee: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What generated code calls where the forward had set context variables around a call."""
    values = [(variable, copy_plain(value)) for variable, value in variables]
    tokens = [(variable, variable.set(value)) for variable, value in values]
    try:
        result = callee(*args, **kwargs)
    finally:
        for variable, token in reversed(tokens):
            variable.reset(token)
    for (variable, value), (_, first) in zip(values, variables, strict=True):
        if value != first:
            raise RuntimeError(
                f"{type(callee).__name__} has filled what the context variable {variable.name!r} "
                "holds, which it did not do when its caller was traced (a hook that was added "
                "later?). Add such hooks before the first call that draws."
            )
    return result
