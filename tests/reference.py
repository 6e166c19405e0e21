"""Slow, obvious checks of what must hold for every converted model."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import bayesify
from bayesify.copies import copy_detached
from bayesify.posterior import sites
from bayesify.rewriter import variants
from bayesify.rewriter.variants import rungs
from bayesify.scope import drawing


class Probe(TorchDispatchMode):
    """Records the Bayesian means that reach an op other than their own draw, and the draws that do.

    Attributes:
        leaks: What should not be: a mean and the op that it reaches.
        drawn: Names of the tensors whose draw reaches an op.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.means = {id(site.mean): site.name for site in sites(model)}
        self.draws: dict[int, tuple[Tensor, str]] = {}
        self.leaks: set[str] = set()
        self.drawn: set[str] = set()
        self.tracing = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.tracing:
            return func(*args, **(kwargs or {}))  # metadata only
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                if id(leaf) in self.draws:
                    self.drawn.add(self.draws[id(leaf)][1])
                elif id(leaf) in self.means and "detach" not in str(func):
                    self.leaks.add(f"{self.means[id(leaf)]} reaches {func}")
        return func(*args, **(kwargs or {}))

    @contextmanager
    def watching(self) -> Iterator[Probe]:
        realise = drawing.realise

        def marked(module: nn.Module, attribute: str, *args: Any) -> Tensor:
            with _disable_current_modes():  # so that it is made as in a call that nobody watches
                draw = realise(module, attribute, *args)
            mean = dict.get(module._parameters, attribute)  # past the fallback
            self.draws[id(draw)] = draw, self.means[id(mean)]
            return draw

        make = variants.make

        def traced(*args: Any) -> Any:
            outer, self.tracing = self.tracing, True
            try:
                return make(*args)
            finally:
                self.tracing = outer

        patch = mock.patch.object
        with patch(drawing, "realise", marked), patch(variants, "make", traced), self:
            yield self


def outputs(value: Any) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]


def values(value: Any) -> list[Tensor]:
    """The tensors of an output, without the memory of its graph."""
    return [tensor.detach() for tensor in outputs(value)]


def perturb_(model: nn.Module, scale: float = 0.02) -> nn.Module:
    """Move every parameter a little, or checks on zero-initialised tensors are vacuous."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.empty(parameter.shape).normal_(generator=generator)
                parameter.add_((scale * noise).to(parameter.dtype))
    return model


def clear_caches(model: nn.Module) -> None:
    for module in model.modules():
        for name, value in list(vars(module).items()):
            internal = name in ("_parameters", "_buffers", "_modules")
            if (
                not internal
                and type(value) is dict
                and any(isinstance(v, Tensor) for v in value.values())
            ):
                value.clear()


def _may_be_a_result(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_may_be_a_result, value))
    return isinstance(value, Tensor) or (
        hasattr(value, "__dict__") and not callable(value) and not isinstance(value, type)
    )


def cache_cleaner(model: nn.Module) -> Callable[[], None]:
    """Puts the tables of results that modules hold back to what they hold now, when called."""
    held = {
        (module, name): dict(value)
        for module in model.modules()
        for name, value in vars(module).items()
        if type(value) is dict and name not in ("_parameters", "_buffers", "_modules")
    }

    def clear() -> None:
        for module in model.modules():
            for name, value in vars(module).items():
                if type(value) is dict and any(map(_may_be_a_result, value.values())):
                    if name not in ("_parameters", "_buffers", "_modules"):
                        value.clear()
                        value.update(held.get((module, name), {}))

    return clear


@dataclass
class Report:
    problems: list[str] = field(default_factory=list)
    owners: int = 0
    fx_owners: int = 0
    swapped: list[str] = field(default_factory=list)


@contextmanager
def exchanged(model: nn.Module, draws: dict[str, Tensor]) -> Iterator[None]:
    """As in torch's ``functional_call``, without the parameters that it leaves swapped.

    It leaves them where a module has two names.
    """
    kept = [(m, n, p) for m in model.modules() for n, p in m._parameters.items()]
    try:
        with _reparametrize_module(model, draws, tie_weights=True):
            yield
    finally:
        for module, name, parameter in kept:
            module._parameters[name] = parameter


def functional_call(model: nn.Module, draws: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
    with exchanged(model, draws):
        return model(*args, **kwargs)


def seed_all(seed: int) -> None:
    """Also of what some models draw masks with."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.named_buffers() if "_prior_mean" not in k}


def same(a: Any, b: Any, rtol: float = 0.0) -> bool:
    left, right = outputs(a), outputs(b)
    if len(left) != len(right):
        return False
    for x, y in zip(left, right, strict=True):
        if x.shape != y.shape or x.dtype != y.dtype:
            return False
        if rtol == 0.0:
            if not torch.equal(x, y) and not torch.equal(x.isnan(), y.isnan()):
                return False
            if not torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)):
                return False
        elif not torch.allclose(x, y, rtol=rtol, atol=rtol * float(y.abs().max())):
            return False
    return True


def check(
    model: nn.Module,
    make_input: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]],
    *,
    batches: tuple[int, ...] = (2, 3),
    rtol: float = 0.0,
    logvar: float | None = None,
    gradients: bool = True,
    prepare: Callable[[nn.Module], object] | None = None,
    others: Sequence[tuple[tuple[Any, ...], dict[str, Any]]] = (),
) -> Report:
    """Check invariants 1-5 of a model in eval and in train.

    Args:
        model: Deterministic; changed only by :func:`perturb_`.
        make_input: From a batch size to the (args, kwargs) of one call.
        batches: Batch sizes to try.
        rtol: Tolerance of 1b; 0 asks for equal bits.
        logvar: Initial log variance; None for the default.
        gradients: Whether to check the gradients.
        prepare: Called with the perturbed model before it is converted.
        others: Further (args, kwargs) for the model in eval, as images of another size.
    """
    report = Report()
    say = report.problems.append
    perturb_(model)
    if prepare is not None:
        prepare(model)
    original = copy_detached(model)
    # of a copy: a GraphModule has more entries in its copies
    before = {k: v.clone() for k, v in original.state_dict().items() if isinstance(v, Tensor)}
    converted = bayesify.to_bbb(model, initial_std=None if logvar is None else math.exp(logvar / 2))
    clear_original, clear_converted = cache_cleaner(original), cache_cleaner(converted)
    now, then = converted.state_dict(), model.state_dict()
    for key, value in before.items():
        if key not in now:
            say(f"lost key {key}")
        elif key in then and not torch.equal(value, then[key]):
            say(f"the original's {key} changed")
    for (name, a), (_, b) in zip(original.named_modules(), converted.named_modules(), strict=True):
        if isinstance(a, fx.GraphModule):  # every copy has a class of its own
            continue
        if not isinstance(b, type(a)) or type(a).__name__ != type(b).__name__:
            say(f"class of {name} changed")
    for training in (False, True):
        converted.train(training)
        original.train(training)
        label = "train" if training else "eval"
        calls = [(f"batch {batch}", make_input(batch)) for batch in batches]
        if not training:
            calls += [(f"other input {index}", call) for index, call in enumerate(others)]
        for batch, (args, kwargs) in calls:
            clear_original()
            clear_converted()
            state_a, state_b = state_of(original), state_of(converted)
            seed_all(7)
            expected = values(original(*args, **kwargs))
            rng = torch.get_rng_state()
            seed_all(7)
            with bayesify.at_mean(converted):
                found = values(converted(*args, **kwargs))
            if not same(found, expected):
                say(f"1a: {label} {batch}: differs at the means")
            if not torch.equal(rng, torch.get_rng_state()):
                say(f"1a: {label}: RNG")
            _restore(original, state_a)
            _restore(converted, state_b)
            # 1b, with a cache filled at the means standing in the way
            draws = bayesify.draws(converted, seed=11)
            clear_original()
            seed_all(7)
            expected = values(functional_call(original, draws, args, kwargs))
            rng = torch.get_rng_state()
            expected_state = state_of(original)
            seed_all(7)
            with bayesify.one_draw(converted, seed=11):
                # traced here, so that the probe sees only what runs; unwatched, memory is reused
                unwatched = values(converted(*args, **kwargs))
            unwatched = [v.clone() for v in unwatched]  # one may be a buffer, restored in place
            _restore(converted, state_b)
            probe = Probe(converted)
            seed_all(7)
            with probe.watching(), bayesify.one_draw(converted, seed=11):
                found = values(converted(*args, **kwargs))
            if not same(unwatched, found):
                say(f"1b: {label} {batch}: a watched call gives something else")
            if not same(found, expected, rtol):
                worst = max(
                    (float((x - y).abs().max())
                     for x, y in zip(found, expected, strict=False)
                     if x.shape == y.shape and x.numel() and x.is_floating_point()), default=-1.0
                )  # fmt: skip
                say(f"1b: {label} {batch}: differs by {worst:.3g}")
            if not torch.equal(rng, torch.get_rng_state()):
                say(f"1b: {label}: RNG differs")
            if rtol == 0.0:
                for key, value in state_of(converted).items():
                    if not torch.equal(value, expected_state[key]):
                        say(f"1b: {label} {batch}: buffer {key} differs")
            for leak in sorted(probe.leaks):
                say(f"2: {label}: {leak}")
            _restore(original, state_a)
            _restore(converted, state_b)
        if gradients:
            args, kwargs = make_input(batches[-1])
            clear_original()
            _gradients(original, converted, args, kwargs, label, say)
            _restore(original, state_a)
            _restore(converted, state_b)
    args, kwargs = make_input(batches[0])
    converted.eval()
    final = state_of(converted)
    with torch.no_grad(), bayesify.sampled(converted):
        first, second = converted(*args, **kwargs), converted(*args, **kwargs)
    _restore(converted, final)
    if same(first, second) and _differ(original.eval(), converted, args, kwargs):
        say("4: two scopes gave the same output")
    back = bayesify.to_deterministic(converted)
    for a, b in zip(original.modules(), back.modules(), strict=True):
        if type(a) is not type(b) and not isinstance(a, fx.GraphModule):
            say("back: another class")
    state = {k: v for k, v in back.state_dict().items() if isinstance(v, Tensor)}
    for key, value in state.items():
        if key in before and not torch.equal(value, before[key]):
            say(f"back: {key} differs")
    if set(state) != set(before):
        say("back: other keys")
    taken: dict[str, bool] = {}
    for rung in rungs(converted):
        if rung.own_parameters:
            taken[rung.owner] = taken.get(rung.owner, True) and rung.rung != "swap"
        if rung.rung == "swap":
            report.swapped.append(f"{rung.owner} {rung.type}.{rung.method}: {rung.reason}")
    report.owners = len(taken)
    report.fx_owners = sum(taken.values())
    return report


def _differ(original: nn.Module, converted: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether two scopes have to differ: not where other weights give the same, as an argmax may.

    Then the draws themselves are compared.
    """
    found: list[list[Tensor]] = []
    drawn: list[dict[str, Tensor]] = []
    for seed in (21, 22):
        probe = Probe(converted)
        with torch.no_grad():
            draws = bayesify.draws(converted, seed=seed)
            found.append(values(functional_call(original, draws, args, kwargs)))
            with probe.watching(), bayesify.sampled(converted):
                converted(*args, **kwargs)
        drawn.append({name: draw.clone() for draw, name in probe.draws.values()})
    return not same(found[0], found[1]) or any(
        same(draw, drawn[1][name]) for name, draw in drawn[0].items() if draw.numel()
    )


def _restore(model: nn.Module, state: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for prefix, module in model.named_modules():
            for name, buffer in module._buffers.items():
                kept = state.get(f"{prefix}.{name}" if prefix else name)
                if buffer is not None and kept is not None:
                    if buffer.shape == kept.shape:
                        buffer.copy_(kept)
                    else:  # a state that took the shape of the batch
                        module._buffers[name] = kept.clone()


def _loss(value: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    total = torch.zeros(())
    for tensor in outputs(value):
        if tensor.is_floating_point() and tensor.requires_grad and tensor.numel():
            weight = torch.empty(tensor.shape).normal_(generator=generator)
            total = total + (tensor.float() * weight).sum()
    return total


def _gradients(
    original: nn.Module, converted: nn.Module, args: Any, kwargs: Any, label: str,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    draws = {k: v.detach().requires_grad_() for k, v in bayesify.draws(converted, seed=5).items()}
    seed_all(7)
    names = list(draws)
    with exchanged(original, draws):  # also in backward, where some functions call modules again
        loss = _loss(original(*args, **kwargs))
        found: Any = [None] * len(draws)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, list(draws.values()), allow_unused=True)
    grads = dict(zip(names, found, strict=True))
    converted.zero_grad()
    seed_all(7)
    with bayesify.one_draw(converted, seed=5):
        loss = _loss(converted(*args, **kwargs))
    if loss.requires_grad:
        loss.backward()
    for site in sites(converted):
        expected = grads[site.name]
        if expected is None:
            continue
        if site.mean.grad is None or site.raw.grad is None:
            say(f"5: {label}: {site.name} has no gradient")
            continue
        if not expected.numel():
            continue
        scale = float(expected.abs().max()) + 1e-12
        if float((site.mean.grad - expected).abs().max()) > 2e-3 * scale:
            say(f"5: {label}: gradient of {site.name} differs")
        # times sigma, a smaller one is zero in float32 (random weights of a deep network)
        if float(expected.abs().max()) > 1e-30 and float(site.raw.grad.abs().max()) == 0:
            say(f"5: {label}: gradient of the log variance of {site.name} is zero")
        exact = site.mean.dtype in (torch.float32, torch.float64)  # others round the deviation
        if exact and site.slot.parameterization == "exp":  # sigma = exp(raw / 2)
            wanted = expected * (draws[site.name] - site.mean).detach() / 2
            worst = float((site.raw.grad - wanted).abs().max())
            draw = draws[site.name].detach()
            rounded = 3e-7 * float((expected * draw).abs().max())  # that of the deviation
            if worst > 2e-3 * float(wanted.abs().max()) + rounded + 1e-12:
                say(f"5: {label}: gradient of the log variance of {site.name} differs")
    converted.zero_grad()
