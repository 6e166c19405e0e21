"""Models that nobody planned for: each holds the invariants of ``reference.check``."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference import check

Inputs = Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]


def randn(*shape: int) -> Inputs:
    def make(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(batch)
        return (torch.randn(batch, *shape, generator=generator),), {}

    return make


class Model(nn.Module):
    """A linear layer, a parameter, and a forward that a test supplies."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.randn(4))
        self.calls = 0


class VectorQuantiser(Model):
    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.randn(5, 4))
        self.register_buffer("count", torch.zeros(5))
        self.count: Tensor

    def forward(self, x: Tensor) -> Any:
        z = self.layer(x)
        nearest = ((z[:, None] - self.code[None]) ** 2).sum(-1).argmin(1)
        found = self.code[nearest]
        with torch.no_grad():
            if self.training:
                self.count.add_(F.one_hot(nearest, 5).sum(0).float())
        return z + (found - z).detach() + found * self.scale


class WritesData(Model):
    def forward(self, x: Tensor) -> Any:
        self.scale.data.clamp_(-5, 5)
        return self.layer(x) * self.scale


@dataclasses.dataclass
class Request:
    x: Tensor
    factor: float = 2.0


class Answer(NamedTuple):
    y: Tensor
    size: int


class TakesDataclass(Model):
    def forward(self, request: Request) -> Answer:
        return Answer(self.layer(request.x) * request.factor, request.x.shape[0])


class TakesList(Model):
    def forward(self, xs: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        outputs = [self.layer(x) * (i + 1) for i, x in enumerate(xs)]
        return outputs, {"sum": sum(outputs, torch.zeros(()))}


class WritesItsDict(Model):
    def forward(self, x: Tensor) -> Any:
        values = {"x": x}
        self.step(values)
        return values["h"]

    def step(self, values: dict[str, Tensor]) -> None:
        values["h"] = self.layer(values["x"]) * self.scale


class Equilibrium(Model):
    def forward(self, x: Tensor) -> Any:
        z = torch.zeros_like(x)
        for _ in range(20):
            new = torch.tanh(self.layer(z) * 0.3 + x) * self.scale
            if (new - z).norm() < 1e-2:
                break
            z = new
        return z


class Graph(Model):
    def forward(self, x: Tensor) -> Any:
        source = torch.arange(x.shape[0])
        target = (source + 1) % x.shape[0]
        message = (self.layer(x) * self.scale)[source]
        out = torch.zeros_like(message).index_add_(0, target, message)
        return out.scatter_add(0, target[:, None].expand_as(message), message)


class DropsWeights(Model):
    def forward(self, x: Tensor) -> Any:
        return F.linear(x, F.dropout(self.layer.weight, 0.5, self.training), self.scale)


class Straight(torch.autograd.Function):
    """Its gradient is not that of its forward: tracing through it would be seen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return 2 * grads[0] * w, 3 * (grads[0] * x).sum(0)


class CustomGradient(Model):
    def forward(self, x: Tensor) -> Any:
        return Straight.apply(self.layer(x), self.scale)


class CustomGradientInFallback(Model):
    def forward(self, x: Tensor) -> Any:
        y: Tensor = Straight.apply(self.layer(x), self.scale)
        return y * (1 if float(y.detach().sum()) > 0 else 2)


class Properties(Model):
    @property
    def positive(self) -> Tensor:
        return self.scale.abs() + 1e-3

    @staticmethod
    def twice(x: Tensor) -> Tensor:
        return x * 2

    def forward(self, x: Tensor, *, power: int = 1) -> Any:
        return self.twice(self.layer(x)) * self.positive**power + 2.0 ** (1 - self.positive)


class UsesNumpy(Model):
    def forward(self, x: Tensor) -> Any:
        ramp = torch.from_numpy(np.linspace(0, 1, 4).astype("float32"))
        return self.layer(x) * ramp * self.scale


class BranchesOnShape(Model):
    def forward(self, x: Tensor) -> Any:
        batch, channels = x.shape
        if batch % 2 == 0:
            return self.layer(x)
        return self.layer(x) + math.sqrt(batch) * x.new_ones(channels)


class HandsOnParameter(Model):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), self.scale


class HoldsCallables(Model):
    def __init__(self) -> None:
        super().__init__()
        self.act = torch.relu
        self.head = lambda x: x.sum(-1, keepdim=True)

    def forward(self, x: Tensor) -> Any:
        return self.act(self.layer(x)) * self.head(x) * self.scale  # type: ignore[no-untyped-call]


class Complex(Model):
    def forward(self, x: Tensor) -> Any:
        weight = torch.view_as_complex(self.scale[:2].reshape(1, 2)) * self.layer.bias[0]
        return torch.fft.irfft(torch.fft.rfft(x) * weight, n=x.shape[-1])


class FillsInPlace(Model):
    def forward(self, x: Tensor) -> Any:
        x = torch.stack([x, x + 1], 1)
        out = torch.empty_like(x)
        for i in range(x.shape[1]):
            out[:, i] = self.layer(x[:, i])
        out += 1
        out[..., 0] *= 2
        first, *rest = out.unbind(1)
        return first + sum(rest) * self.scale


class ChangesAlways(Model):
    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.layer(x) * self.scale


MODELS = [
    VectorQuantiser, WritesData, WritesItsDict, Equilibrium, Graph, DropsWeights, CustomGradient,
    CustomGradientInFallback, Properties, UsesNumpy, BranchesOnShape, HandsOnParameter,
    HoldsCallables, Complex, FillsInPlace, ChangesAlways,
]  # fmt: skip
FALLBACK = {Equilibrium, CustomGradientInFallback}


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_a_model_holds_the_invariants(model: type[Model]) -> None:
    report = check(model(), randn(4))
    assert report.problems == []
    if model not in FALLBACK:
        assert report.swapped == []


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (TakesDataclass, lambda batch: ((Request(randn(4)(batch)[0][0]),), {})),
        (TakesList, lambda batch: (([randn(4)(batch)[0][0], torch.ones(batch, 4)],), {})),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_any_structure_of_arguments(model: type[Model], inputs: Inputs) -> None:
    report = check(model(), inputs)
    assert report.problems == []
    assert report.swapped == []


def test_scripted_functions_get_draws_also_as_arguments() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch deprecate torch.jit.script
        scripted = torch.jit.script(_scaled)

    class CallsScript(Model):
        def forward(self, x: Tensor) -> Any:
            return scripted(self.layer(x), self.scale)

    class CallsScriptInFallback(Model):
        def forward(self, x: Tensor) -> Any:
            y = scripted(self.layer(x), self.scale)
            return y * (1 if float(y.detach().sum()) > 0 else 2)

    assert check(CallsScript(), randn(4)).problems == []
    assert check(CallsScriptInFallback(), randn(4)).problems == []


def _scaled(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.sigmoid(w)
