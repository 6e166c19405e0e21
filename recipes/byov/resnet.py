"""ResNet-18 as CIFAR wants it, which timm has no name for."""

from __future__ import annotations

from typing import Any

from torch import nn

from bayesify import create_model


def cifar_resnet18(
    *, num_classes: int | None = None, in_chans: int | None = None, **arguments: Any
) -> nn.Module:
    """timm's ``resnet18`` with a stem of 3x3 pixels, stride 1, and no pooling after it.

    The further arguments may come from the file of a run: :func:`bayesify.create_model` refuses
    those of timm that read a file or fetch one.

    Reference:
        Chen et al., 2020, arXiv:2002.05709 (SimCLR), appendix B.9.
    """
    model: Any = create_model(
        "resnet18", num_classes=num_classes, in_chans=in_chans, model_args=arguments
    )
    model.conv1 = nn.Conv2d(model.conv1.in_channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    whole: nn.Module = model
    return whole
