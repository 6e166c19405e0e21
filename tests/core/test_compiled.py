"""Compiled models: draws and KL divergences as one operator each, held to the eager ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import bayesify
from bayesify import GaussianPrior, ScaleMixturePrior, elbo_loss, kl_divergence, one_draw
from bayesify.kernels import compiled
from bayesify.kernels.buffers import Buffers
from bayesify.posterior import sites

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
Loss = Callable[[nn.Module, Any], None]


def converted(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))
    return bayesify.to_bbb(model, **settings).train()


def once(model: nn.Module, call: Any) -> None:
    elbo_loss(call(X).sum(), model, num_data=1).backward()


def own_sum(model: nn.Module, call: Any) -> None:
    (call(X).sum() + 2 * kl_divergence(model)).backward()


def two_draws(model: nn.Module, call: Any) -> None:
    elbo_loss((call(X) + call(X)).sum(), model, num_data=3).backward()


def two_kls(model: nn.Module, call: Any) -> None:
    loss = call(X).sum()
    (elbo_loss(loss, model, num_data=1) + elbo_loss(loss, model, num_data=2)).backward()


def kl_alone(model: nn.Module, call: Any) -> None:
    call(X)
    kl_divergence(model).backward()


def backward_apart(model: nn.Module, call: Any) -> None:
    loss = call(X).sum()
    kl = kl_divergence(model)
    loss.backward()
    kl.backward()


def kl_after_backward(model: nn.Module, call: Any) -> None:
    loss = call(X).sum()
    loss.backward()
    elbo_loss(call(X[:1]).sum().detach(), model, num_data=1).backward()


def losses_crossed(model: nn.Module, call: Any) -> None:
    """The KL beside a loss goes with the draw of that loss, not with the last draw."""
    with one_draw(model, seed=3):
        first = call(X).sum()
    with one_draw(model, seed=3):
        second = call(X).square().sum()
    elbo_loss(first, model, num_data=1).backward()
    elbo_loss(second, model, num_data=1).backward()


def of_a_part(model: nn.Module, call: Any) -> None:
    part: Any = model
    (call(X).sum() + elbo_loss(call(X).sum(), part[0], num_data=1)).backward()


def after_a_change(model: nn.Module, call: Any) -> None:
    call(X).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    elbo_loss(call(X).sum(), model, num_data=1).backward()


def changed_between(model: nn.Module, call: Any) -> None:
    call(X)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    kl_divergence(model).backward()


def other_prior(model: nn.Module, call: Any) -> None:
    loss = call(X).sum()
    bayesify.set_prior_(model, GaussianPrior(0.5))
    elbo_loss(loss, model, num_data=1).backward()


def frozen(model: nn.Module, call: Any) -> None:
    part: Any = model
    part[0].weight.requires_grad_(False)
    elbo_loss(call(X).sum(), model, num_data=1).backward()


def pruned(model: nn.Module, call: Any) -> None:
    bayesify.prune_(model, 0.5)
    elbo_loss(call(X).sum(), model, num_data=1).backward()


LOSSES: tuple[Loss, ...] = (
    once, own_sum, two_draws, two_kls, kl_alone, backward_apart, kl_after_backward, losses_crossed,
    of_a_part, after_a_change, changed_between, other_prior, frozen, pruned,
)  # fmt: skip
PRIORS = (
    GaussianPrior(0.3), GaussianPrior(1.0, mean="initial"), ScaleMixturePrior(0.5, 1.0, 0.1)
)  # fmt: skip


def gradients(loss: Loss, model: nn.Module, call: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    loss(model, call)
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_the_eager_model(loss: Loss) -> None:
    torch._dynamo.reset()
    expected = gradients(loss, eager := converted(prior=PRIORS[0]), eager)
    model = converted(prior=PRIORS[0])
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = gradients(loss, model, call)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("prior", PRIORS[1:], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("library", ["native", "torch"], indirect=True)
def test_every_prior(prior: Any, library: str) -> None:
    torch._dynamo.reset()
    expected = gradients(once, eager := converted(prior=prior), eager)
    model = converted(prior=prior)
    found = gradients(once, model, torch.compile(model, backend="aot_eager", fullgraph=True))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("prior", PRIORS, ids=lambda p: type(p).__name__)
def test_a_whole_step_in_one_graph(prior: Any) -> None:
    def step(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: elbo_loss(model(x).sum(), model, num_data=1)

    def loss(model: nn.Module, call: Any) -> None:
        call(X).backward()

    torch._dynamo.reset()
    eager, model = converted(prior=prior), converted(prior=prior)
    expected = gradients(loss, eager, step(eager))
    call = torch.compile(step(model), backend="aot_eager", fullgraph=True)
    found = gradients(loss, model, call)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_compiled_step_has_one_operator_each_way() -> None:
    """Beside those of torch: nothing works on each weight by itself."""
    torch._dynamo.reset()
    model = converted()
    call: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    plain: Any = bayesify.to_deterministic(model).train()
    plain_call: Any = torch.compile(plain, backend="aot_eager", fullgraph=True)

    def counts(step: Callable[[], Tensor]) -> Counter[str]:
        for _ in range(2):
            step().backward()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            step().backward()
        return Counter(e.name for e in profiled.events())

    base = counts(lambda: plain_call(X).sum())
    found = counts(lambda: elbo_loss(call(X).sum(), model, num_data=1))
    assert found["bayesify::draws"] == found["bayesify::draws_backward"] == 1
    assert found["bayesify::noise"] == found["bayesify::kl"] == 0
    kernels = ("normal_", "exp", "mul", "sum", "expm1", "log", "div", "where", "addmm", "mm", "sub")
    more = {k: found[f"aten::{k}"] - base[f"aten::{k}"] for k in kernels}
    assert {k: n for k, n in more.items() if n} == {"mul": 2, "sum": 1}  # of the KL and its factor


def test_memory_of_draws_is_used_again() -> None:
    torch._dynamo.reset()
    model = converted()
    call: Any = torch.compile(model, backend="aot_eager", fullgraph=True)

    def kept() -> set[int]:
        found = (s.slot.buffers.kept() for s in sites(model))
        return {storage.data_ptr() for storages in found for storage in storages}

    for _ in range(2):
        once(model, call)
    first = kept()
    assert first
    for _ in range(3):
        model.zero_grad()
        once(model, call)
    assert kept() == first


def test_an_unread_draw_gets_the_gradient_of_its_kl_alone() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.used(x)
            return result

    torch._dynamo.reset()
    model: Any = bayesify.to_bbb(Skips()).train()
    once(model, torch.compile(model, backend="aot_eager", fullgraph=True))
    found = model.unused.weight.grad.clone()
    model.zero_grad()
    kl_divergence(model).backward()
    torch.testing.assert_close(found, model.unused.weight.grad)


def test_draws_whose_backward_never_comes_are_forgotten() -> None:
    torch._dynamo.reset()
    model = converted()
    call: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    first = call(X).sum()
    for _ in range(compiled._MOST_PENDING + 1):
        call(X)
    assert len(compiled._PENDING) == compiled._MOST_PENDING
    elbo_loss(first, model, num_data=1).backward()  # its KL by itself
    assert all(p.grad is not None for p in model.parameters())


def arguments(prior: Tensor | float) -> tuple[Any, ...]:
    torch.manual_seed(0)
    means = [torch.randn(3, 2, requires_grad=True), torch.randn(3, requires_grad=True)]
    logvars = [torch.full((3, 2), -4.0, requires_grad=True), torch.full((3,), -5.0)]
    given = isinstance(prior, Tensor)
    return (
        means, [v.requires_grad_() for v in logvars],
        [prior if given else None, None], [0.0 if given else prior, 0.5],
        [None, None], [1.0, 2.0], [False, True],
    )  # fmt: skip


# opcheck's own
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("prior", [0.25, torch.full((3, 2), 0.25)], ids=["number", "tensor"])
def test_operators_keep_their_promises(prior: Tensor | float) -> None:
    """What torch checks of an operator: schema, fake tensors, autograd, a traced backward."""
    rows = arguments(prior)
    memory = [Buffers(), Buffers()]
    for operator, given in (
        (torch.ops.bayesify.kl.default, rows),
        (
            torch.ops.bayesify.draws.default,
            (*rows[:2], torch.tensor(3), [1, 2], [b.handle for b in memory], True),
        ),
    ):
        torch.library.opcheck(operator, given)


def test_second_derivatives_of_the_kl() -> None:
    model = converted(prior=GaussianPrior(0.5))
    tensors = [t for site in sites(model) for t in site.tensors]
    first = torch.autograd.grad(kl_divergence(model), tensors, create_graph=True)
    second = torch.autograd.grad(sum((g.sum() for g in first), torch.zeros(())), tensors)
    for site, mean, raw in zip(sites(model), second[::2], second[1::2], strict=True):
        torch.testing.assert_close(mean, torch.full_like(mean, 4.0))
        torch.testing.assert_close(raw, 0.5 * site.raw.exp() * 4)


# torch's own, of any compiled vmap
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_vmap_inside_a_compiled_function() -> None:
    torch._dynamo.reset()
    model = converted()

    def each(x: Tensor) -> Tensor:
        result: Tensor = torch.vmap(lambda row: model(row[None])[0])(x)
        return result

    with one_draw(model, seed=4):
        expected = model(X)
        found = torch.compile(each, backend="aot_eager")(X)
    torch.testing.assert_close(found, expected)


def test_with_the_default_compiler() -> None:
    def seeded(model: nn.Module, call: Any) -> None:
        with one_draw(model, seed=5):  # its own random numbers are not those of eager torch
            once(model, call)

    torch._dynamo.reset()
    expected = gradients(seeded, eager := converted(), eager)
    model = converted()
    found = gradients(seeded, model, torch.compile(model, fullgraph=True))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
