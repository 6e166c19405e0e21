"""Labels belong to outputs by the names of their classes, wherever both sides know them."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.transforms.functional import to_pil_image
from typer.testing import CliRunner, Result

import bayesify
from bayesify import DataError, storage
from bayesify.classes import classes_of, name_classes_, places
from bayesify.cli.app import app
from bayesify.data import Files, ImageData, InMemory, load_dataset
from bayesify.models import InputConfig
from bayesify.report import gather
from bayesify.training.matching import images_by_name

NAMES = ("ash", "birch", "cedar", "date", "elm", "fir", "gum", "hazel", "iroko", "jarrah")
CONFIG = InputConfig((3, 4, 4), (0.5,) * 3, (0.5,) * 3)
EACH = 6


def pictures(label: int, seed: int = 0) -> Tensor:
    """Images of a class: one of ten patterns of light and dark, (N, C, H, W) of uint8."""
    generator = torch.Generator().manual_seed(1000 * seed + label)
    pattern = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(label)) * 160
    return (pattern + torch.randint(0, 90, (EACH, 3, 4, 4), generator=generator)).to(torch.uint8)


def tree(folder: str, classes: dict[str, int]) -> str:
    """A folder of class folders: of each name the images of a number."""
    for name, number in classes.items():
        (Path(folder) / name).mkdir(parents=True)
        for index, image in enumerate(pictures(number)):
            to_pil_image(image).save(Path(folder) / name / f"{index}.png")
    return folder


def memory(classes: dict[str, int], name: str = "own") -> ImageData:
    images = torch.cat([pictures(number) for number in classes.values()])
    labels = torch.arange(len(classes)).repeat_interleave(EACH)
    return ImageData(name, "test", tuple(classes), InMemory(images, labels))


def net(outputs: int = 10) -> nn.Module:
    """The prototype of each class as a matched filter: right on nearly every image."""
    weight = torch.cat([pictures(k, 7).float().mean(0)[None] for k in range(outputs)]) / 255
    weight = ((weight - 0.5) / 0.5).flatten(1)
    linear = nn.Linear(48, outputs)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(-0.5 * weight.square().sum(1))
    return nn.Sequential(nn.Flatten(), linear)


def model(names: Any = NAMES, outputs: int = 10) -> nn.Module:
    return name_classes_(bayesify.to_bbb(net(outputs), initial_std=math.exp(-7.0)).eval(), names)


ALL = {name: k for k, name in enumerate(NAMES)}
THREE = {"cedar": 2, "hazel": 7, "jarrah": 9}
TURNED = {name: ALL[name] for name in reversed(NAMES)}


def accuracy(of: nn.Module, data: Any) -> list[float]:
    rows = bayesify.evaluate(of, data, num_samples=2, model_config=CONFIG)
    return [row.accuracy for row in rows]


# -- Python ------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [ALL, THREE, TURNED], ids=["all", "three", "turned"])
def test_classes_are_found_by_name(classes: dict[str, int], tmp_path: Path) -> None:
    labels = torch.tensor([k for k in classes.values() for _ in range(EACH)])
    images = torch.cat([pictures(k) for k in classes.values()]).float() / 255
    with torch.no_grad():
        right = float((net()((images - 0.5) / 0.5).argmax(1) == labels).double().mean())
    assert right > 0.8
    assert accuracy(model(), memory(classes)) == [right, right]
    assert accuracy(net(), memory(ALL)) == accuracy(name_classes_(net(), NAMES), memory(ALL))
    files = load_dataset(tree(str(tmp_path / "d"), classes), split="test")
    assert accuracy(model(), files)[0] == pytest.approx(right)
    report = gather(model(), memory(classes), num_samples=2, resamples=2, model_config=CONFIG)
    row, example = report.row("at the means"), report.surest[0]
    assert row is not None
    assert row.values["accuracy"] == right
    assert report.curve[0]["accuracy"] == right
    assert example.right
    assert example.label in classes


def test_unknown_names_are_an_error_with_both_lists() -> None:
    other = memory({"golf ball": 0, "tench": 1}, "links")
    for call in (
        lambda: accuracy(model(), other),
        lambda: gather(model(), other, num_samples=2, resamples=2, model_config=CONFIG),
        lambda: bayesify.fit(model(), other, epochs=1, batch_size=6, lr=0.01, model_config=CONFIG),
        lambda: bayesify.fit_laplace_(model(), other, prior_precision=1.0, model_config=CONFIG),
    ):
        with pytest.raises(
            DataError, match="'links' has classes that the model has not: golf b"
        ) as e:
            call()
        assert ", ".join(NAMES) in str(e.value)
        assert "'links' has golf ball, tench." in str(e.value)


def test_a_fit_gives_names_and_goes_on_by_name(tmp_path: Path) -> None:
    fitted = bayesify.to_bbb(net(), initial_std=math.exp(-7.0))
    assert classes_of(fitted) is None
    options: dict[str, Any] = {"epochs": 1, "batch_size": 6, "lr": 1e-6, "model_config": CONFIG}
    bayesify.fit(fitted, memory(ALL), **options)
    assert classes_of(fitted) == NAMES
    bayesify.save(fitted, tmp_path / "a")
    assert storage.read_header(tmp_path / "a")["info"]["classes"] == list(NAMES)
    again = bayesify.load(tmp_path / "a", model=net())
    assert classes_of(again) == NAMES
    before = accuracy(again, memory(THREE))[0]
    seen: list[Tensor] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(targets)
        return nn.functional.cross_entropy(outputs, targets)

    bayesify.fit(again, memory(THREE), **options, loss=nn.CrossEntropyLoss())
    assert classes_of(again) == NAMES
    assert accuracy(again, memory(THREE))[0] == before > 0.8
    # a loss of one's own may have labels of its own
    bayesify.fit(again, memory({"x": 0, "y": 1}), **options, loss=loss)
    assert set(torch.cat(seen).tolist()) == {0, 1}


def test_a_fit_on_a_part_trains_the_outputs_of_its_names() -> None:
    options: dict[str, Any] = {"epochs": 3, "batch_size": 6, "lr": 0.05, "model_config": CONFIG}
    for classes in (THREE, dict(reversed(THREE.items()))):
        fitted = bayesify.to_bbb(
            nn.Sequential(nn.Flatten(), nn.Linear(48, 10)), initial_std=math.exp(-4.5)
        )
        bayesify.fit(name_classes_(fitted, NAMES), memory(classes), **options)
        prepared = memory(THREE).dataset(CONFIG)
        x = torch.stack([prepared[i][0] for i in range(3 * EACH)])
        with torch.no_grad():
            found = fitted.eval()(x).softmax(1).mean(0).topk(3).indices
        assert sorted(found.tolist()) == sorted(THREE.values())


def test_laplace_by_true_labels_finds_them_by_name() -> None:
    def precisions(of: dict[str, int], names: Any) -> Tensor:
        laplace = model(names)
        bayesify.fit_laplace_(
            laplace, memory(of), fisher="empirical", prior_precision=1.0, model_config=CONFIG
        )
        return next(p.logvar.detach() for p in bayesify.posteriors(laplace))

    torch.testing.assert_close(precisions(TURNED, NAMES), precisions(ALL, None))


def test_names_are_copied_and_go_with_the_classifier(tmp_path: Path) -> None:
    timms = timm.create_model("resnet10t", num_classes=3)
    named = name_classes_(timms, ["a", "b", "c"])
    for other in (copy.deepcopy(named), bayesify.to_bbb(named), torch.compile(named)):
        assert classes_of(other) == ("a", "b", "c")  # type: ignore[arg-type]
    bayesian = bayesify.to_bbb(named)
    assert classes_of(bayesify.to_deterministic(bayesian)) == ("a", "b", "c")
    bayesian.reset_classifier(5)  # type: ignore[operator]
    assert classes_of(bayesian) is None
    assert classes_of(name_classes_(named, None)) is None
    with pytest.raises(bayesify.ArgumentError, match="names must be"):
        name_classes_(named, "abc")
    with pytest.raises(bayesify.ArgumentError, match="names must be"):
        name_classes_(named, [1, 2])  # type: ignore[list-item]


@pytest.mark.parametrize("classes", [None, 5, "abc", [1, 2], [], {"a": 1}])
def test_a_file_may_say_anything_else(classes: object, tmp_path: Path) -> None:
    bayesify.save(model(None), tmp_path / "a", info={"classes": classes})
    assert classes_of(bayesify.load(tmp_path / "a", model=model())) is None


@pytest.mark.parametrize(
    ("known", "classes", "expected"),
    [
        (NAMES, NAMES[::-1], tuple(range(9, -1, -1))),
        (NAMES, ("elm", "ash"), (4, 0)),
        (("0", "1", "10", "2"), ("0", "1", "2"), (0, 1, 3)),
        (("crane", "crane", "a"), ("crane", "crane", "a"), (0, 1, 2)),
        (("crane", "crane", "a", "b"), ("b", "a"), (3, 2)),
    ],
)
def test_places(known: Any, classes: Any, expected: tuple[int, ...]) -> None:
    assert places(known, classes, "d") == expected


@pytest.mark.parametrize(
    ("known", "classes", "warning"),
    [
        (NAMES, tuple(map(str, range(10))), "'d' has no names of classes"),
        (NAMES, ("0", "1"), "'d' has no names of classes"),
        (("0", "1"), ("a", "b"), "The model has no names of classes"),
    ],
)
def test_numbers_are_no_names(known: Any, classes: Any, warning: str) -> None:
    with pytest.warns(UserWarning, match=warning):
        assert places(known, classes, "d") is None


@pytest.mark.parametrize(
    ("known", "classes", "message"),
    [
        (NAMES, ("ash", "oak"), "has not: oak. The model has ash"),
        (("a", "b"), ("0", "1", "2"), "has not: 0, 1, 2"),
        (("0", "1", "2"), ("a", "b"), "has not: a, b"),
        (("crane", "crane", "a"), ("crane",), "two are called so"),
        (("crane", "a"), ("crane", "crane"), "two are called so"),
        (NAMES, tuple(f"c{i}" for i in range(20)), "and 8 more"),
    ],
)
def test_classes_that_cannot_be_found(known: Any, classes: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        places(known, classes, "d")


def test_without_names_the_numbers_of_classes_must_agree() -> None:
    assert accuracy(model(None), memory(ALL)) == accuracy(model(), memory(ALL))
    for call in (
        lambda: accuracy(model(None), memory(THREE)),
        lambda: gather(model(None), memory(THREE), num_samples=2, resamples=2, model_config=CONFIG),
    ):
        with pytest.raises(
            DataError, match=r"10 outputs without names and 'own' 3 classes \(cedar"
        ):
            call()
    numbered = replace(memory({"a": 0, "b": 1}), classes=("0", "1"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert min(accuracy(model(None), numbered)) > 0.8
    with pytest.warns(UserWarning, match="'own' has no names"):
        assert min(accuracy(model(), numbered)) > 0.8
    tensors = TensorDataset(torch.randn(4, 3, 4, 4), torch.arange(4))
    bayesify.evaluate(model(), tensors, num_samples=2)  # has no names to compare


def test_a_label_out_of_range_is_still_an_error() -> None:
    wrong = replace(memory(THREE), source=InMemory(pictures(2), torch.tensor([0, 1, 2, 3, -1, 0])))
    data = images_by_name(wrong, model())
    assert data.read(2)[1] == 9
    for index in (3, 4):
        with pytest.raises(DataError, match="out of range"):
            data.read(index)
    assert isinstance(images_by_name(memory(THREE), model()).source, InMemory)
    empty = replace(memory(THREE), source=Files([]))
    assert len(images_by_name(empty, model())) == 0


# -- the commands ------------------------------------------------------------------------------

FACTORY = """
from torch import nn


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
"""
MODEL = ("--model", "classfactory:net")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the files of a model that knows its classes, and of one that does not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("classfactory.py").write_text(FACTORY)
    run("convert", "classfactory:net", "--img-size", 4, "--out", "plain", "--quiet")
    spec = bayesify.ModelSpec("classfactory:net", img_size=4)
    bayesify.save(model(None), "nameless", spec=spec)
    bayesify.save(model(), "named", spec=spec)
    for name, classes in (("all", ALL), ("three", THREE), ("links", {"golf ball": 0, "tench": 1})):
        tree(name, classes)
    yield tmp_path
    import sys

    sys.modules.pop("classfactory", None)


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def words(result: Result) -> str:
    return " ".join((result.stdout + result.stderr).replace("│", " ").split())


def evaluated(file: str, data: str) -> list[float]:
    document = json.loads(run("eval", file, data, *MODEL, "-k", 2, "--json").stdout)
    return [
        row["accuracy"] for row in document["rows"] if row["prediction"] != "temperature scaled"
    ]


@pytest.mark.usefixtures("folder")
def test_eval_by_name() -> None:
    right = accuracy(model(), memory(THREE))
    assert right[0] > 0.8
    assert evaluated("named", "three") == pytest.approx(right)
    shown = run("eval", "named", "three", *MODEL, "-k", 2)
    assert "18 images of three (all), 3 of the 10 classes." in shown.stdout
    message = words(run("eval", "named", "links", *MODEL, code=2))
    assert "golf ball, tench" in message
    assert "ash, birch, cedar" in message
    message = words(run("eval", "named", "fashion-sample", *MODEL, code=2))
    assert "T-shirt/top, Trouser" in message
    message = words(run("eval", "nameless", "three", *MODEL, code=2))
    assert "10 outputs without names and 'three' 3 classes" in message
    whole = run("eval", "nameless", "all", *MODEL, "-k", 2)
    assert "nameless does not say what its outputs are called" in words(whole)
    assert "60 images of all (all)." in whole.stdout


@pytest.mark.usefixtures("folder")
@pytest.mark.filterwarnings("default::UserWarning")
def test_eval_of_data_without_names_says_so() -> None:
    labels = torch.tensor([2, 7]).repeat_interleave(EACH)
    images = torch.cat([pictures(2), pictures(7)]).movedim(1, -1).contiguous()
    save_file({"images": images, "labels": labels}, "d.safetensors")
    result = run("eval", "named", "d.safetensors", *MODEL, "-k", 2, "--json")
    assert "'d.safetensors' has no names of classes" in words(result)
    assert json.loads(result.stdout)["rows"][0]["accuracy"] > 0.8


@pytest.mark.usefixtures("folder")
def test_the_other_commands_by_name() -> None:
    right = accuracy(model(), memory(THREE))[0]
    curve = ("prune", "named", *MODEL, "--curve", "--sparsity", 0, "-k", 2, "--json", "--data")
    rows = json.loads(run(*curve, "three").stdout)["rows"]
    assert [row["accuracy"] for row in rows] == pytest.approx([right, right])
    run("report", "named", "three", *MODEL, "-k", 2, "--no-pruning", "--resamples", 2)
    assert "cedar" in Path("report.html").read_text("utf-8")
    fit = ("fit", "named", "three", *MODEL, "--epochs", 1, "--lr", 1e-6, "-b", 6, "-q", "--out")
    run(*fit, "more")
    assert storage.read_header("more")["info"]["classes"] == list(NAMES)
    assert evaluated("more", "three")[0] == pytest.approx(right)
    for command in (
        (*curve, "links"),
        ("report", "named", "links", *MODEL, "--out", "b.html"),
        ("fit", "named", "links", *MODEL, "--out", "b"),
        ("fit", "named", "links", *MODEL, "--out", "b", "--method", "laplace-diag"),
    ):
        message = words(run(*command, code=2))
        assert "has classes that the model has not: golf ball, tench" in message
    assert not Path("b").exists()


@pytest.mark.usefixtures("folder")
def test_a_first_fit_names_the_outputs() -> None:
    run("fit", "plain", "all", *MODEL, "--epochs", 1, "-b", 6, "-q", "--out", "first")
    assert storage.read_header("first")["info"]["classes"] == list(NAMES)
    laplace = ("fit", "plain", "all", *MODEL, "--method", "laplace-diag", "-q", "--out", "second")
    run(*laplace, "--prior-precision", 1)
    assert storage.read_header("second")["info"]["classes"] == list(NAMES)
    run("prune", "first", *MODEL, "--sparsity", 0.5, "--out", "pruned", "-q")
    assert storage.read_header("pruned")["info"]["classes"] == list(NAMES)
