"""bayesify.data: every kind of data set, the batches made of it, and what is refused."""

import hashlib
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import IterableDataset
from torchvision.transforms.functional import to_pil_image

import bayesify
from bayesify.data import ImageData, load_dataset, loader, prepare
from bayesify.errors import ArgumentError, DataError
from bayesify.models import InputConfig

GREY = InputConfig((1, 28, 28), (0.5,), (0.5,))
HALF = (0.5, 0.5, 0.5)


def smooth_image(height: int, width: int, seed: int = 0) -> Tensor:
    """Colour noise blown up from 8 x 8: as smooth as a photo, uint8 (3, H, W)."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 8, 8, generator=g) * 255
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0].byte()


def save_images(folder: Path, count: int, size: tuple[int, int] = (10, 12)) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        to_pil_image(smooth_image(*size, seed=i)).save(folder / f"{i}.png")


def collect(data: ImageData, config: InputConfig, **options: Any) -> tuple[Tensor, Tensor]:
    batches = list(loader(data, 7, model_config=config, **options))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


# fashion-sample


@pytest.mark.parametrize(("split", "each"), [("train", 600), ("test", 200)])
def test_the_embedded_sample_is_balanced_and_not_repeated(split: Any, each: int) -> None:
    data = load_dataset("fashion-sample", split=split)
    assert (len(data), data.split, len(data.classes)) == (10 * each, split, 10)
    images, labels = collect(data, GREY)
    assert labels.bincount().tolist() == [each] * 10
    distinct = {hashlib.sha256(image.numpy().tobytes()).digest() for image in images}
    assert len(distinct) > 0.99 * len(data)  # the official set repeats a few images itself


def test_the_embedded_splits_share_no_image() -> None:
    seen = [
        {
            image.numpy().tobytes()
            for image in collect(load_dataset("fashion-sample", split=s), GREY)[0]
        }
        for s in ("train", "test")
    ]
    assert not seen[0] & seen[1]


def test_the_embedded_sample_is_small_and_carries_its_licence() -> None:
    assets = Path(bayesify.__file__).parent / "assets"
    assert sum(path.stat().st_size for path in assets.iterdir()) < 4_000_000
    assert "Copyright © 2017 Zalando SE" in (assets / "FASHION-MNIST-LICENSE.txt").read_text("utf8")
    assert "1708.07747" in (assets / "README.md").read_text("utf8")


def test_its_images_look_like_their_classes() -> None:
    # Trousers have a gap between the legs, bags are wide and filled: label order and pixel order
    # cannot be wrong without this failing.
    images, labels = collect(load_dataset("fashion-sample", split="test"), GREY)
    mean = torch.stack([images[labels == k].mean(0)[0] for k in range(10)])
    trouser, bag = mean[1], mean[8]
    assert trouser[24, 13:15].mean() < trouser[24, [9, 10, 17, 18]].mean() - 0.2
    assert bag[16, [4, 23]].mean() > trouser[16, [4, 23]].mean() + 0.5


def test_a_damaged_sample_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assets = Path(bayesify.__file__).parent / "assets"
    with np.load(assets / "fashion_sample.npz") as arrays:
        good = dict(arrays)
    (tmp_path / "assets").mkdir()
    monkeypatch.setattr("bayesify.data.sources.resources.files", lambda package: tmp_path)
    target = tmp_path / "assets" / "fashion_sample.npz"
    with pytest.raises(DataError, match="missing or damaged"):
        load_dataset("fashion-sample", split="test")
    target.write_bytes((assets / "fashion_sample.npz").read_bytes()[:-5000])
    with pytest.raises(DataError, match="missing or damaged"):
        load_dataset("fashion-sample", split="test")
    good["test_labels"][0] += 1
    np.savez(target, **good)
    with pytest.raises(DataError, match="sha256"):
        load_dataset("fashion-sample", split="test")


def test_importing_is_cheap() -> None:
    code = "import sys, bayesify.data, bayesify.metrics; print([m for m in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "'timm'" not in loaded.stdout
    assert "'torchvision'" not in loaded.stdout


# prepare


@pytest.mark.parametrize(
    ("stored", "size", "crop_pct", "crop_mode", "interpolation"),
    [
        ((60, 80), (48, 48), 0.875, "center", "bicubic"),
        ((300, 200), (64, 64), 0.95, "center", "bilinear"),
        ((28, 28), (64, 64), 0.9, "center", "bicubic"),
        ((60, 80), (48, 48), 1.0, "squash", "bicubic"),
        ((90, 70), (32, 48), 0.9, "center", "bicubic"),
        ((60, 80), (48, 48), 1.15, "center", "bicubic"),
    ],
)
def test_prepare_does_what_timm_does(
    stored: tuple[int, int],
    size: tuple[int, int],
    crop_pct: float,
    crop_mode: Any,
    interpolation: Any,
) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image = smooth_image(*stored)
    config = InputConfig((3, *size), mean, std, interpolation, crop_pct, crop_mode)
    transform = create_transform(
        (3, *size),
        mean=mean,
        std=std,
        interpolation=interpolation,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
    )
    if crop_mode == "center" and str(transform.transforms[0]).count(interpolation) == 0:
        pytest.skip("this timm resizes to sides that differ by bilinear, whatever is asked for")
    expected, found = transform(to_pil_image(image)), prepare(image, config)
    assert found.shape == (3, *size)
    # PIL and torch round differently: at most two of 255 grey levels, and seldom.
    levels = ((found - expected) * torch.tensor(std).view(3, 1, 1) * 255).abs()
    assert levels.max() < 2.01
    assert levels.mean() < 0.3


def test_prepare_leaves_images_of_the_right_size_alone() -> None:
    image = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    config = InputConfig((3, 8, 8), (0.1, 0.2, 0.3), (0.5, 1.0, 2.0), crop_pct=0.5)
    expected = (image.numpy() / 255 - np.reshape([0.1, 0.2, 0.3], (3, 1, 1))) / np.reshape(
        [0.5, 1.0, 2.0], (3, 1, 1)
    )
    np.testing.assert_allclose(prepare(image, config).numpy(), expected, atol=1e-6)


def test_grey_is_repeated_and_colour_averaged() -> None:
    grey = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    three = prepare(grey, InputConfig((3, 8, 8), HALF, HALF))
    assert three.shape == (4, 3, 8, 8)
    for channel in range(3):
        assert torch.equal(three[:, channel], (grey[:, 0].float() / 255 - 0.5) / 0.5)
    colour = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    one = prepare(colour, InputConfig((1, 8, 8), (0.0,), (1.0,)))
    torch.testing.assert_close(one, colour.double().mean(1, keepdim=True).float() / 255)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(0, 1, 8, 8, dtype=torch.uint8), "no image in a batch"),
        (torch.zeros(1, 1, 0, 8, dtype=torch.uint8), "no image in a batch"),
        (torch.zeros(1, 1, 8, 8), "must be uint8"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "3 channels do not fit a model of 4"),
    ],
)
def test_prepare_refuses(images: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare(images, InputConfig((4, 8, 8), (0.5,) * 4, (0.5,) * 4))


# loader


def tensors(tmp_path: Path, n: int = 20, more: dict[str, Tensor] | None = None) -> str:
    """A safetensors file in which image i has the value i everywhere and the label i % 4."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 5, 6, 3).contiguous()
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
    save_file({"images": images, "labels": torch.arange(n) % 4, **(more or {})}, path)
    return str(path)


RAW = InputConfig((3, 5, 6), (0.0,) * 3, (1 / 255,) * 3)


@given(batch_size=st.integers(1, 30), shuffle=st.booleans(), seed=st.integers(0, 5))
def test_a_pass_gives_every_image_once_with_its_own_label(
    tmp_path_factory: pytest.TempPathFactory, batch_size: int, shuffle: bool, seed: int
) -> None:
    data = load_dataset(tensors(tmp_path_factory.mktemp("t")), split="train")
    batches = list(loader(data, batch_size, model_config=RAW, shuffle=shuffle, seed=seed))
    assert [len(y) for _, y in batches[:-1]] == [batch_size] * (len(batches) - 1)
    images = torch.cat([x for x, _ in batches])
    labels = torch.cat([y for _, y in batches])
    assert (images.dtype, images.shape) == (torch.float32, (20, 3, 5, 6))
    assert labels.dtype == torch.int64
    order = images[:, 0, 0, 0].round().long()
    assert order.sort().values.tolist() == list(range(20))
    assert torch.equal(labels, order % 4)
    if not shuffle:
        assert order.tolist() == list(range(20))


def test_the_order_comes_from_the_seed_alone_and_changes_every_pass(tmp_path: Path) -> None:
    data = load_dataset(tensors(tmp_path, 200), split="train")

    def passes(seed: int) -> list[list[float]]:
        made = loader(data, 16, model_config=RAW, shuffle=True, seed=seed)
        return [torch.cat([x[:, 0, 0, 0] for x, _ in made]).tolist() for _ in range(2)]

    state = torch.get_rng_state()
    first = passes(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert passes(1) == first
    assert first[0] != first[1]
    assert passes(2)[0] != first[0]


def test_worker_processes_give_the_same_batches_and_errors(tmp_path: Path) -> None:
    for name in "ab":
        save_images(tmp_path / "data" / name, 4)
    data = load_dataset(str(tmp_path / "data"), split="train")
    config = InputConfig((3, 8, 8), HALF, HALF)
    here, there = (collect(data, config, shuffle=True, workers=w) for w in (0, 1))
    assert torch.equal(here[0], there[0])
    assert torch.equal(here[1], there[1])
    (tmp_path / "data" / "a" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png"):
        collect(data, config, workers=1)


@pytest.mark.parametrize("batch_size", [0, -3, 2.5, True])
def test_batch_size_must_be_positive(batch_size: int) -> None:
    data = load_dataset("fashion-sample", split="test")
    with pytest.raises(DataError, match="batch_size"):
        loader(data, batch_size, model_config=GREY)


def test_workers_must_not_be_negative() -> None:
    with pytest.raises(DataError, match="workers"):
        loader(load_dataset("fashion-sample", split="test"), 4, model_config=GREY, workers=-1)


# names


def test_an_unknown_name_lists_the_kinds() -> None:
    with pytest.raises(DataError, match=r"fashion-sample.*folder.*timm:.*safetensors"):
        load_dataset("fashion-smaple", split="train")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file .*none\.safetensors"):
        load_dataset(str(tmp_path / "none.safetensors"), split="train")


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ArgumentError, match="'train' or 'test'"):
        load_dataset("fashion-sample", split="val")  # type: ignore[arg-type]


# folders


def test_a_single_tree_has_no_splits(tmp_path: Path) -> None:
    save_images(tmp_path / "cat", 2)
    save_images(tmp_path / "dog" / "deeper", 3)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    for split in ("train", "test"):
        data = load_dataset(str(tmp_path), split=split)
        assert (len(data), data.split, data.classes) == (5, "all", ("cat", "dog"))
        image, label = data.read(4)
        assert label == 1
        assert torch.equal(image, smooth_image(10, 12, seed=2))


@pytest.mark.parametrize("test_name", ["test", "val", "validation"])
def test_the_classes_are_those_of_the_training_images(tmp_path: Path, test_name: str) -> None:
    for name in ("ant", "bee", "cow"):
        save_images(tmp_path / "train" / name, 2)
    save_images(tmp_path / test_name / "cow", 3)  # alone, it must still have the number 2
    test = load_dataset(str(tmp_path), split="test")
    assert (test.split, test.classes) == ("test", ("ant", "bee", "cow"))
    assert [test.read(i)[1] for i in range(len(test))] == [2, 2, 2]
    assert len(load_dataset(str(tmp_path), split="train")) == 6


def test_a_class_called_train_is_a_class(tmp_path: Path) -> None:
    for name in ("bus", "train"):
        save_images(tmp_path / name, 1)
    assert load_dataset(str(tmp_path), split="test").classes == ("bus", "train")


def test_a_missing_split_or_an_unknown_class_is_refused(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        save_images(tmp_path / "train" / name, 1)
    with pytest.raises(DataError, match="no class folders for 'test'"):
        load_dataset(str(tmp_path), split="test")
    save_images(tmp_path / "val" / "wasp", 1)
    with pytest.raises(DataError, match="wasp"):
        load_dataset(str(tmp_path), split="test")


def test_folders_without_images_or_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no subfolders"):
        load_dataset(str(tmp_path), split="train")
    save_images(tmp_path / "cat", 1)
    with pytest.raises(DataError, match=r"one class only \(cat\)"):
        load_dataset(str(tmp_path), split="train")
    (tmp_path / "dog").mkdir()
    with pytest.raises(DataError, match=r"lacks images.*dog"):
        load_dataset(str(tmp_path), split="train")


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        save_images(tmp_path / name, 1, (200, 200))
    data = load_dataset(str(tmp_path), split="train")
    whole = (tmp_path / "dog" / "0.png").read_bytes()
    (tmp_path / "dog" / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"dog/0\.png cannot be read"):
        collect(data, InputConfig((3, 8, 8), HALF, HALF))
    (tmp_path / "dog" / "0.png").unlink()
    with pytest.raises(DataError, match=r"dog/0\.png cannot be read"):
        data.read(1)


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("1", 1), ("RGB", 3), ("P", 3), ("RGBA", 3), ("CMYK", 3)]
)
def test_image_modes(tmp_path: Path, mode: str, channels: int) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4), (200, 200, 200)).convert(mode).save(tmp_path / name / "a.tiff")
    image, _ = load_dataset(str(tmp_path), split="train").read(0)
    assert (image.dtype, image.shape) == (torch.uint8, (channels, 4, 4))
    if mode != "1":
        assert (image.float() - 200).abs().max() <= 4  # a palette has steps of 51


def test_sixteen_bit_images_are_refused_rather_than_cut_off(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / name / "a.png")
    with pytest.raises(DataError, match="8-bit"):
        load_dataset(str(tmp_path), split="train").read(0)


# safetensors


def test_a_file_with_and_without_a_test_split(tmp_path: Path) -> None:
    one = load_dataset(tensors(tmp_path), split="test")
    assert (len(one), one.split, one.classes) == (20, "all", ("0", "1", "2", "3"))
    more = {
        "test_images": torch.full((2, 5, 6, 3), 9, dtype=torch.uint8),
        "test_labels": torch.tensor([1, 1], dtype=torch.int32),
    }
    path = tensors(tmp_path, more=more)
    train, test = (load_dataset(path, split=split) for split in ("train", "test"))
    assert (len(train), train.split, len(test), test.split) == (20, "train", 2, "test")
    assert train.classes == test.classes
    assert test.read(1)[1] == 1
    assert (test.read(0)[0] == 9).all()


def test_rows_and_columns_are_not_swapped(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (4, 5, 6, 3), dtype=torch.uint8)
    data = load_dataset(tensors(tmp_path, 4, {"images": images}), split="train")
    assert torch.equal(data.read(2)[0], images[2].permute(2, 0, 1))


U8 = torch.uint8
IMAGES = torch.zeros(4, 5, 6, 3, dtype=U8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": IMAGES}, "no tensor 'labels'"),
        ({"labels": torch.arange(4)}, "no tensor 'images'"),
        ({"test_images": IMAGES, "images": IMAGES, "labels": torch.arange(4)}, "'test_labels'"),
        ({"images": IMAGES.float(), "labels": torch.arange(4)}, r"uint8 \(N, H, W, C\)"),
        ({"images": torch.zeros(4, 3, 5, 6, dtype=U8), "labels": torch.arange(4)}, "N, H, W, C"),
        ({"images": torch.zeros(4, 5, 6, dtype=U8), "labels": torch.arange(4)}, "N, H, W, C"),
        ({"images": torch.zeros(4, 0, 6, 1, dtype=U8), "labels": torch.arange(4)}, "no pixel"),
        ({"images": IMAGES, "labels": torch.arange(4) / 4}, "soft"),
        ({"images": IMAGES, "labels": torch.eye(4, dtype=torch.int64)}, "one-hot"),
        ({"images": IMAGES, "labels": torch.tensor([True, False, True, False])}, "integers"),
        ({"images": IMAGES, "labels": torch.arange(4) - 1}, "Label -1 .* below 0"),
        ({"images": IMAGES, "labels": torch.tensor([0, 1, 2, 10**12])}, "out of range"),
        ({"images": IMAGES, "labels": torch.arange(5)}, "4 images but 5 labels"),
        ({"images": IMAGES[:0], "labels": torch.arange(0)}, "no pixel"),
        ({"images": IMAGES, "labels": torch.full((4,), 3)}, "one class only"),
        (
            {
                "images": IMAGES,
                "labels": torch.arange(4),
                "test_images": IMAGES,
                "test_labels": torch.arange(4) + 1,
            },
            "Label 4 .* out of range.* 0 to 3",
        ),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: dict[str, Tensor], message: str) -> None:
    path = tmp_path / "bad.safetensors"
    save_file({key: value.clone() for key, value in content.items()}, path)
    with pytest.raises(DataError, match=message):
        load_dataset(str(path), split="test")


@pytest.mark.parametrize("keep", [0, 4, 40, -100])
def test_a_file_cut_short_is_named(tmp_path: Path, keep: int) -> None:
    path = Path(tensors(tmp_path))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=f"{path.name} is no readable safetensors file"):
        load_dataset(str(path), split="train")


# timm


def write_idx(path: Path, values: np.ndarray[Any, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def test_a_torchvision_data_set_through_timm(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for word, n in (("train", 30), ("t10k", 10)):
        raw = tmp_path / "FashionMNIST" / "raw"
        write_idx(raw / f"{word}-images-idx3-ubyte", rng.integers(0, 256, (n, 28, 28)))
        write_idx(raw / f"{word}-labels-idx1-ubyte", np.arange(n) % 10)
    train, test = (
        load_dataset(f"timm:torch/fashion_mnist@{tmp_path}", split=split)
        for split in ("train", "test")
    )
    assert (len(train), len(test), test.split) == (30, 10, "test")
    assert train.classes == load_dataset("fashion-sample", split="test").classes
    images, labels = collect(train, GREY)
    stored = (tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte").read_bytes()[16:]
    expected = np.frombuffer(stored, np.uint8).reshape(30, 1, 28, 28) / 127.5 - 1
    np.testing.assert_allclose(images.numpy(), expected, atol=1e-6)
    assert labels.tolist() == [i % 10 for i in range(30)]


class Items:
    """What timm returns for a Hugging Face data set: classes in the reader, in declared order."""

    def __init__(self, label: object) -> None:
        self.label = label
        self.reader = type("Reader", (), {"class_to_idx": {"zebra": 0, "ant": 1}})()

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Image.Image, object]:
        return Image.new("L", (4, 4)), self.label


def test_other_sources_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_test(name: str, root: str | None, split: str) -> Items:
        if split != "test":
            raise ValueError(f"Unknown split {split}")
        assert (name, root) == ("hfds/x/y", None)
        return Items(np.int64(1))

    monkeypatch.setattr("timm.data.dataset_factory.create_dataset", only_test)
    data = load_dataset("timm:hfds/x/y", split="test")
    assert data.classes == ("zebra", "ant")
    assert data.read(0)[1] == 1
    with pytest.raises(DataError, match="Unknown split train"):
        load_dataset("timm:hfds/x/y", split="train")


@pytest.mark.parametrize("label", [2, -1])
def test_labels_of_timm_out_of_range(monkeypatch: pytest.MonkeyPatch, label: int) -> None:
    monkeypatch.setattr("timm.data.dataset_factory.create_dataset", lambda *a, **k: Items(label))
    data = load_dataset("timm:hfds/x", split="train")
    with pytest.raises(DataError, match=f"Label {label} .*out of range"):
        collect(data, GREY)


@pytest.mark.parametrize("label", [[0.5, 0.5], 0.5, torch.tensor(0.5), True])
def test_soft_labels_of_timm(monkeypatch: pytest.MonkeyPatch, label: object) -> None:
    monkeypatch.setattr("timm.data.dataset_factory.create_dataset", lambda *a, **k: Items(label))
    with pytest.raises(DataError, match="whole number of a class"):
        collect(load_dataset("timm:hfds/x", split="train"), GREY)


def test_streams_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter([])

    monkeypatch.setattr("timm.data.dataset_factory.create_dataset", lambda *a, **k: Stream())
    with pytest.raises(DataError, match="stream"):
        load_dataset("timm:wds/x", split="train")


@pytest.mark.parametrize("name", ["torch/nothing", "torch/cifar10", "hfds/none", ""])
def test_what_timm_cannot_open(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"timm cannot open|does not name|no image"):
        load_dataset(f"timm:{name}@{tmp_path}", split="train")
    with pytest.raises(DataError, match="timm cannot open"):
        load_dataset(f"timm:{name}", split="train")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_labels_of_unsigned_types(tmp_path: Path, dtype: torch.dtype) -> None:
    labels = torch.arange(4).to(dtype)
    save_file({"images": IMAGES, "labels": labels}, tmp_path / "d.safetensors")
    data = load_dataset(str(tmp_path / "d.safetensors"), split="train")
    assert [data.read(i)[1] for i in range(4)] == [0, 1, 2, 3]
    labels = torch.tensor([0, 1, 2, torch.iinfo(dtype).max], dtype=torch.float64)
    if dtype == torch.uint64:
        labels = torch.tensor([0, 1, 2, -1]).view(torch.uint64)
    if dtype in (torch.uint32, torch.uint64):
        save_file({"images": IMAGES, "labels": labels.to(dtype)}, tmp_path / "e.safetensors")
        with pytest.raises(DataError, match=r"Label .* out of range"):
            load_dataset(str(tmp_path / "e.safetensors"), split="train")
