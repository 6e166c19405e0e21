"""Gradients come in the order of a deterministic model, so that DDP sends while autograd works."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bayesify
from bayesify import draws, kl_divergence, one_draw, posteriors, to_bbb
from bayesify.posterior import sites
from bayesify.scope import LOCAL


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Stack(nn.Module):
    """Three layers, each of which may be a checkpointed region."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
            x = x.relu()
        return x


def layers_of(model: nn.Module) -> nn.ModuleList:
    layers = model.layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def order(model: nn.Module, loss: Any) -> list[str]:
    """Means that get their gradients and layers that have given theirs on, one after the other."""
    events: list[str] = []
    for name, parameter in model.named_parameters():
        if not name.endswith("_logvar"):
            parameter.register_post_accumulate_grad_hook(lambda _, n=name: events.append(n))
    for index, layer in enumerate(layers_of(model)):
        layer.register_full_backward_hook(lambda *_, i=index: events.append(f"[{i}]"))
    for _ in range(2):
        events.clear()
        loss().backward()
    return events


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_each_gradient_comes_before_the_next_layer_begins(kl: bool, checkpointed: bool) -> None:
    plain = Stack(checkpointed)
    model = to_bbb(plain).train()
    x = X.clone().requires_grad_()
    expected = order(plain, lambda: plain(x).sum())
    found = order(model, lambda: model(x).sum() + (kl_divergence(model) if kl else 0.0))
    assert found == expected
    assert expected.index("layers.2.weight") < expected.index("[1]")


@pytest.mark.usefixtures("group")
def test_two_views_of_one_draw_end_with_the_first_of_them() -> None:
    plain = Stack()
    model = to_bbb(plain).train()
    x = X.clone().requires_grad_()

    def views() -> Tensor:
        with one_draw(model):
            first, second = model(x).sum(), model(2 * x).sum()
            total: Tensor = first + second + kl_divergence(model)
            return total

    assert order(model, views) == order(plain, lambda: plain(x).sum() + plain(2 * x).sum())


def gradients_of(model: nn.Module, loss: Tensor) -> list[Tensor]:
    parameters = [p for q in posteriors(model) for p in (q.mean, q.logvar)]
    return list(torch.autograd.grad(loss, parameters))


@pytest.mark.usefixtures("group")
def test_the_kl_hangs_on_draws_that_were_read_and_on_no_others() -> None:
    model = to_bbb(Stack()).train()
    model(X)
    assert all(site.slot.drawn is not None for site in sites(model))
    layers_of(model)[0](X)
    hung = gradients_of(model, kl_divergence(model))
    alone = gradients_of(model, kl_divergence(model))
    for a, b in zip(hung, alone, strict=True):
        torch.testing.assert_close(a, b)


class Mapped(nn.Module):
    """Its layer is first read inside a transform of torch.func, then outside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.func.vmap(lambda row: self.inner(row).square().sum())(x)
        slope = torch.func.grad(lambda y: self.inner(y).square().sum())(x)
        total: Tensor = rows.sum() + slope.sum() + self.inner(x).sum()
        return total


class Counting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Watched(Mapped):
    """Its layer is first read under a mode that sees every operation."""

    def forward(self, x: Tensor) -> Tensor:
        with Counting():  # type: ignore[no-untyped-call]
            first = self.inner(x).square()
        total: Tensor = first.sum() + self.inner(x).sum()
        return total


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("kind", [Mapped, Watched])
def test_a_first_read_inside_a_transform_or_a_mode(kind: type[nn.Module]) -> None:
    model = to_bbb(kind()).train()
    for _ in range(2):
        with one_draw(model, seed=3):
            found = gradients_of(model, model(X))
        weights = draws(model, seed=3)
        with bayesify.at_mean(model):
            reference = torch.func.functional_call(model, weights, (X,))
        for a, b in zip(found, gradients_of(model, reference), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile asks for it
def test_a_compiled_part_finds_its_draws_made() -> None:
    model = to_bbb(Stack()).train()
    layers = layers_of(model)
    layers[1] = torch.compile(layers[1], backend="eager")  # type: ignore[assignment]
    left: list[int] = []
    local: Any = LOCAL
    layers[0].register_forward_hook(lambda *_: left.append(len(local.scope.later)))
    with one_draw(model, seed=1):
        y = model(X)
    assert left == [0]
    weights = {n.replace("_orig_mod.", ""): w for n, w in draws(model, seed=1).items()}
    torch.testing.assert_close(y, torch.func.functional_call(Stack(), weights, (X,)))


# -- two processes -----------------------------------------------------------------------------


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found: dict[str, list[str]] = {}
    for bayesian in (False, True):
        torch.manual_seed(0)
        plain: nn.Module = Stack()
        if bayesian:
            plain = to_bbb(plain).train()
        events: list[str] = []

        def send(
            _: Any,
            bucket: dist.GradBucket,  # type: ignore[name-defined]
            events: list[str] = events,
        ) -> torch.futures.Future[Tensor]:
            events.append("send")
            work = dist.all_reduce(bucket.buffer(), async_op=True)
            return work.get_future().then(lambda f: f.value()[0])

        for index, layer in enumerate(layers_of(plain)):
            layer.register_full_backward_hook(
                lambda *_, i=index, events=events: events.append(f"[{i}]")
            )
        # a bucket a layer
        model = DistributedDataParallel(plain, bucket_cap_mb=1e-6)
        model.register_comm_hook(None, send)
        for _ in range(3):  # DDP makes its buckets anew after the first
            events.clear()
            x = X.clone().requires_grad_()
            loss = model(x).sum()
            (loss + kl_divergence(plain) if bayesian else loss).backward()
        found[str(bayesian)] = list(events)
    Path(folder, f"{rank}.txt").write_text(repr(found))
    dist.barrier()
    os._exit(0)  # gloo's threads can abort an interpreter that shuts down


def test_ddp_sends_while_the_backward_goes_on(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = spawn(worker, (port, str(tmp_path)), nprocs=2, join=False)
    deadline = time.monotonic() + 120
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < deadline, "the two processes did not finish"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
    for rank in range(2):
        found = eval((tmp_path / f"{rank}.txt").read_text())
        for events in found.values():
            first = {layer: events.index(f"[{layer}]") for layer in (1, 0)}
            # something of the last layer is sent before the others have run
            assert "send" in events[: first[1]], found
            assert events[: first[0]].count("send") >= 2, found
