"""Features in clusters, one a class."""

from typing import Any

import torch


def clusters(count: int, classes: int = 4, width: int = 8, noise: float = 1.0) -> tuple[Any, Any]:
    """Features around one point a class; the points are the same on every call."""
    points = 2 * torch.randn(classes, width, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(count) % classes
    return points[labels] + noise * torch.randn(count, width), labels
