"""What holds for every test: fixed random numbers, and no GPU test without a GPU."""

import random
import signal
import sys
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch

from bayesify import torch_support
from bayesify.kernels import native

# The first call of a torch op can take longer than hypothesis' deadline; derandomize gives the same
# examples on every run, so that a failure is one that everybody sees.
hypothesis.settings.register_profile("bayesify", deadline=None, derandomize=True)
hypothesis.settings.load_profile("bayesify")


class TorchRandom:
    """Torch's generator for hypothesis, so that a failing example fails again on replay."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


# A job in the background is started with Ctrl-C ignored, one under nohup with SIGHUP; what is
# ignored stays so.
for number, usual in (
    (signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL),
):  # fmt: skip
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

TORCH_RANDOM = TorchRandom()  # hypothesis keeps no reference of its own
hypothesis.register_random(TORCH_RANDOM)


def _seed_only_what_is_there() -> None:
    """Spare what torch does for accelerators that are not there: for each it keeps the stack.

    That is a millisecond a seed, of which the suite sets many, and memory that never ends.
    """
    if torch_support.accelerator() is None:
        for device in (torch.cuda, torch.xpu, torch.mtia):
            setattr(device, "manual_seed_all", lambda seed: None)  # noqa: B010


_seed_only_what_is_there()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """A test gives the same result alone, in any order and in any worker."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries that use the global state must be fixed as well
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # what it gave up on in an earlier test, it would here
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _compile_begins_later(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Skip what compiles a Bayesian model where torch is too old for that."""
    if not torch_support.has(torch_support.COMPILE) and "too_old" not in request.node.name:
        first = ".".join(map(str, torch_support.FIRST[torch_support.COMPILE]))
        reason = f"{torch_support.COMPILE} begins with torch {first}"
        monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: pytest.skip(reason))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """A test with one thread of torch, and with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=["native", "torch"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A test with the C library, and as where it was not compiled."""
    if request.param == "torch":
        monkeypatch.setattr(native, "_library", lambda: None)
    elif not native.there():
        pytest.skip("bayesify was installed without a C compiler")
    return str(request.param)
