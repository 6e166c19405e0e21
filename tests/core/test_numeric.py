"""Numbers as arguments: numpy's scalars are numbers, bools, arrays and tensors are not."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import bayesify
from bayesify import ArgumentError, metrics
from bayesify.errors import DataError, ModelError
from bayesify.models import InputConfig, ModelSpec
from bayesify.numeric import positive, real, whole
from bayesify.posterior import sites
from bayesify.settings import FitSettings
from bayesify.storage import read_header

INTEGERS = [np.int8, np.int32, np.int64, np.uint8, np.uint64]
FLOATS = [np.float16, np.float32, np.float64, np.longdouble]


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_of_numpy_become_int(kind: Any) -> None:
    found = whole("n", kind(7), "above 0")
    assert type(found) is int
    assert found == 7


@pytest.mark.parametrize("kind", [*FLOATS, *INTEGERS, Fraction])
def test_numbers_of_numpy_become_float(kind: Any) -> None:
    found = real("x", kind(3), "above 0", positive)
    assert type(found) is float
    assert found == 3.0


WRONG = [
    True, np.True_, "3", None, 3j, [3], np.array(3), np.array([3]), torch.tensor(3), math.nan,
    np.float32("nan"),
]  # fmt: skip


@pytest.mark.parametrize("value", [*WRONG, 3.0, np.float32(3)])
def test_what_is_no_integer(value: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^n must be above 0, got "):
        whole("n", value, "above 0")


@pytest.mark.parametrize("value", [*WRONG, -1, 0, math.inf, 10**400])
def test_what_is_no_positive_number(value: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^x must be above 0, got "):
        real("x", value, "above 0", positive)


@pytest.mark.parametrize("value", [np.array(3), torch.tensor(3), nn.Parameter(torch.tensor(3.0))])
def test_an_array_of_one_number_is_told_what_to_do(value: Any) -> None:
    for check in (lambda: whole("n", value, "x"), lambda: real("n", value, "x", positive)):
        with pytest.raises(ArgumentError, match=r"\(take the number out of it: value\.item\(\)\)"):
            check()


def test_bounds() -> None:
    assert whole("n", 5, "x", least=5, below=6) == 5
    for value in (4, 6):
        with pytest.raises(DataError):
            whole("n", value, "x", least=5, below=6, kind=DataError)


def net() -> Any:
    torch.manual_seed(0)
    return bayesify.to_bbb(nn.Linear(3, 4), initial_std=math.exp(-1.5))


def data() -> TensorDataset:
    torch.manual_seed(1)
    return TensorDataset(torch.randn(24, 3), torch.randint(4, (24,)))


def state(model: nn.Module) -> list[Tensor]:
    return [v.clone() for v in model.state_dict().values()]


def fitted(i: Any, f: Any) -> Any:
    model = net()
    result = bayesify.fit(
        model, data(), epochs=i(2), batch_size=i(8), lr=f(0.125), logvar_lr=f(0.25),
        kl_weight=f(0.5), kl_warmup=f(0.25), warmup=f(0.25), weight_decay=f(0.0),
        max_grad_norm=f(1.0), average=f(0.5), draws_per_step=i(2), accumulate=i(1),
        holdout=f(0.25), patience=i(2), seed=i(3), workers=i(0),
    )  # fmt: skip
    assert type(result.kl_scale) is float
    return [result.losses, state(model)]


def laplace(i: Any, f: Any) -> Any:
    model = net()
    found = bayesify.fit_laplace_(
        model, data(), prior_precision=f(2.0), temperature=f(0.5), holdout=f(0.25),
        max_examples=i(9), batch_size=i(8), seed=i(3), workers=i(0),
    )  # fmt: skip
    assert type(found.prior_precision) is float
    return [found.prior_precision, found.mean_std, state(model)]


def calibrated(i: Any, f: Any) -> Any:
    model, batch = net(), torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    first = bayesify.calibrate_(model, batch, target_agreement=f(0.75), num_samples=i(3), seed=i(3))
    return [first, bayesify.calibrate_(model, batch, target_change=f(0.25), seed=i(3))]


def pruned(i: Any, f: Any) -> Any:
    model = net()
    bayesify.prune_(model, f(0.25), min_dim=i(1), seed=i(3), score="random")
    other = bayesify.to_bbb(nn.Linear(4, 4))
    bayesify.prune_n_of_m_(other, i(2), i(4), seed=i(3))
    schedule = bayesify.sparsity_schedule(f(0.5), i(3), initial=f(0.25))
    return [state(model), bayesify.sparsity(other).pruned, schedule]


def measured(i: Any, f: Any) -> Any:
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    probs, labels = logits.softmax(1), torch.arange(40) % 3
    sure, hits = probs.max(1).values, probs.argmax(1) == labels
    return [
        metrics.expected_calibration_error(sure, hits, i(5)),
        metrics.adaptive_calibration_error(sure, hits, i(5)),
        metrics.bootstrap_interval(torch.mean, sure, resamples=i(9), level=f(0.5), seed=i(3)),
        metrics.cross_fitted_temperature(logits, labels, folds=i(4), seed=i(3)).probs,
        metrics.selective_accuracy(sure, hits, f(0.5)),
    ]


def evaluated(i: Any, f: Any) -> Any:
    rows = bayesify.evaluate(
        net(), data(), num_samples=i(3), seed=i(3), batch_size=i(8), resamples=i(9), workers=i(0)
    )
    assert type(rows[1].num_samples) is int
    return [row.intervals for row in rows]


def predicted(i: Any, f: Any) -> Any:
    model, x = net(), torch.ones(2, 3)
    with bayesify.one_draw(model, seed=i(3)):
        one = model(x)
    return [
        one, bayesify.draws(model, seed=i(3))["bias"],
        bayesify.predict(model, x, num_samples=i(3), seed=i(3)),
        bayesify.ensemble(model, i(2), seed=i(3))(x),
    ]  # fmt: skip


def objective(i: Any, f: Any) -> Any:
    model = net()
    schedule = bayesify.kl_schedule("linear", f(0.0), f(0.5), i(4))
    loss = bayesify.elbo_loss(torch.ones(()), model, num_data=i(100), kl_weight=f(0.5))
    groups = bayesify.param_groups(model, lr=f(0.5), logvar_lr=f(0.25), weight_decay=f(0.125))
    assert all(type(group["lr"]) is float for group in groups)
    assert type(schedule(i(3))) is float
    return [loss, schedule(i(3)), schedule(i(9)), [(g["lr"], g["weight_decay"]) for g in groups]]


CALLS: list[Callable[[Any, Any], Any]] = [
    fitted, laplace, calibrated, pruned, measured, evaluated, predicted, objective,
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_numbers_of_numpy_do_what_those_of_python_do(call: Callable[[Any, Any], Any]) -> None:
    expected = call(int, float)
    for i, f in ((np.int64, np.float32), (np.uint8, np.float64)):
        torch.testing.assert_close(
            torch.utils._pytree.tree_leaves(call(i, f)),
            torch.utils._pytree.tree_leaves(expected),
            rtol=0, atol=0, equal_nan=True,
        )  # fmt: skip


def test_settings_are_kept_as_numbers_of_python() -> None:
    values: dict[str, Any] = {}
    wanted: dict[str, Any] = {
        "epochs": 1, "batch_size": 2, "lr": 0.5, "logvar_lr": 0.5, "kl_weight": 1.0,
        "kl_warmup": 0.0, "warmup": 0.5, "weight_decay": 0.0, "max_grad_norm": 1.0, "average": 0.0,
        "draws_per_step": 1, "accumulate": 1, "holdout": 0.5, "patience": 3, "seed": 0,
    }  # fmt: skip
    for name, value in wanted.items():
        values[name] = np.int32(value) if type(value) is int else np.float32(value)
    settings = FitSettings(
        **values, kl_reduction="num_data", kl_shape="linear", augment="none",
        freeze_batchnorm=False, amp=False,
    )  # fmt: skip
    for name, value in wanted.items():
        found = getattr(settings, name)
        assert (type(found), found) == (type(value), value), name
    for name in wanted:
        wrong: dict[str, Any] = {name: True}
        with pytest.raises(ArgumentError, match=f"fit: {name} must be"):
            dataclasses.replace(settings, **wrong)


def test_a_file_holds_numbers_of_python(tmp_path: Path) -> None:
    f = np.float32
    for prior in (
        bayesify.GaussianPrior(f(0.5), f(0.25)),  # type: ignore[arg-type]
        bayesify.GaussianPrior(np.int64(2), "initial"),  # type: ignore[arg-type]
        bayesify.ScaleMixturePrior(f(0.5), f(1.0), f(0.125)),  # type: ignore[arg-type]
    ):
        for value in dataclasses.astuple(prior):
            assert type(value) in (float, str, bool)
        for std in (f(0.25), bayesify.RelativeStd(f(0.25))):  # type: ignore[arg-type]
            model = bayesify.to_bbb(nn.Linear(2, 2), prior=prior, initial_std=std)  # type: ignore[arg-type]
            bayesify.save(model, tmp_path / "a.safetensors", overwrite=True)
            json.dumps(read_header(tmp_path / "a.safetensors"))
            loaded = bayesify.load(tmp_path / "a.safetensors", nn.Linear(2, 2))
            assert next(sites(loaded)).slot.prior == prior
            found: Any = loaded.__dict__["_bayesify"].spec.initial_std
            number = found.fraction if isinstance(found, bayesify.RelativeStd) else found
            assert (type(number), number) == (float, 0.25)


def test_models_and_data() -> None:
    n: Any = np.int64
    spec = ModelSpec("resnet18", num_classes=n(3), in_chans=n(1), img_size=n(32))
    assert [type(v) for v in (spec.num_classes, spec.in_chans, spec.img_size)] == [int] * 3
    f: Any = np.float32
    config = InputConfig((n(1), n(8), n(8)), (f(0.5),), (f(0.5),), crop_pct=f(0.5))
    json.dumps(dataclasses.asdict(config))
    assert config == InputConfig((1, 8, 8), (0.5,), (0.5,), crop_pct=0.5)
    for wrong in (True, 1.0, torch.tensor(3)):
        with pytest.raises(ModelError, match="num_classes must be a whole number above 0"):
            ModelSpec("resnet18", num_classes=wrong)  # type: ignore[arg-type]


REFUSALS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda v: bayesify.GaussianPrior(v), "GaussianPrior: std"),
    (lambda v: bayesify.GaussianPrior(1.0, v), "GaussianPrior: mean"),
    (lambda v: bayesify.ScaleMixturePrior(v), "ScaleMixturePrior: pi"),
    (lambda v: bayesify.ScaleMixturePrior(0.5, v), "ScaleMixturePrior: std1"),
    (lambda v: bayesify.RelativeStd(v), "RelativeStd: fraction"),
    (lambda v: bayesify.to_bbb(nn.Linear(1, 1), initial_std=v), "initial_std"),
    (lambda v: bayesify.draws(net(), seed=v), "seed"),
    (lambda v: bayesify.predict(net(), torch.ones(1, 3), num_samples=v), "predict: num_samples"),
    (lambda v: bayesify.ensemble(net(), v), "num_samples"),
    (lambda v: bayesify.prune_(net(), v), "sparsity"),
    (lambda v: bayesify.fit_laplace_(net(), data(), temperature=v), "fit_laplace_: temperature"),
    (lambda v: bayesify.fit_laplace_(net(), data(), seed=v), "fit_laplace_: seed"),
    (lambda v: bayesify.evaluate(net(), data(), resamples=v), "evaluate: resamples"),
    (lambda v: bayesify.evaluate(net(), data(), workers=v), "evaluate: workers"),
    (lambda v: bayesify.latency(int, seconds=v), "latency: seconds"),
    (lambda v: bayesify.kl_schedule("linear", 0.0, v, 3), "kl_schedule: end"),
    (lambda v: bayesify.param_groups(net(), lr=v), "param_groups: lr"),
]


@pytest.mark.parametrize("value", [True, np.True_, np.array(0.5), "0.5"])
@pytest.mark.parametrize(("call", "name"), REFUSALS, ids=[name for _, name in REFUSALS])
def test_a_bool_is_no_number_anywhere(call: Callable[[Any], Any], name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"^{name} must be "):
        call(value)
