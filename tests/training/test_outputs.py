"""Outputs that are no table of logits, and labels that are no class numbers: refused by all."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import bayesify
from bayesify import ArgumentError
from bayesify.data import ImageData, InMemory
from bayesify.models import InputConfig
from bayesify.report import gather

SIZE = (3, 4, 4)
IMAGES = torch.randn(8, *SIZE)
LABELS = torch.arange(8) % 2


class Net(nn.Module):
    """Four classes for each pixel, in a form that the test chooses."""

    def __init__(self, form: Callable[[Tensor], Any] = lambda y: y) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.conv(x))


def one_logit(y: Tensor) -> Tensor:
    return y.mean((1, 2, 3))[:, None]


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "dense": lambda y: y,
    "tokens": lambda y: y.flatten(2).mT,
    "one logit": one_logit,
    "one number": lambda y: one_logit(y)[:, 0],
    "integers": lambda y: y.mean((2, 3)).long(),
}


def converted(form: Callable[[Tensor], Any] = FORMS["dense"], logvar: float = -3.0) -> nn.Module:
    return bayesify.to_bbb(Net(form), initial_std=math.exp(logvar / 2)).eval()


def _report(model: nn.Module) -> object:
    stored = InMemory((IMAGES * 20 + 100).clamp(0, 255).to(torch.uint8), LABELS)
    config = InputConfig(SIZE, (0.5,) * 3, (0.5,) * 3)
    return gather(
        model, ImageData("own", "test", ("a", "b", "c", "d"), stored), num_samples=2, resamples=2,
        model_config=config,
    )  # fmt: skip


DATA = TensorDataset(IMAGES, LABELS)
ASKING: dict[str, Callable[[nn.Module], object]] = {
    "predict": lambda m: bayesify.predict(m, IMAGES, num_samples=2, reduce="probabilities"),
    "ensemble": lambda m: bayesify.ensemble(m, 2)(IMAGES),
    "to_program": lambda m: bayesify.to_program(m, IMAGES, num_samples=2),
    "calibrate": lambda m: bayesify.calibrate_(m, IMAGES, target_agreement=0.95),
    "evaluate": lambda m: bayesify.evaluate(m, DATA, num_samples=2),
    "evaluate at the means": lambda m: bayesify.evaluate(bayesify.to_deterministic(m), DATA),
    "report": _report,
    "fit": lambda m: bayesify.fit(m, DATA, epochs=1, batch_size=4, lr=0.1),
    "laplace": lambda m: bayesify.fit_laplace_(m, DATA, prior_precision=1.0),
    "laplace exact": lambda m: bayesify.fit_laplace_(m, DATA, fisher="exact", prior_precision=1.0),
    "laplace empirical": lambda m: bayesify.fit_laplace_(
        m, DATA, fisher="empirical", prior_precision=1.0
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("asking", ASKING)
def test_what_is_no_table_of_logits_is_refused(asking: str, form: str) -> None:
    model = converted(FORMS[form])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ArgumentError, match=r"needs logits of the shape \(batch, classes\), with"):
        ASKING[asking](model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("asking", ASKING)
def test_a_table_of_logits_is_taken_by_all(asking: str) -> None:
    ASKING[asking](converted(lambda y: y.mean((2, 3)), logvar=-9.0))


def test_no_file_is_left_of_a_refused_ensemble(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="ensemble needs logits"):
        bayesify.export_torch(converted(), tmp_path / "a.pt2", IMAGES, num_samples=2)
    assert not list(tmp_path.iterdir())
    bayesify.export_torch(converted(), tmp_path / "a.pt2", IMAGES)  # the means need no classes


def test_the_advice_on_one_logit_is_right() -> None:
    model = converted(lambda y: F.pad(one_logit(y), (1, 0)))
    found = bayesify.ensemble(model, 3, seed=5)(IMAGES)
    logits = bayesify.predict(model, IMAGES, num_samples=3, seed=5)[:, :, 1]
    torch.testing.assert_close(found[:, 1], logits.sigmoid().mean(0))
    with pytest.raises(ArgumentError, match=r"functional\.pad\(z, \(1, 0\)\)"):
        bayesify.ensemble(converted(one_logit), 3)(IMAGES)


def test_the_advice_on_dense_outputs_is_right() -> None:
    dense = converted()
    rows = converted(lambda y: y.movedim(1, -1).flatten(0, -2))
    rows.load_state_dict(dense.state_dict())
    found = bayesify.ensemble(rows, 3, seed=5)(IMAGES)
    expected = bayesify.predict(dense, IMAGES, num_samples=3, seed=5).softmax(2).mean(0)
    torch.testing.assert_close(found.unflatten(0, (8, 4, 4)).movedim(-1, 1), expected)
    factor = bayesify.calibrate_(rows, IMAGES, target_agreement=0.95)
    assert factor > 0
    drawn = bayesify.predict(rows, IMAGES, num_samples=8, seed=0).argmax(-1)
    with bayesify.at_mean(rows), torch.no_grad():
        agreed = (drawn == rows(IMAGES).argmax(-1)).double().mean()
    assert float(agreed) >= 0.95  # of the pixels


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize(
    "targets",
    [
        torch.randn(8),
        torch.randn(8, 2),
        torch.randint(2, (8, 2)),
        torch.randint(2, (8, 1)),
        torch.zeros(8, dtype=torch.bool),
        torch.zeros(8, 0).long(),
        torch.zeros(8, dtype=torch.complex64),
    ],
)
def test_laplace_takes_class_numbers_alone(fisher: Any, targets: Tensor) -> None:
    model = bayesify.to_bbb(nn.Linear(3, 2), initial_std=math.exp(-2.0))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    data = TensorDataset(torch.randn(8, 3), targets)
    with pytest.raises(ArgumentError, match="fit_laplace_ needs one whole class number"):
        bayesify.fit_laplace_(model, data, fisher=fisher, prior_precision=1.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_loss_of_its_own_takes_dense_outputs() -> None:
    data = TensorDataset(IMAGES, torch.randint(4, (8, 4, 4)))
    with pytest.raises(
        ArgumentError, match=r"Categorical\(dim=\.\.\.\) for classes.* or give a loss= of your own"
    ):
        bayesify.fit(converted(), data, epochs=1, batch_size=4, lr=0.1)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="sum") / len(targets)

    result = bayesify.fit(converted(), data, epochs=1, batch_size=4, lr=0.1, loss=loss)
    assert result.losses[0] == pytest.approx(16 * 1.4, rel=0.3)  # nats of 16 pixels, not of one
