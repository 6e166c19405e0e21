"""An interrupted fit against the same fit without interruption."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

import bayesify
from bayesify.data import ImageData, InMemory, load_dataset
from bayesify.errors import ArgumentError, BayesifyError, CheckpointError
from bayesify.models import InputConfig
from bayesify.signals import waiting_signals
from bayesify.storage.state import read_state, write_state
from bayesify.training import FitResult, Interrupted, Progress, fit
from bayesify.training.resume import FIT

ROOT = Path(__file__).resolve().parents[2]
CONFIG = InputConfig(size=(1, 28, 28), mean=(0.286,), std=(0.353,))


class Noisy(Dataset[Any]):
    """Points with noise from all three of the global generators."""

    def __len__(self) -> int:
        return 45

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = torch.rand(2) + random.random() + float(np.random.rand())  # noqa: NPY002
        return noise + 3.0 * (index % 3), index % 3


def points_model() -> nn.Module:
    torch.manual_seed(5)
    layers = [nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)]
    return bayesify.to_bbb(nn.Sequential(*layers), initial_std=math.exp(-2.0))


def image_model() -> nn.Module:
    torch.manual_seed(5)
    layers = [nn.Conv2d(1, 4, 5, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)]
    return bayesify.to_bbb(nn.Sequential(*layers), skip="BatchNorm2d")


def images() -> ImageData:
    data = load_dataset("fashion-sample", split="train")
    source = data.source
    assert isinstance(source, InMemory)
    few = InMemory(source.images[:200], source.labels[:200])
    return ImageData("few", "train", data.classes, few)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], dict[str, Any]]] = {
    "points": (
        points_model,
        Noisy,
        {"epochs": 4, "batch_size": 8, "lr": 0.02, "kl_warmup": 0.4, "kl_shape": "cosine"},
    ),
    "images": (
        image_model,
        images,
        {
            "epochs": 3, "batch_size": 20, "lr": 0.01, "augment": "rand-augment", "accumulate": 2,
            "draws_per_step": 2, "holdout": 0.1, "average": 0.6, "model_config": CONFIG,
        },
    ),
}  # fmt: skip


def interrupting(at: int, number: int = signal.SIGINT) -> Callable[[Progress], None]:
    def on_step(progress: Progress) -> None:
        if progress.step == at:
            os.kill(os.getpid(), number)

    return on_step


def run_in_parts(case: str, path: Path, stops: list[int]) -> tuple[nn.Module, FitResult]:
    make, data, arguments = CASES[case]
    resume = False
    for stop, number in zip(stops, [signal.SIGINT, signal.SIGTERM] * 9, strict=False):
        with pytest.raises(Interrupted, match=rf"after step {stop} of .*--resume"):
            fit(make(), data(), **arguments, checkpoint=path, resume=resume,
                on_step=interrupting(stop, number))  # fmt: skip
        torch.rand(3), random.random()  # another process has other random numbers
        resume = True
    model = make()
    return model, fit(model, data(), **arguments, checkpoint=path, resume=resume)


@pytest.mark.filterwarnings("ignore:The fit in .* has ended")  # one is stopped at its last step
@pytest.mark.parametrize(
    ("case", "stops"),
    [("points", [1]), ("points", [7, 10, 20]), ("images", [2]), ("images", [4, 9, 12])],
    ids=str,
)
def test_an_interrupted_fit_ends_like_one_that_was_not(
    tmp_path: Path, case: str, stops: list[int]
) -> None:
    make, data, arguments = CASES[case]
    whole = make()
    expected = fit(whole, data(), **arguments)
    model, found = run_in_parts(case, tmp_path / "state", stops)
    for (name, ours), theirs in zip(
        model.state_dict().items(), whole.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert found.seconds > 0
    for name in FitResult.__dataclass_fields__:
        if name != "seconds":
            assert getattr(found, name) == getattr(expected, name), name


@pytest.mark.parametrize("case", list(CASES))
def test_random_states_are_as_before_the_fit(case: str) -> None:
    def states() -> tuple[Any, ...]:
        state: Any = np.random.get_state(legacy=False)  # noqa: NPY002
        return torch.get_rng_state().tolist(), random.getstate(), state["state"]["key"].tolist()

    make, data, arguments = CASES[case]
    model, before = make(), states()
    fit(model, data(), **{**arguments, "epochs": 1})
    assert states() == before


def test_signals_are_handled_as_before_the_fit(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run_in_parts("points", tmp_path / "state", [3])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_interrupt_is_not_waited_for() -> None:
    with waiting_signals(True) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_state_is_a_safetensors_file_with_one_json_key(tmp_path: Path) -> None:
    path = tmp_path / "state"
    run_in_parts("points", path, [3])
    with safe_open(path, framework="pt") as file:
        [(key, text)] = file.metadata().items()
    assert key == "bayesify.state"
    document = json.loads(text)
    assert (document["format"], document["kind"]) == (2, "fit")
    assert dict(document["state"]["dict"])["step"] == 20
    assert {name.split("/")[1] for name in load_file(path)} == {
        "model", "optimizer", "random", "start"
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def stopped(path: Path) -> None:
    make, data, arguments = CASES["points"]
    with pytest.raises(Interrupted):
        fit(make(), data(), **arguments, checkpoint=path, on_step=interrupting(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 9, "seed": 1}, r"batch_size=9 \(began with 8\), seed=1 \(began with 0\)"),
        ({"train": TensorDataset(torch.zeros(9, 2), torch.arange(9))}, r"num_data=9 .*with 45"),
        ({"model": bayesify.to_bbb(nn.Linear(2, 3))}, "the fit of another model"),
        ({"resume": False}, "state of an earlier fit: go on with it"),
        ({"checkpoint": None}, "resume needs checkpoint"),
    ],
)
def test_what_cannot_be_resumed(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    stopped(tmp_path / "state")
    make, data, arguments = CASES["points"]
    given = {"model": make(), "train": data(), "resume": True, "checkpoint": tmp_path / "state"}
    before = (tmp_path / "state").read_bytes()
    with pytest.raises(BayesifyError, match=message):
        fit(**{**arguments, **given, **change})
    assert (tmp_path / "state").read_bytes() == before


def test_a_fit_that_has_ended_trains_no_further_and_says_so(tmp_path: Path) -> None:
    make, data, arguments = CASES["points"]
    path = tmp_path / "state"
    model = make()
    first = fit(model, data(), **arguments, checkpoint=path)
    again = make()
    with pytest.warns(UserWarning, match="has ended after 20 steps"):
        second = fit(again, data(), **arguments, checkpoint=path, resume=True)
    assert second.losses == first.losses
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_files_that_are_no_state(tmp_path: Path) -> None:
    make, data, arguments = CASES["points"]

    def resume() -> None:
        fit(make(), data(), **arguments, checkpoint=tmp_path / "state", resume=True)

    with pytest.raises(CheckpointError, match="nothing to resume"):
        resume()
    save_file({"a": torch.ones(1)}, tmp_path / "state")
    with pytest.raises(CheckpointError, match="no readable state of a fit"):
        resume()
    stopped(tmp_path / "other")
    (tmp_path / "state").write_bytes((tmp_path / "other").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="cut short"):
        resume()


def test_a_fit_that_diverged_goes_on_with_a_lower_rate(tmp_path: Path) -> None:
    path = tmp_path / "state"
    make, data, arguments = CASES["points"]

    calls = []

    def breaking(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        loss: Tensor = F.cross_entropy(outputs, targets)
        return loss * math.nan if len(calls) == 8 else loss

    model = make()
    with pytest.raises(BayesifyError, match=r"step 8 of 20.*resume with a lower lr"):
        fit(model, data(), **arguments, checkpoint=path, loss=breaking)
    state = load_file(path)
    assert all(torch.equal(state[f"/model/{k}"], v) for k, v in model.state_dict().items())
    again = make()
    result = fit(again, data(), **{**arguments, "lr": 1e-3}, checkpoint=path, resume=True)
    assert result.steps == 20
    with pytest.raises(ArgumentError, match="epochs=9"):
        fit(make(), data(), **{**arguments, "epochs": 9}, checkpoint=path, resume=True)


@pytest.mark.slow
def test_the_command_ends_with_130_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    base = [sys.executable, "-c", "from bayesify.cli.app import main; main()"]
    fit_command = [
        *base, "fit", "net.bbb.safetensors", "fashion-sample", "--model", "net:net", "-b", "4",
        "--epochs", "1",
    ]  # fmt: skip

    options: dict[str, Any] = {
        "cwd": tmp_path, "env": environment, "stderr": subprocess.PIPE, "text": True
    }  # fmt: skip

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, **options, stdout=subprocess.PIPE)

    convert = ("convert", "net:net", "--img-size", "28", "--in-chans", "1")
    made = run(*base, *convert, "--out", "net.bbb.safetensors")
    assert made.returncode == 0, made.stderr
    with subprocess.Popen([*fit_command, "--out", "a"], **options) as process:
        assert process.stderr is not None
        process.stderr.readline()  # the line on the KL: the fit has begun
        time.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        message = process.stderr.read()
    assert process.returncode == 130
    assert "Interrupted after step" in message
    assert "Traceback" not in message
    assert not (tmp_path / "a").exists()
    resumed = run(*fit_command, "--out", "a", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert run(*fit_command, "--out", "b").returncode == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert not (tmp_path / "a.resume").exists()


# -- a damaged state ---------------------------------------------------------------------------


def drop(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda s: s.pop(name)


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no step": drop("step"),
    "no losses": drop("losses"),
    "no settings": drop("settings"),
    "step of text": lambda s: s.update(step="3"),
    "step below 0": lambda s: s.update(step=-1),
    "step beyond": lambda s: s.update(step=10**9),
    "losses of text": lambda s: s.update(losses=["a"]),
    "a parameter of text": lambda s: s["model"].update({"0.weight": "a"}),
    "random of Python": lambda s: s["random"].update(python=[3, [1, 2], None]),
    "random of numpy": lambda s: s["random"].pop("numpy"),
    "random of torch": lambda s: s["random"]["torch"].update(cpu=torch.zeros(3, dtype=torch.uint8)),
    "moment of another shape": lambda s: s["optimizer"][0].update(exp_avg=torch.zeros(7)),
    "moment of one number": lambda s: s["optimizer"][0].update(exp_avg=torch.zeros(())),
    "moment that is missing": lambda s: s["optimizer"][0].pop("exp_avg"),
    "moment of text": lambda s: s["optimizer"][0].update(exp_avg="a"),
    "optimizer of a text": lambda s: s["optimizer"].update(x={"exp_avg": torch.zeros(2)}),
    "start of another shape": lambda s: s["start"].__setitem__(0, torch.zeros(7)),
    "start of another length": lambda s: s["start"].pop(),
    "too deep": lambda s: s.update(losses=json.loads("[" * 200 + "]" * 200)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_refused_and_the_model_left_alone(tmp_path: Path, damage: str) -> None:
    data = TensorDataset(torch.randn(12, 2), torch.arange(12) % 3)
    path = tmp_path / "state"

    class Stop(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.step == 4:
            raise Stop

    options: dict[str, Any] = {"epochs": 2, "batch_size": 4, "lr": 1e-3, "checkpoint": path}
    with pytest.raises(Stop):
        fit(points_model(), data, on_step=stop, **options)
    state = read_state(path, FIT)
    DAMAGE[damage](state)
    write_state(path, state, FIT)
    model = points_model()
    with torch.no_grad():
        model.get_parameter("0.bias").add_(1.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="state"):
        fit(model, data, resume=True, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
