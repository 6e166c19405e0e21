"""A CIFAR ResNet-20 that has not seen the last 5,000 training images, to choose settings on them.

    python benchmarks/cifar_proxy.py --data cifar10.safetensors --out proxy.safetensors

The pretrained network of benchmarks/posterior.py knows every training image by heart, so that none
can stand in for a new one. This network is of the same kind and knows 45,000 of them;
``posterior.py --holdout --weights proxy.safetensors`` measures on the others.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cifar_resnet20 import resnet20
from paired import keep_memory
from safetensors.torch import save_file

import bayesify
from bayesify.data import InMemory, load_dataset
from bayesify.models import input_config
from bayesify.training import Progress

HOLDOUT = 5000
"""How many images of the training set, the last ones, are kept from the network."""


def show(at: Progress) -> None:
    if at.step % 100 == 0:
        print(f"step {at.step} of {at.steps}, loss {at.loss:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="CIFAR-10 as a safetensors file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    train = load_dataset(options.data, split="train")
    source: Any = train.source
    seen = replace(train, source=InMemory(source.images[:-HOLDOUT], source.labels[:-HOLDOUT]))
    torch.manual_seed(options.seed)
    model = resnet20().to(memory_format=torch.channels_last)
    bayesify.fit(
        model, seen, epochs=options.epochs, batch_size=128, lr=options.lr, amp=True,
        augment="flip-crop", seed=options.seed, model_config=input_config(model),
        on_step=show,
    )  # fmt: skip
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, options.out)


if __name__ == "__main__":
    keep_memory()
    main()
