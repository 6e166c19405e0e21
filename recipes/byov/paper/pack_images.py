"""A folder of images as one safetensors file, which a training keeps in the memory of its device.

    python -m recipes.byov.paper.pack_images FOLDER --size 96 --out imagenette96.safetensors

FOLDER holds `train` and `val` with one folder of images for each class. Each image is brought to a
square of --size pixels: shorter side, then central crop. Small pictures are so read once and not in
every epoch, and are augmented on the device.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

from safetensors.torch import save_file
from torch import Tensor

from bayesify.storage import replacing

from ..data.dataset import in_memory, open_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--size", type=int, required=True, help="side of an image, pixels")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    source = open_source(options.folder, image_size=options.size)
    tensors: dict[str, Tensor] = {}
    splits: dict[Literal["train", "test"], str] = {"train": "", "test": "test_"}
    for split, prefix in splits.items():
        held = in_memory(source, split)
        tensors[f"{prefix}images"] = held.images.movedim(1, -1).contiguous()
        tensors[f"{prefix}labels"] = held.labels
    with replacing(options.out, overwrite=True) as path:
        save_file(tensors, path)
    for name, tensor in tensors.items():
        print(name, tensor.dtype, tuple(tensor.shape))


if __name__ == "__main__":
    main()
