"""What of bayesify needs a newer torch than its lowest."""

from __future__ import annotations

import re

import torch

from .errors import UnsupportedVersionError

FIRST = {"torch.compile": (2, 8)}
"""The first version of torch with which each works. The rest works from the lowest bound on."""


def installed() -> tuple[int, int]:
    """Major and minor version of torch."""
    major, minor = re.findall(r"\d+", torch.__version__)[:2]
    return int(major), int(minor)


def check(feature: str) -> None:
    """Refuse a feature that this torch is too old for.

    Raises:
        UnsupportedVersionError: With the version found and the one wanted.
    """
    first = FIRST[feature]
    if installed() < first:
        wanted = ".".join(map(str, first))
        raise UnsupportedVersionError(
            f"{feature} of a Bayesian model needs torch {wanted} or newer, this is "
            f"{torch.__version__}: pip install 'torch>={wanted}'. Without it the model runs."
        )
