"""native.c under gcc's sanitizers: its tests, and draws of any shape, in a copy of the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .section import FAULT, Section, Trial

_ROOT = Path(__file__).resolve().parents[2]
_FLAGS = ("-O1", "-g", "-ffp-contract=off", "-fno-omit-frame-pointer", "-shared", "-fPIC")
SANITIZERS = ("address", "undefined")
_TESTS = ("tests/core/test_native.py", "tests/core/test_grouped.py", "tests/core/test_fixed.py")
_RANDOM = """
import math
import random
import sys

import torch

import bayesify
from bayesify.kernels import native

rng = random.Random(int(sys.argv[1]))
assert native.there() and bayesify.__file__.startswith(sys.argv[2]), bayesify.__file__
for number in range(150):
    torch.set_num_threads(rng.choice((1, 2, 3, 8)))
    dtype = rng.choice((torch.float32,) * 6 + (torch.float64, torch.bfloat16, torch.float16))
    shapes = [
        [rng.choice((0, 1, 2, 3, 5, 16, 17, 63, 64, 65, 257, 999)) for _ in range(rng.randrange(3))]
        for _ in range(rng.randrange(1, 6))
    ]
    net = torch.nn.ParameterList([torch.randn(shape, dtype=dtype) for shape in shapes])
    model = bayesify.to_bbb(net, initial_std=math.exp(rng.choice((-10.0, -2.5, 0.0, 1.5))))
    out = bayesify.draws(model, rng.choice((0, 1, -1, 2**63 - 1, rng.getrandbits(63))))
    loss = sum((d.float() ** 2).sum() for d in out.values()) + bayesify.kl_divergence(model)
    if loss.requires_grad:
        loss.backward()
    native.fill_normal(torch.empty(rng.randrange(3000), dtype=dtype), rng.getrandbits(64), 1)
"""


def library(sanitizer: str, target: Path) -> None:
    """Compile native.c with a sanitizer."""
    source = _ROOT / "bayesify" / "kernels" / "native.c"
    own = (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    subprocess.run(["gcc", *_FLAGS, *own, str(source), "-o", str(target), "-lm"], check=True)


def _runtime(sanitizer: str) -> str:
    """What is loaded before Python; without the C++ library, errors in C++ end the process."""
    names = ({"address": "libasan.so", "undefined": "libubsan.so"}[sanitizer], "libstdc++.so.6")
    asked = (["gcc", f"-print-file-name={name}"] for name in names)
    return " ".join(
        subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
        for words in asked
    )


def _prepare(folder: Path) -> Trial:
    copy = folder / "checkout"
    copy.mkdir()
    for name in ("bayesify", "recipes", "tests", "benchmarks"):
        shutil.copytree(
            _ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "_native.*")
        )
    for name in ("pyproject.toml", "README.md", "setup.py"):
        shutil.copy(_ROOT / name, copy / name)
    (copy / "random_shapes.py").write_text(_RANDOM)

    def trial(index: int) -> str:
        sanitizer = SANITIZERS[index % 2]
        library(sanitizer, copy / "bayesify" / "kernels" / "_native.so")
        environment = {
            **os.environ, "PYTHONPATH": str(copy), "LD_PRELOAD": _runtime(sanitizer),
            "OMP_NUM_THREADS": "1", "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
            # what Python and torch leave at their end is not what is looked for
            "ASAN_OPTIONS": "detect_leaks=0:protect_shadow_gap=0",
        }  # fmt: skip
        if index < 2 * len(_TESTS):
            what = _TESTS[index // 2]
            words = ["-m", "pytest", what, "-q", "-x", "-p", "no:cacheprovider", "--timeout=0"]
        else:
            what = f"draws of random shapes, {index}"
            words = ["random_shapes.py", str(index), str(copy)]
        ended = subprocess.run(
            [sys.executable, *words], cwd=copy, env=environment, capture_output=True, text=True
        )
        text = ended.stdout + ended.stderr
        reported = "runtime error" in text or "AddressSanitizer" in text
        if ended.returncode != 0 or reported:
            return (
                f"{FAULT}: {sanitizer}, {what}: {ended.returncode}: {' '.join(text.split())[-300:]}"
            )
        return "nothing reported"

    return trial


NATIVE = Section(
    "native",
    "the C library under gcc's address and undefined behaviour sanitizers: its tests, and 150 "
    "models of random shapes, dtypes and threads",
    share=2,
    full=20,
    prepare=_prepare,
    seconds=590.0,
    slow=590.0,
)
