"""Make the data set `fashion-sample` again from the official Fashion-MNIST files.

    python benchmarks/make_fashion_sample.py FOLDER [--out FILE]

FOLDER holds the four official files (train-images-idx3-ubyte.gz and so on). The same numbers of
images of every class are kept, those whose seeded hash is smallest, in the official order. The
printed sha256 of each split is the one that bayesify/data/sources.py expects, whatever compressor
was used.
"""

import argparse
import gzip
import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SEED = "bayesify fashion-sample 1"
PER_CLASS = {"train": 600, "test": 200}
PREFIX = {"train": "train", "test": "t10k"}
# sha256 of the unpacked official files: packages that carry them wrap the same bytes anew.
OFFICIAL_SHA256 = {
    "train-images-idx3-ubyte.gz": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
    ),
    "train-labels-idx1-ubyte.gz": (
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
    ),
    "t10k-images-idx3-ubyte.gz": (
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
    ),
}
DEFAULT_OUT = Path(__file__).parents[1] / "bayesify" / "assets" / "fashion_sample.npz"


def read_idx(path: Path, header: int) -> NDArray[np.uint8]:
    """The bytes after the header of an official file."""
    unpacked = gzip.decompress(path.read_bytes())
    if hashlib.sha256(unpacked).hexdigest() != OFFICIAL_SHA256[path.name]:
        raise SystemExit(f"{path} is not the official file: its unpacked sha256 differs.")
    return np.frombuffer(unpacked, np.uint8, offset=header)


def pick(labels: NDArray[np.uint8], split: str) -> NDArray[np.int64]:
    """The kept indices, in order. A hash and no generator: its stream never changes."""
    rank = [hashlib.sha256(f"{SEED}:{split}:{i}".encode()).digest() for i in range(len(labels))]
    kept: list[int] = []
    for label in range(10):
        members = np.flatnonzero(labels == label).tolist()
        kept += sorted(members, key=rank.__getitem__)[: PER_CLASS[split]]
    return np.array(sorted(kept))


def main() -> None:
    """Read, pick, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder with the four official .gz files")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    options = parser.parse_args()
    arrays: dict[str, NDArray[np.uint8]] = {}
    for split, prefix in PREFIX.items():
        images = read_idx(options.folder / f"{prefix}-images-idx3-ubyte.gz", 16)
        labels = read_idx(options.folder / f"{prefix}-labels-idx1-ubyte.gz", 8)
        kept = pick(labels, split)
        arrays[f"{split}_images"] = images.reshape(-1, 28, 28)[kept]
        arrays[f"{split}_labels"] = labels[kept]
        digest = hashlib.sha256(arrays[f"{split}_images"].tobytes())
        digest.update(arrays[f"{split}_labels"].tobytes())
        print(f"{split}: {len(kept)} images, sha256 {digest.hexdigest()}")
    with tempfile.NamedTemporaryFile(dir=options.out.parent, delete=False) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)
    os.replace(file.name, options.out)
    print(f"wrote {options.out} ({options.out.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
