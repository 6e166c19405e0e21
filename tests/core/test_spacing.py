"""Sigmas that a half precision cannot hold, and the spread of draws under autocast."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesify
from bayesify import RelativeStd, SigmaBelowSpacingWarning, plan, to_bbb
from bayesify.posterior import sites
from bayesify.scope import open_modes
from bayesify.spacing import Spread, below_spacing, spacing

HALVES = [torch.bfloat16, torch.float16]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 4)
    )


@pytest.mark.parametrize("dtype", HALVES)
def test_spacing_is_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    for value in torch.randn(200).mul(3.0).exp().clamp(1e-4, 6e4).to(dtype):
        up = torch.nextafter(value, torch.tensor(torch.inf, dtype=dtype))
        assert spacing(float(value), dtype) == float(up) - float(value)
    assert 0.0 < spacing(0.0, dtype) < 1e-7


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("steps", "ratio"), [(2.0, 1.010), (1.0, 1.041), (0.5, 1.141), (0.1, 0.0)])
def test_spread_of_draws_beside_a_spacing(dtype: torch.dtype, steps: float, ratio: float) -> None:
    """The numbers that ``below_spacing`` gives, at weights of 1.5."""
    layer = nn.Linear(400, 400, bias=False).to(dtype)
    with torch.no_grad():
        layer.weight.fill_(1.5)
    std = steps * spacing(1.5, dtype)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model: Any = to_bbb(layer, initial_std=math.exp((2 * math.log(std)) / 2))
    assert [w.category for w in told] == [SigmaBelowSpacingWarning] * (steps < 1.0)
    drawn = bayesify.draws(model, seed=0)["weight"].detach().double() - 1.5
    assert float(drawn.square().mean().sqrt()) / std == pytest.approx(ratio, abs=0.02)


def test_the_plan_names_the_tensors() -> None:
    assert plan(net()).spacing == ()
    [told] = plan(net().bfloat16()).spacing
    assert "of bfloat16 numbers in 7 tensors (0.weight: " in told
    row = plan(net().bfloat16()).rows[0]
    assert row.std is not None
    mean = net().bfloat16().get_parameter("0.weight").detach().double()
    step = spacing(float(mean.square().mean().sqrt()), torch.bfloat16)
    assert f"0.weight: {row.std:.2g} against {step:.2g}, " in told
    assert "and 4 more" in told
    assert "initial_std=RelativeStd(0.008)" in told
    assert told in str(plan(net().bfloat16()))
    assert plan(net().bfloat16()).to_json()["spacing"] == [told]
    # beside a zero every number of half precision is near; GroupNorm's bias takes its weight's
    # root mean square for a scale
    assert "1.bias" not in told


@pytest.mark.parametrize("dtype", HALVES)
def test_what_the_message_advises_is_enough(dtype: torch.dtype) -> None:
    [told] = plan(net().to(dtype), initial_std=RelativeStd(1e-4)).spacing
    std = float(told.rpartition("RelativeStd(")[2].partition(")")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = to_bbb(net().to(dtype), initial_std=RelativeStd(std))
        to_bbb(net())
        bayesify.check_optimizer(model, torch.optim.SGD(bayesify.param_groups(model, lr=0.1)))


def test_conversion_and_check_optimizer_warn() -> None:
    with pytest.warns(SigmaBelowSpacingWarning, match="7 tensors"):
        to_bbb(net().bfloat16())
    model = to_bbb(net())
    optimizer = torch.optim.SGD(bayesify.param_groups(model, lr=0.1))
    bayesify.check_optimizer(model, optimizer)
    with pytest.warns(SigmaBelowSpacingWarning, match=r"bfloat16 numbers in 7 tensors \(0.weight"):
        bayesify.check_optimizer(model.bfloat16(), optimizer)


def test_what_is_never_drawn_does_not_count() -> None:
    model = to_bbb(nn.Linear(64, 64, bias=False), initial_std=math.exp(-5.5))
    bayesify.fix_(model, {"weight": torch.rand(64, 64) < 0.999})
    optimizer = torch.optim.SGD(bayesify.param_groups(model.bfloat16(), lr=0.1))
    bayesify.check_optimizer(model, optimizer)  # what is fixed has a sigma of 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_bbb(nn.Linear(64, 64).bfloat16(), estimator="local")  # mean and noise stay apart


def test_many_tensors_and_one() -> None:
    few = [Spread("a", 1e-4, 1.0, torch.bfloat16), Spread("b", 1e-4, 1.0, torch.float16)]
    first, second = below_spacing(few)
    assert "in 1 tensor (a: 0.0001 against 0.0078): " in first
    assert "in 1 tensor (b: 0.0001 against 0.00098): " in second
    assert below_spacing([Spread("a", 1e-9, 1.0, torch.float32)]) == ()


# -- under autocast --------------------------------------------------------------------------


@pytest.mark.parametrize("wide", [None, RelativeStd(0.008)])
def test_draws_under_autocast_spread_by_sigma(wide: RelativeStd | None) -> None:
    """Those in float32 for every sigma; what bfloat16 makes of them where sigma is a step of it."""
    model: Any = to_bbb(net(), initial_std=wide).eval()
    names = {site.slot.uid: site for site in sites(model)}
    squares: dict[tuple[str, torch.dtype], list[Tensor]] = {}
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for seed in range(600):
            drawn = bayesify.draws(model, seed)
            with bayesify.one_draw(model, seed):
                model(x)
                (mode,) = open_modes()
                assert mode.scope is not None
                realised = dict(mode.scope.realised)
            seen = set()
            for (uid, *_), value in realised.items():
                name = names[uid].name
                assert torch.equal(value, drawn[name].to(value.dtype))
                seen.add(name)
                squares.setdefault((name, value.dtype), []).append(value.double())
            assert seen == set(drawn)
            for name, value in drawn.items():
                squares.setdefault((name, torch.float64), []).append(value.double())
    lowered = 0
    for (name, dtype), values in squares.items():
        if dtype is torch.bfloat16 and wide is None:
            continue
        if len(values) < 100:
            continue  # the first call draws in float32 what later ones lower
        std = bayesify.stddev(model)[name].double().mean()
        ratio = float(torch.stack(values).var(0).mean().sqrt() / std)
        assert ratio == pytest.approx(1.0, abs=0.05), (name, dtype)
        lowered += dtype is torch.bfloat16
    assert lowered == (0 if wide is None else 6)
