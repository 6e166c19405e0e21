"""Compiles bayesify/kernels/native.c; all else about the package stands in pyproject.toml.

The library is loaded by ctypes and has no header of Python, so one wheel serves every Python.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NAME = "_native.dll" if os.name == "nt" else "_native.so"
"""As in bayesify/kernels/native.py, which looks for it."""

# Without contraction the noise has the same bits on every processor.
FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]


class BuildLibrary(build_ext):
    """Compile the library, or say what is missing and go on: plain torch does its work then."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1], NAME))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # not an entry for Python; native.c says what it exports

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type == "msvc":
            ext.extra_compile_args, ext.libraries = ["/O2", "/fp:precise"], []
        super().build_extension(ext)

    def built(self) -> bool:
        return all(Path(self.get_ext_fullpath(ext.name)).exists() for ext in self.extensions)

    def run(self) -> None:
        super().run()
        if not self.built():
            print(
                "bayesify: no C compiler worked here, so its C library was not built. bayesify is "
                "installed and draws on the CPU are made by plain torch, slower and with other "
                "numbers for a seed. With a compiler, such as gcc, install it anew.",
                file=sys.stderr,
            )


class Wheel(bdist_wheel):
    """For any Python of a platform; where nothing was compiled, for any platform."""

    def get_tag(self) -> tuple[str, str, str]:
        built = self.get_finalized_command("build_ext").built()
        return "py3", "none", super().get_tag()[2] if built else "any"


setup(
    ext_modules=[
        Extension(
            "bayesify.kernels._native",
            sources=["bayesify/kernels/native.c"],
            depends=["setup.py"],
            extra_compile_args=FLAGS,
            libraries=[] if os.name == "nt" else ["m"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
