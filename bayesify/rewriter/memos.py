"""What ``functools.lru_cache`` keeps: of a method, values of parameters; of others, constants.

Such a cache lies in C, where no trace sees it and nothing can be hidden in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..scope import LOCAL
from .active import ACTIVE
from .assignments import is_memo, members
from .surroundings import memos_named_by
from .values import TraceFailure

FILLED = "it fills the cache of "


@functools.cache
def _memos_of(cls: type) -> tuple[Any, ...]:
    return memos_named_by(cls)


@contextmanager
def unfilled(modules: Iterable[nn.Module]) -> Iterator[None]:
    """A block that runs on examples, after which no cache of these modules' code holds any.

    Raises:
        TraceFailure: The block has filled one, which then is empty.
    """
    classes: set[Any] = {type(module) for module in modules}
    memos = {memo for cls in classes for memo in _memos_of(cls)}
    before = {memo: memo.cache_info().misses for memo in memos}
    filled: list[str] = []
    try:
        yield
    finally:
        for memo, misses in before.items():
            if memo.cache_info().misses != misses:
                memo.cache_clear()
                filled.append(memo.__name__)
    if filled:
        raise TraceFailure(f"{FILLED}{filled[0]!r}")


def uncached_methods(cls: type) -> dict[str, Any]:
    """The methods of a class that keep what they give, which keep no draw and give none again."""
    own = {name: found[0] for name, found in members(cls).items()}
    return {name: _uncached(m) for name, m in own.items() if is_memo(m)}


def _uncached(cached: Any) -> Callable[..., Any]:
    original = cached.__wrapped__

    @functools.wraps(original)
    def method(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        scope = LOCAL.scope
        examples = ACTIVE.tracer is not None or ACTIVE.fake_mode is not None
        if examples or (scope is not None and scope.drawing):
            return original(self, *args, **kwargs)
        return cached(self, *args, **kwargs)

    for name in ("cache_info", "cache_clear", "cache_parameters"):
        setattr(method, name, getattr(cached, name))
    return method
