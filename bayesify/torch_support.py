"""Which versions of torch bayesify works with, and what of it begins with a later one."""

from __future__ import annotations

import re

import torch

from .errors import UnsupportedVersionError

COMPILE = "torch.compile, or torch.export with strict=True, of a Bayesian model"
FIRST = {"bayesify": (2, 6), COMPILE: (2, 10)}
"""The first version of torch with which each works; the first is the bound of pyproject.toml."""


def installed() -> tuple[int, int]:
    """Major and minor version of torch."""
    major, minor = re.findall(r"\d+", torch.__version__)[:2]
    return int(major), int(minor)


def has(feature: str) -> bool:
    """Whether torch is new enough for one of :data:`FIRST`."""
    return installed() >= FIRST[feature]


def check(feature: str) -> None:
    """Refuse what torch is too old for.

    Raises:
        UnsupportedVersionError: With the range, the version found and the command that mends it.
    """
    if not has(feature):
        first = ".".join(map(str, FIRST[feature]))
        raise UnsupportedVersionError(
            f"{feature} needs torch {first} or newer, this is {torch.__version__}: "
            f"pip install 'torch>={first}'"
        )


def accelerator() -> torch.device | None:
    """The accelerator of this machine; None without one. Torch 2.6 cannot ask for both at once."""
    there = torch.accelerator.is_available()
    return torch.accelerator.current_accelerator() if there else None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def check_compile() -> None:
    """As :func:`check`, of what torch.compile traces now: said once, when it traces."""
    check(COMPILE)


def lacks(error: Exception) -> str:
    """What to say of a torch from which a name is gone that bayesify uses."""
    first = ".".join(map(str, FIRST["bayesify"]))
    return (
        f"torch {torch.__version__} lacks a name that this bayesify uses ({error}). It was made "
        f"for torch {first} and newer, before yours: pip install --upgrade bayesify, or "
        f"pip install 'torch<{torch.__version__}'"
    )
