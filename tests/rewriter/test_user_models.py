"""Models that nobody planned for: each holds the invariants of ``reference.check``."""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bayesify
from bayesify import one_draw
from bayesify.posterior import sites
from reference import check, functional_call, same

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


class ChangesNumpyInPlace(Model):
    def forward(self, x: Tensor) -> Any:
        ramp = torch.from_numpy(np.ones(4, np.float32))
        ramp.add_(x.detach()[0])
        ramp += 1
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


class Scaled:
    """No module, but it holds one."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.model.scale


class HoldsBoundMethods(Model):
    """Methods of its own and of a child, a partial, a table and a list of callables."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(4, 4)
        self.bound = self.child.forward
        self.partial = functools.partial(self.twist, 2.0)
        self.table: dict[str, Any] = {"act": torch.tanh, "own": self.shift}
        self.chain: list[Any] = [self.child, torch.relu]
        self.object = Scaled(self)

    def twist(self, factor: float, x: Tensor) -> Tensor:
        return x * factor * self.scale

    def shift(self, x: Tensor) -> Tensor:
        return x + self.layer.bias

    def forward(self, x: Tensor) -> Any:
        x = self.table["own"](self.table["act"](self.partial(self.bound(x))))
        for step in self.chain:
            x = step(x)
        return self.object(self.layer(x))


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
    CustomGradientInFallback, Properties, UsesNumpy, ChangesNumpyInPlace, BranchesOnShape,
    HandsOnParameter, HoldsCallables, HoldsBoundMethods, Complex, FillsInPlace, ChangesAlways,
]  # fmt: skip
FALLBACK = {Equilibrium, CustomGradientInFallback, WritesData}


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


# -- arguments that modules give one another -------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Item:
    x: Tensor
    weights: dict[str, list[Tensor]]
    name: str = ""


@dataclasses.dataclass
class Result:
    y: Tensor
    parts: list[Tensor | None]


class TakesEverything(Model):
    def forward(
        self, item: Item, /, *rest: dict[str, tuple[Tensor]], flag: bool,
        options: dict[str, Tensor | None], **more: Tensor,
    ) -> tuple[Answer, Result]:  # fmt: skip
        h = self.layer(item.x) * item.weights["w"][0]
        for entry in rest:
            h = h + entry["k"][0]
        if flag:
            h = h * self.scale
        if options["shift"] is not None:
            h = h + options["shift"]
        return Answer(h, len(rest)), Result(h * 2 + more["extra"], [h, None])


class GivesEverything(nn.Module):
    """Its children take and give dataclasses, named tuples, dicts, lists and keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"a": TakesEverything(), "b": TakesEverything()})

    def forward(
        self, batch: dict[str, Any], *, order: tuple[str, ...] = ("a", "b"), flag: bool = True
    ) -> dict[str, Any]:
        found: list[Any] = []
        for key in order:
            answer, result = self.inner[key](
                Item(batch["x"], {"w": [batch["w"]]}, name=key),
                *[{"k": (t,)} for t in batch["rest"]],
                flag=flag, options={"shift": None if flag else batch["x"]}, extra=batch["w"],
            )  # fmt: skip
            assert answer.size == len(batch["rest"])
            assert result.parts[1] is None
            found += [answer.y, result.y]
        return {"sum": sum(found), "all": found, "last": result}


def test_any_structure_between_modules() -> None:
    def make(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = randn(4)(batch)[0][0]
        values = {"x": x, "w": x + 1, "rest": [x * k for k in range(1 + batch % 2)]}
        return (values,), {"order": ("b", "a") if batch % 2 else ("a", "b"), "flag": batch == 2}

    report = check(GivesEverything(), make)
    assert report.problems == []
    assert report.swapped == []


# -- functions that a forward gives back -----------------------------------------------------


class GivesClosure(Model):
    def forward(self, x: Tensor) -> Any:
        h = self.layer(x)
        return lambda y: self.layer(y) * self.scale + h


class GivesPartial(Model):
    def forward(self, x: Tensor) -> Any:
        weight = self.layer.weight * self.scale
        return functools.partial(F.linear, weight=weight, bias=self.layer.bias + x.mean())


class CallsIt(nn.Module):
    def __init__(self, maker: nn.Module) -> None:
        super().__init__()
        self.maker = maker
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.maker(x)(x + 1))


CLOSURE = pytest.mark.xfail(
    strict=True, reason="what a function that a forward gave back reads itself are the means"
)


@pytest.mark.parametrize("maker", [GivesClosure, GivesPartial])
def test_a_function_called_in_the_same_scope_draws(maker: type[Model]) -> None:
    report = check(CallsIt(maker()), randn(4))
    assert report.problems == []


@pytest.mark.parametrize(
    "maker",
    [pytest.param(GivesClosure, marks=CLOSURE), GivesPartial],
)
def test_a_function_called_in_one_draw_draws(maker: type[Model]) -> None:
    model = maker()
    converted = bayesify.to_bbb(model, initial_std=math.exp(-1.5)).eval()
    x = randn(4)(2)[0][0]
    with one_draw(converted, seed=1):
        found = converted(x)(x)
    model.load_state_dict(bayesify.draws(converted, seed=1))
    assert torch.equal(found, model(x)(x))


# -- what a forward does beside computing ----------------------------------------------------


class AddsHook(Model):
    """Registers a hook on a child at its first call, as libraries that record outputs do."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        if not getattr(self, "ready", False):
            self.layer.register_forward_hook(lambda module, args, out: self.seen.append(out))
            self.ready = True
        y = self.layer(x)
        return y * (1 if float(y.detach().sum()) > 0 else 2) * self.scale


FACTOR = contextvars.ContextVar("FACTOR", default=1.0)


class Multiplies(Model):
    """A hook on its layer reads the variable at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer.register_forward_hook(lambda module, args, out: out * FACTOR.get())

    def forward(self, x: Tensor) -> Any:
        return self.layer(x) * self.scale


class SetsContextVariable(Model):
    """Tells those below it something by a context variable."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Multiplies()

    def forward(self, x: Tensor) -> Any:
        token = FACTOR.set(3.0)
        try:
            return self.inner(x)
        finally:
            FACTOR.reset(token)


def test_a_hook_registered_in_a_forward_is_registered_once() -> None:
    converted: Any = bayesify.to_bbb(AddsHook()).train()
    x = randn(4)(2)[0][0]
    for calls in (1, 2):
        converted(x)
        assert len(converted.layer._forward_hooks) == 1
        assert len(converted.seen) == calls


def test_a_context_variable_set_in_a_forward() -> None:
    model = SetsContextVariable()
    converted: Any = bayesify.to_bbb(model, initial_std=math.exp(-1.5))
    x = randn(4)(2)[0][0]
    drawn = bayesify.draws(converted, seed=1)
    for _ in range(2):
        with one_draw(converted, seed=1):
            found = converted(x)
        assert torch.equal(found, functional_call(model, drawn, (x,), {}))
    assert FACTOR.get() == 1.0


# -- what a converted model is given later ---------------------------------------------------


class Grows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.extra: nn.Module | None = None

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x if self.extra is None else self.extra(x)


@pytest.mark.parametrize("called_before", [False, True])
def test_children_added_later_are_deterministic(called_before: bool) -> None:
    converted: Any = bayesify.to_bbb(Grows(), initial_std=math.exp(-1.5)).train()
    x = randn(4)(2)[0][0]
    if called_before:
        converted(x)
    converted.layers.append(nn.Linear(4, 4))
    converted.extra = nn.Linear(4, 3)
    assert {s.name for s in sites(converted)} == {"layers.0.weight", "layers.0.bias"}
    drawn = bayesify.draws(converted, seed=1)
    with one_draw(converted, seed=1):
        found = converted(x)
    first = F.linear(x, drawn["layers.0.weight"], drawn["layers.0.bias"])
    assert torch.equal(found, converted.extra(converted.layers[1](first)))
    found.sum().backward()
    assert all(p.grad is not None for p in converted.parameters())
    # converted again by way of the means, they get a posterior as well
    back = bayesify.to_deterministic(converted)
    assert torch.equal(back(x), converted.eval()(x))
    again = bayesify.to_bbb(back)
    assert {s.name for s in sites(again)} == {n for n, _ in back.named_parameters()}


def test_children_replaced_later() -> None:
    converted: Any = bayesify.to_bbb(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), initial_std=math.exp(-1.5)
    )
    x = randn(4)(2)[0][0]
    converted(x)
    converted[0] = nn.Identity()
    with one_draw(converted, seed=1):
        found = converted(x)
    drawn = bayesify.draws(converted, seed=1)
    assert set(drawn) == {"1.weight", "1.bias"}
    assert torch.equal(found, F.linear(x, drawn["1.weight"], drawn["1.bias"]))
    converted[0] = bayesify.to_bbb(
        nn.Linear(4, 4), initial_std=math.exp(-1.5)
    )  # converted by itself
    converted.append(converted[1])  # and one that is called twice now
    drawn = bayesify.draws(converted, seed=1)
    assert set(drawn) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    expected = F.linear(x, drawn["0.weight"], drawn["0.bias"])
    for _ in range(2):
        expected = F.linear(expected, drawn["1.weight"], drawn["1.bias"])
    with one_draw(converted, seed=1):
        assert torch.equal(converted(x), expected)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Open(Model):
    """Uses what it is given, in every way in which a forward may ask for it."""

    def __init__(self) -> None:
        super().__init__()
        self.plain: Any = None
        self.child: nn.Module = nn.Identity()
        self.after: Any
        self.register_parameter("registered", None)
        self.register_buffer("buffer", None)

    def forward(self, x: Tensor) -> Any:
        y = self.child(self.layer(x))
        if hasattr(self, "gain"):
            y = y * self.gain
        gain = getattr(self, "other", None)
        if gain is not None:
            y = y * gain
        if "third" in self._parameters:
            y = y * self._parameters["third"]
        for gain in (self.plain, self.registered, self.buffer):
            if gain is not None:
                y = y * gain
        return self.after(y) if hasattr(self, "after") else y


def twos() -> Tensor:
    return torch.full((4,), 2.0)


LATER: dict[str, tuple[str, Callable[[], Any], Any]] = {
    # name, value, the value before (a model that has none lacks the attribute)
    "attribute": ("gain", twos, ...),
    "attribute that was None": ("plain", twos, None),
    "child in place of another": ("child", Twice, nn.Identity()),
    "parameter": ("gain", lambda: nn.Parameter(twos()), ...),
    "parameter by getattr": ("other", lambda: nn.Parameter(twos()), ...),
    "parameter by its key": ("third", lambda: nn.Parameter(twos()), ...),
    "parameter registered as None": ("registered", lambda: nn.Parameter(twos()), None),
    "buffer registered as None": ("buffer", twos, None),
    "child": ("after", Twice, ...),
}


@pytest.mark.parametrize("kind", LATER)
def test_attributes_added_later_are_seen(kind: str) -> None:
    name, value, before = LATER[kind]
    converted: Any = bayesify.to_bbb(Open(), initial_std=math.exp(-1.5))
    x = randn(4)(2)[0][0]

    def drawn() -> Tensor:
        with one_draw(converted, seed=1):
            return converted(x)  # type: ignore[no-any-return]

    plain = drawn()
    setattr(converted, name, value())
    assert torch.equal(drawn(), 2 * plain)
    if before is ...:
        delattr(converted, name)
    else:
        setattr(converted, name, before)
    assert torch.equal(drawn(), plain)


def test_a_bias_added_later_is_seen() -> None:
    converted: Any = bayesify.to_bbb(nn.Linear(4, 4, bias=False), initial_std=math.exp(-1.5))
    x = randn(4)(2)[0][0]
    converted(x)
    converted.bias = nn.Parameter(torch.ones(4))
    with one_draw(converted, seed=1):
        found = converted(x)
    weight = bayesify.draws(converted, seed=1)["weight"]
    assert same(found, F.linear(x, weight, torch.ones(4)))


def without_bias(layer: nn.Module) -> None:
    layer.bias = None  # type: ignore[assignment]


def of_another_shape(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(torch.randn(3, 4))
    layer.bias = nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize(
    ("change", "shape"),
    [(without_bias, (2, 4)), (of_another_shape, (2, 3))],
)
def test_a_parameter_changed_later(
    change: Callable[[nn.Module], None], shape: tuple[int, ...]
) -> None:
    converted: Any = bayesify.to_bbb(
        nn.Sequential(nn.Linear(4, 4)), initial_std=math.exp(-1.5)
    ).train()
    x = randn(4)(2)[0][0]
    converted(x)
    change(converted[0])
    assert converted.eval()(x).shape == shape  # at the means it is a model like any other
    # drawing either works, or an error names the parameter
    try:
        first, second = converted.train()(x), converted(x)
    except bayesify.BayesifyError as error:
        assert "0." in str(error)  # noqa: PT017
    else:
        assert first.shape == shape
        assert not torch.equal(first, second)


def test_a_parameter_tied_later_is_refused() -> None:
    converted: Any = bayesify.to_bbb(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), initial_std=math.exp(-1.5)
    )
    converted[1].weight = converted[0].weight
    groups = functools.partial(bayesify.param_groups, lr=0.1)
    for call in (bayesify.draws, bayesify.kl_divergence, groups):
        with pytest.raises(bayesify.UnsupportedModuleError, match=r"'0.weight' and '1.weight' are"):
            call(converted)
    plain: Any = bayesify.to_deterministic(converted)
    assert plain[1].weight is plain[0].weight
    assert set(bayesify.draws(bayesify.to_bbb(plain))) == {"0.weight", "0.bias", "1.bias"}


def test_one_tensor_given_for_two_parameters_is_no_tie() -> None:
    converted: Any = bayesify.to_bbb(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), initial_std=math.exp(-1.5)
    )
    given = {"0.weight": (w := torch.zeros(4, 4)), "1.weight": w}

    class WithKL(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = converted

        def forward(self) -> Any:
            return bayesify.kl_divergence(self.model)

    found = torch.func.functional_call(WithKL(), {f"model.{k}": v for k, v in given.items()}, ())
    converted[0].weight.data.zero_()
    converted[1].weight.data.zero_()
    torch.testing.assert_close(found, bayesify.kl_divergence(converted))


# -- factories -------------------------------------------------------------------------------


class AsksForDevice(Model):
    """Makes a tensor on the device of another that was made without saying where."""

    def forward(self, x: Tensor) -> Any:
        places = torch.arange(4.0)
        jitter = torch.ones(4, device=places.device)
        return self.layer(x) * self.scale + (places * jitter).to(x.device)


def test_factories_follow_the_default_device() -> None:
    converted = bayesify.to_bbb(AsksForDevice().to("meta"), initial_std=math.exp(-1.5))
    for _ in range(2):
        with torch.device("meta"), one_draw(converted, seed=1):
            assert converted(torch.empty(2, 4)).device.type == "meta"


# -- forwards that are not the class's -------------------------------------------------------


class ChoosesForward(nn.Module):
    """Its class has no forward: each instance holds one, as timm's FasterNet does."""

    def __init__(self, double: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.forward = self.forward_double if double else self.forward_once

    def forward_once(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y

    def forward_double(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(self.layer(x))
        return y


@pytest.mark.parametrize("double", [False, True])
def test_a_class_without_forward(double: bool) -> None:
    torch.manual_seed(0)
    report = check(nn.Sequential(ChoosesForward(double), nn.Linear(4, 2)), randn(4))
    assert report.problems == []
    assert report.swapped == []


class Reshapes(nn.Module):
    """Passes a shape through."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, size: Any) -> tuple[Tensor, Any]:
        return x.reshape(-1, *size) * self.scale, x.shape[-2:]


class PassesShapes(nn.Module):
    """Two layers between which a slice of a shape goes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Reshapes(), Reshapes()

    def forward(self, x: Tensor) -> Tensor:
        x, size = self.first(x, x.shape[-2:])
        x, size = self.second(x, size)
        return x.reshape(-1, *size)


def test_a_slice_of_a_shape_goes_from_layer_to_layer() -> None:
    report = check(PassesShapes(), lambda batch: ((torch.randn(batch, 3, 4),), {}))
    assert report.problems == []
    assert report.swapped == []


# -- what a forward makes --------------------------------------------------------------------


class MakesLoss(Model):
    """As many models of transformers do."""

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x) * self.scale
        loss = nn.CrossEntropyLoss(label_smoothing=0.1)
        return loss(y, torch.arange(len(x))) + nn.GELU()(y).sum()


class MakesWeightedLoss(Model):
    def forward(self, x: Tensor) -> Any:
        loss = nn.CrossEntropyLoss(weight=self.scale.detach().square())
        return loss(self.layer(x), torch.arange(len(x))) * self.scale


class MakesLayer(Model):
    def forward(self, x: Tensor) -> Any:
        made = nn.Linear(4, 4)
        nn.init.ones_(made.weight)
        return made(self.layer(x)) * self.scale


class MultipliesGroups(Model):
    """Rows of experts, in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 4, 8))

    def forward(self, x: Tensor) -> Any:
        ends = torch.tensor([1, len(x)], dtype=torch.int32)
        return F.grouped_mm(self.layer(x), self.experts, offs=ends).view(-1, 2, 4) * self.scale


@pytest.mark.parametrize(
    ("make", "swapped"),
    [(MakesLoss, 0), (MakesWeightedLoss, 1), (MakesLayer, 1), (MultipliesGroups, 0)],
)
def test_what_a_forward_makes(make: type[Model], swapped: int) -> None:
    report = check(make(), randn(4))
    assert report.problems == []
    assert len({s.partition(":")[0] for s in report.swapped}) == swapped


def asks_for_the_device(x: Tensor) -> Tensor:
    return x if x.is_cuda or x.device.type == "cuda" else x + 1


def compares_with_none(x: Tensor) -> Tensor:
    return x if x == None else x + 1  # noqa: E711


def looks_at_the_class(x: Tensor) -> Tensor:
    return x + 1 if x.__class__.__module__ == "torch" and x.__class__ is Tensor else x


class Asks(nn.Module):
    def __init__(self, question: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.question = question

    def forward(self, x: Tensor) -> Tensor:
        return self.question(self.layer(x) * self.layer.weight.sum())


@pytest.mark.parametrize("question", [asks_for_the_device, compares_with_none, looks_at_the_class])
def test_what_a_graph_can_answer_takes_no_fallback(question: Callable[[Tensor], Tensor]) -> None:
    report = check(Asks(question), lambda n: ((torch.randn(n, 3),), {}))
    assert (report.problems, report.swapped) == ([], [])
