"""Modes of a part of a model: they hold for its weights also when the whole model is called."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

import bayesify
from bayesify import at_mean, draws, one_draw, sampled
from bayesify.kernels import grouped
from bayesify.scope import LOCAL
from reference import functional_call

LOGVAR = -2.0
X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A part that is called twice, a layer, and a head whose parameters the model reads itself."""

    def __init__(self, checkpoint: bool | None = None, opaque: bool = False) -> None:
        super().__init__()
        self.checkpoint, self.opaque = checkpoint, opaque
        self.body = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.again = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.opaque and x.detach().sum().item() > 1e9:  # fx cannot follow
            return x
        x = self.again(self.run(self.run(x)))
        return F.linear(x, self.head.weight, self.head.bias)

    def run(self, x: Tensor) -> Any:
        if self.checkpoint is None:
            return self.body(x)
        return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=self.checkpoint)


def net(training: bool = False, /, estimator: Any = "weight", **options: Any) -> Any:
    torch.manual_seed(0)
    model = bayesify.to_bbb(Net(**options), initial_std=math.exp(LOGVAR / 2), estimator=estimator)
    return model.train(training)


def given(model: nn.Module, weights: dict[str, Tensor], x: Tensor = X) -> Tensor:
    """What the model computes with these weights, and with its means for the others."""
    found: Tensor = functional_call(bayesify.to_deterministic(model), weights, (x,), {})
    return found


def drawn(model: nn.Module, seed: int, *parts: str) -> dict[str, Tensor]:
    """Of one draw of the model the weights of some parts."""
    return {k: v for k, v in draws(model, seed).items() if k.split(".")[0] in parts}


@pytest.mark.parametrize("options", [{}, {"opaque": True}], ids=["graph", "fallback"])
@pytest.mark.parametrize("training", [False, True])
def test_a_part_at_its_means_or_in_one_draw(training: bool, options: dict[str, bool]) -> None:
    model = net(training, **options)
    others = {"body", "again", "head"}
    for name in others:
        part = model.get_submodule(name)
        with torch.no_grad():
            with one_draw(model, seed=5), at_mean(part):
                assert torch.equal(model(X), given(model, drawn(model, 5, *others - {name})))
            with at_mean(model), one_draw(part, seed=5):
                assert torch.equal(model(X), given(model, drawn(model, 5, name)))
            with one_draw(model, seed=5), one_draw(part, seed=6):
                both = drawn(model, 5, *others - {name}) | drawn(model, 6, name)
                assert torch.equal(model(X), given(model, both))
            with at_mean(part):
                assert torch.equal(model(X), model(X)) is not training
            with sampled(part):
                assert not torch.equal(model(X), model(X))
    with torch.no_grad(), at_mean(model):
        assert torch.equal(model(X), given(model, {}))
    ways = {r.rung for r in bayesify.rungs(model) if r.type == "Net"}
    assert ways == ({"swap"} if options else {"plain"})


def test_a_part_in_eval_keeps_the_rest_at_the_means() -> None:
    model, seen = net(), []
    model.again.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(X)
        with sampled(model.head):
            y = model(X), model(X)
    assert not torch.equal(*y)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_a_part_is_drawn_once_in_a_call() -> None:
    model, seen = net(), []
    model.body[0].register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    with torch.no_grad(), sampled(model.body[0]):
        model(X)
        model(X)
    weights = [torch.linalg.lstsq(_with_ones(x), y).solution for x, y in seen]
    assert torch.allclose(weights[0], weights[1], atol=1e-3)
    assert torch.allclose(weights[2], weights[3], atol=1e-3)
    assert not torch.allclose(weights[0], weights[2], atol=1e-1)


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1)], 1)


PUSHED = {"sampled": sampled, "at_mean": at_mean, "one_draw": one_draw}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("of_whole", [None, *PUSHED])
@pytest.mark.parametrize("of_part", PUSHED)
@pytest.mark.parametrize("part_inside", [False, True])
def test_of_blocks_that_name_a_part_the_innermost_decides(
    training: bool, of_whole: str | None, of_part: str, part_inside: bool
) -> None:
    model, seen = net(training), []
    model.again.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    blocks = [PUSHED[of_part](model.again)]
    if of_whole is not None:
        blocks.insert(0 if part_inside else 1, PUSHED[of_whole](model))
    with ExitStack() as stack, torch.no_grad():
        for block in blocks:
            stack.enter_context(block)
        for _ in range(2):
            model(X)
    weights = [torch.linalg.lstsq(_with_ones(x), y).solution for x, y in seen]
    mean = torch.cat([model.again.weight.T, model.again.bias[None]]).detach()
    deciding = of_part if part_inside or of_whole is None else of_whole
    assert torch.allclose(weights[0], mean, atol=1e-3) is (deciding == "at_mean")
    # as for a whole model: a draw that is held stays held where a block inside asks for draws
    held = deciding == "at_mean" or "one_draw" in (of_part, of_whole)
    assert torch.allclose(weights[0], weights[1], atol=1e-3) is held
    others_at_mean = of_whole == "at_mean" or (of_whole is None and not training)
    assert torch.equal(seen[0][0], seen[1][0]) is (others_at_mean or of_whole == "one_draw")


def test_modes_of_another_models_part_are_nothing_to_this_one() -> None:
    first, second = net(), net()
    with torch.no_grad():
        plain = second(X)
        with sampled(first.head):
            assert torch.equal(second(X), plain)
        second.train()
        with at_mean(first.head):
            assert not torch.equal(second(X), second(X))


@pytest.mark.parametrize("estimator", ["local", "flipout"])
def test_estimators_have_no_noise_at_the_means(estimator: str) -> None:
    model = net(True, estimator=estimator)
    features: list[Tensor] = []
    model.again.register_forward_hook(lambda module, args, y: features.append(y))
    with torch.no_grad():
        with at_mean(model.head), one_draw(model.body, seed=1), one_draw(model.again, seed=1):
            y = model(X)
        assert torch.equal(y, F.linear(features[0], model.head.weight, model.head.bias))
        with at_mean(model), sampled(model.head):
            first, second = model(X), model(X)
        assert torch.equal(features[1], features[2])
        assert not torch.equal(first, second)
        # two runs of one seed, of which one also draws the head
        with one_draw(model, seed=2):
            model(X)
            with at_mean(model.head):
                model(X)
    assert torch.equal(features[3], features[4])


def test_embeddings_have_no_noise_at_the_means() -> None:
    tokens = torch.tensor([[0, 2], [1, 1]])
    for estimator in ("local", "flipout"):
        model: Any = bayesify.to_bbb(
            nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 2)),
            initial_std=math.exp(LOGVAR / 2),
            estimator=estimator,
        )
        with torch.no_grad(), sampled(model), at_mean(model[0]), at_mean(model[1]):
            plain = functional_call(bayesify.to_deterministic(model), {}, (tokens,), {})
            assert torch.equal(model(tokens), plain)


@pytest.mark.parametrize("checkpoint", [None, False, True])
def test_gradients(checkpoint: bool | None) -> None:
    model = net(True, checkpoint=checkpoint)
    weights = {k: v for k, v in draws(model, 3).items() if not k.startswith("body.0.")}
    plain = bayesify.to_deterministic(net())
    functional_call(plain, weights, (X,), {}).square().sum().backward()
    expected = {k: p.grad for k, p in model.named_parameters()}
    model.zero_grad()
    x = X.clone().requires_grad_()  # a reentrant checkpoint wants one
    with one_draw(model, seed=3), at_mean(model.body[0]):
        model(x).square().sum().backward()
    for name, p in model.named_parameters():
        if name == "body.0.weight_logvar" or name == "body.0.bias_logvar":
            assert p.grad is None
        elif name.startswith("body.0."):
            torch.testing.assert_close(p.grad, plain.get_parameter(name).grad)
        else:
            torch.testing.assert_close(p.grad, expected[name])


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_region_that_is_computed_again_has_the_draws_of_its_forward(checkpoint: bool) -> None:
    """Outside the block, under a new draw for each call: backward must find those of its call."""
    grads = []
    for option in (None, checkpoint):
        model = net(checkpoint=option)
        torch.manual_seed(7)
        x = X.clone().requires_grad_()
        with sampled(model.body):
            y = model(x)
        y.square().sum().backward()
        grads.append([p.grad for p in (x, *model.parameters())])
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_the_kl_divergence_is_that_of_the_whole() -> None:
    model = net(True)
    for block in (nullcontext(), at_mean(model.body)):
        model.zero_grad()
        with block:
            loss = model(X).square().mean()
        (0.0 * loss + bayesify.kl_divergence(model)).backward()
        found = {k: p.grad.clone() for k, p in model.named_parameters()}
        model.zero_grad()
        bayesify.kl_divergence(model).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[name], p.grad)


def test_means_are_read_anew_after_a_step() -> None:
    model = net(True)
    with torch.no_grad(), at_mean(model.head):
        for _ in range(2):
            with torch.autocast("cpu"):
                y = model(torch.zeros(1, 3))
            model.head.weight.zero_()
            assert not torch.equal(y[0], model.head.bias.to(y.dtype))
            with torch.autocast("cpu"):
                y = model(torch.zeros(1, 3))
            assert torch.equal(y[0], model.head.bias.to(y.dtype))
            model.head.weight.fill_(1.5)


def test_a_copy_of_a_layer_has_noise_of_its_own() -> None:
    model = net()
    model.again = copy.deepcopy(model.body[0])
    seen: list[Tensor] = []
    for part in model.body[0], model.again:
        part.register_forward_pre_hook(lambda module, args: (torch.zeros(1, 3),))
        part.register_forward_hook(lambda module, args, y: seen.append(y))
    with torch.no_grad(), sampled(model), at_mean(model.head):
        model(X)
    first, second, of_copy = seen
    assert torch.equal(first, second)
    assert not torch.equal(first, of_copy)


def test_nothing_is_drawn_in_vain_and_nothing_kept() -> None:
    model = net()
    with mock.patch.object(grouped, "draw", wraps=grouped.draw) as draw:
        with torch.no_grad(), sampled(model.head):
            model(X)
        assert sum(len(call.args[0]) for call in draw.mock_calls) == 2
    kept: list[Any] = []
    local: Any = LOCAL
    model.body.register_forward_hook(
        lambda *_: kept.extend(map(weakref.ref, local.scope.realised.values()))
    )
    gc.disable()
    try:
        with torch.no_grad(), at_mean(model.head), sampled(model.body):
            model(X)
        assert {draw() for draw in kept} == {None}
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
def test_timm(name: str) -> None:
    plain = timm.create_model(name, num_classes=5).eval()
    model: Any = bayesify.to_bbb(plain, initial_std=math.exp(-3.0))
    x = torch.randn(2, 3, 64, 64) if name != "test_vit" else torch.randn(2, 3, 160, 160)
    head = model.get_classifier()
    prefix = next(n for n, m in model.named_modules() if m is head)
    weights = draws(model, 4)
    last = {k: v for k, v in weights.items() if k.startswith(prefix)}
    rest = {k: v for k, v in weights.items() if k not in last}
    assert last
    assert rest
    with torch.no_grad():
        with one_draw(head, seed=4):
            assert torch.equal(model(x), functional_call(plain, last, (x,), {}))
        with one_draw(model, seed=4), at_mean(head):
            assert torch.equal(model(x), functional_call(plain, rest, (x,), {}))


def test_attention_that_reads_its_projection_itself() -> None:
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2, batch_first=True)
    model: Any = bayesify.to_bbb(plain, initial_std=math.exp(LOGVAR / 2)).train()
    x = torch.randn(2, 3, 8)
    weights = draws(model, 1)
    rest = {k: v for k, v in weights.items() if not k.startswith("out_proj")}
    with one_draw(model, seed=1), at_mean(model.out_proj):
        found = model(x, x, x)[0]
    assert torch.equal(found, functional_call(plain, rest, (x, x, x), {})[0])


def test_compiled() -> None:
    model = net(True)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for seed in (1, 2):
            with one_draw(model, seed=seed), at_mean(model.body):
                torch.testing.assert_close(compiled(X), model(X))
                expected = given(model, drawn(model, seed, "again", "head"))
            with one_draw(model, seed=seed):
                assert not torch.allclose(compiled(X), expected)
        with at_mean(model):
            torch.testing.assert_close(compiled(X), given(model, {}))
