"""predict, recompute_batchnorm_ and calibrate_ against loops written out by hand."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import bayesify
from bayesify import ArgumentError, at_mean, one_draw
from bayesify.inference import (
    Moments,
    ProbabilitySummary,
    Reduce,
    calibrate_,
    predict,
    recompute_batchnorm_,
)
from bayesify.posterior import sites
from bayesify.seeds import fold

REDUCTIONS: tuple[Reduce, ...] = ("probabilities", "moments")


class Net(nn.Module):
    """A classifier with dropout and BatchNorm; ``form`` says in what its logits are returned."""

    def __init__(self, form: Callable[[Tensor], Any] = lambda logits: logits) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)
        self.form = form

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        x = self.drop(self.norm(self.hidden(x)).relu())
        return self.form(self.head(x) * scale)


def identity(logits: Tensor) -> Tensor:
    return logits


def converted(form: Callable[[Tensor], Any] = identity, logvar: float = -2.0) -> nn.Module:
    return bayesify.to_bbb(Net(form), initial_std=math.exp(logvar / 2)).eval()


def by_hand(model: nn.Module, x: Tensor, num_samples: int, seed: int) -> Tensor:
    outputs = []
    for k in range(num_samples):
        with one_draw(model, seed=fold(seed, k)), torch.no_grad():
            outputs.append(model(x))
    return torch.stack(outputs)


# -- draws -------------------------------------------------------------------------------------


def test_predict_is_a_loop_of_one_draw() -> None:
    model, x = converted(), torch.randn(5, 4)
    found = predict(model, x, num_samples=6, seed=3)
    torch.testing.assert_close(found, by_hand(model, x, 6, 3), rtol=1e-5, atol=1e-6)
    assert found.shape == (6, 5, 3)
    assert not found.requires_grad
    assert len({tuple(draw.flatten().tolist()) for draw in found}) == 6


def test_one_seed_gives_the_same_weights_for_every_batch() -> None:
    model, x = converted(), torch.randn(7, 4)
    whole = predict(model, x, num_samples=4, seed=11)
    parts = [predict(model, part, num_samples=4, seed=11) for part in x.split(3)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-6)
    assert torch.equal(predict(model, x, num_samples=2, seed=11), whole[:2])
    assert not torch.equal(predict(model, x, num_samples=4, seed=12), whole)


def test_a_seed_leaves_the_global_generator_alone() -> None:
    model, x = converted(), torch.randn(2, 4)
    state = torch.get_rng_state()
    predict(model, x, num_samples=2, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_seed_the_global_generator_decides() -> None:
    model, x = converted(), torch.randn(2, 4)
    state = torch.get_rng_state()
    first, second = (predict(model, x, num_samples=2) for _ in range(2))
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(predict(model, x, num_samples=2), first)


def test_predict_runs_in_eval_and_gives_every_module_its_mode_again() -> None:
    model, x = converted(), torch.randn(5, 4)
    expected = predict(model, x, num_samples=3, seed=0)
    model.train()
    norm = model.get_submodule("norm").eval()
    before = copy.deepcopy(model.state_dict())
    assert torch.equal(predict(model, x, num_samples=3, seed=0), expected)
    assert [m.training for m in model.modules() if m is not norm] == [True] * 4
    assert not norm.training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_predict_gives_the_modes_again_after_an_error() -> None:
    model = converted().train()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        predict(model, torch.randn(5, 9), num_samples=2)
    assert all(m.training for m in model.modules())


def test_predict_passes_keyword_arguments_and_takes_an_outer_module() -> None:
    model, x = converted(), torch.randn(5, 4)
    doubled = predict(model, x, num_samples=2, seed=0, scale=2.0)
    torch.testing.assert_close(doubled, 2 * by_hand(model, x, 2, 0))
    outer = nn.Sequential(model, nn.Identity())
    found = predict(outer, x, num_samples=2, seed=0)
    torch.testing.assert_close(found, by_hand(model, x, 2, 0), rtol=1e-5, atol=1e-6)


# -- structures --------------------------------------------------------------------------------


class Pair(NamedTuple):
    logits: Tensor
    name: str


class HFOutput(OrderedDict[str, Any]):
    """As transformers.utils.ModelOutput: an OrderedDict by attribute, registered as a pytree."""

    @property
    def logits(self) -> Any:
        return self["logits"]


pytree.register_pytree_node(
    HFOutput,
    lambda output: (list(output.values()), list(output)),
    lambda values, keys: HFOutput(zip(keys, values, strict=True)),
    serialized_type_name="test_inference.HFOutput",
)


@pytest.mark.parametrize(
    ("form", "pick"),
    [
        (lambda y: (y, y.argmax(-1)), lambda out: out[0]),
        (lambda y: {"a": [y, None], "b": 3}, lambda out: out["a"][0]),
        (lambda y: Pair(y, "net"), lambda out: out.logits),
        (lambda y: HFOutput(loss=None, logits=y), lambda out: out.logits),
    ],
)
def test_predict_keeps_the_structure_of_the_output(
    form: Callable[[Tensor], Any], pick: Callable[[Any], Tensor]
) -> None:
    torch.manual_seed(1)
    structured, x = converted(form), torch.randn(5, 4)
    plain = converted()
    plain.load_state_dict(structured.state_dict())
    expected = by_hand(plain, x, 3, 0)
    with at_mean(structured), torch.no_grad():
        once = structured(x)
    found = predict(structured, x, num_samples=3, seed=0)
    assert type(found) is type(once)
    torch.testing.assert_close(pick(found), expected)
    for stacked, single in zip(pytree.tree_leaves(found), pytree.tree_leaves(once), strict=True):
        if isinstance(single, Tensor):
            assert stacked.dtype == single.dtype
            assert stacked.shape == (3, *single.shape)
        else:
            assert stacked == single
    moments = predict(structured, x, num_samples=3, seed=0, reduce="moments")
    torch.testing.assert_close(pick(moments.mean), expected.mean(0))
    torch.testing.assert_close(pick(moments.std), expected.std(0, correction=0))


@dataclass
class Opaque:
    logits: Tensor


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (Opaque, r"holds a Opaque.*register_dataclass"),
        (lambda y: (y, y.sum().item()), "in one draw and .* in another"),
        (lambda y: y[y > 0], r"has the shape \(\d+,\) in one draw and \(\d+,\) in another"),
        (lambda y: [y] * (1 + int(y[0, 0] > 0)), "outputs of different structure"),
    ],
)
def test_outputs_that_cannot_be_combined_are_refused(
    form: Callable[[Tensor], Any], message: str
) -> None:
    model = converted(form, logvar=0.0)
    with pytest.raises(ArgumentError, match=message):
        predict(model, torch.randn(5, 4), num_samples=20, seed=0)


# -- summaries ---------------------------------------------------------------------------------


def entropy(probs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    result: np.ndarray[Any, Any] = scipy.special.entr(probs).sum(-1)
    return result


@pytest.mark.parametrize("form", [identity, lambda y: HFOutput(loss=None, logits=y)])
def test_streamed_probabilities_are_those_of_the_stack(form: Callable[[Tensor], Any]) -> None:
    model, x = converted(form, logvar=0.0), torch.randn(6, 4)
    stack = predict(model, x, num_samples=9, seed=5)
    stack = stack if isinstance(stack, Tensor) else stack.logits
    probs = scipy.special.softmax(stack.double().numpy(), axis=-1)
    found = predict(model, x, num_samples=9, seed=5, reduce="probabilities")
    assert isinstance(found, ProbabilitySummary)
    expected = {
        "mean": probs.mean(0),
        "std": probs.std(0),
        "predictive_entropy": entropy(probs.mean(0)),
        "expected_entropy": entropy(probs).mean(0),
        "mutual_information": entropy(probs.mean(0)) - entropy(probs).mean(0),
    }
    assert set(found._fields) == set(expected)
    for name, value in found._asdict().items():
        assert value.dtype == torch.float32
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, err_msg=name)
    assert (found.mutual_information > 0).all()


@given(st.floats(-30.0, 30.0), st.integers(1, 4))
def test_mutual_information_is_never_negative(size: float, num_samples: int) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return x * size + 0.0 * self.w

    model = bayesify.to_bbb(Fixed(), initial_std=1.0)
    found = predict(model, torch.eye(3), num_samples=num_samples, seed=0, reduce="probabilities")
    assert (found.mutual_information >= 0).all()
    # these draws agree, so that there is nothing to learn of the weights
    torch.testing.assert_close(found.mutual_information, torch.zeros(3), rtol=0, atol=1e-15)
    torch.testing.assert_close(found.std, torch.zeros(3, 3), rtol=0, atol=1e-15)
    assert (found.expected_entropy <= math.log(3) + 1e-6).all()


def test_impossible_classes_make_no_nan() -> None:
    model = converted(lambda y: torch.cat([y[:, :2], torch.full_like(y[:, :1], -math.inf)], 1))
    found = predict(model, torch.randn(3, 4), num_samples=2, reduce="probabilities")
    for value in found:
        assert torch.isfinite(value).all()
    assert (found.mean[:, 2] == 0).all()


def test_streamed_moments_are_those_of_the_stack_far_from_zero() -> None:
    model, x = converted(lambda y: 1e4 + y), torch.randn(6, 4)
    stack = predict(model, x, num_samples=50, seed=5).double()
    found = predict(model, x, num_samples=50, seed=5, reduce="moments")
    assert isinstance(found, Moments)
    torch.testing.assert_close(found.mean.double(), stack.mean(0), rtol=1e-7, atol=0)
    torch.testing.assert_close(found.std.double(), stack.std(0, correction=0), rtol=1e-6, atol=0)


def test_summaries_of_a_bfloat16_model_are_float32() -> None:
    model, x = converted().bfloat16(), torch.randn(6, 4).bfloat16()
    for reduce in REDUCTIONS:
        for value in predict(model, x, num_samples=2, reduce=reduce):
            assert value.dtype == torch.float32
    assert predict(model, x, num_samples=2).dtype == torch.bfloat16


def test_summaries_of_a_float64_model_are_float64() -> None:
    model, x = converted().double(), torch.randn(6, 4).double()
    stack = predict(model, x, num_samples=4, seed=0)
    found = predict(model, x, num_samples=4, seed=0, reduce="moments")
    torch.testing.assert_close(found.mean, stack.mean(0), rtol=1e-13, atol=1e-13)


def test_one_sample_has_no_spread() -> None:
    model, x = converted(), torch.randn(6, 4)
    found = predict(model, x, num_samples=1, seed=0, reduce="probabilities")
    assert (found.std == 0).all()
    assert (found.mutual_information < 1e-7).all()
    torch.testing.assert_close(found.mean, by_hand(model, x, 1, 0)[0].softmax(-1))


def test_streaming_keeps_no_output_of_a_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    held: list[weakref.ref[Tensor]] = []
    most = 0

    def counting(logits: Tensor) -> Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in held))
        held.append(weakref.ref(logits))
        return logits

    model = converted()
    model.register_forward_hook(lambda module, args, output: counting(output))
    gc.disable()
    try:
        for reduce in REDUCTIONS:
            predict(model, torch.randn(2, 4), num_samples=20, reduce=reduce)
    finally:
        gc.enable()
    assert len(held) == 40
    assert most <= 1


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples must be an integer above 0, got 0"),
        ({"num_samples": -1}, "num_samples must be"),
        ({"num_samples": 2.0}, "num_samples must be"),
        ({"num_samples": True}, "num_samples must be"),
        ({"num_samples": 2, "reduce": "mean"}, "reduce must be None, 'probabilities', 'mom"),
        ({"num_samples": 2, "seed": -1}, "seed must be an integer"),
    ],
)
def test_predict_refuses_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        predict(converted(), torch.randn(2, 4), **options)


def test_predict_refuses_an_empty_batch_and_a_deterministic_model() -> None:
    with pytest.raises(ArgumentError, match=r"batch is empty .*\(0, 4\)"):
        predict(converted(), torch.zeros(0, 4), num_samples=2)
    with pytest.raises(ArgumentError, match="batch is empty"):
        predict(converted(), x=torch.zeros(0, 4), num_samples=2)
    with pytest.raises(bayesify.UnsupportedModuleError, match="no Bayesian parameter"):
        predict(Net(), torch.randn(2, 4), num_samples=2)


@pytest.mark.parametrize(
    "form",
    [
        lambda y: y[:, 0],
        lambda y: y[:, :1],
        lambda y: y[None],
        lambda y: y.argmax(-1, keepdim=True).expand(-1, 3),
    ],
)
def test_probabilities_need_logits(form: Callable[[Tensor], Any]) -> None:
    with pytest.raises(ArgumentError, match=r"needs logits of the shape \(batch, classes\)"):
        predict(converted(form), torch.randn(2, 4), num_samples=2, reduce="probabilities")


def test_probabilities_need_one_output() -> None:
    with pytest.raises(ArgumentError, match="output is a tuple, expected a tensor"):
        predict(
            converted(lambda y: (y, y)), torch.randn(2, 4), num_samples=2, reduce="probabilities"
        )


# -- BatchNorm ---------------------------------------------------------------------------------


def batches(number: int = 4, size: int = 16) -> list[Tensor]:
    return list((3.0 + 2.0 * torch.randn(number * size, 4)).split(size))


def test_batchnorm_statistics_are_those_at_the_means() -> None:
    model = converted(logvar=0.0).train()
    model(torch.randn(8, 4))  # leaves statistics of its own
    model.get_submodule("hidden").eval()
    norm = model.get_submodule("norm")
    assert isinstance(norm, nn.BatchNorm1d)
    data = batches()
    linear = {s.name: s.mean.detach().double().numpy() for s in sites(model)}
    hidden = [b.double().numpy() @ linear["hidden.weight"].T + linear["hidden.bias"] for b in data]
    others = {n: p.clone() for n, p in model.state_dict().items() if "norm." not in n}
    assert recompute_batchnorm_(model, data) is model
    mean = np.mean([h.mean(0) for h in hidden], axis=0)
    var = np.mean([h.var(0, ddof=1) for h in hidden], axis=0)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    np.testing.assert_allclose(norm.running_mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norm.running_var, var, rtol=1e-5)
    assert norm.momentum == 0.1
    assert int(norm.num_batches_tracked or 0) == 4
    assert [m.training for m in model.modules()] == [True, False, True, True, True]
    torch.testing.assert_close({n: model.state_dict()[n] for n in others}, others, rtol=0, atol=0)


@pytest.mark.parametrize(
    "form",
    [
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x, "label"],
        lambda x: {"x": x, "scale": 2.0},
    ],
)
def test_batchnorm_takes_the_batches_of_a_loader(form: Callable[[Tensor], Any]) -> None:
    data = batches()
    model = converted()
    other = copy.deepcopy(model)
    recompute_batchnorm_(model, data)
    recompute_batchnorm_(other, (form(x) for x in data), device="cpu")
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_batchnorm_statistics_are_never_those_of_a_draw() -> None:
    layers = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    # calls each converted layer from outside, where one in training mode would draw
    plain = nn.Sequential(*(bayesify.to_bbb(layer, initial_std=1.0) for layer in layers))
    other = copy.deepcopy(plain)
    data = batches()
    recompute_batchnorm_(plain, data)
    with bayesify.sampled(other):
        recompute_batchnorm_(other, data)
    torch.testing.assert_close(other.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_later_norms_see_what_earlier_ones_give() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    model = bayesify.to_bbb(net, initial_std=math.exp(-0.5))
    [data] = batches(1, 64)
    recompute_batchnorm_(model, [data])
    second = model[3]  # type: ignore[index]
    # the first one's output has mean 0 and variance 1 per channel, and there is no dropout
    torch.testing.assert_close(second.running_mean, torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(second.running_var, torch.full((4,), 64 / 63), rtol=1e-3, atol=0)


def test_a_model_without_batchnorm_reads_no_batch() -> None:
    def never() -> Iterator[Tensor]:
        raise AssertionError("a batch was read")
        yield

    model = bayesify.to_bbb(
        nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2, track_running_stats=False))
    )
    assert recompute_batchnorm_(model, never()) is model


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], ArgumentError, "loader gave no batch"),
        ([torch.randn(8, 4), torch.randn(8, 5)], RuntimeError, "shapes cannot be multiplied"),
        ([torch.randn(8, 4), ["text"]], ArgumentError, "a sequence that begins with one"),
        ([torch.randn(8, 4), []], ArgumentError, "a sequence that begins with one"),
    ],
)
def test_an_error_leaves_the_statistics_as_they_were(
    loader: list[Any], error: type[Exception], message: str
) -> None:
    model = converted().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        recompute_batchnorm_(model, loader)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    norm = model.get_submodule("norm")
    assert norm.momentum == 0.1
    assert all(m.training for m in model.modules())


def test_batchnorm_of_a_deterministic_model_is_refused() -> None:
    with pytest.raises(bayesify.UnsupportedModuleError, match="no Bayesian parameter"):
        recompute_batchnorm_(Net(), batches())


# -- calibrate_ --------------------------------------------------------------------------------


def agreement(model: nn.Module, x: Tensor, num_samples: int, seed: int) -> float:
    with at_mean(model), torch.no_grad():
        labels = model(x).argmax(-1)
    drawn = by_hand(model, x, num_samples, seed).argmax(-1)
    return float((drawn == labels).double().mean())


@pytest.mark.parametrize("logvar", [-12.0, 4.0])
@pytest.mark.parametrize("parameterization", ["exp", "softplus"])
def test_calibrate_finds_the_largest_sigma_that_agrees(
    logvar: float, parameterization: Any
) -> None:
    config = bayesify.BBBConfig(parameterization=parameterization)
    model = bayesify.to_bbb(Net(), initial_std=math.exp(logvar / 2), config=config)
    x = torch.randn(200, 4)
    before = {s.name: (s.mean.detach().clone(), s.std.detach().clone()) for s in sites(model)}
    factor = calibrate_(model, x, target_agreement=0.95)
    assert all(m.training for m in model.modules())
    for site in sites(model):
        mean, std = before[site.name]
        assert torch.equal(site.mean, mean)
        torch.testing.assert_close(site.std.detach(), factor * std, rtol=1e-4, atol=0)
    model.eval()
    assert agreement(model, x, 8, 0) >= 0.95
    for site in sites(model):  # a little wider, and it is missed
        with torch.no_grad():
            wider = 2.0 * torch.log(1.03 * site.std)
            site.raw.copy_(bayesify.gaussian.raw_from_logvar(wider, parameterization))
    assert agreement(model, x, 8, 0) < 0.95


def test_calibrate_can_hold_the_change_of_any_output() -> None:
    model = bayesify.to_bbb(nn.Linear(4, 2, bias=False), initial_std=1.0)
    x = torch.randn(50, 4)
    calibrate_(model, (x,), target_change=0.1, num_samples=4, seed=2)
    drawn = by_hand(model, x, 4, 2)
    with at_mean(model), torch.no_grad():
        mean = model(x)
    change = ((drawn - mean).square().mean() / mean.square().mean()).sqrt().item()
    assert 0.1 / 1.03 <= change <= 0.1  # a linear model's change is proportional to sigma


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_agreement": 0.0}, r"target_agreement must be in \(0, 1\]"),
        ({"target_agreement": 1.1}, "target_agreement must be"),
        ({"target_agreement": math.nan}, "target_agreement must be"),
        ({"target_change": 0.0}, "target_change must be a positive"),
        ({"target_change": math.inf}, "target_change must be a positive"),
        ({"num_samples": 0}, "num_samples must be"),
    ],
)
def test_calibrate_refuses_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        calibrate_(converted(), torch.randn(5, 4), **options)


def test_calibrate_refuses_what_has_no_classes() -> None:
    with pytest.raises(ArgumentError, match=r"needs logits.*target_change=0\.05"):
        calibrate_(converted(lambda y: y[:, :1]), torch.randn(5, 4))
    with pytest.raises(ArgumentError, match="output is a tuple"):
        calibrate_(converted(lambda y: (y,)), torch.randn(5, 4))
    with pytest.raises(ArgumentError, match="batch is empty"):
        calibrate_(converted(), torch.zeros(0, 4))
    with pytest.raises(bayesify.UnsupportedModuleError, match="no Bayesian parameter"):
        calibrate_(Net(), torch.randn(5, 4))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda y: y * 0.0 + torch.arange(3.0), "does not depend on the drawn weights"),
        (lambda y: torch.randn(len(y), 3), "random numbers of the model's own"),
    ],
)
def test_calibrate_leaves_the_model_alone_where_it_fails(
    form: Callable[[Tensor], Any], message: str
) -> None:
    model = converted(form).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArgumentError, match=message):
        calibrate_(model, torch.randn(50, 4))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(m.training for m in model.modules())


def test_draws_that_do_not_fit_into_memory() -> None:
    model, x = bayesify.to_bbb(nn.Linear(2, 3)), torch.randn(50, 2)
    for k in (10**12, 10**18):  # more than there is; more than can be counted in bytes
        with pytest.raises(ArgumentError, match=r"GiB, more than cpu has.*reduce='probabilities'"):
            bayesify.predict(model, x, num_samples=k)


def test_two_seeds_share_no_draw() -> None:
    model, x = bayesify.to_bbb(nn.Linear(2, 3), initial_std=1.0), torch.randn(4, 2)
    drawn = [
        tuple(output.flatten().tolist())
        for seed in range(4)
        for output in bayesify.predict(model, x, num_samples=5, seed=seed)
    ]
    assert len(set(drawn)) == len(drawn) == 20
