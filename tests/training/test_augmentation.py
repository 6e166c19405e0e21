"""training/augmentation.py: which images a fit sees."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesify.data import ImageData, load_dataset, prepare
from bayesify.errors import ArgumentError, DataError
from bayesify.models import InputConfig
from bayesify.training import fit
from bayesify.training.augmentation import Augmented, augmentation

CONFIG = InputConfig(size=(1, 28, 28), mean=(0.3,), std=(0.4,))
NAMES = ("flip-crop", "resized-crop", "rand-augment")


def data() -> ImageData:
    return load_dataset("fashion-sample", split="train")


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_of_an_example_alone_decides(name: Any) -> None:
    images = Augmented(data(), CONFIG, augmentation(name, CONFIG))
    together = images.__getitems__([(5, 1), (6, 2), (5, 3)])
    torch.rand(9)
    alone = [images[(5, 1)], images[(6, 2)], images[(5, 3)]]
    for (ours, label), (theirs, other) in zip(together, alone, strict=True):
        assert torch.equal(ours, theirs)
        assert label == other
    assert not torch.equal(together[0][0], together[2][0])
    assert len({tuple(images[(5, s)][0].flatten().tolist()) for s in range(8)}) > 4


def test_flip_crop_mirrors_and_moves_on_black() -> None:
    stored = data().read(7)[0]
    padded = torch.zeros(1, 34, 34, dtype=torch.uint8)
    padded[:, 3:31, 3:31] = stored
    possible = {
        (flip, y, x): prepare((image := padded.flip(2) if flip else padded)[
            :, y : y + image.shape[1] - 6, x : x + 28], CONFIG)
        for flip in (False, True) for y in range(7) for x in range(7)
    }  # fmt: skip
    images = Augmented(data(), CONFIG, augmentation("flip-crop", CONFIG))
    seen = set()
    for seed in range(60):
        given = images[(7, seed)][0]
        seen |= {key for key, image in possible.items() if torch.equal(image, given)}
        assert any(torch.equal(image, given) for image in possible.values())
    assert {flip for flip, _, _ in seen} == {False, True}
    assert {y for _, y, _ in seen} == {x for _, _, x in seen} == set(range(7))


@pytest.mark.parametrize("name", NAMES)
def test_the_global_generators_are_left_alone(name: Any) -> None:
    images = Augmented(data(), CONFIG, augmentation(name, CONFIG))
    torch.manual_seed(3)
    random.seed(3)
    expected = torch.rand(3).tolist(), random.random()
    torch.manual_seed(3)
    random.seed(3)
    images.__getitems__([(5, 1), (6, 2)])
    assert (torch.rand(3).tolist(), random.random()) == expected


@pytest.mark.parametrize("name", NAMES)
def test_images_of_any_size_come_out_in_that_of_the_model(name: Any) -> None:
    config = InputConfig(size=(3, 20, 12), mean=(0.5,) * 3, std=(0.5,) * 3)
    image, _ = Augmented(data(), config, augmentation(name, config))[(0, 0)]
    assert image.shape == (3, 20, 12)
    assert image.dtype == torch.float32


def test_a_callable_of_ones_own() -> None:
    def black(image: Tensor) -> Tensor:
        return torch.zeros_like(image)

    seen: list[Tensor] = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    fit(model, data(), epochs=1, batch_size=3000, lr=0.1, augment=black, model_config=CONFIG)
    assert len(seen) == 2
    assert all(torch.allclose(x, torch.tensor(-0.75)) for x in seen)


@pytest.mark.parametrize(
    ("augment", "kind", "message"),
    [
        ("flip", ArgumentError, "augment must be one of 'none', 'flip-crop'"),
        (lambda image: image.float(), DataError, "augmentation gave torch.float32"),
        (lambda image: None, DataError, "augmentation gave NoneType, expected uint8"),
    ],
)
def test_what_is_no_augmentation(augment: Any, kind: type[Exception], message: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    with pytest.raises(kind, match=message):
        fit(model, data(), epochs=1, batch_size=9, lr=0.1, augment=augment, model_config=CONFIG)
