"""A version that is too old: range, what was found, and the command that mends it, at import."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import bayesify
from bayesify import requirements

ROOT = Path(__file__).resolve().parents[2]
OLD = """
from importlib import metadata
before = metadata.version
metadata.version = lambda name: "0.0.9" if name == {package!r} else before(name)
{code}
"""
USES = {
    "typer": "import bayesify.cli.app",
    "rich": "import bayesify.cli.app",
    "numpy": "import bayesify; bayesify.plan",
    "safetensors": "import bayesify; bayesify.load",
    "timm": "import bayesify; bayesify.create_model('resnet18')",
    "torchvision": "import bayesify; bayesify.create_model('torchvision:resnet18')",
}


def test_the_bounds_are_those_of_the_project() -> None:
    toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    wanted = toml.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    bounds = {r.name: str(r.specifier).removeprefix(">=") for r in map(Requirement, wanted)}
    assert {name: bounds[name] for name in requirements.OLDEST} == requirements.OLDEST


@pytest.mark.parametrize("package", USES)
def test_a_package_that_is_too_old_is_refused(package: str) -> None:
    assert requirements.OLDEST.keys() == USES.keys()
    code = OLD.format(package=package, code=USES[package])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    oldest = requirements.OLDEST[package]
    assert done.stderr.strip().splitlines()[-1] == (
        f"bayesify.errors.UnsupportedVersionError: bayesify needs {package} {oldest} or newer, "
        f"this is 0.0.9: pip install '{package}>={oldest}'"
    )


@pytest.mark.parametrize(
    ("found", "fits"),
    [("1.0.15", True), ("1.0.15.dev0", True), ("1.1", True), ("2.0.0rc1", True), ("1.0.9", False),
     ("0.9.16", False)],
)  # fmt: skip
def test_versions_are_compared_as_numbers(
    found: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: found)
    if fits:
        requirements.check("timm")
    else:
        with pytest.raises(bayesify.UnsupportedVersionError, match=f"this is {re.escape(found)}"):
            requirements.check("timm")


def test_what_has_no_metadata_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    requirements.check("timm", "torchvision")


def test_a_python_that_is_too_old_is_refused() -> None:
    code = f"""
import sys
sys.version_info = (3, 9, 18, "final", 0)
sys.path.insert(0, {str(ROOT)!r})
import bayesify
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("ImportError: bayesify needs Python 3.10 or newer")
    assert "python3.12 -m venv" in said
