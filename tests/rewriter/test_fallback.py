"""The fallback beside functional_call: where parameters are read, by whom, and what is left behind.

Every forward here asks a tensor for its value, which no graph can answer.
"""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import bayesify
from bayesify import one_draw
from bayesify.posterior import sites
from bayesify.rewriter.fallback import DrawnParameters
from bayesify.rewriter.variants import rungs
from reference import check, functional_call, outputs, same, state_of


def asked(y: Tensor) -> Tensor:
    return y * (1 if float(y.detach().sum()) < 1e9 else 2)


class Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Any:
        return asked(self.layer(x) * self.scale)


# -- where parameters are read ---------------------------------------------------------------


class ReadsChild(Asks):
    def forward(self, x: Tensor) -> Any:
        return asked(F.linear(x, self.layer.weight, self.layer.bias).relu() * self.scale)


class ReadsDict(Asks):
    def forward(self, x: Tensor) -> Any:
        own = self._parameters["scale"]
        assert own is self._parameters.get("scale")
        if not isinstance(own, nn.Parameter):
            assert [*dict(self._parameters).values()] == [own]
            assert self._parameters.copy() == {"scale": own}
            assert len(self._parameters) == 1
        return asked(self.layer(x) * own)


class SumsParameters(Asks):
    def forward(self, x: Tensor) -> Any:
        names = [name for name, _ in self.named_parameters()]
        assert names == ["scale", "layer.weight", "layer.bias"]
        first = next(self.parameters())
        total = sum(p.square().sum() for p in self.parameters())
        return asked(self.layer(x.to(first.dtype))) + total


class Lists(Asks):
    def __init__(self) -> None:
        super().__init__()
        self.many = nn.ParameterList([nn.Parameter(torch.rand(4)) for _ in range(3)])
        self.named = nn.ParameterDict({"a": nn.Parameter(torch.rand(4))})

    def forward(self, x: Tensor) -> Any:
        for weight in self.many:
            x = x * weight
        for weight in self.named.values():
            x = x + weight
        return asked(self.layer(x) * self.many[0] * self.named["a"])


class HoldsList(Asks):
    def __init__(self) -> None:
        super().__init__()
        self.held: list[Any] = [self.scale, (self.layer.weight,)]

    def forward(self, x: Tensor) -> Any:
        return asked(F.linear(x, self.held[1][0]) * self.held[0])


class Box:
    """An object that no module knows of."""

    def __init__(self, value: Any) -> None:
        self.value = value


class HoldsObject(Asks):
    def __init__(self) -> None:
        super().__init__()
        self.box = Box(self.scale)

    def forward(self, x: Tensor) -> Any:
        return asked(self.layer(x) * self.box.value)


class HoldsClosure(Asks):
    """Reads what it closes over in later calls only."""

    def __init__(self) -> None:
        super().__init__()
        scale = self.scale

        def multiply(y: Tensor) -> Tensor:
            return y * scale

        self.multiply = multiply

    def forward(self, x: Tensor) -> Any:
        y = asked(self.layer(x))
        return self.multiply(y) if len(x) > 2 else y * self.scale


class GivesBack(Asks):
    def forward(self, x: Tensor) -> Any:
        return asked(self.layer(x)), self.scale, {"w": [self.layer.weight]}


class Recurrent(Asks):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 4, 2)

    def forward(self, x: Tensor) -> Any:
        y, (h, _) = self.rnn(x[:, None])
        return asked(self.layer(y[:, 0])) * self.scale + h.sum()


class AsksRecurrent(nn.LSTM):
    """Its flat weights are a list that it keeps."""

    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: Any, hx: Any = None) -> Any:
        y = super().forward(x[:, None], hx)[0]
        self.kinds = [type(w) for w in self._flat_weights]
        return asked(y)


class Tied(Asks):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(4, 4)
        self.other.weight = self.layer.weight

    def forward(self, x: Tensor) -> Any:
        assert self.other.weight is self.layer.weight
        return asked(self.other(self.layer(x))) * self.scale


class Normalised(Asks):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.inner = Asks()

    def forward(self, x: Tensor) -> Any:
        return asked(self.drop(self.norm(self.inner(self.layer(x)))))


class WritesInPlace(Asks):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            self.seen += self.scale.detach()
        return asked(self.layer(x) + self.seen)


class WithAttention(Asks):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x: Tensor) -> Any:
        return asked(self.attention(x, x, x)[0] * self.scale)


class Copies(Asks):
    """Copies itself, writes its state, and comes back from a file, in the middle of a call."""

    def forward(self, x: Tensor) -> Any:
        alike = pickle.loads(pickle.dumps(self.layer))
        assert type(alike._parameters) is dict
        assert type(copy.deepcopy(self.layer)._parameters) is dict
        assert "weight" in self.layer.state_dict()
        return asked(self.layer(x) * self.scale)


class Parametrized(Asks):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.layer)

    def forward(self, x: Tensor) -> Any:
        return asked(F.linear(x, self.layer.weight)) * self.scale


def rows(batch: int) -> Any:
    return (torch.randn(batch, 4, generator=torch.Generator().manual_seed(batch)),), {}


READS = [Asks, ReadsChild, ReadsDict, Lists, GivesBack, Recurrent, AsksRecurrent, Tied, Normalised,
         WithAttention, Parametrized]  # fmt: skip


@pytest.mark.parametrize("make", READS)
def test_every_read_is_a_draw(make: Callable[[], nn.Module]) -> None:
    report = check(make(), rows)
    assert report.problems == []
    assert report.swapped


@pytest.mark.parametrize("make", [HoldsList, HoldsObject, HoldsClosure])
def test_a_parameter_that_is_held_is_a_draw(make: Callable[[], nn.Module]) -> None:
    original = make()
    converted = bayesify.to_bbb(original, initial_std=math.exp(-1.5))
    plain = make()  # a deep copy would keep the closure of the original
    for batch in (2, 3, 3, 2):
        args, _ = rows(batch)
        plain.load_state_dict(bayesify.draws(converted, seed=batch))
        plain.zero_grad()
        converted.zero_grad()
        with one_draw(converted, seed=batch):
            out = converted(*args)
        assert torch.equal(out, plain(*args))
        out.sum().backward()
        plain(*args).sum().backward()
        for site in sites(converted):
            assert same(site.mean.grad, plain.get_parameter(site.name).grad), site.name


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [*READS, SumsParameters, WritesInPlace])
def test_bit_for_bit_as_functional_call(make: Callable[[], nn.Module], training: bool) -> None:
    original = make().train(training)
    converted = bayesify.to_bbb(original, initial_std=math.exp(-1.5)).train(training)
    for batch in (2, 3, 3):
        args, _ = rows(batch)
        results = []
        for reference in (True, False):
            converted.zero_grad()
            torch.manual_seed(5)
            with one_draw(converted, seed=2):
                if reference:
                    drawn = bayesify.draws(converted, seed=2)
                    out = functional_call(original, drawn, args, {})
                else:
                    out = converted(*args)
            loss: Any = sum(t.sum() for t in outputs(out) if t.requires_grad)
            loss.backward()
            grads = {s.name: [p.grad for p in s.tensors] for s in sites(converted)}
            results.append(([t.detach() for t in outputs(out)], grads, torch.get_rng_state()))
        (expected, right, rng), (found, grads, rng_found) = results
        assert same(found, expected)
        assert torch.equal(rng, rng_found)
        for name, pair in right.items():
            for a, b in zip(pair, grads[name], strict=True):
                # a draw that is not read has a gradient of zero, or none
                if a is None:
                    assert b is None or not bool(b.any()), name
                else:
                    assert b is not None, name
                    assert torch.equal(a, b), name
        assert same(state_of(converted), state_of(original))
    assert {r.rung for r in rungs(converted) if r.owner == ""} == {"swap"}
    for module in converted.modules():
        assert type(module._parameters) is dict


def test_a_call_may_copy_its_module() -> None:
    converted = bayesify.to_bbb(Copies())
    converted(*rows(2)[0])
    assert {r.rung for r in rungs(converted) if r.owner == ""} == {"swap"}


# -- activation checkpointing ----------------------------------------------------------------


class Checkpointed(Asks):
    def __init__(self, reentrant: bool, held: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.held = [self.scale] if held else None

    def body(self, x: Tensor) -> Tensor:
        scale = self.scale if self.held is None else self.held[0]
        y: Tensor = (self.layer(x) * scale).tanh() @ self.layer.weight
        return y

    def forward(self, x: Tensor) -> Any:
        y = asked(checkpoint(self.body, x * 1, use_reentrant=self.reentrant))
        return y * self.scale


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_reads_the_draws_of_its_forward(reentrant: bool, held: bool) -> None:
    original = Checkpointed(reentrant, held)
    converted = bayesify.to_bbb(original, initial_std=math.exp(-1.5)).train()
    x = rows(3)[0][0].requires_grad_()
    for _ in range(2):
        plain = Checkpointed(reentrant, held)
        plain.load_state_dict(bayesify.draws(converted, seed=1))
        plain(x).sum().backward()
        converted.zero_grad()
        with one_draw(converted, seed=1):
            out = converted(x)
        assert torch.equal(out, plain(x))
        out.sum().backward()
        right = dict(plain.named_parameters())
        for site in sites(converted):
            torch.testing.assert_close(site.mean.grad, right[site.name].grad)


# -- threads ---------------------------------------------------------------------------------


class Waits(Asks):
    """Stops in the middle of its forward until it is told to go on."""

    inside: threading.Event | None = None

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def __deepcopy__(self, memo: Any) -> Any:
        alike = Waits()
        alike.load_state_dict(self.state_dict())
        return alike

    def forward(self, x: Tensor) -> Any:
        y = asked(self.layer(x) * self.scale)
        if self.inside is not None:
            inside, self.inside = self.inside, None
            inside.set()
            assert self.go_on.wait(20)
        return y @ self.layer.weight + self.scale


def test_other_threads_see_no_exchanged_parameter() -> None:
    converted: Any = bayesify.to_bbb_(Waits(), initial_std=math.exp(-1.5))
    x = rows(2)[0][0]
    right = {}
    for seed in (1, 2):
        with one_draw(converted, seed=seed):
            right[seed] = converted(x)
    with bayesify.at_mean(converted):
        means = converted(x)
    found = {}

    def draw() -> None:
        with one_draw(converted, seed=1):
            found[1] = converted(x)

    converted.inside = inside = threading.Event()
    thread = threading.Thread(target=draw)
    thread.start()
    assert inside.wait(20)
    weight = converted.layer.weight
    assert isinstance(weight, nn.Parameter)
    assert {*dict(converted.named_parameters())} == {
        "scale", "scale_logvar", "layer.weight", "layer.weight_logvar", "layer.bias",
        "layer.bias_logvar",
    }  # fmt: skip
    assert all(isinstance(p, nn.Parameter) for p in converted.parameters())
    with bayesify.at_mean(converted):
        assert torch.equal(converted(x), means)
    with one_draw(converted, seed=2):
        found[2] = converted(x)
    # a trace puts what it finds back, and must not take the draws from the other thread
    bayesify.to_bbb(nn.Sequential(nn.Linear(4, 4))).train()(x)
    converted.layer.__dict__["_bayesify"].variants.clear()
    with one_draw(converted, seed=2):
        assert torch.equal(converted.layer(x), F.linear(x, *_of_layer(converted, 2)))
    converted.go_on.set()
    thread.join()
    assert torch.equal(found[1], right[1])
    assert torch.equal(found[2], right[2])
    assert converted.layer.weight is weight
    assert type(converted.layer._parameters) is dict


def _of_layer(model: nn.Module, seed: int) -> tuple[Tensor, Tensor]:
    drawn = bayesify.draws(model, seed=seed)
    return drawn["layer.weight"], drawn["layer.bias"]


class Signals(nn.Module):
    """Its first forward, which is its trace, does what it is told."""

    todo: ClassVar[list[Callable[[], object]]] = []

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        if self.todo:
            self.todo.pop()()
        return self.layer(x)


def test_a_trace_puts_back_no_exchanged_parameters() -> None:
    model = Waits()
    model.inner = Signals()
    converted: Any = bayesify.to_bbb_(model, initial_std=math.exp(-1.5))
    x = rows(2)[0][0]
    converted.inside = inside = threading.Event()
    thread = threading.Thread(target=converted, args=(x,))
    thread.start()
    assert inside.wait(20)

    def end_the_fallback() -> None:
        converted.go_on.set()
        thread.join()

    Signals.todo.append(end_the_fallback)
    with one_draw(converted, seed=1):
        converted.inner(x)
    assert not thread.is_alive()
    assert all(type(m._parameters) is dict for m in converted.modules())


def test_no_draw_is_put_into_the_list_of_an_rnn() -> None:
    converted: Any = bayesify.to_bbb(AsksRecurrent(), initial_std=math.exp(-1.5))
    for _ in range(2):
        converted(rows(3)[0][0])
        assert set(converted.kinds) == {nn.Parameter}
        assert all(isinstance(w, nn.Parameter) for w in converted._flat_weights)


# -- what is left behind ---------------------------------------------------------------------


class Fails(Asks):
    def forward(self, x: Tensor) -> Any:
        asked(self.layer(x))
        raise ValueError("no")


class Replaces(Asks):
    """Makes a parameter anew at its first call, as lazy modules do."""

    def forward(self, x: Tensor) -> Any:
        y = asked(self.layer(x))
        if not hasattr(self, "late"):
            self.late = nn.Parameter(torch.ones(4))
            self.scale = nn.Parameter(self.scale.detach() * 2)
        return y * self.scale + self.late


def test_an_error_leaves_the_parameters() -> None:
    converted = bayesify.to_bbb(Fails())
    with pytest.raises(ValueError, match="no"):
        converted(*rows(2)[0])
    assert all(type(m._parameters) is dict for m in converted.modules())


def test_parameters_assigned_in_a_call_stay() -> None:
    converted: Any = bayesify.to_bbb(Replaces())
    for _ in range(2):
        converted(*rows(2)[0])
        assert type(converted._parameters) is dict
        assert list(converted._parameters) == ["scale", "scale_logvar", "late"]
        assert isinstance(converted._parameters["scale"], nn.Parameter)
        assert not isinstance(converted._parameters, DrawnParameters)


# -- hooks and modes -------------------------------------------------------------------------


@pytest.mark.parametrize("held", [False, True])
def test_a_hook_reads_draws(held: bool) -> None:
    original = Asks()
    layer, scale = original.layer, original.scale

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out * scale if held else out + F.linear(out, module.weight)  # type: ignore[arg-type]

    (original if held else layer).register_forward_hook(hook)
    converted = bayesify.to_bbb_(original, initial_std=math.exp(-1.5))
    x = rows(2)[0][0]
    for seed in (1, 2):
        w = bayesify.draws(converted, seed=seed)
        y = F.linear(x, w["layer.weight"], w["layer.bias"])
        right = y * w["scale"] * w["scale"] if held else (y + F.linear(y, w["layer.weight"]))
        with one_draw(converted, seed=seed):
            found = converted(x)
        torch.testing.assert_close(found, right if held else right * w["scale"])


def test_at_the_means_of_a_part() -> None:
    converted: Any = bayesify.to_bbb(ReadsChild(), initial_std=math.exp(-1.5))
    x = rows(2)[0][0]
    with one_draw(converted, seed=1), bayesify.at_mean(converted.layer):
        found = converted(x)
    scale = bayesify.draws(converted, seed=1)["scale"]
    assert torch.equal(found, converted.layer.eval()(x).relu() * scale)


@pytest.mark.parametrize("make", [Asks, ReadsChild, HoldsList])
def test_compiled(make: Callable[[], nn.Module]) -> None:
    converted = bayesify.to_bbb(make(), initial_std=math.exp(-1.5))
    x = rows(3)[0][0]
    torch._dynamo.reset()
    compiled: Any = torch.compile(converted, backend="eager")
    for seed in (1, 2, 3):
        with one_draw(converted, seed=seed):
            found, right = compiled(x), converted(x)
        torch.testing.assert_close(found, right)
        found.sum().backward()
    assert all(s.raw.grad is not None for s in sites(converted) if s.name != "layer.bias")
    assert all(type(m._parameters) is dict for m in converted.modules())


class AsksForItsParameters(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias if "bias" in self._parameters else None)


class Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = AsksForItsParameters(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y if float(y.detach().sum()) > -1e9 else -y


def test_a_graph_inside_a_fallback_is_used_again() -> None:
    model = bayesify.to_bbb(Decides())
    for _ in range(3):
        model(torch.ones(2, 3))
    assert [(r.owner, r.rung) for r in rungs(model)] == [("", "swap"), ("layer", "plain")]
