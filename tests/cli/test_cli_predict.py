"""cli/predict.py and cli/images.py: which images are meant, and what becomes of broken ones."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_cli_outputs import FACTORY
from torch import nn
from typer.testing import CliRunner, Result

import bayesify
from bayesify.cli.app import app, main
from bayesify.data import prepare
from bayesify.models import input_config
from bayesify.storage import load

MODEL = ("--model", "predictfactory:net", "-k", 2)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a converted model and images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("predictfactory.py").write_text(FACTORY)
    run("convert", "predictfactory:net", "--img-size", 4, "--quiet", "--out", "net")
    for number in range(4):
        path = Path(f"images/{'ab'[number // 2]}/{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (60 * number, 0, 255)).save(path)
    Path("flat/deep").mkdir(parents=True)
    for number, name in enumerate(("x.png", "y.JPG", "deep/z.png")):
        Image.new("RGB", (4, 4), (0, 70 * number, 9)).save(Path("flat") / name)
    Path("flat/notes.txt").write_text("images/a/0.png\n\nimages/b/3.png\n")
    Path("broken.png").write_bytes(b"no image")
    yield tmp_path
    sys.modules.pop("predictfactory", None)


def run(*arguments: object, code: int = 0, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def predicted(*inputs: object, code: int = 0, stdin: str | None = None) -> Any:
    return json.loads(
        run("predict", "net", *inputs, *MODEL, "--json", code=code, stdin=stdin).stdout
    )


def test_images_by_every_kind_of_name() -> None:
    flat = ["flat/deep/z.png", "flat/x.png", "flat/y.JPG"]

    def names(*inputs: str, stdin: str | None = None) -> list[str]:
        return [row["image"] for row in predicted(*inputs, stdin=stdin)]

    assert names("flat") == flat
    assert names("flat/*.png") == ["flat/x.png"]
    assert names("flat/**/*.png") == flat[:2]
    assert names("flat/notes.txt") == ["images/a/0.png", "images/b/3.png"]
    assert names("-", stdin="flat/x.png\nimages/a/1.png\n") == ["flat/x.png", "images/a/1.png"]
    assert names("flat/x.png", "images/b/*", "flat") == [
        "flat/x.png", "images/b/2.png", "images/b/3.png", *flat
    ]  # fmt: skip
    Path("no_suffix").write_bytes(Path("flat/x.png").read_bytes())
    assert names("no_suffix") == ["no_suffix"]


def test_a_folder_of_classes_gives_path_and_label() -> None:
    rows = predicted("images")
    assert [(row["image"], row["label"]) for row in rows] == [
        ("images/a/0.png", "a"), ("images/a/1.png", "a"), ("images/b/2.png", "b"),
        ("images/b/3.png", "b"),
    ]  # fmt: skip
    assert all(row["error"] is None for row in rows)
    assert [row["image"] for row in predicted("fashion-sample", "--limit", 2)] == ["0", "1"]


def test_all_probabilities_are_those_of_predict() -> None:
    [row] = predicted("flat/x.png", "--probabilities")
    model = load("net", sys.modules["predictfactory"].net())
    pixels = torch.tensor([0, 0, 9], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    images = prepare(pixels, input_config(model, img_size=4))
    expected = bayesify.predict(model, images, num_samples=2, seed=0, reduce="probabilities")
    found = torch.tensor([row["probabilities"][str(number)] for number in range(3)])
    torch.testing.assert_close(found, expected.mean[0])
    assert row["probability"] == max(row["probabilities"].values())
    run("predict", "net", "flat", *MODEL, "--probabilities", "--out", "a.csv")
    with open("a.csv", newline="") as handle:
        assert {"p(0)", "p(1)", "p(2)"} < set(next(csv.DictReader(handle)))
    assert (
        "--out or --json" in run("predict", "net", "flat", *MODEL, "--probabilities", code=2).stderr
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_has_its_reason_in_its_row_and_all_others_an_answer(workers: int) -> None:
    inputs = ("flat/x.png", "broken.png", "flat/y.JPG")
    rows = predicted(*inputs, "--workers", workers, "-b", 2, code=3)
    assert [row["image"] for row in rows] == list(inputs)
    assert "broken.png cannot be read" in rows[1]["error"]
    assert rows[1]["class"] is None
    alone = predicted("flat/x.png") + predicted("flat/y.JPG")
    for row, other in zip((rows[0], rows[2]), alone, strict=True):
        assert row["error"] is None
        assert row["class"] == other["class"]
        assert row["probability"] == pytest.approx(other["probability"], rel=1e-5)
    shown = run("predict", "net", *inputs, *MODEL, code=3)
    assert "cannot be read" in " ".join(shown.stdout.split())
    assert "1 of 3 images could not be read" in shown.stderr
    run("predict", "net", *inputs, *MODEL, "--out", "a.json", code=3)
    assert len(json.loads(Path("a.json").read_text())) == 3
    Path("list.txt").write_text("flat/x.png\ngone.png\n")
    assert "gone.png" in predicted("list.txt", code=3)[1]["error"]
    [row] = predicted("broken.png", code=3)
    assert row["class"] is None


def test_no_such_images(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    Path("empty.txt").write_text("\n\n")
    for inputs, message in [
        (("gone.png",), "no image file 'gone.png'"), (("*.bmp",), "No file matches"),
        (("empty", "flat"), "no image in the folder"), (("empty.txt",), "list of images is empty"),
        (("nonsense",), "no data set or folder"), (("fashion-sample", "flat"), "no image file"),
    ]:  # fmt: skip
        for error in (predicted(*inputs, code=2)["error"],):
            assert message in error["message"], inputs
            assert (error["kind"], error["exit_code"]) == ("DataError", 2)
    assert not [name for name in os.listdir() if name.startswith(".")]


# -- fit ---------------------------------------------------------------------------------------

FIT = ("fit", "net", "images", "--model", "predictfactory:net", "-b", 2)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("method", [(), ("--method", "laplace-diag", "--prior-precision", 1)])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_fit_with_a_broken_image_does_not_begin_or_leaves_it_out(
    method: tuple[object, ...], workers: int
) -> None:
    Path("images/c").mkdir()  # the network has three outputs
    Path("images/c/0.png").write_bytes(Path("images/a/0.png").read_bytes())
    Path("images/b/9.png").write_bytes(b"no image")
    length = () if method else ("--epochs", 1)
    command = [*FIT, *length, *method, "--workers", workers]
    before = sorted(os.listdir())
    message = " ".join(run(*command, "--out", "o", code=2).stderr.replace("│", " ").split())
    assert "1 of 6 images of 'images' cannot be read" in message
    assert "images/b/9.png" in message
    assert "--skip-unreadable" in message
    assert sorted(os.listdir()) == before
    result = run(*command, "--out", "o", "--skip-unreadable", "--json")
    assert "1 of 6 images" in result.stderr
    assert json.loads(result.stdout)["unreadable"] == 1
    Path("images/b/9.png").unlink()
    run(*command, "--out", "without")
    ours, theirs = (load(name, sys.modules["predictfactory"].net()) for name in ("o", "without"))
    for mine, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(mine, other)


def test_a_fit_of_images_none_of_which_can_be_read() -> None:
    for path in Path("images").rglob("*.png"):
        path.write_bytes(b"no image")
    message = run(*FIT, "--out", "o", "--skip-unreadable", code=2).stderr
    assert "4 of 4 images" in message


# -- errors as JSON ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (["predict", "--json"], 2, "MissingParameter"),
        (["predict", "net", "flat", "--nonsense", "--json"], 2, "NoSuchOption"),
        (["eval", "net", "flat", "--split", "x", "--json"], 2, "BadParameter"),
        (["inspect", "broken.png", "--json"], 1, "CheckpointError"),
        (["inspect", "net", "--json"], 0, None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_error_is_json_under_json(
    arguments: list[str], code: int, kind: str | None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["bayesify", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    if kind is None:
        assert "error" not in document
    else:
        assert (document["error"]["kind"], document["error"]["exit_code"]) == (kind, code)
        assert printed.err == ""


# -- eval, prune --curve, report -----------------------------------------------------------------

MEASURED = [
    ("eval", "net", "images", "-k", 2, "--ood", "images", "--json"),
    ("prune", "net", "--curve", "--data", "images", "-k", 2, "--sparsity", 0.5, "--json"),
    ("report", "net", "images", "-k", 2, "--resamples", 2, "--ood", "images", "-o", "page.html"),
]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("command", MEASURED, ids=lambda c: str(c[0]))
def test_a_measurement_with_a_broken_image_does_not_begin_or_leaves_it_out(
    command: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("images/c").mkdir()
    Path("images/c/0.png").write_bytes(Path("images/a/0.png").read_bytes())
    Path("images/b/9.png").write_bytes(b"no image")
    calls: list[int] = []
    called = nn.Linear.forward

    def noted(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return called(self, x)

    monkeypatch.setattr(nn.Linear, "forward", noted)
    wanted = (*command, *MODEL, "-b", 1)
    failed = run(*wanted, code=2)
    message = " ".join((failed.stdout + failed.stderr).replace("│", " ").split())
    assert "1 of 6 images of 'images' cannot be read" in message
    assert "--skip-unreadable" in message
    assert not calls
    result = run(*wanted, "--skip-unreadable")
    assert "1 of 6 images of 'images' cannot be read and are left out" in " ".join(
        result.stderr.split()
    )
    if command[0] == "report":
        assert "2 images that cannot be read" in Path("page.html").read_text()
        return
    found = json.loads(result.stdout)
    assert found["unreadable"] == 1
    Path("images/b/9.png").unlink()
    whole = json.loads(run(*wanted).stdout)
    assert whole["unreadable"] == 0
    assert found["rows"] == whole["rows"]
