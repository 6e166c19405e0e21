"""Invariant 8: compile, checkpointing, vmap, autocast, accumulation, DDP and FSDP2."""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import socket
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.spawn import start_processes
from torch.utils.checkpoint import checkpoint

import bayesify
from bayesify import at_mean, draws, kl_divergence, one_draw, sampled, torch_support
from bayesify.posterior import sites
from reference import functional_call


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = normal(3, 4)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), nn.Linear(8, 2)
    )


def converted(model: nn.Module | None = None) -> Any:
    return bayesify.to_bbb(net() if model is None else model, initial_std=math.exp(-1.5)).train()


def at(model: Any, seed: int | Tensor, *args: Any) -> Any:
    with one_draw(model, seed=seed):
        return model(*args)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


# -- torch.compile ---------------------------------------------------------------------------


@pytest.fixture
def compiler() -> Any:
    """A backend that counts the graphs it compiles."""
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def test_compile_gives_the_draw_of_the_seed(compiler: Any) -> None:
    model = converted()
    compiled: Any = torch.compile(model, fullgraph=True, backend=compiler)
    for seed in range(3):
        found = at(model, seed, X)
        compiled_found = []
        with one_draw(model, seed=seed):
            compiled_found.append(compiled(X))
        torch.testing.assert_close(compiled_found[0], found, rtol=1e-6, atol=1e-6)
        found.square().sum().backward()
        expected = gradients(model)
        compiled_found[0].square().sum().backward()
        assert_close(gradients(model), expected)
        assert len(expected) == 2 * len(list(sites(model)))
    assert compiler.frame_count == 1  # another seed is no other program


def test_compiled_training_draws_anew_without_recompilation(compiler: Any) -> None:
    model = converted()
    compiled: Any = torch.compile(model, fullgraph=True, backend=compiler)
    torch.manual_seed(1)
    found = [compiled(X) for _ in range(4)]
    torch.manual_seed(1)
    expected = [model(X) for _ in range(4)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert not torch.equal(found[0], found[1])
    assert compiler.frame_count == 1


def test_compiled_eval_uses_the_means(compiler: Any) -> None:
    model = converted().eval()
    compiled: Any = torch.compile(model, fullgraph=True, backend=compiler)
    assert torch.equal(compiled(X), model(X))
    with sampled(model):
        assert not torch.equal(compiled(X), compiled(X))
    with at_mean(model.train()):
        torch.testing.assert_close(compiled(X), model.eval()(X))
    before = compiler.frame_count
    for _ in range(3):
        with sampled(model):
            compiled(X)
    assert compiler.frame_count == before


def test_compiled_updates_are_seen(compiler: Any) -> None:
    model = converted()
    compiled: Any = torch.compile(model, fullgraph=True, backend=compiler)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(3):
        with one_draw(model, seed=seed):
            loss = compiled(X).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with one_draw(model, seed=seed):
            torch.testing.assert_close(compiled(X), model(X), rtol=1e-6, atol=1e-6)
    assert compiler.frame_count == 1


def test_compile_a_vision_transformer(compiler: Any) -> None:
    model = converted(timm.create_model("test_vit", num_classes=3, depth=2))
    x = normal(2, 3, 160, 160)
    compiled: Any = torch.compile(model, fullgraph=True, backend=compiler)
    for seed in range(2):
        with one_draw(model, seed=seed):
            found = compiled(x)
        torch.testing.assert_close(found, at(model, seed, x), rtol=1e-5, atol=1e-5)
    assert compiler.frame_count == 1


class _BySize(nn.Module):
    """Its graph hangs on the number of rows, and on whether there are more than four."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y[: len(x) // 2].sum(0) if len(x) > 4 else y.mean(0)


def _pooled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 2),
    )  # fmt: skip


IMAGES = [(4, 3, 9, 9), (4, 3, 12, 12), (4, 3, 10, 14), (6, 3, 10, 14), (7, 3, 10, 14)]
ROWS = [(3, 4), (4, 4), (6, 4), (2, 4), (9, 4), (8, 4)]


@pytest.mark.parametrize(
    ("make", "sizes", "dynamic"),
    [
        (_pooled, IMAGES, True),
        (_BySize, ROWS, None),
        (_BySize, ROWS, False),
        pytest.param(_pooled, IMAGES, None, marks=pytest.mark.slow),
        pytest.param(_pooled, IMAGES, False, marks=pytest.mark.slow),
        pytest.param(_BySize, ROWS, True, marks=pytest.mark.slow),
    ],
)
def test_compile_takes_one_graph_for_each_size(
    make: Callable[[], nn.Module], sizes: list[tuple[int, ...]], dynamic: bool | None
) -> None:
    torch._dynamo.reset()
    model, compiler = converted(make()), CompileCounterWithBackend("eager")
    compiled: Any = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=compiler)
    for seed, size in enumerate([*sizes, *sizes]):
        x = normal(*size, seed=seed)
        with one_draw(model, seed=seed):
            found = compiled(x)
        torch.testing.assert_close(found, at(model, seed, x), rtol=1e-5, atol=1e-5)
    assert compiler.frame_count == len(sizes)
    torch._dynamo.reset()


# torch says so of any compiled part whose input is not a leaf
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compile_a_part(compiler: Any) -> None:
    model = converted()
    model[2].compile(fullgraph=True, backend=compiler)
    reference = converted()
    for seed in range(3):
        found = at(model, seed, X)
        torch.testing.assert_close(found, at(reference, seed, X), rtol=1e-6, atol=1e-6)
        found.square().sum().backward()
        at(reference, seed, X).square().sum().backward()
        assert_close(gradients(model), gradients(reference))
    assert not torch.equal(model(X), model(X))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_part_is_not_compiled_again(compiler: Any) -> None:
    model = converted()
    model[2].compile(fullgraph=True, backend=compiler)
    for _ in range(4):
        model(X)
    assert compiler.frame_count == 1


@pytest.mark.slow
def test_inductor() -> None:
    torch._dynamo.reset()
    model = converted(timm.create_model("test_vit", num_classes=3))
    x = normal(2, 3, 160, 160)
    compiled: Any = torch.compile(model, fullgraph=True)
    for seed in range(2):
        expected = at(model, seed, x)
        expected.sum().backward()
        expected_gradients = gradients(model)
        with one_draw(model, seed=seed):
            found = compiled(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        found.sum().backward()
        for name, value in gradients(model).items():
            scale = float(expected_gradients[name].abs().max())
            torch.testing.assert_close(
                value, expected_gradients[name], rtol=1e-3, atol=1e-4 * scale, msg=name
            )


# -- activation checkpointing ----------------------------------------------------------------

HOW = {"none": None, "non-reentrant": False, "reentrant": True}
REENTRANT = list(HOW)[1:]


class Checkpointed(nn.Module):
    """Checkpoints a region that reads a child's bare parameter, twice."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first = nn.Linear(4, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3))
        self.last = nn.Linear(8, 2)

    def region(self, h: Tensor) -> Tensor:
        y: Tensor = self.block(h) * self.block[0].bias
        return y.tanh()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for _ in range(2):
            if self.how == "none":
                h = self.region(h)
            else:
                h = checkpoint(lambda z: self.region(z), h, use_reentrant=HOW[self.how])
        y: Tensor = self.last(h)
        return y


def checkpointed(how: str, calls: int, context: Callable[[Any], Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = converted(Checkpointed(how))
    torch.manual_seed(5)
    with context(model):
        # several draws in one graph: each is recomputed with its own
        loss = sum(model(normal(3, 4, seed=k)).square().sum() for k in range(calls))
        assert isinstance(loss, Tensor)
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("how", REENTRANT)
def test_checkpoint_inside_a_forward(how: str, calls: int) -> None:
    expected = checkpointed("none", calls, nullcontext)
    assert len(expected) == 13
    found = checkpointed(how, calls, nullcontext)
    assert torch.equal(found["loss"], expected["loss"])
    assert_close(found, expected)


@pytest.mark.parametrize("context", [one_draw, lambda m: one_draw(m, seed=4), sampled, at_mean])
@pytest.mark.parametrize("how", REENTRANT)
def test_checkpoint_inside_a_mode(how: str, context: Callable[[Any], Any]) -> None:
    # backward runs after the block has been left
    assert_close(checkpointed(how, 2, context), checkpointed("none", 2, context))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("context", [nullcontext, one_draw, sampled, at_mean])
@pytest.mark.parametrize("how", REENTRANT)
def test_checkpoint_of_a_whole_model(
    how: str, context: Callable[[Any], Any], training: bool
) -> None:
    results = []
    for wrapped in (False, True):
        model = converted().train(training)
        x = X.clone().requires_grad_()
        torch.manual_seed(5)
        with context(model):
            if wrapped:
                y = checkpoint(model, x, use_reentrant=HOW[how])
            else:
                y = model(x)
        torch.manual_seed(77)  # whatever happens before backward
        y.square().sum().backward()
        assert x.grad is not None
        results.append({"y": y.detach(), "x": x.grad, **gradients(model)})
    assert_close(results[1], results[0])


@pytest.mark.parametrize("how", REENTRANT)
def test_checkpointed_parts_of_one_draw(how: str) -> None:
    results = []
    for wrapped in (False, True):
        model = converted()
        x = X.clone().requires_grad_()
        with one_draw(model, seed=3):
            h = model[1](model[0](x))
            h = checkpoint(model[2], h, use_reentrant=HOW[how]) if wrapped else model[2](h)
            y = model[3](h)
        y.square().sum().backward()
        results.append({"y": y.detach(), **gradients(model)})
    assert_close(results[1], results[0])


def test_a_backward_of_two_graphs_in_the_other_order() -> None:
    results = []
    for how in HOW:
        torch.manual_seed(0)
        model = converted(Checkpointed(how))
        torch.manual_seed(5)
        losses = [model(normal(3, 4, seed=k)).square().sum() for k in range(3)]
        for loss in reversed(losses):
            loss.backward()
        results.append(gradients(model))
    assert_close(results[1], results[0])
    assert_close(results[2], results[0])


def test_timm_checkpointing() -> None:
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = converted(timm.create_model("test_vit", num_classes=3))
        model.set_grad_checkpointing(enabled)
        torch.manual_seed(5)
        x = normal(2, 3, 160, 160)
        (model(x).square().sum() + model(x).square().sum()).backward()
        results.append(gradients(model))
    assert len(results[0]) == len(list(model.parameters()))
    for name, value in results[0].items():
        scale = float(value.abs().max())
        torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-5 * scale, msg=name)


def test_checkpointing_switched_on_later() -> None:
    torch.manual_seed(0)
    model = converted(Checkpointed("none"))
    at(model, 1, X).sum().backward()
    gradients(model)
    results = []
    for how in HOW:
        model.how = how
        torch.manual_seed(3)
        at(model, 1, X).square().sum().backward()
        results.append(gradients(model))
    assert_close(results[1], results[0])
    assert_close(results[2], results[0])


# -- vmap ------------------------------------------------------------------------------------


def test_vmap_over_seeds() -> None:
    original = net()
    model = bayesify.to_bbb(original, initial_std=math.exp(-1.5)).eval()
    seeds = torch.tensor([1, 2, 3])

    def functional(seed: Tensor) -> Any:
        return torch.func.functional_call(original, draws(model, seed), (X,))

    def scoped(seed: Tensor) -> Any:
        return at(model, seed, X)

    expected = torch.stack([at(model, int(s), X) for s in seeds])
    for function in (functional, scoped):
        found = torch.vmap(function)(seeds)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)


def test_gradient_through_vmap_over_seeds() -> None:
    model = converted()
    seeds = torch.tensor([4, 5])
    torch.vmap(lambda s: at(model, s, X))(seeds).square().sum().backward()
    found = gradients(model)
    for seed in seeds:
        at(model, int(seed), X).square().sum().backward()
    assert_close(found, gradients(model))


def test_vmap_over_inputs() -> None:
    model = converted()
    with one_draw(model, seed=1):
        found = torch.vmap(model)(normal(5, 3, 4))
        expected = torch.stack([model(x) for x in normal(5, 3, 4)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# -- dtypes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_dtype_of_every_tensor(dtype: torch.dtype) -> None:
    original = timm.create_model("test_vit", num_classes=3).train()
    model = converted(original)
    x = normal(2, 3, 160, 160)
    given = {k: v.detach().requires_grad_() for k, v in draws(model, seed=1).items()}
    at(model, 1, x)  # a variant of another autocast state must not serve
    recorded: list[dict[str, Any]] = []
    results = []
    for which in (original, model):
        seen: dict[str, Any] = {}

        def note(name: str, seen: dict[str, Any] = seen) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, out: Any) -> None:
                seen[name] = ([a.dtype for a in args], out.dtype)

            return hook

        with torch.autocast("cpu", dtype=dtype):
            if which is model:
                at(model, 1, x)  # traced without the hooks
            handles = [m.register_forward_hook(note(n)) for n, m in which.named_modules() if n]
            if which is model:
                results.append(at(model, 1, x))
            else:
                results.append(functional_call(original, given, (x,), {}))
        for handle in handles:
            handle.remove()
        recorded.append(seen)
    assert recorded[1] == recorded[0]
    assert {d for _, d in recorded[0].values()} == {dtype, torch.float32}
    assert results[1].dtype == results[0].dtype
    assert torch.equal(results[1], results[0])
    results[1].float().square().sum().backward()
    expected = torch.autograd.grad(results[0].float().square().sum(), list(given.values()))
    for site, value in zip(sites(model), expected, strict=True):
        assert site.mean.grad is not None
        assert site.mean.grad.dtype == site.raw.dtype == torch.float32
        scale = float(value.abs().max())
        torch.testing.assert_close(site.mean.grad, value, rtol=2e-2, atol=1e-3 * scale)


def test_float64_is_float64_throughout() -> None:
    original = net().double()
    model = converted(original)
    for site in sites(model):  # sigma 1 in 1e-10 would be lost in float32
        with torch.no_grad():
            site.raw.fill_(-46.0)
    x = X.double()
    y = at(model, 1, x)
    assert y.dtype == torch.float64
    assert torch.equal(y, functional_call(original, draws(model, seed=1), (x,), {}))
    assert 0 < float((y - original(x)).detach().abs().max()) < 1e-7
    y.sum().backward()
    assert all(s.mean.grad is not None and s.mean.grad.dtype == torch.float64 for s in sites(model))


def test_bfloat16_model_draws_in_float32() -> None:
    model = bayesify.to_bbb(nn.Linear(64, 64).bfloat16(), initial_std=math.exp(-6.0))
    weight = draws(model, seed=1)["weight"].detach()
    assert weight.dtype == torch.bfloat16
    exact = bayesify.to_bbb(nn.Linear(64, 64), initial_std=math.exp(-6.0))
    exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    expected = draws(exact, seed=1)["weight"].detach()
    assert torch.equal(weight, expected.bfloat16())  # rounded once


# -- gradient accumulation -------------------------------------------------------------------


def test_gradient_accumulation() -> None:
    original = net()
    model = bayesify.to_bbb(original, initial_std=math.exp(-1.5)).train()
    for seed in range(3):
        (at(model, seed, normal(3, 4, seed=seed)).square().mean() / 3).backward()
    found = gradients(model)
    losses = []
    for seed in range(3):
        out = functional_call(original, draws(model, seed=seed), (normal(3, 4, seed=seed),), {})
        losses.append(out.square().mean())
    torch.stack(losses).mean().backward()
    assert_close(found, gradients(model))


def test_microbatches_draw_anew() -> None:
    model = converted()
    torch.manual_seed(2)
    first, second = model(X), model(X)
    assert not torch.equal(first, second)
    first.sum().backward()
    part = gradients(model)
    torch.manual_seed(2)
    torch.autograd.backward([model(X).sum()])
    assert_close(gradients(model), part)


# -- several processes -----------------------------------------------------------------------

SEEDS = (100, 101)


def batch(rank: int) -> Tensor:
    return normal(3, 4, seed=50 + rank)


def whole(tensor: Tensor) -> Tensor:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


def worker(rank: int, kind: str, port: int, folder: str) -> None:
    """One of two processes: a step with its own draw, an implicit draw, and the KL."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        plain = converted()
        model = plain
        if kind == "ddp":
            model = nn.parallel.DistributedDataParallel(plain)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (2,))
            for part in (plain[0], plain[2], plain[3], plain):
                fully_shard(part, mesh=mesh)
        found: dict[str, Any] = {"types": [type(p).__name__ for p in plain.parameters()]}
        found["class"] = [k.__name__ for k in type(plain).__mro__]
        with one_draw(model, seed=SEEDS[rank]):
            out = model(batch(rank))
        out.square().mean().backward()
        found["out"] = out.detach()
        found["grads"] = {n: whole(p.grad) for n, p in plain.named_parameters()}
        plain.zero_grad()
        torch.manual_seed(7)  # every rank seeds alike, as training scripts do
        with torch.no_grad():
            found["implicit"] = [model(X), model(X)]
            found["mean"] = model.eval()(X)
        kl = kl_divergence(plain)
        kl.backward()
        found["kl"] = whole(kl)
        found["kl_grads"] = {n: whole(p.grad) for n, p in plain.named_parameters()}
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
        model.train()
        for _ in range(2):
            optimizer.zero_grad()
            model(batch(rank)).square().mean().backward()
            optimizer.step()
        found["trained"] = {n: whole(p) for n, p in plain.named_parameters()}
        torch.save(found, Path(folder, f"{kind}{rank}.pt"))
        dist.barrier()
        os._exit(0)  # gloo's threads can abort an interpreter that shuts down beside a mesh
    finally:
        dist.destroy_process_group()


def run_two(kind: str, folder: Path) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # out of a server that has imported what takes seconds, one with that of the other tests
    multiprocessing.get_context("forkserver").set_forkserver_preload(["recipes.byov.train", "timm"])
    context = start_processes(
        worker, (kind, port, str(folder)), nprocs=2, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + 180
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < deadline, f"{kind}: the two processes did not finish"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [torch.load(folder / f"{kind}{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param == "fsdp2" and torch_support.installed() < (2, 7):
        pytest.skip("FSDP2 of torch 2.6 itself does not run on the CPU")
    return request.param, run_two(request.param, tmp_path_factory.mktemp("two"))


def test_distributed_gradients_are_those_of_two_microbatches(two: Any) -> None:
    kind, ranks = two
    reference = converted()
    losses = []
    for rank in range(2):
        out = at(reference, SEEDS[rank], batch(rank))
        torch.testing.assert_close(ranks[rank]["out"], out.detach(), rtol=1e-5, atol=1e-6)
        losses.append(out.square().mean())
    torch.stack(losses).mean().backward()
    expected = gradients(reference)
    for found in ranks:
        assert_close(found["grads"], expected)
        assert "Sequential" in found["class"]
        assert set(found["types"]) == ({"Parameter"} if kind == "ddp" else {"DTensor"})


def test_distributed_draws_differ_by_rank(two: Any) -> None:
    first, second = (found["implicit"] for found in two[1])
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[0], first[1])
    assert torch.equal(two[1][0]["mean"], two[1][1]["mean"])
    expected = net()(X).detach()
    torch.testing.assert_close(two[1][0]["mean"], expected, rtol=1e-5, atol=1e-6)


def test_distributed_kl_is_global(two: Any) -> None:
    reference = converted()
    kl = kl_divergence(reference)
    kl.backward()
    expected = gradients(reference)
    for found in two[1]:
        torch.testing.assert_close(found["kl"], kl.detach(), rtol=1e-6, atol=0)
        assert_close(found["kl_grads"], expected)


def test_distributed_replicas_stay_equal(two: Any) -> None:
    first, second = (found["trained"] for found in two[1])
    start = dict(converted().named_parameters())
    for name, value in first.items():
        assert torch.equal(value, second[name])
        assert not torch.equal(value, start[name])


def test_the_reference_is_not_degenerate() -> None:
    """The two microbatches must have different draws, or the tests above compare nothing."""
    reference = converted()
    one, other = (at(copy.deepcopy(reference), seed, X) for seed in SEEDS)
    assert float((one - other).detach().abs().max()) > 1e-2
