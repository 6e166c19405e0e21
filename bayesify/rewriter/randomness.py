"""Random numbers that a trace must neither take nor seed: no graph would do so again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from .active import ACTIVE
from .values import TraceFailure


def has_random_numbers(value: Any) -> bool:
    """Whether an object gives random numbers that no torch function takes."""
    return isinstance(value, random.Random) or type(value).__module__.startswith("numpy.random")


class _Generator:
    """torch's own, which ``torch.manual_seed``, ``fork_rng`` and their like ask by its name."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __getattr__(self, name: str) -> Any:
        if ACTIVE.tracer is not None:
            raise TraceFailure("it seeds, reads or sets the state of torch's random numbers")
        return getattr(self.generator, name)


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Fail a trace that changes the state of a global generator, and put that back.

    What comes next, another attempt or the fallback, begins where the trace did.
    """
    namespace: Any = torch.random
    generator = namespace.default_generator
    own, python = torch.default_generator.get_state(), random.getstate()
    legacy = np.random.get_state()  # noqa: NPY002
    namespace.default_generator = _Generator(generator)
    try:
        yield
        if not torch.equal(torch.default_generator.get_state(), own):
            raise TraceFailure("it seeds torch's random numbers")
        if random.getstate() != python or not _same(legacy, np.random.get_state()):  # noqa: NPY002
            raise TraceFailure("it draws random numbers with Python or numpy")
    except BaseException:
        torch.default_generator.set_state(own)
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        raise
    finally:
        namespace.default_generator = generator


def _same(a: Any, b: Any) -> bool:
    return bool(a[0] == b[0] and a[1].tobytes() == b[1].tobytes() and a[2:] == b[2:])
