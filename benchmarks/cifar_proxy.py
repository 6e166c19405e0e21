"""A CIFAR ResNet-20 that does not know the last 5,000 training images, to choose settings on them.

    python benchmarks/cifar_proxy.py --data cifar10.safetensors --weights WEIGHTS \\
        --out proxy.safetensors

The pretrained network of benchmarks/posterior.py knows every training image by heart, so that none
can stand in for a new one. This one begins with the same WEIGHTS, of which the last stage and the
classifier (three quarters of all) are drawn anew, and learns 20,000 other images: at the rate of a
training from random weights, in which what the rest may remember of the 5,000 is lost, then at
falling rates. Few images make it too sure of itself within minutes, as the pretrained network is,
though less so. After every epoch it prints how it does on both kinds of images.
``posterior.py --holdout --train-images 20000 --weights proxy.safetensors`` measures on the 5,000.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cifar_resnet20 import pretrained, resnet20
from paired import keep_memory
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from bayesify.data import InMemory, load_dataset, prepare
from bayesify.models import input_config
from bayesify.training.batches import shuffled_batches

SEEN = 20_000
"""How many images of the training set, the first ones, the network learns."""
HOLDOUT = 5000
"""How many, the last ones, it must not know."""
FRESH = ("layer3", "linear")
HOT_EPOCHS, HOT_LR = 4, 0.1
COOLING = (0.02, 0.001)
"""First and last learning rate after the hot epochs, falling by the same factor in every step."""


def rate(done: float, epochs: int) -> float:
    """The learning rate after ``done`` of the epochs."""
    if done < HOT_EPOCHS:
        return HOT_LR
    first, last = COOLING
    return float(first * (last / first) ** ((done - HOT_EPOCHS) / (epochs - HOT_EPOCHS)))


def start(weights: Path, seed: int) -> nn.Module:
    """The network in its first step."""
    model = pretrained(weights).to(memory_format=torch.channels_last)
    torch.manual_seed(seed)
    fresh = resnet20()
    for name in FRESH:
        model.get_submodule(name).load_state_dict(fresh.get_submodule(name).state_dict())
    return model


def quality(model: nn.Module, images: Tensor, labels: Tensor, device: str) -> str:
    """Top-1 and NLL of images as they are, in words."""
    model.eval()
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        logits = torch.cat([model(x.to(device)) for x in images.split(500)]).float().cpu()
    right = (logits.argmax(1) == labels).double().mean()
    return f"top-1 {100 * right:.2f} %, NLL {F.cross_entropy(logits, labels):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="CIFAR-10 as a safetensors file")
    parser.add_argument("--weights", type=Path, required=True, help="of the CIFAR ResNet-20")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()

    train = load_dataset(options.data, split="train")
    source: Any = train.source
    seen = replace(train, source=InMemory(source.images[:SEEN], source.labels[:SEEN]))
    model = start(options.weights, options.seed).to(options.device)
    config = input_config(model)
    sets = {
        "held out": (prepare(source.images[-HOLDOUT:], config), source.labels[-HOLDOUT:]),
        "trained on": (prepare(source.images[:HOLDOUT], config), source.labels[:HOLDOUT]),
    }
    batches, order = shuffled_batches(
        seen, range(SEEN), batch_size=128, accumulate=1, augment="flip-crop",
        model_config=config, workers=0, seed=options.seed, pin=False,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), HOT_LR, momentum=0.9, weight_decay=1e-4)
    for epoch in range(options.epochs):
        model.train()
        order.epoch = epoch
        for step, (x, y) in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = rate(epoch + step / len(order), options.epochs)
            optimizer.zero_grad()
            x, y = x.to(options.device), y.to(options.device)
            with torch.autocast(options.device, torch.bfloat16):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        for name, (images, labels) in sets.items():
            found = quality(model, images, labels, options.device)
            print(f"epoch {epoch + 1}, {name}: {found}", flush=True)
    state = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(state, options.out)


if __name__ == "__main__":
    keep_memory()
    main()
