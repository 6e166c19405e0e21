"""The grouped draw on the CPU: the numbers of the plain draw, its gradients, and its memory."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesify
from bayesify import GaussianPrior, scope
from bayesify.kernels import cpu_draw, grouped, native
from bayesify.kernels.buffers import _MOST, Buffers
from bayesify.kernels.noise import BLOCK, fill_by_generators, fill_normal
from bayesify.posterior import sites
from bayesify.priors import Prior
from bayesify.seeds import fold

pytestmark = pytest.mark.usefixtures("library")


class Mixed(nn.Module):
    """Tensors of many shapes, one larger than a block of noise, one not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Linear(400, 400)
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.wide = nn.Linear(3, 2, dtype=torch.float64)
        self.frozen_mean = nn.Parameter(torch.randn(5))

    def forward(self) -> list[Tensor]:
        layers: list[Any] = [self.large, self.conv, self.wide]
        values: list[Tensor] = [v for layer in layers for v in (layer.weight, layer.bias)]
        return [value * 1 for value in (*values, self.scalar, self.empty, self.frozen_mean)]


def mixed() -> Any:
    torch.manual_seed(0)
    model: Any = bayesify.to_bbb(Mixed(), initial_std=math.exp(-1.0))
    for site in sites(model):
        site.raw.data.add_(torch.randn(site.raw.shape))
    return model


def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "possible", lambda: False)


def step(model: Any, seed: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    with bayesify.one_draw(model, seed=seed):
        values = model()
    loss: Any = sum((v.double() * (i + 1)).square().sum() for i, v in enumerate(values))
    loss.backward()
    return values, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_values_and_gradients_are_those_of_the_plain_draw(
    threads: int, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mixed()
    model.frozen_mean.requires_grad_(False)
    values, gradients = step(model, 3)
    drawn: dict[str, Tensor] = {}
    monkeypatch.setattr(scope.drawing, "realise", spy(scope.drawing.realise, drawn))
    step(model, 3)
    assert set(drawn) == {"conv.weight"}  # the one that is not contiguous
    plainly(monkeypatch)
    reference = mixed()
    reference.frozen_mean.requires_grad_(False)
    expected, wanted = step(reference, 3)
    for a, b in zip(values, expected, strict=True):
        exact = library == "torch" or a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=0, atol=0 if exact else 1e-6)
    assert list(gradients) == list(wanted)
    assert "frozen_mean_logvar" in wanted
    assert "frozen_mean" not in wanted
    for name, gradient in gradients.items():
        assert gradient.dtype == wanted[name].dtype
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-6, atol=1e-7, msg=name)


def spy(realise: Callable[..., Tensor], drawn: dict[str, Tensor]) -> Callable[..., Tensor]:
    def watched(module: nn.Module, attribute: str, slot: Any, *args: Any) -> Tensor:
        drawn[slot.name] = realise(module, attribute, slot, *args)
        return drawn[slot.name]

    return watched


def test_gradients_accumulate(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = mixed(), mixed()
    for seed in range(3):
        _, found = step(model, seed)
    plainly(monkeypatch)
    for seed in range(3):
        _, expected = step(reference, seed)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_two_graphs_at_once_and_a_graph_that_is_kept() -> None:
    layer = bayesify.to_bbb(nn.Linear(4, 3), initial_std=math.exp(-0.5)).train()
    x = torch.randn(2, 4)

    def loss(seed: int) -> Tensor:
        with bayesify.one_draw(layer, seed=seed):
            return layer(x).square().sum()  # type: ignore[no-any-return]

    def gradient(value: Tensor, **options: Any) -> Tensor:
        return torch.autograd.grad(value, layer.weight_logvar, **options)[0]  # type: ignore[arg-type]

    alone = [gradient(loss(seed)).clone() for seed in (1, 2)]
    first, second = loss(1), loss(2)
    assert torch.equal(gradient(second, retain_graph=True), alone[1])
    assert torch.equal(gradient(second, retain_graph=True), alone[1])
    assert torch.equal(gradient(first), alone[0])
    assert torch.equal(gradient(second), alone[1])


def test_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    def curvature() -> list[Tensor]:
        torch.manual_seed(0)
        layer = bayesify.to_bbb(nn.Linear(4, 3), initial_std=math.exp(-0.5)).train()
        parameters = list(layer.parameters())
        with bayesify.one_draw(layer, seed=1):
            value = layer(torch.ones(2, 4)).pow(3).sum()
        first = torch.autograd.grad(value, parameters, create_graph=True)
        total = sum(g.square().sum() for g in first)
        return list(torch.autograd.grad(total, parameters))  # type: ignore[arg-type]

    found = curvature()
    plainly(monkeypatch)
    for a, b in zip(found, curvature(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_kl", [False, True])
def test_sparse_gradients(with_kl: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        layer = bayesify.to_bbb(nn.Embedding(6, 3, sparse=True), initial_std=math.exp(-0.5)).train()
        with bayesify.one_draw(layer, seed=1):
            loss = layer(torch.tensor([1, 1, 4])).square().sum()
        (loss + bayesify.kl_divergence(layer) if with_kl else loss).backward()
        found = [p.grad for p in layer.parameters()]
        assert all(g.is_sparse != with_kl for g in found if g is not None)
        return [g.to_dense() for g in found if g is not None]

    found = gradients()
    plainly(monkeypatch)
    for a, b in zip(found, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_batched_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def jacobian() -> Tensor:
        torch.manual_seed(0)
        layer = bayesify.to_bbb(nn.Linear(4, 3), initial_std=math.exp(-0.5)).train()
        with bayesify.one_draw(layer, seed=1):
            y = layer(torch.ones(4))
        rows = torch.autograd.grad(
            y, layer.weight_logvar, torch.eye(3), is_grads_batched=True,  # type: ignore[arg-type]
        )  # fmt: skip
        return rows[0]

    found = jacobian()
    plainly(monkeypatch)
    torch.testing.assert_close(found, jacobian(), rtol=1e-6, atol=1e-7)


def test_repeated_draws_are_the_same_draws(threads: int) -> None:
    items = [
        grouped.Item(s.mean, s.raw, s.slot.key, s.slot.buffers)
        for s in sites(mixed())
        if grouped.suits(s.mean, s.raw)
    ]
    repeated = grouped.Repeated(items)
    seeds = [3, (1 << 62) + 1, 0]
    stacked = repeated.stack(seeds)
    for k, seed in enumerate(seeds):
        with torch.no_grad():
            expected = [value.clone() for value, _ in grouped.draw(items, torch.tensor(seed))]
        for a, b, c in zip(expected, repeated.draw(seed), stacked, strict=True):
            assert a.dtype == b.dtype == c.dtype
            assert torch.equal(a, b)
            assert torch.equal(a, c[k])


# -- the KL divergence that hangs on draws ---------------------------------------------------


NORMAL = GaussianPrior()


def network(prior: Prior = NORMAL) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 3))
    converted = bayesify.to_bbb(model, initial_std=math.exp(-1.5), prior=prior).train()
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    # weights without a KL, in the midst of others and at the end
    held = torch.zeros(200, 300, dtype=torch.bool)
    held[7], held[:, 11], held[-1, -3:] = True, True, True
    return bayesify.fix_(converted, {"0.weight": held})


def likelihood(model: Any, seed: int = 1) -> Tensor:
    with bayesify.one_draw(model, seed=seed):
        value: Tensor = model(torch.ones(2, 300)).square().sum()
    return value


def after(model: Any) -> None:
    (likelihood(model) + 0.3 * bayesify.kl_divergence(model)).backward()


def before(model: Any) -> None:
    kl = bayesify.kl_divergence(model)
    (likelihood(model) + 0.3 * kl).backward()


def without_forward(model: Any) -> None:
    bayesify.kl_divergence(model).backward()


def apart(model: Any) -> None:
    loss = likelihood(model)
    kl = bayesify.kl_divergence(model)
    loss.backward()
    kl.backward()


def apart_the_other_way(model: Any) -> None:
    loss = likelihood(model)
    kl = bayesify.kl_divergence(model)
    kl.backward()
    loss.backward()


def alone(model: Any) -> None:
    likelihood(model)
    bayesify.kl_divergence(model).backward()


def after_the_backward(model: Any) -> None:
    loss = likelihood(model)
    loss.backward()
    bayesify.kl_divergence(model).backward()


def twice(model: Any) -> None:
    loss = likelihood(model)
    (loss + bayesify.kl_divergence(model) + 2 * bayesify.kl_divergence(model)).backward()


def two_draws(model: Any) -> None:
    loss = likelihood(model, 1) + likelihood(model, 2)
    (loss + bayesify.kl_divergence(model)).backward()


def accumulated(model: Any) -> None:
    for seed in range(3):
        (likelihood(model, seed) + bayesify.kl_divergence(model)).backward()


def scaled(model: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled: Any = scaler.scale(likelihood(model) + bayesify.kl_divergence(model))
    scaled.backward()


def at_the_means(model: Any) -> None:
    with bayesify.at_mean(model):
        loss = model(torch.ones(2, 300)).square().sum()
    (loss + bayesify.kl_divergence(model)).backward()


def kept(model: Any) -> None:
    loss = likelihood(model) + bayesify.kl_divergence(model)
    loss.backward(retain_graph=True)
    loss.backward()


def after_a_step(model: Any) -> None:
    likelihood(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    bayesify.kl_divergence(model).backward()


def with_frozen_means(model: Any) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("_logvar"))
    after(model)


def twice_differentiated(model: Any) -> None:
    loss = likelihood(model) + bayesify.kl_divergence(model)
    first = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    total: Any = sum(g.square().sum() for g in first)
    total.backward()


PRIORS: dict[str, Callable[[], bayesify.Prior]] = {
    "standard": bayesify.GaussianPrior,
    "initial": lambda: bayesify.GaussianPrior(mean="initial", std=0.3),
    "live": lambda: bayesify.LivePrior(lambda name: (torch.tensor(0.1), torch.tensor(0.5))),
}


@pytest.mark.parametrize(
    "how",
    [after, before, without_forward, apart, apart_the_other_way, alone, after_the_backward, twice,
     two_draws, accumulated, scaled, at_the_means, kept, after_a_step, with_frozen_means,
     twice_differentiated],
)  # fmt: skip
@pytest.mark.parametrize("prior", PRIORS)
def test_the_gradient_of_the_kl_is_that_of_the_reference(
    how: Callable[[Any], None], prior: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reference = network(PRIORS[prior]()), network(PRIORS[prior]())
    how(model)
    plainly(monkeypatch)
    how(reference)
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            scale = float(b.grad.abs().max())
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("tensors", [False, True])
def test_the_value_of_the_kl_is_that_of_torch_distributions(tensors: bool) -> None:
    def source(name: str) -> tuple[Tensor, Tensor]:
        shape = dict(model.named_parameters())[name].shape
        return torch.full(shape, 0.2), torch.linspace(0.5, 2, shape.numel()).reshape(shape)

    prior = bayesify.LivePrior(source) if tensors else bayesify.GaussianPrior(std=0.7)
    model = network(prior)
    likelihood(model)
    found = bayesify.kl_divergence(model)
    expected = 0.0
    for site in sites(model):
        mean, var = source(site.name) if tensors else (torch.tensor(0.0), torch.tensor(0.49))
        drawn = site.std > 0
        terms = torch.distributions.kl_divergence(
            torch.distributions.Normal(site.mean.double()[drawn], site.std.double()[drawn]),
            torch.distributions.Normal(
                mean.double().expand_as(drawn)[drawn], var.double().sqrt().expand_as(drawn)[drawn]
            ),
        )
        expected += float(terms.detach().sum())
    assert float(found.detach()) == pytest.approx(expected, rel=1e-6)


def test_a_kl_hangs_on_draws_and_makes_no_other_gradient() -> None:
    model = network()
    loss = likelihood(model) + bayesify.kl_divergence(model)
    assert all(site.slot.drawn is None for site in sites(model))
    edges = {id(p): 0 for p in model.parameters()}
    stack, seen = [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            variable = getattr(following, "variable", None)
            if variable is not None:
                edges[id(variable)] += 1
            stack.append(following)
    assert set(edges.values()) == {1}


def test_a_step_between_forward_and_backward_is_an_error() -> None:
    model = network()
    loss = likelihood(model)
    with torch.no_grad():
        model[0].weight_logvar.add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
        loss.backward()


def test_a_second_backward_is_an_error() -> None:
    layer = bayesify.to_bbb(nn.Linear(3, 2), initial_std=math.exp(-0.5)).train()
    with bayesify.one_draw(layer, seed=1):
        first, second = (layer(torch.ones(1, 3)).sum() for _ in range(2))
    first.backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        second.backward()


# -- the noise -------------------------------------------------------------------------------


def test_generated_noise_does_not_depend_on_the_number_of_threads(threads: int) -> None:
    tensor = torch.empty(2 * BLOCK + 5)
    fill_by_generators([(tensor, 7)])
    expected = [
        torch.empty(n).normal_(generator=torch.Generator().manual_seed(seed))
        for n, seed in ((BLOCK, 7), (BLOCK, fold(7, 1)), (5, fold(7, 2)))
    ]
    assert torch.equal(tensor, torch.cat(expected))


def test_threads_of_an_inference(threads: int) -> None:
    layer = bayesify.to_bbb(nn.Linear(500, 500), initial_std=math.exp(-0.5)).eval()
    x = torch.ones(1, 500)
    found = []
    for mode in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
        with mode, bayesify.one_draw(layer, seed=1):
            found.append(layer(x).detach().clone())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def _fill_in_child(tensor: Tensor, expected: Tensor) -> None:
    fill_normal([(tensor, 7)], 5)
    # not torch.equal: OpenMP's own threads do not outlive a fork
    assert tensor.numpy().tobytes() == expected.numpy().tobytes()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_has_threads_of_its_own() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = torch.empty(3 * BLOCK)
        fill_normal([(expected, 7)], 5)
        child = multiprocessing.get_context("fork").Process(
            target=_fill_in_child, args=(torch.empty(3 * BLOCK), expected)
        )
        child.start()
        child.join(10)
        hangs = child.is_alive()
        child.kill()
        child.join()
    finally:
        torch.set_num_threads(threads)
    assert not hangs
    assert child.exitcode == 0


# -- the memory ------------------------------------------------------------------------------


def test_a_training_step_uses_the_memory_of_the_one_before() -> None:
    layer = bayesify.to_bbb(nn.Linear(64, 64), initial_std=math.exp(-0.5)).train()
    optimizer = torch.optim.SGD(bayesify.param_groups(layer, lr=0.1))
    places: list[set[int]] = []
    for _ in range(4):
        optimizer.zero_grad()
        layer(torch.randn(3, 64)).square().sum().backward()
        (site, _) = sites(layer)
        assert site.raw.grad is not None
        places.append({s.data_ptr() for s in site.slot.buffers.kept()})
        assert site.raw.grad.data_ptr() in places[-1]  # computed in place of sigma times noise
        optimizer.step()
    assert len(places[0]) == 2
    assert all(p == places[0] for p in places)


def test_a_draw_that_is_held_is_not_overwritten() -> None:
    layer: Any = bayesify.to_bbb(nn.Linear(8, 8), initial_std=math.exp(-0.5)).eval()
    held, copies = [], []
    for seed in range(6):
        with torch.no_grad(), bayesify.one_draw(layer, seed=seed):
            layer(torch.ones(1, 8))
            (mode,) = scope.open_modes()
            assert mode.scope is not None
            held.append(next(iter(mode.scope.realised.values())))
            copies.append(held[-1].clone())
    assert len({tensor.data_ptr() for tensor in held}) == 6
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))
    assert len(next(sites(layer)).slot.buffers.kept()) == _MOST


def test_buffers_know_when_they_are_free() -> None:
    buffers, like = Buffers(), torch.zeros(2, 3)
    first = buffers.take(like)
    second = buffers.take(like)
    assert first.shape == (2, 3)
    assert first.data_ptr() != second.data_ptr()
    place, view = first.data_ptr(), first[0]
    del first
    assert buffers.take(like).data_ptr() != place  # a view holds it
    del view
    again = buffers.take(like)
    assert again.data_ptr() == place
    assert buffers.take(torch.zeros(7)).shape == (7,)  # another size: the others are let go
    assert len(buffers.kept()) == 1
    half = buffers.take(torch.zeros(7), torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert len(buffers.kept()) == 2  # beside the others, not in their place


def test_a_model_that_moves_lets_go_of_its_memory() -> None:
    layer = bayesify.to_bbb(nn.Linear(8, 8), initial_std=math.exp(-0.5)).train()
    layer(torch.ones(1, 8))
    assert next(sites(layer)).slot.buffers.kept()
    layer.double()
    assert not next(sites(layer)).slot.buffers.kept()


def test_a_copy_has_memory_of_its_own() -> None:
    import copy

    layer = bayesify.to_bbb(nn.Linear(8, 8), initial_std=math.exp(-0.5)).train()
    layer(torch.ones(1, 8))
    other = copy.deepcopy(layer)
    assert next(sites(other)).slot.buffers is not next(sites(layer)).slot.buffers


# -- plain torch -----------------------------------------------------------------------------


def test_draws_without_the_library_are_those_of_one_thread_and_plain_expressions(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are finished where their noise was made, in strips: every bit is the same."""
    monkeypatch.setattr(native, "_library", lambda: None)
    sizes = [1, 5, BLOCK - 16, 2 * BLOCK + (1 << 15) + 5]
    items = [
        grouped.Item(nn.Parameter(torch.randn(n)), nn.Parameter(torch.randn(n)), n, Buffers())
        for n in sizes
    ]
    for (value, hook), item in zip(grouped.draw(items, torch.tensor(9)), items, strict=True):
        blocks = range(0, item.mean.numel(), BLOCK)
        seeds = [fold(fold(9, item.key), i) if i else fold(9, item.key) for i in range(len(blocks))]
        noise = torch.cat([
            torch.empty(min(BLOCK, item.mean.numel() - start))
            .normal_(generator=torch.Generator().manual_seed(seed))
            for start, seed in zip(blocks, seeds, strict=True)
        ])  # fmt: skip
        std = torch.exp(0.5 * item.logvar.detach())
        torch.testing.assert_close(value, item.mean + std * noise, rtol=1e-6, atol=1e-6)
        assert hook is not None
        assert hook.node.half is not None
        assert torch.equal(value, item.mean + 2 * hook.node.half)


@pytest.mark.parametrize("far", [True, False])
def test_expm1_is_that_of_torch(far: bool) -> None:
    """Also where posterior and prior nearly agree, and where they do not at all."""
    x = torch.linspace(-20, -0.5001, 4000)
    if not far:
        near = torch.logspace(-10, 1.9, 4000)
        x = torch.cat([x, near, -near, torch.tensor([0.0, -0.5, 90.0, math.inf])])
    x = torch.cat([x, torch.tensor([-math.inf, -200.0])])
    assert cpu_draw._expm1(torch.tensor([-1.0, math.nan])).isnan().tolist() == [False, True]
    found, wide = cpu_draw._expm1(x), torch.expm1(x.double())
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, wide.float(), rtol=2e-7, atol=2e-16, equal_nan=True)
    excess = found.sub_(x)
    torch.testing.assert_close(excess, torch.expm1(x) - x, rtol=1e-6, atol=1e-7, equal_nan=True)
