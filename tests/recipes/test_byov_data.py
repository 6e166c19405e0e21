"""recipes.byov.data.batches: kinds of data set, and batches that seed, epoch, step and part fix."""

import io
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from bayesify.data import InMemory, load_dataset, prepare
from bayesify.errors import ArgumentError, DataError
from bayesify.models import InputConfig
from recipes.byov.data import sources
from recipes.byov.data.batches import Views, eval_batches, steps_per_epoch, train_views
from recipes.byov.data.dataset import Source, as_channels, mean_and_std, open_source
from recipes.byov.data.views import CIFAR_VIEWS, TwoViews, WorkerViews, view_configs

CONFIGS = view_configs("cifar", size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
ON_DEVICE, IN_WORKER = TwoViews(*CONFIGS), WorkerViews(*CONFIGS)


def pixels(count: int, size: int = 10, channels: int = 3, seed: int = 0) -> Tensor:
    """Noise, uint8 (N, C, H, W)."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, size, size), dtype=torch.uint8, generator=g)


def save_images(folder: Path, images: Tensor, start: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images, start):
        array = image.movedim(0, 2).squeeze(2).numpy()
        Image.fromarray(array).save(folder / f"{number:03d}.png")


def in_memory(count: int = 40, **changes: Any) -> Source:
    """A source whose labels are the rows, so that a batch tells which images it holds."""
    images = InMemory(pixels(count, 8), torch.arange(count))
    names = tuple(map(str, range(count)))
    source = Source("rows", images, None, names, 8, 3, (0.5,) * 3, (0.25,) * 3)
    return replace(source, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of 12 training and 3 test images, 10 x 10."""
    for name, start in (("cat", 0), ("dog", 12)):
        save_images(tmp_path / "train" / name, pixels(12, seed=start), start)
        save_images(tmp_path / "test" / name, pixels(3, seed=100 + start), 100 + start)
    return tmp_path


def collect(batches: Iterator[Views]) -> list[tuple[Tensor, Tensor, list[int]]]:
    return [(a, b, [] if y is None else y.tolist()) for a, b, y in batches]


def same(left: Iterator[Views], right: Iterator[Views]) -> bool:
    ours, theirs = collect(left), collect(right)
    return len(ours) == len(theirs) > 0 and all(
        torch.equal(a, c) and torch.equal(b, d) and x == y
        for (a, b, x), (c, d, y) in zip(ours, theirs, strict=True)
    )


# Which images a batch holds


def test_an_epoch_shows_each_image_once_in_an_order_of_its_own() -> None:
    source = in_memory(40)
    seen = {}
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        batches = collect(
            train_views(source, batch_size=8, seed=seed, epoch=epoch, views=ON_DEVICE)
        )
        rows = [row for _, _, labels in batches for row in labels]
        assert sorted(rows) == list(range(40))
        seen[seed, epoch] = tuple(rows)
        assert all(a.shape == b.shape == (8, 3, 8, 8) for a, b, _ in batches)
    assert len({*seen.values(), tuple(range(40))}) == 4


def test_what_fills_no_step_is_left_out() -> None:
    source = in_memory(43)
    sizes: dict[str, Any] = {"batch_size": 4, "world_size": 2, "micro_batches": 2}
    assert steps_per_epoch(source, **sizes) == 2
    batches = collect(train_views(source, seed=0, epoch=0, views=ON_DEVICE, rank=1, **sizes))
    assert len(batches) == 4
    with pytest.raises(DataError, match=r"43 training images, fewer than one step takes: 44 \(ba"):
        steps_per_epoch(source, batch_size=11, world_size=2, micro_batches=2)


@pytest.mark.parametrize("views", [ON_DEVICE, IN_WORKER])
@pytest.mark.parametrize("start", [0, 1, 3])
def test_a_resumed_epoch_gives_the_batches_that_were_left(views: Any, start: int) -> None:
    options: dict[str, Any] = {"batch_size": 4, "seed": 3, "epoch": 2, "views": views}
    options["micro_batches"] = 2
    whole = list(train_views(in_memory(), **options))
    torch.rand(start)  # whatever was drawn in between
    resumed = train_views(in_memory(), start_step=start, **options)
    assert same(resumed, iter(whole[2 * start :]))


@pytest.mark.parametrize("views", [ON_DEVICE, IN_WORKER])
def test_two_ranks_see_what_one_process_accumulates(views: Any) -> None:
    options: dict[str, Any] = {"batch_size": 4, "seed": 0, "epoch": 0, "views": views}
    alone = list(train_views(in_memory(), micro_batches=2, **options))
    for rank in range(2):
        beside = train_views(in_memory(), rank=rank, world_size=2, **options)
        assert same(beside, iter(alone[rank::2]))


def test_ranks_that_accumulate_share_a_step_out_between_them() -> None:
    options: dict[str, Any] = {"batch_size": 4, "seed": 0, "epoch": 0, "views": ON_DEVICE}
    alone = list(train_views(in_memory(), micro_batches=4, **options))
    for rank in range(2):
        two = train_views(in_memory(), rank=rank, world_size=2, micro_batches=2, **options)
        assert same(two, iter(alone[rank::2]))


@pytest.mark.parametrize("views", [ON_DEVICE, IN_WORKER])
def test_every_image_of_every_batch_is_augmented_differently(views: Any) -> None:
    one = pixels(1, 40).expand(16, -1, -1, -1)  # of few crops, two can be alike
    source = in_memory(16, train=InMemory(one, torch.arange(16)))
    options: dict[str, Any] = {"batch_size": 4, "seed": 0, "views": views}
    batches = [b for e in range(2) for b in train_views(source, epoch=e, **options)]
    seen = torch.cat([view for batch in batches for view in batch[:2]]).flatten(1)
    assert len(seen) == 64
    assert len(seen.unique(dim=0)) == 64


@pytest.mark.parametrize("views", [ON_DEVICE, IN_WORKER])
def test_batches_do_not_use_the_global_random_state(views: Any, folder: Path) -> None:
    for source in (in_memory(), open_source(str(folder), image_size=8)):
        options: dict[str, Any] = {"batch_size": 4, "seed": 0, "epoch": 0, "views": views}
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = list(train_views(source, **options))
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        assert same(iter(first), train_views(source, **options))


@pytest.mark.parametrize("views", [ON_DEVICE, IN_WORKER])
def test_workers_change_no_batch(views: Any, folder: Path) -> None:
    source = open_source(str(folder), image_size=8)
    options: dict[str, Any] = {"batch_size": 4, "seed": 0, "epoch": 0, "views": views}
    assert same(train_views(source, **options), train_views(source, workers=1, **options))


def test_files_and_memory_give_the_same_batches(folder: Path) -> None:
    files = open_source(str(folder), image_size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
    memory = open_source(str(folder), image_size=8, resident=True)
    assert (files.resident, memory.resident) == (False, True)
    options: dict[str, Any] = {"batch_size": 4, "seed": 0, "epoch": 0, "views": ON_DEVICE}
    assert same(train_views(files, **options), train_views(memory, **options))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to 1"),
        ({"start_step": 11}, "start_step from 0 to 10"),
        ({"batch_size": 0}, "batch_size = 0: expected 1 or more"),
        ({"micro_batches": -1}, "micro_batches = -1"),
        ({"workers": -1}, "workers must be 0 or more"),
        ({"seed": -1}, "seed, epoch and step must be 0 or more"),
    ],
)
def test_numbers_that_cannot_work_are_refused_at_once(changes: Any, message: str) -> None:
    options = {"batch_size": 4, "seed": 0, "epoch": 0, "views": ON_DEVICE} | changes
    with pytest.raises(ArgumentError, match=message):
        train_views(in_memory(), **options)


# Measurements


def test_images_to_measure_on_are_those_of_bayesify(folder: Path) -> None:
    source = open_source(str(folder), image_size=8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    config = InputConfig((3, 8, 8), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), interpolation="bicubic")
    data = load_dataset(str(folder), split="test")
    batches = list(eval_batches(source, "test", batch_size=4))
    assert [len(images) for images, _ in batches] == [4, 2]
    rows = iter(range(6))
    for images, labels in batches:
        assert labels is not None
        for image, label, row in zip(images, labels, rows, strict=False):
            stored, expected = data.read(row)
            torch.testing.assert_close(image, prepare(stored, config))
            assert label == expected


def test_mean_and_deviation_are_those_of_numpy() -> None:
    images = pixels(7, 5)
    images[:, 2] = 9
    mean, std = mean_and_std(images)
    scaled = images.double().numpy() / 255
    np.testing.assert_allclose(mean, scaled.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std[:2], scaled[:, :2].std((0, 2, 3)), rtol=1e-12)
    assert std[2] == 1.0  # a constant channel is divided by no zero


def test_channels_are_repeated_or_averaged() -> None:
    colour = pixels(2)
    assert torch.equal(as_channels(colour, 3), colour)
    grey = as_channels(colour, 1)
    assert (grey.dtype, grey.shape) == (torch.uint8, (2, 1, 10, 10))
    assert (grey - colour.float().mean(1, keepdim=True)).abs().max() <= 0.5
    assert torch.equal(as_channels(grey, 3), grey.repeat(1, 3, 1, 1))


# Kinds of data set


def test_the_embedded_sample() -> None:
    source = open_source("fashion-sample", image_size=28)
    assert (source.num_images, source.num_classes, source.grey) == (6000, 10, True)
    assert source.resident
    assert isinstance(source.test, InMemory)
    images, labels = next(eval_batches(source, "train", batch_size=6000))
    assert labels is not None
    assert labels.bincount().tolist() == [600] * 10
    torch.testing.assert_close(images.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.std(), torch.tensor(1.0), atol=1e-4, rtol=0)
    larger = open_source("fashion-sample", image_size=32, channels=3)
    assert larger.part("test").read(0)[0].shape == (3, 32, 32)


def test_a_folder_of_grey_images_is_grey_if_all_are(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_images(tmp_path / name, pixels(4, channels=1))
    assert open_source(str(tmp_path), image_size=8).grey
    as_colour = open_source(str(tmp_path), image_size=8, channels=3)
    assert (as_colour.grey, as_colour.channels) == (True, 3)
    save_images(tmp_path / "b", pixels(1), start=50)
    source = open_source(str(tmp_path), image_size=8)
    assert (source.grey, source.test, source.mean) == (False, None, (0.485, 0.456, 0.406))
    assert open_source(str(tmp_path), image_size=8, channels=1).grey
    with pytest.raises(DataError, match="has no split 'test'"):
        next(eval_batches(source, "test", batch_size=2))


@pytest.mark.parametrize("place", [".", "train", "train/all", "deep/er"])
def test_images_without_classes_are_images_without_labels(tmp_path: Path, place: str) -> None:
    save_images(tmp_path / place, pixels(6))
    source = open_source(str(tmp_path), image_size=8)
    assert (source.num_images, source.num_classes, source.classes) == (6, 0, ())
    for views in (ON_DEVICE, IN_WORKER):
        batches = list(train_views(source, batch_size=3, seed=0, epoch=0, views=views))
        assert [batch.labels for batch in batches] == [None, None]
    assert next(eval_batches(source, "train", batch_size=4))[1] is None


def test_timm_names_a_data_set(tmp_path: Path) -> None:
    # The layout of MNIST's files: a magic number, the shape, the bytes.
    images, labels = pixels(4, 28, 1), bytes([0, 1, 0, 1])
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        header = struct.pack(">IIII", 2051, 4, 28, 28)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 4) + labels)
    source = open_source(f"timm:torch/fashion_mnist@{tmp_path}", image_size=28)
    assert (source.num_images, source.num_classes, source.grey) == (4, 10, True)
    assert torch.equal(source.train.read(2)[0], images[2])
    [(_, found)] = eval_batches(source, "test", batch_size=4)
    assert found is not None
    assert found.tolist() == list(labels)


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_a_file_of_tensors(tmp_path: Path, kind: str) -> None:
    images, labels = pixels(6, 8), torch.arange(6) % 3
    arrays = {
        "images": images.movedim(1, 3).contiguous(),
        "labels": labels,
        "test_images": images[:2].movedim(1, 3).contiguous(),
        "test_labels": labels[:2].clone(),
    }
    path = tmp_path / f"data.{kind}"
    if kind == "npz":
        plain: dict[str, Any] = {key: value.numpy() for key, value in arrays.items()}
        np.savez(path, **plain)
    else:
        save_file(arrays, path)
    source = open_source(str(path), image_size=8)
    assert (source.num_classes, source.resident) == (3, True)
    assert isinstance(source.train, InMemory)
    assert torch.equal(source.train.images, images)
    assert torch.equal(source.train.labels, labels)
    assert isinstance(source.test, InMemory)
    assert torch.equal(source.test.images, images[:2])
    assert (source.mean, source.std) == mean_and_std(images)
    on_meta = source.to("meta")
    assert isinstance(on_meta.train, InMemory)
    assert on_meta.train.images.is_meta
    assert on_meta.train.labels.is_meta


def test_an_npz_may_have_no_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=pixels(4, 8).movedim(1, 3).numpy())
    source = open_source(str(tmp_path / "a.npz"), image_size=8)
    assert (source.num_classes, source.test) == (0, None)
    [batch] = train_views(source, batch_size=4, seed=0, epoch=0, views=ON_DEVICE)
    assert batch.labels is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "images in .* must be uint8 .* not no such array"),
        ({"images": np.zeros((2, 8, 8, 3))}, "not float64"),
        ({"images": np.zeros((2, 8, 8, 2), np.uint8)}, "must have 1 or 3 channels"),
        ({"labels": np.zeros(3, np.int64)}, "one label from 0 for each image"),
        ({"labels": np.array([0, -1])}, "one label from 0 for each image"),
        ({"labels": np.zeros(2)}, "labels float64"),
        ({"labels": np.array([None, None])}, "no readable .npz file of plain arrays"),
        (
            {
                "labels": np.zeros(2, np.int64),
                "test_images": np.zeros((1, 8, 8, 3), np.uint8),
                "test_labels": np.ones(1, np.int64),
            },
            "labels that no training image has",
        ),
    ],
)
def test_an_npz_that_cannot_be_used_is_refused(tmp_path: Path, arrays: Any, message: str) -> None:
    images = {"images": np.zeros((2, 8, 8, 3), np.uint8)} if arrays else {}
    np.savez(tmp_path / "a.npz", **(images | arrays))
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path / "a.npz"), image_size=8)


# Shards of WebDataset


def write_shard(path: Path, images: Tensor, labels: list[int] | None, prefix: str) -> None:
    def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))

    with tarfile.open(path, "w") as tar:
        for row, image in enumerate(images):
            file = io.BytesIO()
            Image.fromarray(image.movedim(0, 2).numpy()).save(file, "PNG")
            key = f"{prefix}/{row % 2}/{row // 2:03d}"
            add(tar, f"{key}.png", file.getvalue())
            add(tar, f"{key}.json", b'{"text": "no label"}')
            if labels is not None:
                add(tar, f"{key}.cls", str(labels[row]).encode())


def test_shards_are_read_at_random_places(tmp_path: Path) -> None:
    images = pixels(8, 8)
    write_shard(tmp_path / "train-0.tar", images[:3], [0, 1, 2], "a")
    write_shard(tmp_path / "train-1.tar", images[3:6], [2, 1, 0], "b")
    write_shard(tmp_path / "val-0.tar", images[6:], [1, 1], "a")
    source = open_source(f"wds:{tmp_path}", image_size=8)
    assert (source.num_images, source.classes) == (6, ("0", "1", "2"))
    for row in (5, 0, 3):
        image, label = source.train.read(row)
        assert torch.equal(image, images[row])
        assert label == [0, 1, 2, 2, 1, 0][row]
    [(_, labels)] = eval_batches(source, "test", batch_size=2)
    assert labels is not None
    assert labels.tolist() == [1, 1]
    options: dict[str, Any] = {"batch_size": 2, "seed": 0, "epoch": 0, "views": ON_DEVICE}
    memory = open_source(f"wds:{tmp_path}", image_size=8, resident=True)
    assert same(train_views(source, **options), train_views(memory, **options))


def test_shards_need_no_labels(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", pixels(3, 8), None, "a")
    source = open_source(f"wds:{tmp_path}", image_size=8)
    assert (source.num_images, source.num_classes) == (3, 0)


def test_shards_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.tar file to train on"):
        open_source(f"wds:{tmp_path}", image_size=8)
    (tmp_path / "a.tar").write_bytes(b"x" * 600)
    with pytest.raises(DataError, match=r"a\.tar is no uncompressed tar file"):
        open_source(f"wds:{tmp_path}", image_size=8)
    write_shard(tmp_path / "a.tar", pixels(2, 8), [0, 1], "a")
    write_shard(tmp_path / "b.tar", pixels(2, 8), None, "b")
    with pytest.raises(DataError, match=r"2 of 4 images .* have no label"):
        open_source(f"wds:{tmp_path}", image_size=8)
    write_shard(tmp_path / "b.tar", pixels(0, 8), [], "b")
    write_shard(tmp_path / "val.tar", pixels(1, 8), [2], "b")
    with pytest.raises(DataError, match="labels that no training image has"):
        open_source(f"wds:{tmp_path}", image_size=8)


# Bad input


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"There is no image in the folder {tmp_path}"):
        open_source(str(tmp_path), image_size=8)
    with pytest.raises(DataError, match="There is no data set or folder 'nowhere'"):
        open_source("nowhere", image_size=8)


def break_image(folder: Path, number: int) -> Path:
    [path] = folder.glob(f"train/*/{number:03d}.png")
    path.write_bytes(path.read_bytes()[:30])
    return path


@pytest.mark.parametrize(("views", "workers"), [(ON_DEVICE, 0), (ON_DEVICE, 1), (IN_WORKER, 0)])
def test_an_unreadable_image_is_named(folder: Path, views: Any, workers: int) -> None:
    source = open_source(str(folder), image_size=8)
    path = break_image(folder, 5)
    options: dict[str, Any] = {"batch_size": 4, "seed": 0, "epoch": 0, "views": views}
    with pytest.raises(DataError, match=rf"{path.name} cannot be read"):
        list(train_views(source, workers=workers, **options))


@pytest.mark.parametrize("views", [ON_DEVICE, IN_WORKER])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_replaced_and_counted_when_asked(
    folder: Path, views: Any, workers: int
) -> None:
    break_image(folder, 5)
    break_image(folder, 23)  # the last: the first takes its place
    source = open_source(str(folder), image_size=8, skip_broken=True)
    options: dict[str, Any] = {"batch_size": 4, "seed": 0, "epoch": 0, "views": views}
    batches = list(train_views(source, workers=workers, **options))
    assert len(batches) == 6
    assert source.broken == {("train", 5), ("train", 23)}
    torch.testing.assert_close(source.stored("train", 5)[0], source.train.read(6)[0])
    torch.testing.assert_close(source.stored("train", 23)[0], source.train.read(0)[0])
    again = open_source(str(folder), image_size=8, skip_broken=True)
    assert same(iter(batches[2:]), train_views(again, start_step=2, **options))


def test_a_data_set_of_broken_images_is_refused(folder: Path) -> None:
    for number in range(24):
        break_image(folder, number)
    with pytest.raises(DataError, match="None of the 24 images"):
        open_source(str(folder), image_size=8, skip_broken=True)


def test_settings_of_a_source_that_cannot_work(folder: Path) -> None:
    for options in ({"image_size": 0}, {"channels": 2}, {"mean": (0.5,)}):
        with pytest.raises(ArgumentError, match="image_size must be above 0"):
            open_source(str(folder), **({"image_size": 8} | options))
    with pytest.raises(ArgumentError, match="one number for each of the 3 channels"):
        open_source(str(folder), image_size=8, mean=(0.5,), std=(0.5,))


def test_workers_cut_crops_from_the_whole_image(tmp_path: Path) -> None:
    """The square of the device path would have lost the ends of a long image."""
    image = torch.zeros(3, 8, 40, dtype=torch.uint8)
    image[:, :, :8] = 255
    for name in ("a", "b"):
        save_images(tmp_path / name, image.expand(8, -1, -1, -1))
    source = open_source(str(tmp_path), image_size=8, channels=3)
    options: dict[str, Any] = {"batch_size": 16, "seed": 0, "epoch": 0}
    plain = tuple(replace(view, solarise=0.0) for view in CIFAR_VIEWS)
    [whole] = train_views(source, views=WorkerViews(*plain), **options)
    [square] = train_views(source, views=TwoViews(*plain), **options)
    assert len({float(view.max()) for view in whole.first}) > 1
    assert len({float(view.max()) for view in square.first}) == 1


@pytest.mark.parametrize("text", [b"1000000000000", b"-1", b"9" * 5000, b"cat", b""])
def test_a_class_that_none_can_have_is_refused(tmp_path: Path, text: bytes) -> None:
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name, content in (("0.png", b"x"), ("0.cls", text)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(DataError, match=r"A \.cls file in .*train-0\.tar"):
        sources.open_images(f"wds:{tmp_path}")


def test_an_npz_that_unpacks_to_far_more_than_it_is_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, images=np.zeros((300, 1000, 1000, 1), np.uint8))
    with pytest.raises(DataError, match="unpacks to 300,000"):
        sources.open_images(str(path))
    labels = np.array([0, 10**12])
    np.savez(path, images=np.zeros((2, 4, 4, 1), np.uint8), labels=labels)
    with pytest.raises(DataError, match="one label from 0 for each image, below 1,000,000"):
        sources.open_images(str(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images", b"not an array")
    with pytest.raises(DataError, match=r"images in .* not no such array"):
        sources.open_images(str(path))
