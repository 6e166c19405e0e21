"""benchmarks/cifar_resnet20.py: the network of the paper, and files that bayesify reads."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar_resnet20 import main, resnet20
from torch.nn import functional as F

from bayesify.data import load_dataset
from bayesify.models import input_config

LOADER = """
import numpy as np


def load(split):
    size = {"train": 7, "test": 3}[split]
    images = np.arange(size * 32 * 32 * 3) % 251
    return images.astype(np.uint8).reshape(size, 32, 32, 3), np.arange(size) % 2
"""


def test_it_is_the_network_of_the_paper() -> None:
    model = resnet20().eval()
    assert sum(p.numel() for p in model.parameters()) == 269_722  # 0.27 M in its table 6
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 19
    names = {name.rpartition(".")[0] for name in model.state_dict()}
    assert {"conv1", "bn1", "layer1.0.conv1", "layer3.2.bn2", "linear"} <= names
    assert not any("shortcut" in name or "downsample" in name for name in names)
    # a block with a stride: the shortcut is every second pixel, with zeros for the new channels
    block = model.get_submodule("layer2.0")
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        expected = torch.cat(
            [torch.zeros(2, 8, 4, 4), x[:, :, ::2, ::2], torch.zeros(2, 8, 4, 4)], 1
        )
        assert torch.equal(block(x), F.relu(expected))


def test_it_says_how_its_images_are_prepared() -> None:
    config = input_config(resnet20())
    assert config.size == (3, 32, 32)
    assert config.mean == (0.485, 0.456, 0.406)
    assert config.std == (0.229, 0.224, 0.225)
    assert config.crop_pct == 1.0


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["cifar_resnet20.py", *map(str, arguments)])
    main()


def test_a_folder_of_cifar_becomes_a_file_with_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "load_cifar10.py").write_text(LOADER)
    out = tmp_path / "data.safetensors"
    run(monkeypatch, "--cifar", tmp_path, "--out", out)
    train, test = (load_dataset(str(out), split=split) for split in ("train", "test"))
    assert (len(train), len(test), train.split, test.split) == (7, 3, "train", "test")
    image, label = train.read(1)
    assert label == 1
    pixels = (np.arange(2 * 3072) % 251).reshape(2, 32, 32, 3)[1]
    assert np.array_equal(image.numpy(), np.moveaxis(pixels, 2, 0))


@pytest.mark.parametrize("labels", [np.arange(5) + 2, None, np.array(list("abcde"))])
def test_an_archive_of_strangers_becomes_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: np.ndarray | None
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    arrays = {"x": images} if labels is None else {"names": labels, "x": images}
    np.savez(tmp_path / "a.npz", **arrays)
    run(monkeypatch, "--npz", tmp_path / "a.npz", "--out", tmp_path / "a.safetensors")
    data = load_dataset(str(tmp_path / "a.safetensors"), split="test")
    assert data.split == "all"
    assert np.array_equal(data.read(4)[0].numpy(), np.moveaxis(images[4], 2, 0))
    assert data.read(4)[1] == (6 if labels is not None and labels.dtype.kind == "i" else 0)
