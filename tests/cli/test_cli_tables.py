"""cli/tables.py: a table through fit, eval and predict."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import bayesify
from bayesify.cli.app import app
from bayesify.likelihoods import Gaussian
from bayesify.storage import read_header

COLUMNS = ("size", "city", "price", "kind", "stars")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tables: a number, a text and a whole number that depend on size and city."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, rows in (("train.csv", 240), ("new.csv", 300)):
        size, north = rng.uniform(20, 90, rows), rng.integers(0, 2, rows)
        price = 1000 + 50 * size + 800 * north + rng.normal(0, 300, rows)
        with Path(name).open("w", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(COLUMNS)
            for s, n, p in zip(size, north, price, strict=True):
                kind = "large" if s > 50 else "small"
                lines.writerow([f"{s:.2f}", ("south", "north")[n], f"{p:.1f}", kind, 1 + n])


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


def words(result: Result) -> str:
    return " ".join(result.stderr.replace("│", " ").split())


def fit(target: str, *arguments: object, out: str = "t.bbb.safetensors", code: int = 0) -> Result:
    left = [a for c in ("price", "kind", "stars") if c != target for a in ("--ignore", c)]
    return run("fit", "train.csv", "--target", target, "-o", out, "-b", 24, "-q",
               *left, *arguments, code=code)  # fmt: skip


def read_csv(name: str) -> list[dict[str, str]]:
    with Path(name).open(newline="") as file:
        return list(csv.DictReader(file))


def read(command: str, *arguments: object) -> Any:
    return json.loads(run(command, "t.bbb.safetensors", "new.csv", *arguments, "--json").stdout)


def test_a_table_becomes_intervals_that_hold_new_targets() -> None:
    said = fit("price", "--epochs", 60, "--lr", 0.02)
    assert "The target 'price' is a number: Gaussian('learned')" in words(said)
    found = read("eval", "-k", 30)
    assert (found["target"], found["examples"]) == ("price", 300)
    row = found["rows"][-1]
    # the noise is 300; the price itself varies by about 1100
    assert 270 < row["rmse"] < 360
    assert 0.83 < row["coverage"]["0.9"] < 0.96  # 90 % +- 4 standard errors
    answers = read("predict", "-k", 30)
    target, mean, low, high, std = (
        np.array([float(a[key]) for a in answers]) for key in ("price", "mean", "q05", "q95", "std")
    )
    assert np.sqrt(((target - mean) ** 2).mean()) == pytest.approx(row["rmse"], rel=1e-4)
    assert abs(target - mean).mean() == pytest.approx(row["mae"], rel=1e-4)
    assert ((low <= target) & (target <= high)).mean() == pytest.approx(row["coverage"]["0.9"])
    assert std == pytest.approx([
        np.hypot(a["aleatoric_std"], a["epistemic_std"]) for a in answers], rel=1e-4)  # fmt: skip
    shown = run("eval", "t.bbb.safetensors", "new.csv").stdout
    assert "CRPS" in shown
    assert "300 rows of new.csv, target 'price'." in shown


def test_the_file_alone_says_how_rows_are_coded() -> None:
    fit("price", "--epochs", 3, "--hidden", 7, "--hidden", 5)
    header = read_header("t.bbb.safetensors")
    size, city = header["info"]["table"]["columns"]
    rows = read_csv("train.csv")
    sizes = np.array([float(row["size"]) for row in rows])
    assert (size["mean"], size["std"]) == pytest.approx((sizes.mean(), sizes.std()))
    assert city == {"name": "city", "categories": ["north", "south"]}
    model = bayesify.load("t.bbb.safetensors")
    assert [p.shape[0] for n, p in model.named_parameters() if n.endswith("weight")] == [7, 5, 1]
    likelihood: Any = bayesify.likelihood_of(model)
    prices = np.array([float(row["price"]) for row in rows])
    assert isinstance(likelihood, Gaussian)
    assert float(likelihood.location) == pytest.approx(prices.mean())
    assert float(likelihood.scale) == pytest.approx(prices.std())
    new = read_csv("new.csv")
    x = torch.tensor([
        [(float(r["size"]) - sizes.mean()) / sizes.std(), r["city"] == "north",
         r["city"] == "south"] for r in new
    ], dtype=torch.float32)  # fmt: skip
    p = bayesify.predict(model, x, num_samples=6, seed=2, reduce="predictive")
    answers = read("predict", "-k", 6, "--seed", 2)
    assert [a["mean"] for a in answers] == pytest.approx(p.mean[:, 0].tolist(), rel=1e-4)
    assert [a["q95"] for a in answers] == pytest.approx(p.quantile(0.95)[:, 0].tolist(), rel=1e-3)
    run("predict", "t.bbb.safetensors", "new.csv", "-k", 6, "--seed", 2, "-o", "p.csv")
    written = read_csv("p.csv")
    assert [float(w["std"]) for w in written] == pytest.approx([a["std"] for a in answers])
    assert len(read("predict", "--limit", 3)) == 3
    one_by_one = read("predict", "-k", 6, "--seed", 2, "-b", 1, "--limit", 5)
    assert [a["mean"] for a in one_by_one] == pytest.approx([a["mean"] for a in answers[:5]])


def test_a_text_is_predicted_as_a_class() -> None:
    said = fit("kind", "--epochs", 30, "--lr", 0.02)
    assert "The target 'kind' is one of 2 classes: Categorical()." in words(said)
    assert read_header("t.bbb.safetensors")["info"]["classes"] == ["large", "small"]
    rows = read("eval")["rows"]
    answers = read("predict", "--probabilities")
    right = np.mean([answer["class"] == answer["kind"] for answer in answers])
    assert rows[-1]["accuracy"] == pytest.approx(right)
    assert right > 0.9
    nll = -np.mean([np.log(a["probabilities"][a["kind"]]) for a in answers])
    assert rows[-1]["nll"] == pytest.approx(nll, rel=1e-4)
    assert "top-1" in run("eval", "t.bbb.safetensors", "new.csv").stdout


@pytest.mark.parametrize(
    ("more", "said", "kind"),
    [
        ((), "one of 2 classes: Categorical(). For numbers: --likelihood gaussian", "Categorical"),
        (("--likelihood", "gaussian"), "a number: Gaussian('learned')", "Gaussian"),
        (("--likelihood", "predicted"), "a number: Gaussian('predicted')", "Gaussian"),
    ],
)
def test_whole_numbers_are_classes_unless_the_user_says_otherwise(
    more: tuple[str, ...], said: str, kind: str
) -> None:
    assert said in words(fit("stars", "--epochs", 1, *more))
    assert read_header("t.bbb.safetensors")["likelihood"]["kind"] == kind
    assert len(read("predict", "-k", 2)) == 300


def test_the_written_settings_repeat_the_fit() -> None:
    fit("price", "--epochs", 2)
    run("fit", "--config", "t.bbb.toml", "-o", "again.safetensors", "-q")
    first, again = (Path(name).read_bytes() for name in ("t.bbb.safetensors", "again.safetensors"))
    assert first == again


def test_rows_need_no_target_to_be_predicted() -> None:
    fit("price", "--epochs", 1)
    Path("one.csv").write_text("city,size\nsouth,33\n")
    (answer,) = json.loads(run("predict", "t.bbb.safetensors", "one.csv", "--json").stdout)
    assert answer.keys() == {
        "row", "mean", "std", "aleatoric_std", "epistemic_std", "q05", "q95"
    }  # fmt: skip
    assert "no target 'price'" in words(run("eval", "t.bbb.safetensors", "one.csv", code=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fit", "train.csv", "-o", "o"), "--target is missing, the column that is predicted"),
        (("fit", "train.csv", "--target", "cost", "-o", "o"), "no target 'cost'"),
        (("fit", "train.csv", "new.csv", "--target", "price", "-o", "o"), "DATA: of no use"),
        (("fit", "train.csv", "--target", "price", "-o", "train.csv", "-f"), "would be lost"),
        (("fit", "train.csv", "--target", "price", "-o", "o", "--method", "laplace-diag"),
         "needs a trained network"),
        (("fit", "t.bbb.safetensors", "-o", "o"), "DATA is missing"),
        (("fit", "t.bbb.safetensors", "new.csv", "-o", "o"), "was not fitted to one"),
        (("fit", "t.bbb.safetensors", "fashion-sample", "-o", "o", "--target", "price"),
         "are for a table"),
        (("fit", "t.bbb.safetensors", "fashion-sample", "-o", "o"), "is of a table"),
        (("eval", "t.bbb.safetensors", "none.csv"), "There is no table"),
        (("eval", "t.bbb.safetensors", "new.csv", "--ood", "x"), "--ood: of no use for a table"),
        (("predict", "t.bbb.safetensors", "bad.csv"), "bad.csv lacks 'city'"),
        (("predict", "t.bbb.safetensors", "new.csv", "new.csv"), "INPUT must be one table"),
        (("predict", "t.bbb.safetensors", "new.csv", "--probabilities", "--json"),
         "--probabilities are of classes"),
        (("report", "t.bbb.safetensors", "fashion-sample"), "is of a table"),
        (("export", "t.bbb.safetensors", "-o", "o.onnx"), "is of a table"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_error(arguments: tuple[str, ...], message: str) -> None:
    fit("price", "--epochs", 1)
    Path("bad.csv").write_text("size\n3\n")
    result = run(*arguments, code=2)
    assert message in (words(result) + result.stdout.replace("\n", " "))


def test_a_table_is_no_data_for_a_model_of_images() -> None:
    run("convert", "resnet18", "--num-classes", 2, "-o", "net", "-q")
    for command in ("eval", "predict"):
        assert "was not fitted to one" in words(run(command, "net", "new.csv", code=2))
