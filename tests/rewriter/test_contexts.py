"""Parts of a model under autocast, without gradient and checkpointed, in first and later calls."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from bayesify import draws, kl_divergence, one_draw, sampled, to_bbb


class Block(nn.Module):
    """A residual block whose body runs in a context of its own."""

    def __init__(self, width: int, inner: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.ones(width))
        self.inner = inner

    def body(self, x: Tensor) -> Tensor:
        change: Tensor = self.scale * self.down(torch.relu(self.up(self.norm(x))))
        return x + change

    def forward(self, x: Tensor) -> Tensor:
        if self.inner == "no autocast":
            with torch.autocast("cpu", enabled=False):
                return self.body(x.float())
        if self.inner == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.body(x)
        if self.inner == "no grad":
            with torch.no_grad():
                return self.body(x)
        if self.inner.startswith("checkpoint"):
            reentrant = self.inner == "checkpoint, reentrant"
            result: Tensor = checkpoint(self.body, x, use_reentrant=reentrant)
            return result
        return self.body(x)


class Net(nn.Module):
    """Bare, tied and attention's parameters around two blocks."""

    def __init__(self, inner: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.pos = nn.Parameter(torch.randn(1, 9, 8) / 10)
        self.blocks = nn.Sequential(Block(8, inner), Block(8, "plain"))
        self.att = nn.MultiheadAttention(8, 2, batch_first=True)
        self.emb = nn.Embedding(5, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)
        self.head.weight = self.emb.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).flatten(2).transpose(1, 2) + self.pos + self.emb(torch.arange(9) % 5)
        y = self.blocks(y)
        logits: Tensor = self.head(self.norm(y + self.att(y, y, y)[0]).mean(1))
        return logits


INNER = (
    "plain", "autocast", "no autocast", "no grad", "checkpoint", "checkpoint, reentrant",
)  # fmt: skip
PARTS: dict[str, dict[str, Any]] = {
    "all": {}, "last layer": {"preset": "last-layer"}, "bare": {"only": "pos"},
    "no stem": {"skip": ["stem", "LayerNorm"]}, "one layer": {"only": "blocks.0.up"},
}  # fmt: skip


@contextmanager
def _without_gradient() -> Iterator[None]:
    # in float32 attention's fast path would differ by rounding
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        yield


AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nothing": nullcontext,
    "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "float16": lambda: torch.autocast("cpu", torch.float16),
    "no cache": lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    "no grad": _without_gradient,
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("inner", INNER)
def test_a_part_computes_what_functional_call_does(inner: str, part: str) -> None:
    torch.manual_seed(0)
    net, x = Net(inner), torch.randn(2, 3, 6, 6)
    for around in AROUND.values():
        model = to_bbb(net, initial_std=math.exp(-1.5), **PARTS[part]).eval()
        means = {n: p for n, p in model.named_parameters() if not n.endswith("logvar")}
        for seed in (1, 2):  # the first call traces, the second one has learnt what is read how
            images = x.clone().requires_grad_()
            with around(), sampled(model), one_draw(model, seed):
                out = model(images)
                kl = kl_divergence(model)
            with around():
                expected = functional_call(net.eval(), {**means, **draws(model, seed)}, (images,))
            assert type(out) is Tensor  # not an example of a trace
            assert torch.equal(out, expected)
            if out.requires_grad:
                (out.float().square().sum() + 1e-3 * kl).backward()
                grads = [p.grad for p in model.parameters()]
                assert all(g is None or type(g) is Tensor for g in grads)
