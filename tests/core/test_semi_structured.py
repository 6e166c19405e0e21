"""pruning/semi_structured.py: which weights are packed, what packing keeps, and what is refused.

No CPU multiplies packed weights, so here they are packed by torch's own reference for CUTLASS and
multiplied as what it unpacks them to; what a GPU makes of them is in the test marked ``gpu``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import bayesify
from bayesify.errors import ArgumentError
from bayesify.pruning import semi_structured, to_semi_structured

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")


def pruned(model: nn.Module) -> nn.Module:
    """Converted, with means that are no longer the original's, and 2:4."""
    bayesify.to_bbb_(model)
    return bayesify.prune_n_of_m_(model, score="random", seed=3)


def packed_by_reference(weight: Tensor) -> Any:
    values, indices = sparse_semi_structured_from_dense_cutlass(weight)
    return SparseSemiStructuredTensorCUTLASS(
        weight.shape, values, indices, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None
    )


def multiplied(
    self: Any, x: Tensor, *, bias: Tensor | None = None, should_transpose_dense: bool = False,
    **_: Any,
) -> Tensor:  # fmt: skip
    """``weight @ x``, as torch's own kernels are called."""
    found: Tensor = self.to_dense() @ (x.t() if should_transpose_dense else x)
    found = found if bias is None else found + bias[:, None]
    return found.t() if should_transpose_dense else found


@pytest.fixture
def any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack here, into what CUTLASS takes."""
    monkeypatch.setattr(semi_structured, "_gpu", lambda device, could: torch.device("cpu"))
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", packed_by_reference)
    monkeypatch.setattr(SparseSemiStructuredTensor, "_FORCE_CUTLASS", True)
    monkeypatch.setattr(SparseSemiStructuredTensorCUTLASS, "_mm", multiplied)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mask_of_ours_is_one_that_torch_packs(dtype: torch.dtype) -> None:
    model = bayesify.prune_n_of_m_(bayesify.to_bbb(nn.Linear(128, 96)))
    weight = bayesify.to_deterministic(model).get_parameter("weight").detach().to(dtype)
    values, indices = sparse_semi_structured_from_dense_cutlass(weight)
    assert values.shape == (96, 64)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, indices), weight)


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 128), (2, 3, 128), (2, 3, 4, 128)])
def test_outputs_are_those_of_the_means(
    shape: tuple[int, ...], bias: bool, inference: bool
) -> None:
    model = pruned(nn.Sequential(nn.Linear(128, 64, bias=bias), nn.GELU(), nn.Linear(64, 32)))
    found = to_semi_structured(model, dtype=torch.bfloat16)
    assert found.packed == ("0.weight", "2.weight")
    assert found.dense == {}
    means = bayesify.to_deterministic(model).to(torch.bfloat16).eval()
    x = torch.randn(shape, dtype=torch.bfloat16)
    apart = x.transpose(0, 1).contiguous().transpose(0, 1)  # the same, not contiguous
    with torch.inference_mode(inference), torch.no_grad():
        expected = means(x)
        for given in (x, apart):
            torch.testing.assert_close(found.model(given), expected, atol=0.02, rtol=0.02)


@pytest.mark.usefixtures("any_device")
def test_a_vit_keeps_what_torch_does_not_pack() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2,
        num_classes=10,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"1 tensors are not pruned.*patch_embed"):
        pruned(model)
    found = to_semi_structured(model)
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert set(found.packed) == {f"blocks.{i}.{n}.weight" for i in range(2) for n in layers}
    assert found.dense == {
        "patch_embed.proj.weight": "torch packs no weight of a Conv2d",
        "head.weight": "it is 10 x 64, and torch packs multiples of 32 x 64",
    }
    assert isinstance(found.model.get_parameter(found.packed[0]), SparseSemiStructuredTensor)
    means = bayesify.to_deterministic(model).half().eval()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float16)
    with torch.no_grad():
        torch.testing.assert_close(found.model(x), means(x), atol=5e-3, rtol=5e-3)


@pytest.mark.usefixtures("any_device")
def test_the_model_stays_as_it_was_and_may_come_from_a_file(tmp_path: Path) -> None:
    model = pruned(nn.Sequential(nn.Linear(64, 32))).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    from_posterior = to_semi_structured(model)
    bayesify.export_safetensors(model, tmp_path / "means.safetensors")
    means = nn.Sequential(nn.Linear(64, 32))
    means.load_state_dict(load_file(tmp_path / "means.safetensors"))
    from_means = to_semi_structured(means)
    for one in (from_posterior, from_means):
        assert not one.model.training
        assert not any(p.requires_grad for p in one.model.parameters())
    assert model.training
    assert {name: v.dtype for name, v in model.state_dict().items()} == {
        name: v.dtype for name, v in before.items()
    }
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert type(means[0].weight) is nn.Parameter
    assert means[0].weight.requires_grad
    unpacked = [
        one.model.get_parameter("0.weight").to_dense() for one in (from_posterior, from_means)
    ]
    assert torch.equal(unpacked[0], means[0].weight.half())
    assert torch.equal(*unpacked)


class Odd(nn.Module):
    """Weights that cannot be replaced, beside one that can."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 64)
        self.tied = nn.Linear(64, 32)
        self.tied.weight = self.embedding.weight
        self.normed = parametrizations.weight_norm(nn.Linear(64, 32))
        self.encoder = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True)
        self.full = nn.Linear(64, 32)
        self.narrow = nn.Linear(66, 32)
        self.short = nn.Linear(60, 32)
        self.good = nn.Linear(64, 32)


@pytest.mark.usefixtures("any_device")
def test_each_weight_that_stays_says_why() -> None:
    model = Odd()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and not name.startswith("full"):
                parameter.view(-1)[::4] = 0
                parameter.view(-1)[1::4] = 0
        model.full.weight[0, 0] = 0  # three are left
        model.full.weight[3, 5] = 0
        model.full.weight[3, 4] = 0
    found = to_semi_structured(model)
    assert found.packed == ("good.weight",)
    assert found.dense == {
        "tied.weight": "another module has the same weight",
        "normed.weight": "it is computed from other parameters",
        "encoder.self_attn.out_proj.weight":
            "MultiheadAttention reads it without calling the layer",
        "encoder.linear1.weight": "TransformerEncoderLayer reads it without calling the layer",
        "encoder.linear2.weight": "TransformerEncoderLayer reads it without calling the layer",
        "full.weight": "511 of 512 groups of four inputs have more than 2 that are not 0",
        "narrow.weight": "its 66 inputs are no multiple of 4",
        "short.weight": "it is 32 x 60, and torch packs multiples of 32 x 64",
    }  # fmt: skip
    with torch.no_grad():
        found.model.get_submodule("encoder")(torch.randn(2, 3, 64).half())  # by its one operator


def test_what_cannot_be_packed_is_refused() -> None:
    dense = nn.Sequential(nn.Linear(64, 32), nn.Conv2d(4, 4, 1))
    with pytest.raises(ArgumentError, match=r"no weight of Sequential to pack \(0\.weight: 512 of"):
        to_semi_structured(dense)
    with pytest.raises(ArgumentError, match="there is no Linear"):
        to_semi_structured(nn.LayerNorm(3))
    for dtype in (torch.float32, torch.int8):
        with pytest.raises(ArgumentError, match=rf"torch\.float16 or .* got {dtype}"):
            to_semi_structured(dense, dtype=dtype)


def test_the_gpu_is_one_that_has_sparse_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 5)))
    could = "1 of 2 weights could be packed on one"
    with pytest.raises(ArgumentError, match=f"CUDA device, got 'cpu'. {could}"):
        to_semi_structured(model, device="cpu")
    with pytest.raises(ArgumentError, match="'card' is no device of torch"):
        to_semi_structured(model, device="card")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentError, match=f"'cuda' is none of the 0 here. {could}"):
        to_semi_structured(model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ArgumentError, match="'cuda:1' is none of the 1 here"):
        to_semi_structured(model, device="cuda:1")
    with pytest.raises(ArgumentError, match=rf"Old has 7\.5\. {could}"):
        to_semi_structured(model)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    with pytest.raises(ArgumentError, match="needs cuSPARSELt"):
        to_semi_structured(model)


def test_shapes_are_those_of_this_torch() -> None:
    """Multiples of 16 x 16 where cuSPARSELt packs, as torch's class says."""
    for rows, columns, fits in ((16, 16, True), (48, 80, True), (24, 16, False), (16, 24, False)):
        weight = torch.zeros(rows, columns)
        why = semi_structured._misfit(weight, torch.float16)
        assert (why is None) == fits, (rows, columns)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gpu_gives_the_outputs_of_the_means(dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs sparse tensor cores")
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10)
    with pytest.warns(UserWarning, match="patch_embed"):
        pruned(model)
    found = to_semi_structured(model, dtype=dtype)
    assert len(found.packed) == 8
    means = bayesify.to_deterministic(model).to("cuda", dtype).eval()
    x = torch.randn(3, 3, 224, 224, device="cuda", dtype=dtype)
    with torch.no_grad():
        expected, given = means(x).float(), found.model(x).float()
    scale = float(expected.abs().max())
    torch.testing.assert_close(given, expected, atol=8 * torch.finfo(dtype).eps * scale, rtol=0)
