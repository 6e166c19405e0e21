"""setup.py: the C library as part of an installation, and an installation without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bayesify.kernels import native

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
setuptools = pytest.importorskip(
    "setuptools", minversion="77", reason="pip builds with a setuptools of its own; none is here"
)


def build(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py beside a part of the package."""
    source = folder / "bayesify" / "kernels" / "native.c"
    source.parent.mkdir(parents=True)
    shutil.copy(ROOT / "bayesify" / "kernels" / "native.c", source)
    shutil.copy(ROOT / "setup.py", folder)
    return subprocess.run(
        [sys.executable, "setup.py", *command], cwd=folder, env={**os.environ, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_library_has_the_name_that_is_looked_for(tmp_path: Path) -> None:
    done = build(tmp_path, "build_ext", "--build-lib", "out")
    assert done.returncode == 0, done.stderr
    if "its C library was not built" in done.stderr:
        pytest.skip("there is no C compiler")
    assert [path.name for path in (tmp_path / "out").rglob("*.*")] == [native.FILE]


def test_without_a_compiler_an_installation_goes_on_and_says_so(tmp_path: Path) -> None:
    done = build(tmp_path, "build_ext", "--build-lib", "out", CC="false")
    assert done.returncode == 0, done.stderr
    assert "no C compiler worked here" in done.stderr
    assert not list(tmp_path.rglob("_native.*"))


@pytest.mark.parametrize(("compiler", "tag"), [("", "py3-none-"), ("false", "py3-none-any")])
def test_a_wheel_is_for_every_python(compiler: str, tag: str, tmp_path: Path) -> None:
    environment = {"CC": compiler} if compiler else {}
    done = build(tmp_path, "-q", "bdist_wheel", "--dist-dir", "out", **environment)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "out").iterdir()
    assert tag in wheel.name
    assert wheel.name.endswith("any.whl") == ("its C library was not built" in done.stderr)


def test_cibuildwheel_makes_one_wheel_of_a_platform() -> None:
    """And tries it by a script that is there."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["cibuildwheel"]
    assert settings["build"].count("cp") == 1
    _, _, script = settings["test-command"].partition("{project}/")
    assert (ROOT / script).exists()
