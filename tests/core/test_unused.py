"""Parameters that a forward skips, in two processes under DistributedDataParallel, with the KL."""

import dataclasses
import math
import os
import socket
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from bayesify import at_mean, elbo_loss, kl_divergence, one_draw, sampled, to_bbb
from bayesify.priors import GaussianPrior, ScaleMixturePrior
from bayesify.seeds import fold

SEED, STEPS = 100, 3


@dataclasses.dataclass
class Output:
    """What torch does not know as a structure."""

    logits: Tensor
    name: str


class Branches(nn.Module):
    """Residual branches, of which a call takes some."""

    def __init__(self, kind: str = "tensor") -> None:
        super().__init__()
        self.stem = nn.Linear(4, 5)
        self.branches = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(5))
        self.aside = nn.Linear(5, 1)
        self.head = nn.Linear(5, 2)
        self.kind = kind

    def forward(self, x: Tensor, taken: tuple[int, ...]) -> Any:
        y = self.stem(x)
        for index in taken:
            y = y + torch.tanh(self.branches[index](y)) * self.scale
        self.aside(y)  # computed, and led to by no output
        logits = self.head(y)
        if self.kind == "dict":
            return {"logits": logits, "features": [y], "name": "x"}
        return Output(logits, "x") if self.kind == "dataclass" else logits


class Around(nn.Module):
    """A user's module with a converted one in it, whose output it changes in place."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, taken: tuple[int, ...]) -> Tensor:
        out: Tensor = self.inner(x, taken)
        return out.mul_(2.0)


def built(kind: str) -> nn.Module:
    torch.manual_seed(0)
    output = kind if kind in ("dict", "dataclass") else "tensor"
    prior = ScaleMixturePrior() if kind == "mixture" else GaussianPrior()
    model = to_bbb(Branches(output), initial_std=math.exp(-1.5), prior=prior).train()
    return Around(model) if kind == "inside" else model


def batch(rank: int) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(50 + rank))


def loss_of(out: Any) -> Tensor:
    logits: Tensor = out["logits"] if isinstance(out, dict) else getattr(out, "logits", out)
    return logits.square().mean()


SKIPS: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "none": lambda rank, step: (0, 1, 2),
    "all": lambda rank, step: (0, 2),
    "one": lambda rank, step: (0, 1, 2) if rank else (0,),
    "changing": lambda rank, step: (step % 3, (step + rank) % 3),
}
CASES = [
    ("plain", skip, kl) for skip in SKIPS for kl in ("elbo", "kl", "no kl")
] + [
    ("dict", "changing", "elbo"), ("dataclass", "changing", "elbo"), ("mixture", "all", "elbo"),
    ("inside", "one", "elbo"), ("at mean", "changing", "elbo"), ("anew", "changing", "elbo"),
    ("static graph", "all", "elbo"), ("static graph", "none", "elbo"),
]  # fmt: skip


def total(kind: str, kl: str, model: nn.Module, out: Any) -> Tensor:
    loss = loss_of(out)
    if kl == "elbo":
        return elbo_loss(loss, model, num_data=50)
    return loss + kl_divergence(model) / 50 if kl == "kl" else loss


def block(kind: str, model: nn.Module, step: int) -> Any:
    if kind == "at mean":
        return at_mean(model)
    return sampled(model) if kind == "anew" else one_draw(model, SEED + step)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def worker(rank: int, port: int, folder: str) -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    try:
        for kind, skip, kl in CASES:
            plain = built(kind)
            static = kind == "static graph"
            model = DistributedDataParallel(
                plain, find_unused_parameters=not static, static_graph=static
            )
            each = []
            for step in range(STEPS):
                plain.zero_grad()
                with block(kind, model, step):
                    torch.manual_seed(step)  # on both ranks, so that a new draw is known
                    out = model(batch(rank), SKIPS[skip](rank, step))
                    loss = total(kind, kl, model if step else plain, out)
                loss.backward()
                each.append(gradients(plain))
            found[f"{kind} {skip} {kl}"] = each
        torch.save(found, Path(folder, f"{rank}.pt"))
        dist.barrier()
        os._exit(0)  # gloo's threads can abort an interpreter that shuts down
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("unused")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = spawn(worker, (port, str(folder)), nprocs=2, join=False)
    deadline = time.monotonic() + 180
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < deadline, "the two processes did not finish"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def drawn_by(rank: int, step: int, model: nn.Module) -> Any:
    """The draw that a process takes after ``torch.manual_seed(step)``."""
    generator = torch.Generator().manual_seed(step)
    return one_draw(model, torch.randint(0, 1 << 62, (), generator=generator) + fold(0, rank))


@pytest.mark.parametrize(("kind", "skip", "kl"), CASES, ids=map(", ".join, CASES))
def test_gradients_are_those_of_one_process(two: Any, kind: str, skip: str, kl: str) -> None:
    reference = built(kind)
    for step in range(STEPS):
        reference.zero_grad()
        losses = []
        taken = [SKIPS[skip](rank, step) for rank in range(2)]
        with block(kind, reference, step):
            if taken[0] == taken[1] and kind != "anew":
                out = reference(torch.cat([batch(0), batch(1)]), taken[0])
                total(kind, kl, reference, out).backward()
            else:
                for rank in range(2):
                    with drawn_by(rank, step, reference) if kind == "anew" else nullcontext():
                        out = reference(batch(rank), taken[rank])
                        losses.append(total(kind, kl, reference, out))
                torch.stack(losses).mean().backward()
        expected = gradients(reference)
        for rank in range(2):
            found = two[rank][f"{kind} {skip} {kl}"][step]
            for name, grad in expected.items():
                if grad is None:  # what torch does with what no process used
                    assert found[name] is None, name
                else:
                    torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-7, msg=name)
