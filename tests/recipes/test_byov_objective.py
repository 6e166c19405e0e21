"""The loss of BYOL against numbers done by hand and by numpy."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from recipes.byov.objective import byol_loss, negatives_loss


def four(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 5, generator=generator) for _ in range(4)]


def unit(x: Tensor) -> np.ndarray:
    array: np.ndarray = x.double().numpy()
    array = array / np.linalg.norm(array, axis=1, keepdims=True)
    return array


def test_loss_is_the_sum_of_both_directions_on_the_scale_from_0_to_8() -> None:
    q1, q2, z1, z2 = four()
    expected = np.mean(
        4 - 2 * (unit(q1) * unit(z2)).sum(axis=1) - 2 * (unit(q2) * unit(z1)).sum(axis=1)
    )
    assert byol_loss(q1, q2, z1, z2).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("sign", "value"), [(1.0, 0.0), (-1.0, 8.0)])
def test_loss_of_equal_and_of_opposite_directions(sign: float, value: float) -> None:
    q1, q2, _, _ = four()
    loss = byol_loss(q1, q2, 7.0 * sign * q2, 0.1 * sign * q1)  # lengths do not count
    assert loss.item() == pytest.approx(value, abs=1e-5)


def test_loss_of_unrelated_directions_is_4() -> None:
    q = torch.eye(4)
    assert byol_loss(q, q, q.roll(1, 0), q.roll(1, 0)).item() == pytest.approx(4.0)


def test_targets_get_no_gradient_and_bfloat16_is_computed_in_float32() -> None:
    q1, q2, z1, z2 = (x.requires_grad_() for x in four())
    loss = byol_loss(q1.bfloat16(), q2, z1, z2)
    loss.backward()
    assert loss.dtype == torch.float32
    assert q1.grad is not None
    assert z1.grad is None
    assert z2.grad is None


def test_negatives_are_the_other_images_of_the_batch() -> None:
    q1, q2, z1, z2 = four(1)

    def crowding(q: Tensor, z: Tensor) -> float:
        similarity = unit(q) @ unit(z).T / 0.1
        rows = [
            math.log(np.mean([math.exp(v) for j, v in enumerate(row) if j != i]))
            for i, row in enumerate(similarity)
        ]
        return 2 * 0.1 * float(np.mean(rows))

    expected = crowding(q1, z2) + crowding(q2, z1)
    assert negatives_loss(q1, q2, z1, z2).item() == pytest.approx(expected, rel=1e-5)
