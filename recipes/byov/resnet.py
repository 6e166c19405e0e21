"""ResNet-18 as CIFAR wants it, which timm has no name for."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn


def cifar_resnet18(**arguments: Any) -> nn.Module:
    """timm's ``resnet18`` with a stem of 3x3 pixels, stride 1, and no pooling after it.

    Reference:
        Chen et al., 2020, arXiv:2002.05709 (SimCLR), appendix B.9.
    """
    model: Any = timm.create_model("resnet18", **arguments)
    model.conv1 = nn.Conv2d(model.conv1.in_channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    whole: nn.Module = model
    return whole
