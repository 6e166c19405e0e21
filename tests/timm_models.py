"""Models of timm without data, whatever timm's version."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn


def without_data(name: str, **arguments: Any) -> nn.Module:
    """A model on the meta device. ViTs of timm before 1.0.22 cannot be made there, but moved."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, **arguments)
    except RuntimeError as error:
        if "meta" not in str(error):
            raise
        return timm.create_model(name, **arguments).to("meta")
