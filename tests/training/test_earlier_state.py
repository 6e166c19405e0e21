"""The state of a fit that an earlier version (commit e6cc7f4) wrote is gone on from."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import bayesify
from bayesify.training import fit

STATE = Path(__file__).parents[1] / "files" / "fit_state" / "step-8-of-12.safetensors"
OPTIONS: dict[str, Any] = {
    "epochs": 4, "batch_size": 6, "lr": 0.02, "average": 0.6, "holdout": 0.25, "kl_warmup": 0.5,
    "seed": 3,
}  # fmt: skip


def model() -> nn.Module:
    layers = [nn.Linear(2, 4, bias=False), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 3)]
    net = nn.Sequential(*layers)
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(torch.linspace(-0.5, 0.7, p.numel()).view(p.shape) * (1 + 0.1 * i))
    return bayesify.to_bbb(net, initial_std=math.exp(-2.5))


def data() -> TensorDataset:
    labels = torch.arange(24) % 3
    x = torch.stack([torch.sin(torch.arange(24.0)), torch.cos(1.7 * torch.arange(24.0))], 1)
    return TensorDataset(x + labels[:, None], labels)


def drops_the_same() -> bool:
    """Whether dropout leaves out the same as with the torch that wrote the state, 2.14."""
    torch.manual_seed(0)
    kept = nn.functional.dropout(torch.ones(12), 0.2) > 0
    return kept.tolist() == [place not in (0, 3) for place in range(12)]


@pytest.mark.skipif(
    not drops_the_same(),
    reason="this torch leaves out other elements in a dropout than 2.14, which wrote the state",
)
def test_an_earlier_state_ends_like_a_fit_without_interruption(tmp_path: Path) -> None:
    path = tmp_path / "state"
    shutil.copy(STATE, path)
    whole, resumed = model(), model()
    expected = fit(whole, data(), **OPTIONS)
    found = fit(resumed, data(), **OPTIONS, checkpoint=path, resume=True)
    assert (found.steps, found.best_epoch) == (expected.steps, expected.best_epoch) == (12, 4)
    for name in ("losses", "kl", "holdout_losses"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5, msg=name
        )
    for (name, ours), theirs in zip(
        resumed.state_dict().items(), whole.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
