"""The oldest versions of other packages that work; each is looked at where it is needed."""

from __future__ import annotations

import re
from importlib import metadata

from .errors import UnsupportedVersionError

OLDEST = {
    "numpy": "1.26.4",
    "rich": "13.7",
    "safetensors": "0.4.5",
    "timm": "1.0.15",
    "torchvision": "0.21",
    "typer": "0.19.2",
}
"""The bounds of pyproject.toml; :mod:`.torch_support` has those of torch."""


def check(*packages: str) -> None:
    """Refuse a package that is too old. One without metadata is left to its own import.

    Raises:
        UnsupportedVersionError: With the range, the version found and the command that mends it.
    """
    for package in packages:
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        oldest = OLDEST[package]
        if _numbers(found) < _numbers(oldest):
            raise UnsupportedVersionError(
                f"bayesify needs {package} {oldest} or newer, this is {found}: "
                f"pip install '{package}>={oldest}'"
            )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))
