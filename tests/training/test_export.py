"""export.py and `bayesify export`: files that give what the model gives, without bayesify."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import bayesify
from bayesify import torch_support
from bayesify.cli.app import app
from bayesify.errors import ArgumentError, CheckpointError, UnsupportedModuleError

# torch 2.11's own loader of programs
pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
NEEDS_ONNX = pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript or onnxruntime is not installed: pip install 'bayesify[dev]'",
)

PLACES = (str(Path(__file__).parent).encode(), str(Path(torch.__file__).parent).encode())


class Net(nn.Module):
    """Batch statistics that are no weights, and two layers that share theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu().mean((2, 3))
        out: Tensor = self.head(self.second(self.first(x).relu()))
        return out


class Cached(nn.Module):
    """In evaluation mode it keeps a function of its weights, as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x @ self.weight.t()
        if "doubled" not in self.cache:
            self.cache["doubled"] = 2 * self.weight
        return x @ self.cache["doubled"].t()


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out if out.sum() > 0 else -out


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) + torch.rand(x.shape[0], 2)
        return out


class Two(nn.Module):
    """Two inputs, and more than a tensor as output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"sum": self.linear(x + y), "difference": self.linear(x - y)}


def net() -> nn.Module:
    model = bayesify.to_bbb(Net(), skip="BatchNorm*", initial_std=math.exp(-1.5))
    model.train()
    model(torch.randn(16, 3, 8, 8))  # running statistics that are not the initial ones
    return model.eval()


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 8, 8)


def run_program(path: Path, *inputs: Tensor) -> Any:
    return torch.export.load(path).module()(*inputs)


def session(path: Path, inputs: Tensor) -> list[Tensor]:
    import onnxruntime

    found = onnxruntime.InferenceSession(path)
    given = {found.get_inputs()[0].name: inputs.numpy()}
    return [torch.from_numpy(value) for value in found.run(None, given)]


# -- safetensors -----------------------------------------------------------------------------


def test_the_original_model_loads_the_means(tmp_path: Path) -> None:
    model = bayesify.prune_(net(), 0.5)
    bayesify.export_safetensors(model, tmp_path / "a.safetensors")
    state = load_file(tmp_path / "a.safetensors")
    original = Net()
    assert set(state) == set(original.state_dict())
    original.load_state_dict(state)
    x = images(5)
    assert torch.equal(original.eval()(x), model(x))
    assert float((state["stem.weight"] == 0).float().mean()) == 0.5
    bayesify.export_safetensors(model, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_timm_loads_the_means(tmp_path: Path) -> None:
    import timm

    model = bayesify.to_bbb(bayesify.create_model("test_efficientnet", num_classes=7)).eval()
    path = tmp_path / "means.safetensors"
    bayesify.export_safetensors(model, path)
    create: Any = timm.create_model
    loaded = create("test_efficientnet", num_classes=7, checkpoint_path=path).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(x), model(x))


# -- torch -----------------------------------------------------------------------------------


def contents(path: Path) -> dict[str, bytes]:
    """What a program's file holds, without the times that torch 2.6 puts beside it."""
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def test_a_program_of_the_means(tmp_path: Path) -> None:
    model, path = net(), tmp_path / "net.pt2"
    before = {key: value.clone() for key, value in model.state_dict().items()}
    bayesify.export_torch(model, path, images(2), info={"classes": ["a"]})
    for count in (1, 2, 5):
        x = images(count)
        torch.testing.assert_close(run_program(path, x), model(x))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    extra = {"bayesify.json": ""}
    torch.export.load(path, extra_files=extra)
    assert json.loads(extra["bayesify.json"]) == {"classes": ["a"]}
    written = path.read_bytes()
    inside = contents(path)
    assert not any(place in written for place in PLACES), "paths of this machine are in the file"
    bayesify.export_torch(model, path, images(2), info={"classes": ["a"]}, overwrite=True)
    assert contents(path) == inside, "the example is in the file"


def test_a_program_needs_no_bayesify(tmp_path: Path) -> None:
    model, x = net(), images(3)
    bayesify.export_torch(model, tmp_path / "net.pt2", images(2), num_samples=3, seed=5)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch\n"
        "y = torch.export.load('net.pt2').module()(torch.load('x.pt'))\n"
        "assert not any(name.startswith(('bayesify', 'test_export')) for name in sys.modules)\n"
        "torch.save(y, 'y.pt')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = bayesify.predict(model, x, num_samples=3, seed=5, reduce="probabilities").mean
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), expected)


def test_an_ensemble_is_what_predict_gives(tmp_path: Path) -> None:
    model, path = net(), tmp_path / "net.pt2"
    bayesify.export_torch(model, path, images(2), num_samples=4, seed=3, per_draw=True)
    x = images(5)
    mean, each = run_program(path, x)
    logits = bayesify.predict(model, x, num_samples=4, seed=3)
    torch.testing.assert_close(each, logits.softmax(-1))
    summary = bayesify.predict(model, x, num_samples=4, seed=3, reduce="probabilities")
    torch.testing.assert_close(mean, summary.mean)
    other = bayesify.predict(model, x, num_samples=4, seed=4, reduce="probabilities")
    assert float((mean - other.mean).abs().max()) > 1e-3
    assert float(each.std(0).max()) > 1e-2


def test_an_ensemble_shares_what_is_not_drawn() -> None:
    found = bayesify.ensemble(net(), 3)
    members: Any = found.members
    first, last = members[0], members[2]
    assert first.norm.running_mean.data_ptr() == last.norm.running_mean.data_ptr()
    assert first.stem.weight.data_ptr() != last.stem.weight.data_ptr()
    assert first.second.weight is first.first.weight
    assert not any(p.requires_grad for p in found.parameters())


def test_a_model_that_keeps_a_function_of_its_weights(tmp_path: Path) -> None:
    model = bayesify.to_bbb(Cached(), initial_std=1.0).eval()
    x = torch.randn(5, 3)
    model(x)
    bayesify.export_torch(model, tmp_path / "a", x, num_samples=3, per_draw=True)
    _, each = run_program(tmp_path / "a", x)
    torch.testing.assert_close(each, bayesify.predict(model, x, num_samples=3, seed=0).softmax(-1))
    try:
        bayesify.export_torch(model, tmp_path / "b", x)
    except UnsupportedModuleError as error:
        if torch_support.installed() <= (2, 8) and "arity mismatch" in str(error):
            pytest.skip("torch 2.8 and older export no model that fills an empty attribute")
        raise
    torch.testing.assert_close(run_program(tmp_path / "b", x), model(x))


def test_several_inputs_and_outputs_and_a_batch_of_one(tmp_path: Path) -> None:
    model = bayesify.to_bbb(Two()).eval()
    bayesify.export_torch(model, tmp_path / "a", torch.ones(1, 3), torch.ones(1, 3))
    x, y = torch.randn(2, 4, 3)
    found, expected = run_program(tmp_path / "a", x, y), model(x, y)
    assert set(found) == {"sum", "difference"}
    torch.testing.assert_close(found, expected)


# -- onnx ------------------------------------------------------------------------------------


@NEEDS_ONNX
def test_onnx(tmp_path: Path) -> None:
    import onnx

    model, path, x = net(), tmp_path / "net.onnx", images(5)
    bayesify.export_onnx(model, path, images(2), info={"model": "net"})
    torch.testing.assert_close(session(path, x)[0], model(x))
    written = onnx.load(path)
    assert {p.key: p.value for p in written.metadata_props}["bayesify"] == '{"model": "net"}'
    assert [o.name for o in written.graph.output] == ["output"]
    assert not any(place in path.read_bytes() for place in PLACES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx"]

    bayesify.export_onnx(
        model, path, images(2), num_samples=3, seed=2, per_draw=True, overwrite=True
    )
    mean, each = session(path, x)
    logits = bayesify.predict(model, x, num_samples=3, seed=2)
    torch.testing.assert_close(each, logits.softmax(-1))
    torch.testing.assert_close(mean, logits.softmax(-1).mean(0))


class Windows(nn.Module):
    """Attention within groups of tokens, as NesT and Twins have it."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        q = self.project(x).unflatten(1, (2, 4)).unflatten(-1, (2, 3)).transpose(2, 3)
        return nn.functional.scaled_dot_product_attention(q, q, q).flatten(1)


@NEEDS_ONNX
def test_onnx_of_attention_over_five_dimensions(tmp_path: Path) -> None:
    model, x = bayesify.to_bbb(Windows()).eval(), torch.randn(5, 8, 3)
    bayesify.export_onnx(model, tmp_path / "a.onnx", x[:2])
    torch.testing.assert_close(session(tmp_path / "a.onnx", x)[0], model(x))


def test_onnx_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"onnx and onnxscript: pip install 'bayesify\[onnx\]'"):
        bayesify.export_onnx(net(), tmp_path / "a.onnx", images(2))


# -- failures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Branching(), "Branching cannot be exported as a .*format safetensors works"),
        (Noisy(), "Noisy was exported, but .* random numbers"),
    ],
)
def test_what_cannot_be_a_program(tmp_path: Path, model: nn.Module, message: str) -> None:
    converted = bayesify.to_bbb(model).eval()
    with pytest.raises(UnsupportedModuleError, match=message):
        bayesify.export_torch(converted, tmp_path / "a.pt2", torch.randn(2, 3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ((), {}, "needs example inputs"),
        ((torch.zeros(0, 3, 8, 8),), {}, "batch is empty"),
        ((torch.zeros(2, 3, 8, 8),), {"per_draw": True}, "per_draw belongs to an ensemble"),
        ((torch.zeros(2, 3, 8, 8),), {"num_samples": 0}, "whole number above 0, got 0"),
        ((torch.zeros(2, 3, 8, 8),), {"num_samples": 1, "seed": -1}, r"from 0 to below 2\*\*63"),
        ((torch.zeros(2, 3, 8, 8),), {"info": {"a": {1}}}, "what JSON can hold"),
    ],
)
def test_bad_arguments(
    tmp_path: Path, inputs: tuple[Tensor, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        bayesify.export_torch(net(), tmp_path / "a.pt2", *inputs, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_not_overwritten_and_a_posterior_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("mine")
    with pytest.raises(CheckpointError, match="exists"):
        bayesify.export_torch(net(), path, images(2))
    with pytest.raises(CheckpointError, match="exists"):
        bayesify.export_safetensors(net(), path)
    assert path.read_text() == "mine"
    with pytest.raises(UnsupportedModuleError):
        bayesify.export_torch(Net(), tmp_path / "b", images(2))


# -- the command -----------------------------------------------------------------------------


def run(*arguments: object, code: int = 0) -> Result:
    environment = {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}
    result = CliRunner().invoke(app, [str(a) for a in arguments], env=environment)
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run("convert", "test_efficientnet_gn", "--num-classes", 5, "--img-size", 32, "--quiet")
    file = "test_efficientnet_gn.bbb.safetensors"
    model = bayesify.load(file)
    x = torch.randn(3, 3, 32, 32)

    shown = run("export", file).stdout
    assert "timm.create_model('test_efficientnet_gn', num_classes=5" in shown
    code = "\n".join(line.strip() for line in shown.splitlines()[1:])
    spoken: dict[str, Any] = {}
    exec(code, spoken)
    assert torch.equal(spoken["model"].eval()(x), model(x))

    run("export", file, "--format", "torch", "--ensemble", 2, "--seed", 7)
    expected = bayesify.predict(model, x, num_samples=2, seed=7, reduce="probabilities").mean
    path = Path("test_efficientnet_gn.k2.pt2")
    torch.testing.assert_close(run_program(path, x), expected)
    extra = {"bayesify.json": ""}
    torch.export.load(path, extra_files=extra)
    about = json.loads(extra["bayesify.json"])
    assert (about["draws"], about["seed"], about["output"]) == (2, 7, "probabilities")
    assert about["input"]["size"] == [3, 32, 32]

    document = json.loads(run("export", file, "--out", "again", "--json").stdout)
    assert document["bytes"] == Path("again").stat().st_size
    assert Path("again").read_bytes() == Path("test_efficientnet_gn.safetensors").read_bytes()
    assert run("export", file, "--out", "again", "--force", "--quiet").stdout == ""


def test_the_command_leaves_out_what_is_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("convert", "test_vit", "--num-classes", 5, "--quiet")
    run("prune", "test_vit.bbb.safetensors", "--unit", "channels", "--sparsity", 0.5,
        "--only", "re:.*mlp.fc1.*")  # fmt: skip
    file = "test_vit.pruned.bbb.safetensors"
    options = ("--format", "torch", "--shrink", "--measure", "--out", "b")
    shown = run("export", file, *options).stdout
    after, before = re.findall(r"image ([\d,]+) instead of ([\d,]+); a batch of 8 takes", shown)[0]
    assert int(after.replace(",", "")) < int(before.replace(",", ""))
    x = torch.randn(3, 3, 160, 160)
    expected = bayesify.load(file)(x)
    torch.testing.assert_close(run_program(Path("b"), x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ensemble", 2], "take --format torch or onnx"),
        (["--shrink"], "take --format torch or onnx"),
        (["--format", "torch", "--measure"], "give --shrink too"),
        (["--format", "torch", "--per-draw"], "per_draw belongs to an ensemble"),
    ],
)
def test_the_command_refuses(options: list[object], message: str) -> None:
    assert message in run("export", "a.bbb.safetensors", *options, code=2).stderr


def test_onnx_says_which_exporter_could_not_write_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch 2.8 beside an onnxscript that lacks what it imports."""

    def too_old(*args: Any, **kwargs: Any) -> None:
        raise ImportError("cannot import name 'opset23'")

    monkeypatch.setattr(torch.onnx, "export", too_old)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"1.2.3 of {name}")
    model = bayesify.to_bbb(nn.Linear(2, 2))
    with pytest.raises(bayesify.UnsupportedModuleError) as error:
        bayesify.export_onnx(model, tmp_path / "x.onnx", torch.ones(1, 2))
    said = str(error.value)
    assert "cannot import name 'opset23'" in said
    assert f"torch {torch.__version__} with onnxscript 1.2.3 of onnxscript" in said
    assert "pip install --upgrade onnx onnxscript" in said
    assert not list(tmp_path.iterdir())
