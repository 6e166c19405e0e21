"""Where figures come from, if they can."""

from __future__ import annotations

from typing import Any

from ..errors import ArgumentError


def figure_class() -> Any:
    """matplotlib's Figure, which draws without a display.

    Raises:
        ArgumentError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError(
            "Figures need matplotlib: pip install 'bayesify[report]'."
        ) from error  # fmt: skip
    return Figure
