"""Do draws at the initial sigma keep the function of a pretrained network?

For real networks and real images: the share of images for which a drawn network has the top-1
class of the means, over fractions of each tensor's root mean square and for logvar -10.

    python benchmarks/initial_sigma.py --data FOLDER [--images 500] [--draws 5]

FOLDER holds `weights/tf_efficientnet_lite0_timm.safetensors`,
`weights/cifar10_resnet20_akamaster.safetensors`, `imagenette96_val.zip` (an ImageFolder tree) and
`cifar10/` (lossless mosaics, `test.webp` and `labels.json`).
"""

import argparse
import io
import json
import math
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from cifar_resnet20 import pretrained
from PIL import Image
from safetensors.torch import load_file
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

import bayesify
from bayesify import RelativeStd
from bayesify.planning import DEFAULT_NOISE
from bayesify.provenance import machine, provenance

RESULT = Path(__file__).parent / "results" / "initial_sigma.json"


def resnet20(folder: Path) -> nn.Module:
    """The real pretrained network."""
    return pretrained(folder / "weights/cifar10_resnet20_akamaster.safetensors")


def lite0(folder: Path) -> nn.Module:
    """The real pretrained network."""
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(load_file(folder / "weights/tf_efficientnet_lite0_timm.safetensors"))
    return model.eval()


def cifar_images(folder: Path, count: int) -> Tensor:
    """The first test images of CIFAR-10, normalised as the network expects."""
    Image.MAX_IMAGE_PIXELS = None
    mosaic = np.asarray(Image.open(folder / "cifar10/test.webp").convert("RGB"))
    tiles = mosaic.reshape(100, 32, 100, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)
    images = torch.from_numpy(tiles[:count].copy()).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def imagenette_images(folder: Path, count: int, model: nn.Module) -> Tensor:
    """Images of Imagenette at 96 px, evenly over the classes, through the model's own transform."""
    transform = create_transform(**resolve_model_data_config(model))  # type: ignore[no-untyped-call]
    with zipfile.ZipFile(folder / "imagenette96_val.zip") as archive:
        names = sorted(n for n in archive.namelist() if n.lower().endswith((".jpeg", ".jpg")))
        chosen = [names[i * len(names) // count] for i in range(count)]
        images = [Image.open(io.BytesIO(archive.read(n))).convert("RGB") for n in chosen]
    return torch.stack([transform(image) for image in images])


@torch.no_grad()
def agreement(model: nn.Module, images: Tensor, draws: int, **options: Any) -> list[float]:
    """For each draw, the share of images whose top-1 class is that of the means."""
    converted = bayesify.to_bbb(model, **options).eval()
    batches = images.split(50)
    means = torch.cat([model(batch) for batch in batches]).argmax(1)
    shares = []
    for seed in range(draws):
        with bayesify.one_draw(converted, seed=seed):
            drawn = torch.cat([converted(batch) for batch in batches]).argmax(1)
        shares.append((drawn == means).float().mean().item())
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    network = lite0(options.data)
    cases = {
        "resnet20 on CIFAR-10 test": (
            resnet20(options.data),
            cifar_images(options.data, 4 * options.images),
        ),
        "tf_efficientnet_lite0 on Imagenette-96 val": (
            network,
            imagenette_images(options.data, options.images, network),
        ),
    }
    rules: dict[str, dict[str, Any]] = {"default": {}, "logvar -10": {"initial_std": math.exp(-5)}}
    for fraction in (0.0005, 0.001, 0.0025, 0.01):
        rules[f"{fraction} rms"] = {"initial_std": RelativeStd(fraction)}
    rows = []
    for case, (model, images) in cases.items():
        for rule, arguments in rules.items():
            started = time.perf_counter()
            shares = agreement(model, images, options.draws, **arguments)
            row = {
                "case": case, "rule": rule, "images": len(images), "draws": options.draws,
                "mean_agreement": sum(shares) / len(shares), "min_agreement": min(shares),
            }  # fmt: skip
            rows.append(row)
            print(json.dumps(row), f"{time.perf_counter() - started:.0f} s", flush=True)
    record = {
        "command": f"benchmarks/initial_sigma.py --images {options.images} --draws {options.draws}",
        "default_noise": DEFAULT_NOISE,
        "rows": rows,
        "seeds": list(range(options.draws)),
        "machine": machine(),
        **provenance("torch", "timm"),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
