"""pruning/shrinking.py: what is left out changes shapes and no output."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

import bayesify
from bayesify.pruning.shrinking import shrink_


def exported(model: nn.Module, example: Tensor) -> Any:
    shapes = ({0: Dim("batch", min=1)},)
    return torch.export.export(model.eval(), (example,), dynamic_shapes=shapes).module()


def kill(layer: Any, *channels: int) -> None:
    """What pruning does to the weights of a unit; its bias may be Bayesian or not."""
    with torch.no_grad():
        layer.weight[list(channels)] = 0.0


def norm(channels: int) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels)
    for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
        assert tensor is not None
        tensor.data.uniform_(0.5, 1.5)
    return layer


def conv(
    inputs: int, outputs: int, size: int, padding: int = 0, *, bias: bool = True, groups: int = 1
) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=padding, bias=bias, groups=groups)


class Residual(nn.Module):
    """The sum reads the channels too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        out: Tensor = y + self.second(y)
        return out


class Split(nn.Module):
    """Two layers read the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        out: Tensor = self.second(y) + self.third(y)
        return out


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).relu())
        return out


def mlp(act: nn.Module, *, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), act, nn.Dropout(0.5), nn.Linear(8, 3, bias=bias))


torch.manual_seed(0)  # the models below are made when this file is read
VECTORS = torch.randn(2, 6)
SERIES = torch.randn(2, 6, 6)
IMAGES = torch.randn(2, 6, 7, 7)


@pytest.mark.parametrize(
    ("model", "x", "gone"),
    [
        (mlp(nn.GELU()), VECTORS, 3),
        (mlp(nn.Sigmoid()), VECTORS, 3),
        (mlp(nn.LeakyReLU(0.3, inplace=True)), VECTORS[:, None], 3),
        # with no bias to take the constant of a dead channel, it must be 0; see below for which
        (mlp(nn.ReLU(), bias=False), VECTORS, None),
        (nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), VECTORS, 3),
        # BatchNorm of (batch, channels, length) is not along the last dimension
        (nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(6), nn.Linear(8, 2)), SERIES, 0),
        (nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2)), VECTORS, 0),
        (nn.Sequential(nn.Linear(6, 8), nn.Softmax(-1), nn.Linear(8, 2)), VECTORS, 0),
        (nn.Sequential(conv(6, 8, 3), norm(8), nn.ReLU(), conv(8, 4, 3)), IMAGES, 3),
        (nn.Sequential(conv(6, 8, 3), norm(8), nn.ReLU(), conv(8, 4, 3, 1)), IMAGES, None),
        (nn.Sequential(conv(6, 8, 1, bias=False), nn.ReLU(), conv(8, 4, 3, 1)), IMAGES, 3),
        (nn.Sequential(conv(6, 8, 1), conv(8, 8, 3, groups=8), nn.SiLU(), conv(8, 4, 1)),
         IMAGES, 3),
        (nn.Sequential(conv(6, 8, 1, bias=False), conv(8, 8, 3, 1, groups=8), norm(8), nn.ReLU(),
                       conv(8, 4, 1)), IMAGES, 3),
        (nn.Sequential(conv(6, 8, 1), conv(8, 8, 3, 1, groups=8), conv(8, 4, 1)), IMAGES, None),
        (nn.Sequential(conv(6, 8, 1), conv(8, 8, 1, groups=2), conv(8, 4, 1)), IMAGES, 0),
        (nn.Sequential(conv(6, 8, 1), nn.MaxPool2d(2), conv(8, 4, 1)), IMAGES, 0),
    ],
)  # fmt: skip
def test_outputs_stay(model: Any, x: Tensor, gone: int | None) -> None:
    kill(model[0], 1, 2, 5)
    with torch.no_grad():
        if model[0].bias is not None:
            model[0].bias[[1, 2]] = torch.tensor([0.7, -0.7])
            if isinstance(model[1], nn.Conv2d | nn.ReLU):
                model[0].bias[5] = 0.0
    program = exported(model, x)
    removed = shrink_(program)
    if gone is None:
        assert 0 <= removed < 3
    else:
        assert removed == gone
    again = torch.randn(5, *x.shape[1:])
    with torch.no_grad():
        torch.testing.assert_close(program(again), model(again))
    assert sum(p.numel() for p in program.parameters()) <= sum(
        p.numel() for p in model.parameters()
    )


def test_channels_whose_constant_cannot_be_kept_stay() -> None:
    """Without a bias behind it only a channel that holds 0 may go: -0.7 and 0.0 behind a ReLU."""
    model: Any = mlp(nn.ReLU(), bias=False)
    kill(model[0], 1, 2, 5)
    with torch.no_grad():
        model[0].bias[[1, 2, 5]] = torch.tensor([0.7, -0.7, 0.0])
    program = exported(model, VECTORS)
    assert shrink_(program) == 2
    torch.testing.assert_close(program(VECTORS), model(VECTORS))


@pytest.mark.parametrize(
    "model", [Residual(), Split(), Tied()], ids=lambda model: type(model).__name__
)
def test_what_others_read_stays(model: Any) -> None:
    kill(model.first, 0, 1)
    program = exported(model, VECTORS)
    assert shrink_(program) == 0
    torch.testing.assert_close(program(VECTORS), model(VECTORS))


def test_one_channel_of_a_layer_stays() -> None:
    model: Any = mlp(nn.ReLU())
    kill(model[0], *range(8))
    program = exported(model, VECTORS)
    assert shrink_(program) == 7
    torch.testing.assert_close(program(VECTORS), model(VECTORS))


def test_a_dropout_that_always_draws_is_no_constant() -> None:
    class Always(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.second(nn.functional.dropout(self.first(x), 0.5, training=True))
            return out

    model = Always()
    kill(model.first, 0)
    assert shrink_(exported(model, VECTORS)) == 0


def test_a_pruned_vit_computes_less() -> None:
    """Half of the hidden channels of each MLP: half of their multiply-adds, and nothing else."""
    model = bayesify.to_bbb(bayesify.create_model("test_vit", num_classes=7)).eval()
    bayesify.prune_units_(model, 0.5, only="re:.*mlp.fc1.*")
    x = torch.randn(3, *(model.pretrained_cfg["input_size"]))  # type: ignore[index]
    programs = [bayesify.to_program(model, x, shrink=shrink).module() for shrink in (False, True)]
    counts = []
    for program in programs:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            found = program(x)
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)
        counts.append(counter.get_total_flops())
    vit: Any = model
    layer, tokens = vit.blocks[0].mlp.fc1, 1 + vit.patch_embed.num_patches
    # two layers in each block, two operations a multiply-add
    halves = len(vit.blocks) * 2 * (layer.out_features // 2) * layer.in_features
    assert counts[0] - counts[1] == 2 * halves * tokens * len(x)


def test_an_ensemble_shrinks_alike() -> None:
    model = bayesify.to_bbb(mlp(nn.ReLU()), initial_std=math.exp(-1.5)).eval()
    bayesify.prune_units_(model, 0.5)
    program = bayesify.to_program(model, VECTORS, num_samples=3, seed=1, shrink=True)
    found = program.module()(VECTORS)
    expected = bayesify.predict(model, VECTORS, num_samples=3, seed=1, reduce="probabilities")
    torch.testing.assert_close(found, expected.mean)
    assert sum(p.numel() for p in program.parameters()) == 3 * (4 * 6 + 4 + 3 * 4 + 3)


def test_latency_is_a_time() -> None:
    model = nn.Linear(6, 6)
    assert 0.0 < bayesify.latency(model, VECTORS, seconds=0.01) < 10.0
    with pytest.raises(bayesify.ArgumentError, match="above 0"):
        bayesify.latency(model, VECTORS, seconds=0.0)
