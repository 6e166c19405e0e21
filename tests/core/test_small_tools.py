"""A device by its name, values for JSON, mean and spread of tensors as they come."""

from __future__ import annotations

import json
import math

import pytest
import torch

from bayesify import ArgumentError, torch_support
from bayesify.devices import resolve_device
from bayesify.json_numbers import finite
from bayesify.welford import Welford


def test_a_device_is_found_by_its_name() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    expected = torch_support.accelerator() or torch.device("cpu")
    assert resolve_device("auto") == expected


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x", ""])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ArgumentError, match=f"device '{name}' cannot be used here"):
        resolve_device(name)


def test_json_has_null_where_a_number_is_not_finite() -> None:
    value = {"a": [1.5, math.inf, (math.nan, "inf", None)], "b": {"c": -math.inf, "d": 3}}
    found = json.dumps(finite(value), allow_nan=False)
    assert found == '{"a": [1.5, null, [null, "inf", null]], "b": {"c": null, "d": 3}}'


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_running_moments_are_those_of_the_stack(dtype: torch.dtype) -> None:
    values = (1e3 + torch.randn(7, 3, 2)).to(dtype)
    found = Welford(values[0])
    for value in values:
        found.add(value)
    assert torch.allclose(found.mean, values.double().mean(0))
    assert torch.allclose(found.std(), values.double().std(0, correction=0))
    assert torch.allclose(found.std(1), values.double().std(0))
    mean, std = found.moments()
    assert mean.dtype == std.dtype == torch.promote_types(dtype, torch.float32)


def test_the_spread_of_one_is_zero() -> None:
    found = Welford(torch.ones(2))
    found.add(torch.full((2,), 5.0))
    assert found.std(1).tolist() == [0.0, 0.0]
