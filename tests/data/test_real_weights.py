"""Real pretrained networks and real images, where a folder of them is given."""

import os
import sys
from pathlib import Path

import pytest
import torch

import bayesify

FOLDER = os.environ.get("BAYESIFY_DATA")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not FOLDER,
        reason="set BAYESIFY_DATA to a folder with the real weights and images that "
        "benchmarks/initial_sigma.py names: they may not be shipped",
    ),
]
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


def test_lite0_keeps_its_function_at_the_default_sigma_and_comes_back_bit_for_bit() -> None:
    import initial_sigma  # type: ignore[import-not-found, unused-ignore]

    folder = Path(str(FOLDER))
    model = initial_sigma.lite0(folder)
    images = initial_sigma.imagenette_images(folder, 200, model)
    shares = initial_sigma.agreement(model, images, draws=2)
    assert sum(shares) / len(shares) >= 0.99
    back = bayesify.to_deterministic(bayesify.to_bbb(model))
    state = back.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(back(images[:2]), model(images[:2]))


def test_resnet20_keeps_its_function_at_the_default_sigma() -> None:
    import initial_sigma  # type: ignore[import-not-found, unused-ignore]

    folder = Path(str(FOLDER))
    images = initial_sigma.cifar_images(folder, 1000)
    shares = initial_sigma.agreement(initial_sigma.resnet20(folder), images, draws=3)
    assert sum(shares) / len(shares) >= 0.99
