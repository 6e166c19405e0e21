"""The CIFAR ResNet-20 as a model that ``bayesify`` can build, and CIFAR-10 as a file it can read.

    python benchmarks/cifar_resnet20.py --cifar FOLDER --out cifar10.safetensors
    python benchmarks/cifar_resnet20.py --npz images.npz --out ood.safetensors
    cd benchmarks
    bayesify convert cifar_resnet20:resnet20 --weights WEIGHTS --out net.bbb.safetensors
    bayesify eval net.bbb.safetensors cifar10.safetensors --model cifar_resnet20:resnet20

FOLDER holds ``load_cifar10.py`` with a function ``load("train" | "test")`` that returns uint8
images (N, 32, 32, 3) and int64 labels (N,). The archive of --npz holds images (N, H, W, 3) of uint8
and, if it likes, whole numbers as labels.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """A residual block of the CIFAR ResNet of He et al. (2015), with padding shortcuts."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride == 2:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, y.shape[1] // 4, y.shape[1] // 4))
        return F.relu(x + y)


class ResNet20(nn.Module):
    """The CIFAR ResNet-20 of He et al. (2015, arXiv:1512.03385, section 4.2), shortcuts A.

    Args:
        dropout: Probability of dropping a feature before the classifier.
    """

    # what bayesify.models.input_config asks a model for, as timm's models answer it
    pretrained_cfg = {  # noqa: RUF012
        "input_size": (3, 32, 32), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
        "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center",
    }  # fmt: skip

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        found: Tensor = self.layer3(self.layer2(self.layer1(x))).mean((2, 3))
        return found

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.dropout(self.features(x)))
        return logits


def resnet20(dropout: float = 0.0) -> nn.Module:
    """The network with random weights, for ``--model cifar_resnet20:resnet20``."""
    return ResNet20(dropout)


def pretrained(weights: Path, dropout: float = 0.0) -> nn.Module:
    """The network with the weights in a safetensors file."""
    model = resnet20(dropout)
    model.load_state_dict(load_file(weights))
    return model.eval()


def cifar(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 32, 32, 3) of uint8 and labels (N,) of int64, by the folder's own loader."""
    spec = importlib.util.spec_from_file_location("load_cifar10", folder / "load_cifar10.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"{folder} has no load_cifar10.py")
    loader: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    images, labels = loader.load(split)
    return torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels)


def ood_images(path: Path) -> tuple[Tensor, Tensor]:
    """Images (N, H, W, 3) of uint8 and labels (N,) of int64 in an npz or a safetensors file."""
    if path.suffix == ".safetensors":
        found = load_file(path)
        return found["images"], found["labels"]
    with np.load(path, allow_pickle=False) as arrays:
        every = [arrays[name] for name in arrays.files]
    [images] = (torch.from_numpy(array) for array in every if array.ndim == 4)
    whole = (a for a in every if a.shape == (len(images),) and a.dtype.kind in "iu")
    # OOD images have no class that counts: without labels each image is one of two
    labels = next(whole, np.arange(len(images)) % 2)
    return images, torch.from_numpy(labels.astype(np.int64))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--cifar", type=Path, metavar="FOLDER")
    source.add_argument("--npz", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    tensors: dict[str, Tensor] = {}
    if options.cifar is not None:
        for split, prefix in (("train", ""), ("test", "test_")):
            tensors[f"{prefix}images"], tensors[f"{prefix}labels"] = cifar(options.cifar, split)
    else:
        tensors["images"], tensors["labels"] = ood_images(options.npz)
    save_file(tensors, options.out)
    for name, tensor in tensors.items():
        print(name, tensor.dtype, tuple(tensor.shape))


if __name__ == "__main__":
    main()
