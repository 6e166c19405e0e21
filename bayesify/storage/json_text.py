"""The JSON in a file, which may come from anywhere."""

from __future__ import annotations

import json
from typing import Any

MAX_CHARACTERS = 1 << 25
"""A row for each of 100,000 tensors; more would take a GB when it is read."""
MAX_DEPTH = 64


def parse_json(text: str) -> Any:
    """What a JSON text says, if it is of a size and depth that a file of bayesify can have.

    Raises:
        ValueError: It is no JSON, too long or too deep.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{len(text):,} characters of JSON, more than {MAX_CHARACTERS:,}")
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("its JSON is too deep") from None
    level = [found]
    for _ in range(MAX_DEPTH):
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return found
    raise ValueError(f"its JSON is deeper than {MAX_DEPTH}")


def _inside(value: Any) -> list[Any]:
    """The containers in a container."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [item for item in items if isinstance(item, dict | list)]
