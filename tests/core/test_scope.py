"""Scopes, modes and seeds: who shares a draw with whom, and that the noise is normal noise."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import math
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

import bayesify
from bayesify import (
    ArgumentError,
    UnsupportedModuleError,
    at_mean,
    draws,
    one_draw,
    sampled,
)
from bayesify.kernels import grouped
from bayesify.posterior import STATE, sites
from bayesify.scope import LOCAL, open_modes
from bayesify.seeds import key_of
from reference import functional_call

ROOT = Path(__file__).resolve().parents[2]
LOGVAR = -2.0


class Reads(nn.Module):
    """Hands out every weight that its call read, in the order of the reads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.first = nn.Linear(3, 3)
        self.second = self.first
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.weight

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        identity, zero = torch.eye(3), torch.zeros(1, 3)
        return {
            "own": self.weight,
            "own again": self.weight.clone(),
            "tied": self.tied(identity).T,
            "bias": self.first(zero)[0],
            "bias again": self.second(zero)[0],
        }


class Branches(nn.Module):
    """Two layers that are called in the order asked for."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        values = {"a": torch.full((3, 3), 0.5), "b": torch.eye(3)}
        for name in names:
            layer = nn.Linear(3, 3, bias=False)
            layer.weight = nn.Parameter(values[name].clone())
            self.add_module(name, layer)

    def forward(self, x: Tensor, order: str = "ab") -> dict[str, Tensor]:
        return {name: getattr(self, name)(x) for name in order}


def branches(*names: str, training: bool = True) -> Any:
    return bayesify.to_bbb(
        Branches(*(names or ("a", "b"))), initial_std=math.exp(LOGVAR / 2)
    ).train(training)


X = torch.eye(3)


def drawn(model: Any, x: Tensor = X) -> bool:
    """Whether a call of ``model`` draws."""
    with torch.no_grad():
        found, mean = model(x), bayesify.to_deterministic(model)(x)
    if not isinstance(found, dict):
        found, mean = {"y": found}, {"y": mean}
    return not all(torch.equal(found[k], mean[k]) for k in found)


@pytest.fixture(autouse=True)
def _nothing_left_open() -> Iterator[None]:
    """No test leaves a scope, a mode or a patch of torch behind, whatever it raises."""
    entry_points = dict(vars(torch.utils.checkpoint))
    yield
    assert LOCAL.scope is None
    assert open_modes() == ()
    for name, value in entry_points.items():
        assert vars(torch.utils.checkpoint)[name] is value, name


# -- one draw per scope ----------------------------------------------------------------------


def test_reads_in_one_call_share_the_draw_and_two_calls_do_not() -> None:
    model: Any = bayesify.to_bbb(Reads(), initial_std=math.exp(LOGVAR / 2)).train()
    first, second = model(X), model(X)
    for found in (first, second):
        assert torch.equal(found["own"], found["own again"])
        assert torch.equal(found["own"], found["tied"])
        assert torch.equal(found["bias"], found["bias again"])
    assert not torch.equal(first["own"], model.weight)
    for name in first:
        assert not torch.equal(first[name], second[name])


def test_each_parameter_is_drawn_once_in_a_scope() -> None:
    model = bayesify.to_bbb(Reads(), initial_std=math.exp(LOGVAR / 2)).train()
    with mock.patch.object(grouped, "prepare", wraps=grouped.prepare) as draw:
        model(X)
        assert [len(call.args[0]) for call in draw.mock_calls] == [len(list(sites(model)))] == [3]
        with one_draw(model):
            model(X)
            model(X)
            model.first(X)  # type: ignore[operator]
        assert draw.call_count == 2


def test_eval_uses_the_means_and_train_draws() -> None:
    model = branches()
    assert drawn(model.train())
    assert not drawn(model.eval())


def test_parts_called_in_one_call_share_its_scope() -> None:
    model = branches()
    found = model(X, "aba"), model(X, "ab")
    assert not torch.equal(found[0]["a"], found[1]["a"])
    sums: Any = bayesify.to_bbb(
        nn.Sequential(*[layer := nn.Linear(3, 3, bias=False), nn.Identity(), layer]),
        initial_std=math.exp(LOGVAR / 2),
    )
    with one_draw(sums, seed=1):
        weight = draws(sums, seed=1)["0.weight"]
        assert torch.equal(sums(X), F.linear(F.linear(X, weight), weight))


def test_one_draw_over_several_calls() -> None:
    model = branches(training=False)
    with one_draw(model):
        first, second = model(X), model(2 * X)
        part = model.a(X)
        torch.testing.assert_close(second["a"], 2 * first["a"])
        assert torch.equal(part, first["a"])
    with one_draw(model):
        assert not torch.equal(model(X)["a"], first["a"])
    assert not drawn(model)


def test_gradients_of_several_calls_add_up() -> None:
    model = branches()
    with one_draw(model, seed=1):
        loss = model(X)["a"].square().sum() + model(2 * X)["a"].square().sum()
    loss.backward()
    weight = draws(model, seed=1)["a.weight"]
    expected = torch.autograd.grad(
        F.linear(X, weight).square().sum() + F.linear(2 * X, weight).square().sum(),
        [model.a.weight, model.a.weight_logvar],
    )
    torch.testing.assert_close(model.a.weight.grad, expected[0])
    torch.testing.assert_close(model.a.weight_logvar.grad, expected[1])


# -- seeds -----------------------------------------------------------------------------------


def test_seed_gives_the_same_draw_whatever_the_order() -> None:
    model = branches()
    results = []
    for order in ("ab", "ba", "b"):
        with one_draw(model, seed=3):
            results.append(model(X, order))
    with one_draw(model, seed=3):
        model.b(X)
        results.append({"a": model.a(X), "b": model.b(X)})
    reordered = branches("b", "a")
    with one_draw(reordered, seed=3):
        results.append(reordered(X, "ab"))
    for found in results[1:]:
        for name in found:
            assert torch.equal(found[name], results[0][name])
    with one_draw(model, seed=4):
        assert not torch.equal(model(X)["a"], results[0]["a"])


def test_seed_does_not_depend_on_what_else_is_bayesian() -> None:
    whole = bayesify.to_bbb(Branches("a", "b"), initial_std=math.exp(LOGVAR / 2))
    part = bayesify.to_bbb(Branches("a", "b"), initial_std=math.exp(LOGVAR / 2), only="b")
    assert torch.equal(draws(whole, seed=1)["b.weight"], draws(part, seed=1)["b.weight"])


def test_seed_gives_the_same_draw_in_another_process() -> None:
    code = (
        "import torch, bayesify; from torch import nn\n"
        "m = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).requires_grad_()\n"
        "[nn.init.constant_(p, 0.5) for p in m.parameters()]\n"
        "import math; c = bayesify.to_bbb(m, initial_std=math.exp(-1.0))\n"
        "print([v.tolist() for v in bayesify.draws(c, seed=2**40 + 7).values()])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "123"}
    other = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    here = draws(bayesify.to_bbb(model, initial_std=math.exp(-1.0)), seed=2**40 + 7)
    assert other.stdout.strip() == str([v.tolist() for v in here.values()]), other.stderr


def test_manual_seed_fixes_the_draws() -> None:
    model = branches()
    torch.manual_seed(5)
    first = [model(X)["a"] for _ in range(2)]
    torch.manual_seed(5)
    second = [model(X)["a"] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


def test_seeded_draw_takes_nothing_from_the_global_generator() -> None:
    model = branches()
    before = torch.get_rng_state()
    with one_draw(model, seed=1):
        model(X)
    draws(model, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    with one_draw(model):
        model(X)
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [0, 7, 2**40, 2**63 - 1])
def test_int_and_tensor_seeds_agree(seed: int) -> None:
    model = branches()
    a, b = draws(model, seed=seed), draws(model, seed=torch.tensor(seed))
    assert torch.equal(a["a.weight"], b["a.weight"])
    assert not torch.equal(a["a.weight"], draws(model, seed=seed ^ 2**35)["a.weight"])


BAD_SEEDS = [
    -1, 2**63, 1.0, True, "1", torch.tensor(1.0), torch.tensor([1]), torch.tensor(1, device="meta"),
]  # fmt: skip


@pytest.mark.parametrize("seed", BAD_SEEDS, ids=repr)
def test_bad_seed_is_refused(seed: Any) -> None:
    model = branches(training=False)
    with pytest.raises(ArgumentError, match="seed must be an int"), one_draw(model, seed=seed):
        pass
    with pytest.raises(ArgumentError, match="seed must be an int"):
        draws(model, seed=seed)
    assert not drawn(model)


@pytest.mark.parametrize("context", [sampled, at_mean, one_draw])
def test_model_without_posterior_is_refused(context: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedModuleError, match=r"to_bbb\(model\)"), context(nn.Linear(2, 2)):
        pass
    with pytest.raises(UnsupportedModuleError, match=r"to_bbb\(model\)"):
        draws(nn.Linear(2, 2))


# -- modes -----------------------------------------------------------------------------------

MODES: dict[str, Callable[[nn.Module], Any]] = {
    "sampled": sampled,
    "at_mean": at_mean,
    "one_draw": one_draw,
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("outer", MODES)
@pytest.mark.parametrize("inner", MODES)
def test_the_innermost_mode_decides(inner: str, outer: str, training: bool) -> None:
    model = branches(training=training)
    with MODES[outer](model):
        assert drawn(model) is (outer != "at_mean")
        with MODES[inner](model):
            assert drawn(model) is (inner != "at_mean")
            first, second = model(X)["a"], model(X)["a"]
            # a draw that is held stays held where a block inside asks for draws
            held = inner == "at_mean" or "one_draw" in (inner, outer)
            assert torch.equal(first, second) is held
        assert drawn(model) is (outer != "at_mean")
    assert drawn(model) is training


def test_one_draw_inside_one_draw_is_another_draw() -> None:
    model = branches()
    with one_draw(model, seed=1):
        outer = model(X)["a"]
        with one_draw(model, seed=2):
            assert torch.equal(model(X)["a"], F.linear(X, draws(model, seed=2)["a.weight"]))
        assert torch.equal(model(X)["a"], outer)


def test_modes_concern_their_model_only() -> None:
    first, second = branches(training=False), branches(training=False)
    with sampled(first), one_draw(first):
        assert drawn(first)
        assert not drawn(second)
    with at_mean(first.train()):
        assert drawn(second.train())
        assert not drawn(first)


def test_modes_reach_parts_and_containers() -> None:
    part = branches(training=False)
    whole = nn.Sequential(nn.Identity(), part)
    with sampled(whole):
        assert drawn(part)
        assert drawn(part.a)
    with one_draw(whole, seed=1):
        assert torch.equal(part(X)["a"], part.a(X))


def test_modes_as_decorators_and_in_an_exit_stack() -> None:
    model = branches(training=False)

    @sampled(model)
    def predict() -> bool:
        return drawn(model)

    assert predict()
    assert predict()
    with ExitStack() as stack:
        stack.enter_context(sampled(model))
        stack.enter_context(one_draw(model))
        assert drawn(model)
    assert not drawn(model)


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        if self.error is not None:
            raise self.error
        return y


@pytest.mark.parametrize("error", [ValueError("stop"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("context", MODES.values())
def test_exceptions_leave_no_scope_open(context: Callable[..., Any], error: BaseException) -> None:
    model: Any = bayesify.to_bbb(Broken(), initial_std=math.exp(LOGVAR / 2)).train()
    for warm in (False, True):
        if warm:
            model(X)
        model.error = error
        with pytest.raises(type(error)), context(model):
            model(X)
        with pytest.raises(type(error)):
            model(X)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model.layer(torch.ones(2, 5))
        model.error = None
        assert LOCAL.scope is None
        assert open_modes() == ()
        assert drawn(model)
        assert not drawn(model.eval())
        model.train()


# -- grad modes, memory, replaced tensors ----------------------------------------------------


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_draw_without_graph_does_not_serve_one_that_needs_it(without: Any) -> None:
    model = branches()
    with one_draw(model):
        with without():
            first = model(X)["a"]
        second = model(X)["a"]
        with without():
            third = model(X)["a"]
    assert not first.requires_grad
    assert not third.requires_grad
    assert torch.equal(first, second)
    second.sum().backward()
    assert model.a.weight_logvar.grad.abs().min() > 0


@pytest.mark.parametrize("held", [False, True])
def test_no_draw_is_kept_after_its_scope(held: bool) -> None:
    model = bayesify.to_bbb(Reads()).train()
    with one_draw(model) if held else sampled(model):
        alive = weakref.ref(model(X)["own"])
        assert (alive() is not None) is held
    gc.collect()
    assert alive() is None


def test_parameters_may_be_replaced_between_calls() -> None:
    model = branches()
    model(X)
    means = {k: v + 1 for k, v in model.state_dict().items()}
    model.load_state_dict(means, assign=True)
    with one_draw(model, seed=1):
        found = model(X)["a"].detach()
    noise = (found - F.linear(X, means["a.weight"])) / math.exp((LOGVAR + 1) / 2)
    assert torch.equal(found, F.linear(X, draws(model, seed=1)["a.weight"]))
    assert 0.1 < float(noise.std()) < 3
    model.to_empty(device="cpu")
    for site in sites(model):
        nn.init.zeros_(site.mean)
        nn.init.constant_(site.raw, -60.0)
    assert float(model(X)["a"].detach().abs().max()) < 1e-10
    model.double()
    assert model(X.double())["a"].dtype == torch.float64


def test_draws_are_those_of_one_draw() -> None:
    model = bayesify.to_bbb(Reads(), initial_std=math.exp(LOGVAR / 2)).eval()
    found = draws(model, seed=8)
    assert sorted(found) == ["first.bias", "first.weight", "weight"]
    with one_draw(model, seed=8):
        values = model(X)
    assert torch.equal(found["weight"], values["own"])
    assert torch.equal(found["first.bias"], values["bias"])
    assert all(v.requires_grad and not v.is_leaf for v in found.values())
    with torch.no_grad():
        assert not any(v.requires_grad for v in draws(model, seed=8).values())
    assert not torch.equal(draws(model)["weight"], draws(model)["weight"])


def test_functional_call_uses_what_it_is_given() -> None:
    model = bayesify.to_bbb(nn.Linear(3, 3), initial_std=math.exp(LOGVAR / 2))
    given = draws(model, seed=2)
    expected = F.linear(X, given["weight"], given["bias"])
    assert torch.equal(torch.func.functional_call(model.eval(), given, (X,)), expected)
    with at_mean(model.train()):
        assert torch.equal(torch.func.functional_call(model, given, (X,)), expected)


# -- threads ---------------------------------------------------------------------------------


def test_threads_have_their_own_scopes() -> None:
    model = branches(training=False)
    expected = {k: F.linear(X, draws(model, seed=k)["a.weight"]) for k in range(4)}
    with one_draw(model):
        model(X)  # a first draw that runs beside other threads has a test of its own
    barrier, seen = threading.Barrier(5, timeout=60), []

    def seeded(seed: int) -> None:
        with one_draw(model, seed=seed):
            barrier.wait()
            for _ in range(30):
                seen.append(torch.equal(model(X)["a"], expected[seed]))

    def plain() -> None:
        barrier.wait()
        for _ in range(30):
            seen.append(torch.equal(model(X)["a"], model.a.weight.T))

    threads = [threading.Thread(target=seeded, args=(k,)) for k in range(4)]
    threads.append(threading.Thread(target=plain))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == [True] * 150


class Waits(nn.Module):
    """Waits inside its forward, in every thread but the main one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.entered, self.leave = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        if threading.current_thread() is not threading.main_thread():
            self.entered.set()
            self.leave.wait(20)
        return y


def test_a_trace_in_one_thread_does_not_disturb_another() -> None:
    part = Waits()
    model = bayesify.to_bbb_(nn.Sequential(part), initial_std=math.exp(LOGVAR / 2)).eval()
    expected = F.linear(X, part.layer.weight, part.layer.bias)
    results: list[Any] = []

    def first_draw() -> None:
        with one_draw(model, seed=1):
            results.append(model(X))

    thread = threading.Thread(target=first_draw)
    thread.start()
    try:
        assert part.entered.wait(20)
        found = model(X)
    finally:
        part.leave.set()
        thread.join(60)
    assert type(found) is Tensor
    assert torch.equal(found, expected)
    with one_draw(model, seed=1):
        assert torch.equal(model(X), results[0])


# -- parts that were converted apart ---------------------------------------------------------


def noises(model: nn.Module, seed: int) -> list[Tensor]:
    found = draws(model, seed=seed)
    return [(found[s.name] - s.mean).detach() / s.std.detach() for s in sites(model)]


def apart(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).abs().max() > 0.1)


def test_parts_with_equal_names_do_not_share_noise() -> None:
    parts = [bayesify.to_bbb(nn.Linear(3, 3), initial_std=1.0) for _ in range(3)]
    whole = nn.Sequential(*parts)
    found = dict(zip([s.name for s in sites(whole)], noises(whole, 1), strict=True))
    for a, b in itertools.combinations(range(3), 2):
        assert apart(found[f"{a}.weight"], found[f"{b}.weight"])
    with one_draw(whole, seed=1):
        given = draws(whole, seed=1)
        expected = X
        for k in range(3):
            expected = F.linear(expected, given[f"{k}.weight"], given[f"{k}.bias"])
        assert torch.equal(whole(X), expected)


@pytest.mark.parametrize(
    "held",
    [
        True,
        False,
    ],
)
def test_copies_of_a_layer_do_not_share_noise(held: bool) -> None:
    model: Any = bayesify.to_bbb(Branches("a"), initial_std=1.0).train()
    model.b = copy.deepcopy(model.a)
    with one_draw(model) if held else sampled(model), torch.no_grad():
        found = model(X, "ab")
    assert apart(found["a"] - model.a.weight.T, found["b"] - model.b.weight.T)


# -- the noise -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noise_table() -> Tensor:
    """Standardised draws of two float64 parameters under several seeds: (seed, parameter, n)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 250, bias=False), nn.Linear(250, 200, bias=False))
    converted = bayesify.to_bbb(model.double())
    with torch.no_grad():
        for site in sites(converted):
            site.raw.uniform_(-6.0, 2.0)
    rows = []
    for seed in (0, 1, 2, 1 << 32, 1 << 40, (1 << 63) - 1):
        found = draws(converted, seed=seed)
        rows.append(
            torch.stack(
                [
                    ((found[s.name] - s.mean) / torch.exp(0.5 * s.raw.double())).detach().flatten()
                    for s in sites(converted)
                ]
            )
        )
    return torch.stack(rows)


def test_noise_has_the_moments_of_a_standard_normal(noise_table: Tensor) -> None:
    n = noise_table.shape[-1]
    # five standard errors of mean, variance, skewness and kurtosis of a normal sample
    limits = {1: 5 / math.sqrt(n), 2: 5 * math.sqrt(2 / n), 3: 5 * math.sqrt(15 / n)}
    for z in noise_table.flatten(0, 1):
        assert abs(float(z.mean())) < limits[1]
        assert abs(float(z.square().mean()) - 1) < limits[2]
        assert abs(float(z.pow(3).mean())) < limits[3]
        assert abs(float(z.pow(4).mean()) - 3) < 5 * math.sqrt(96 / n)
    everything = noise_table.flatten().numpy()
    assert scipy.stats.kstest(everything, "norm").pvalue > 1e-6


def test_noise_is_independent_of_other_seeds_parameters_and_elements(noise_table: Tensor) -> None:
    rows = noise_table.flatten(0, 1)
    n = rows.shape[-1]
    correlation = torch.corrcoef(rows)
    off = correlation[~torch.eye(len(rows), dtype=torch.bool)]
    assert float(off.abs().max()) < 5 / math.sqrt(n)
    for lag in (1, 2, 16, 200, 250):
        product = (rows[:, lag:] * rows[:, :-lag]).mean(1)
        assert float(product.abs().max()) < 5 / math.sqrt(n - lag)
    # not only uncorrelated: equal magnitudes would give correlated squares
    squares = torch.corrcoef(rows.square())
    off = squares[~torch.eye(len(rows), dtype=torch.bool)]
    assert float(off.abs().max()) < 5 / math.sqrt(n)


def test_a_draw_has_the_mean_and_variance_of_its_posterior() -> None:
    model: Any = bayesify.to_bbb(nn.Linear(4, 3, bias=False).double())
    with torch.no_grad():
        model.weight_logvar.copy_(torch.linspace(-4, 1, 12).view(3, 4))
    count = 4000
    torch.manual_seed(3)
    found = torch.stack([draws(model)["weight"].detach() for _ in range(count)])
    std = torch.exp(0.5 * model.weight_logvar.detach().double())
    error = (found.mean(0) - model.weight).detach() / std
    assert float(error.abs().max()) < 5 / math.sqrt(count)
    ratio = found.var(0) / std.square()
    assert float((ratio - 1).abs().max()) < 5 * math.sqrt(2 / count)


# -- what a call does not read ---------------------------------------------------------------


class Mixture(nn.Module):
    """Experts, of which a call reads two at most; with activation checkpointing on demand."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.router = nn.Linear(4, 8)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))
        self.reentrant = reentrant

    def forward(self, x: Tensor, first: int, second: int) -> Tensor:
        gate = self.router(x).softmax(-1)
        for index in (first, second):
            run = self.experts[index]
            if self.reentrant is None:
                y = run(x)
            else:
                y = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=self.reentrant)
            x = x + gate[:, index : index + 1] * y
        return x


def drawn_in(call: Callable[[], Any]) -> set[str]:
    """Names of the slots that are drawn during a call, together or one by one."""
    names: set[str] = set()
    together, alone = grouped.prepare, bayesify.scope.drawing.realise
    keys = {key_of(f"{n}.{k}"): n for n in [*MIXTURE, "router"] for k in ("weight", "bias")}

    def draw(items: Any, seed: Tensor) -> Any:
        names.update(keys[item.key] for item in items)
        return together(items, seed)

    def realise(module: nn.Module, attribute: str, slot: Any, *rest: Any) -> Tensor:
        names.add(slot.name.rpartition(".")[0])
        return alone(module, attribute, slot, *rest)

    patch = mock.patch.object
    with patch(grouped, "prepare", draw), patch(bayesify.scope.drawing, "realise", realise):
        call()
    return names


MIXTURE = [f"experts.{index}" for index in range(8)]


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_mixture_of_experts_draws_what_it_reads(reentrant: bool | None) -> None:
    plain = Mixture(reentrant)
    model = bayesify.to_bbb(plain, initial_std=math.exp(LOGVAR / 2))
    x = torch.randn(5, 4, requires_grad=True)
    assert drawn_in(lambda: model(x, 0, 1)) == {*MIXTURE, "router"}
    for chosen, drawn in (((1, 2), {0, 1, 2}), ((7, 3), {1, 7, 3}), ((0, 1), {0, 1})):
        names = drawn_in(functools.partial(model, x, *chosen))
        if reentrant:  # such a region draws by itself: nothing is drawn for it when a scope opens
            drawn = set(chosen)
        assert names == {"router", *(f"experts.{index}" for index in drawn)}
    expected = functional_call(plain, draws(model, seed=3), (x, 4, 5), {})
    with one_draw(model, seed=3):
        found = model(x, 4, 5)
    torch.testing.assert_close(found, expected)
    loss = bayesify.elbo_loss(found.square().sum(), model, num_data=10)
    loss.backward()
    for site in sites(model):  # the KL divergence reaches also what was not drawn
        assert site.raw.grad is not None, site.name
        assert site.raw.grad.any(), site.name


def test_each_method_has_what_it_reads_drawn_together() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward_a(self, x: Tensor) -> Tensor:
            found: Tensor = self.a(x)
            return found

        def forward_b(self, x: Tensor) -> Tensor:
            found: Tensor = self.b(x)
            return found

    model: Any = bayesify.to_bbb(Two())
    x = torch.randn(2, 3)
    for _ in range(2):
        model.forward_a(x)
        model.forward_b(x)
    with mock.patch.object(bayesify.scope.drawing, "realise", side_effect=AssertionError):
        model.forward_a(x)
        model.forward_b(x)
    assert {site.name: site.slot.drawn is None for site in sites(model)} == {
        "a.weight": False, "a.bias": False, "b.weight": False, "b.bias": False,
    }  # fmt: skip


def test_a_call_that_fails_says_nothing_of_what_is_read() -> None:
    model = bayesify.to_bbb(nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 3)))
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 3))
    assert not model.__dict__[STATE].seldom
