"""torch.export and torch.onnx.export of a model that draws, called before or not."""

from __future__ import annotations

import contextlib
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesify
from bayesify import torch_support
from bayesify.rewriter.variants import rungs

# torch 2.6 says so of the constants that it adds by itself
pytestmark = [
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
    pytest.mark.filterwarnings("ignore:Additional .* suppressed about get_attr:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*does not reference an nn.Module:UserWarning"),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 5)
        self.scale = nn.Parameter(torch.ones(5))
        self.shift = torch.ones(5)  # neither parameter nor buffer

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.conv(x)).relu().flatten(2).transpose(1, 2)
        return self.head(self.attention(x, x, x)[0].mean(1)) * self.scale + self.shift


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(batch))


def converted() -> nn.Module:
    torch.manual_seed(0)
    return bayesify.to_bbb(Net(), initial_std=math.exp(-2.0)).eval()


def drawing(model: nn.Module, how: str) -> contextlib.AbstractContextManager[Any]:
    if how == "train":
        model.train()
        return contextlib.nullcontext()
    return bayesify.sampled(model) if how == "sampled" else bayesify.one_draw(model, seed=1)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("how", ["train", "sampled", "one_draw"])
def test_a_model_never_called_is_exported_as_one_that_was(
    how: str, grad: bool, strict: bool
) -> None:
    if strict and not torch_support.has(torch_support.COMPILE):
        first = ".".join(map(str, torch_support.FIRST[torch_support.COMPILE]))
        pytest.skip(f"{torch_support.COMPILE} begins with torch {first}")
    programs, outputs = [], []
    # strict, what is held already becomes constants without a gradient, as torch warns
    for called in (False,) if strict and how == "one_draw" else (False, True):
        model = converted()
        with drawing(model, how), torch.set_grad_enabled(grad):
            if called:
                model(images())
            programs.append(torch.export.export(model, (images(),), strict=strict))
        outputs += [programs[-1].module()(images()) for _ in range(2)]
        assert {r.rung for r in rungs(model)} <= {"plain", "guided"}
        model.train()
        model(images()).sum().backward()  # what the export has made serves real calls as well
        assert all(p.grad is not None for p in model.parameters())
    assert len({str(p.graph_module.code) for p in programs}) == 1
    if how == "one_draw":
        model = converted()
        with bayesify.one_draw(model, seed=1):
            expected = model(images())
        for output in outputs:
            torch.testing.assert_close(output, expected)
    else:
        assert not torch.equal(outputs[0], outputs[1])


def test_a_held_draw_serves_calls_after_an_export() -> None:
    model = converted()
    with bayesify.one_draw(model, seed=1):
        expected = model(images())
    model = converted()
    with bayesify.one_draw(model, seed=1):
        torch.export.export(model, (images(),), strict=False)
        assert torch.equal(model(images()), expected)


@pytest.mark.parametrize("how", ["train", "one_draw"])
def test_a_program_takes_batches_of_any_size(how: str) -> None:
    model = converted()
    batch = torch.export.Dim("batch", min=2, max=64)
    with drawing(model, how):
        program = torch.export.export(
            model, (images(),), dynamic_shapes=({0: batch},), strict=False
        )
        if how == "one_draw":
            torch.testing.assert_close(program.module()(images(7)), model(images(7)))
    assert program.module()(images(7)).shape == (7, 5)


def test_onnx_of_a_held_draw(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = converted()
    with bayesify.one_draw(model, seed=1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of onnxscript's, on its own future
        program = torch.onnx.export(model, (images(),), dynamo=True, verbose=False)
    assert program is not None
    program.save(str(tmp_path / "draw.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "draw.onnx")
    [found] = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    with bayesify.one_draw(model, seed=1):
        torch.testing.assert_close(torch.from_numpy(found), model(images()).detach())
