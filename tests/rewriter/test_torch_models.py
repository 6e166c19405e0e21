"""Models of torch.nn as people build them: text to text, packed sequences, segmentation, dtypes.

Single layers with drawn settings are in test_invariants; here they meet in models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import rnn

import bayesify
from bayesify import one_draw
from reference import check, functional_call, same

Call = tuple[tuple[Any, ...], dict[str, Any]]
Inputs = Callable[[int], Call]

WORDS = 20


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def words(batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(batch + seed)
    return torch.randint(1, WORDS, (batch, length), generator=generator)


def passes(model: nn.Module, make: Inputs) -> None:
    """All invariants hold and every forward became a graph."""
    report = check(model, make)
    assert report.problems == []
    assert report.swapped == []
    assert report.fx_owners == report.owners > 0


# -- transformers ----------------------------------------------------------------------------


class Translation(nn.Module):
    """nn.Transformer between an embedding and a head that share their weight."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embedding = nn.Embedding(WORDS, 8)
        self.net = nn.Transformer(8, 2, 2, 2, 16, batch_first=batch_first)
        self.head = nn.Linear(8, WORDS)
        self.head.weight = self.embedding.weight

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        pad = source == 1
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        a, b = self.embedding(source), self.embedding(target)
        if not self.batch_first:
            a, b = a.transpose(0, 1), b.transpose(0, 1)
        h = self.net(
            a, b, tgt_mask=mask, tgt_is_causal=True, src_key_padding_mask=pad,
            memory_key_padding_mask=pad,
        )  # fmt: skip
        y: Tensor = self.head(h)
        return y


# torch itself says so of the encoder's fast path
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but self.use_nested_tensor")
@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer(batch_first: bool) -> None:
    def make(batch: int) -> Call:
        source = words(batch, 5)
        source[:, 0] = 2  # a row of padding alone is NaN in torch
        return (source, words(batch, 4, seed=1)), {}

    report = check(Translation(batch_first), make)
    assert report.problems == []
    assert report.fx_owners == report.owners  # two wrappers may fall back, on the nested tensor


class Decoder(nn.Module):
    """nn.TransformerDecoder with its norm first and a norm at the end."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(
            8, 2, 16, batch_first=True, norm_first=True, activation="gelu"
        )
        self.net = nn.TransformerDecoder(layer, 2, nn.LayerNorm(8))
        self.memory = nn.Parameter(torch.randn(1, 3, 8))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        memory = self.memory.expand(x.shape[0], -1, -1)
        y: Tensor = self.net(x, memory, tgt_mask=mask, tgt_is_causal=mask is not None)
        return y


def test_transformer_decoder() -> None:
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    passes(
        Decoder(),
        lambda batch: ((normal(batch, 4, 8, seed=batch),), {"mask": mask if batch % 2 else None}),
    )


class Attending(nn.Module):
    """Self-attention with padding; its weights are asked for in three ways."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.1)

    def forward(self, x: Tensor, padding: Tensor, **options: bool) -> Any:
        y, weights = self.attention(self.query(x), x, x, key_padding_mask=padding, **options)
        return y if weights is None else (y, weights)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"need_weights": False}, None),
        ({"need_weights": True}, (2, 4, 4)),
        ({"need_weights": True, "average_attn_weights": False}, (2, 2, 4, 4)),
    ],
)
def test_attention_with_padding(options: dict[str, bool], shape: tuple[int, ...] | None) -> None:
    def make(batch: int) -> Call:
        padding = torch.arange(4).expand(batch, 4) > 2
        return (normal(batch, 4, 8, seed=batch), padding), options

    model = Attending()
    passes(model, make)
    converted = bayesify.to_bbb(model, initial_std=math.exp(-1.5))
    found = converted(*make(2)[0], **options)
    if shape is None:
        assert isinstance(found, Tensor)
        return
    assert found[1].shape == shape
    assert float(found[1][..., 3].detach().abs().max()) == 0.0  # padding gets no weight


# -- sequences of several lengths ------------------------------------------------------------

KINDS = [nn.RNN, nn.LSTM, nn.GRU]
LENGTHS = [6, 3, 5]


class Classifier(nn.Module):
    """A recurrent net over words, packed or padded."""

    def __init__(self, kind: Any, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        self.embedding = nn.Embedding(WORDS, 6, padding_idx=0)
        self.net = kind(6, 5, 2, batch_first=True, bidirectional=True, dropout=0.1)
        self.head = nn.Linear(10, 3)

    def forward(self, text: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(text)
        if self.packed:
            x = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        outputs, state = self.net(x)
        if self.packed:
            outputs, _ = rnn.pad_packed_sequence(outputs, batch_first=True)
        hidden = state[0] if isinstance(state, tuple) else state
        return self.head(torch.cat([hidden[-2], hidden[-1]], -1)), outputs


def texts(batch: int) -> Call:
    lengths = torch.tensor(LENGTHS[:batch])
    padded = words(batch, 6).masked_fill(torch.arange(6) >= lengths[:, None], 0)
    return (padded, lengths), {}


@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_classifier(kind: type[nn.Module]) -> None:
    passes(Classifier(kind, packed=False), texts)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_classifier(kind: type[nn.Module]) -> None:
    report = check(Classifier(kind, packed=True), texts)
    assert report.problems == []
    # a packed sequence has sizes that depend on values: the net and its caller fall back, said so
    assert {line.split()[0] for line in report.swapped} == {"Classifier.forward:", "net"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_sequence_is_its_rows_alone(kind: Any) -> None:
    model = kind(4, 5)
    converted = bayesify.to_bbb(model, initial_std=math.exp(-1.5)).eval()
    rows = [normal(n, 4, seed=n) for n in (5, 3, 2)]
    packed = rnn.pack_sequence(rows)
    with one_draw(converted, seed=1):
        outputs, lengths = rnn.pad_packed_sequence(converted(packed)[0])
        alone = [converted(row[:, None])[0][:, 0] for row in rows]
    drawn = bayesify.draws(converted, seed=1)
    expected = functional_call(model, drawn, (packed,), {})
    assert same(outputs, rnn.pad_packed_sequence(expected[0])[0])
    for k, row in enumerate(alone):
        assert int(lengths[k]) == len(row)
        torch.testing.assert_close(outputs[: len(row), k], row, rtol=1e-5, atol=1e-6)
    packed_report = check(model, lambda batch: ((rnn.pack_sequence(rows[:batch]),), {}))
    assert packed_report.problems == []


# -- segmentation ----------------------------------------------------------------------------

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda width: nn.GroupNorm(2, width),
    "instance": lambda width: nn.InstanceNorm2d(width, affine=True, track_running_stats=True),
}


class Block(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, norm: str) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1), NORMS[norm](outputs), nn.ReLU(inplace=True)
        )


class UNet(nn.Module):
    """Down and up with skips; any height and width; a loss if there is a target."""

    def __init__(self, norm: str = "batch") -> None:
        super().__init__()
        self.down1 = Block(1, 4, norm)
        self.down2 = Block(4, 8, norm)
        self.bottom = Block(8, 8, norm)
        self.up2 = nn.ConvTranspose2d(8, 8, 2, 2)
        self.decode2 = Block(16, 4, norm)
        self.up1 = nn.Upsample(scale_factor=2, mode="bilinear")
        self.decode1 = Block(8, 4, norm)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Any:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        h = self.up2(self.bottom(F.max_pool2d(second, 2)))
        h = self.decode2(torch.cat([F.interpolate(h, second.shape[-2:]), second], 1))
        h = self.decode1(torch.cat([F.interpolate(self.up1(h), first.shape[-2:]), first], 1))
        scores = self.head(h)
        if target is None:
            return scores
        return {"scores": scores, "loss": F.cross_entropy(scores, target)}


def pictures(batch: int) -> Call:
    size = (7 + batch, 12)  # another resolution for another batch size
    x = normal(batch, 1, *size, seed=batch)
    target = (x[:, 0] > 0).long()
    return (x,), {"target": target} if batch % 2 else {}


@pytest.mark.parametrize("norm", NORMS)
def test_segmentation(norm: str) -> None:
    passes(UNet(norm), pictures)


# -- other precisions ------------------------------------------------------------------------

LOW: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "unet": (UNet, (1, 8, 8)),
    "recurrent": (lambda: nn.Sequential(nn.Linear(6, 6), nn.LSTM(6, 5, batch_first=True)), (4, 6)),
    "transformer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), (5, 8)
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sigma is below the spacing")
@pytest.mark.parametrize("name", LOW)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_model_of_another_precision(name: str, dtype: torch.dtype) -> None:
    build, shape = LOW[name]
    passes(build().to(dtype), lambda batch: ((normal(batch, *shape, seed=batch).to(dtype),), {}))


class Mixed(nn.Module):
    """Three precisions in one model, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Linear(4, 4).bfloat16()
        self.norm = nn.LayerNorm(4)
        self.high = nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.high(self.norm(self.low(x.bfloat16()).float()).double())
        return y


@pytest.mark.filterwarnings("ignore:Sigma is below the spacing")
def test_several_precisions_in_one_model() -> None:
    model = Mixed()
    passes(model, lambda batch: ((normal(batch, 4, seed=batch),), {}))
    drawn = bayesify.draws(bayesify.to_bbb(model), seed=1)
    assert {k: v.dtype for k, v in drawn.items()} == {
        k: v.dtype for k, v in model.named_parameters()
    }


# -- bags of words ---------------------------------------------------------------------------


class Bag(nn.Module):
    """Weighted bags of several sizes and a bilinear form."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(WORDS, 4, mode="sum", include_last_offset=True)
        self.bilinear = nn.Bilinear(4, 3, 2)

    def forward(self, text: Tensor, offsets: Tensor, *, weights: Tensor, x: Tensor) -> Tensor:
        bags = self.bag(text, offsets, per_sample_weights=weights)
        y: Tensor = self.bilinear(bags, x)
        return y


def test_weighted_bags() -> None:
    def make(batch: int) -> Call:
        offsets = torch.tensor([*[0, 1, 3][:batch], 6])
        values = {"weights": normal(6, seed=batch), "x": normal(batch, 3, seed=batch)}
        return (words(1, 6, seed=batch)[0], offsets), values

    passes(Bag(), make)
