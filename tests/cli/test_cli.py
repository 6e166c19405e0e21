"""cli/: what each command prints and writes, and how it fails."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner, Result

import bayesify
from bayesify import inference, models, training
from bayesify.cli.app import app
from bayesify.cli.convert import default_name, parts
from bayesify.data import load_dataset, prepare
from bayesify.models import InputConfig
from bayesify.planning import PlanRow
from bayesify.posterior import sites
from bayesify.selection import PRESETS
from bayesify.storage import load, read_header

ROOT = Path(__file__).resolve().parents[2]
FACTORY = '''
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.linear = nn.Linear(6, 6)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return x + self.linear(self.norm(x))


class Net(nn.Module):
    """A classifier of images of 4 x 4 pixels."""

    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(6, classes)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x).flatten(1)))


def tiny():
    return Net(3)


def normed():
    return nn.Sequential(nn.Conv2d(3, 6, 4), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6, 3))


def no_parameters():
    return nn.ReLU()


def integers():
    model = nn.Module()
    model.table = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    return model
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with the module ``tinyfactory`` beside it."""
    library, here = tmp_path / "lib", tmp_path / "here"
    library.mkdir()
    here.mkdir()
    (library / "tinyfactory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(library)
    monkeypatch.delitem(sys.modules, "tinyfactory", raising=False)
    monkeypatch.chdir(here)
    return here


def run(*arguments: object, code: int = 0) -> Result:
    """Run ``bayesify`` with a terminal of fixed width and no colour."""
    environment = {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}
    result = CliRunner().invoke(app, [str(a) for a in arguments], env=environment)
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def failure(*arguments: object, code: int) -> str:
    """The message of a command that fails, without its frame and line breaks."""
    before = sorted(os.listdir())
    result = run(*arguments, code=code)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert sorted(os.listdir()) == before, "something was written"
    return " ".join(line.strip("│╭╮╰╯─ ") for line in result.stderr.splitlines()).strip()


def converted(*options: object) -> Path:
    """A file of the factory's model."""
    run("convert", "tinyfactory:tiny", "--img-size", 4, "--quiet", *options)
    return Path("tiny.bbb.safetensors")


def dataset() -> str:
    """A file of 60 images of 4 x 4 pixels whose class is their colour; 20 of them are the test."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for prefix, count in (("", 40), ("test_", 20)):
        labels = torch.arange(count) % 3
        images = torch.randint(0, 90, (count, 4, 4, 3), generator=generator)
        images[torch.arange(count), :, :, labels] += 150
        tensors |= {f"{prefix}images": images.to(torch.uint8), f"{prefix}labels": labels}
    save_file(tensors, "colours.safetensors")
    return "colours.safetensors"


# -- convert ---------------------------------------------------------------------------------


def test_convert_prints_the_plan_and_writes_the_file() -> None:
    result = run("convert", "tinyfactory:tiny", "--skip", "LayerNorm", "--img-size", 4)
    table = [line.rstrip() for line in result.stdout.splitlines()]
    assert [line.split() for line in table[2:6]] == [
        "stem 1 Conv2d 294 posterior".split() + table[2].split()[5:],
        "blocks 2 LayerNorm 24 skipped: LayerNorm".split(),
        "blocks 4 Linear 96 posterior".split() + table[4].split()[5:],
        "head 1 Linear 21 posterior".split() + table[5].split()[5:],
    ]
    assert table[6].startswith("Net: 411 of 435 parameters (94.48%) get a posterior, prior N(0, 1")
    assert "random. Give real ones: --weights FILE." in result.stderr

    model = load("tiny.bbb.safetensors", model=models.create_model("tinyfactory:tiny"))
    names = {site.name for site in sites(model)}
    expected = {n for n, _ in models.create_model("tinyfactory:tiny").named_parameters()}
    assert names == {n for n in expected if "norm" not in n}


def test_the_python_lines_run(folder: Path) -> None:
    for arguments in (("tinyfactory:tiny",), ("test_resnet", "--num-classes", 3)):
        lines = run("convert", *arguments).stdout.partition("In Python:")[2].strip().splitlines()
        assert len(lines) == 3
        names: dict[str, Any] = {"images": torch.zeros(2, 3, 4, 4)}
        if arguments[0] == "test_resnet":
            names["images"] = torch.zeros(2, 3, 32, 32)
        exec("\n".join(line.strip() for line in lines), names)
        assert names["outputs"].shape == (16, 2, 3)


def test_convert_tells_of_biases_that_no_loss_sees() -> None:
    told = run("convert", "tinyfactory:normed", "--img-size", 4)
    assert "takes a bias off again in training: 0.bias. " in " ".join(told.stderr.split())
    found = run(
        "convert", "tinyfactory:normed", "--img-size", 4, "--skip", "@before-batchnorm", "--json",
        "--force",
    )  # fmt: skip
    rows = {row["name"]: row["action"] for row in json.loads(found.stdout)["rows"]}
    assert rows["0.bias"] == "skipped: @before-batchnorm"
    assert [name for name, action in rows.items() if action != "bayes"] == ["0.bias"]
    assert "BatchNorm" not in found.stderr


def test_convert_as_json() -> None:
    options = ("--logvar", -6, "--prior-std", 0.5, "--prior-mean", "initial", "--img-size", 4)
    result = run(
        "convert", "tinyfactory:tiny", "--only", "head", "--show", "head", "--json", *options
    )
    document = json.loads(result.stdout)
    assert result.stderr == ""
    assert document["file"] == "tiny.bbb.safetensors"
    assert [r["name"] for r in document["rows"] if r["action"] == "bayes"] == [
        "head.weight",
        "head.bias",
    ]
    assert any("random" in note for note in document["notes"])
    [code] = document["code"]
    assert "draw(self, 'weight', autocast = True)" in code["after"]
    assert "self.weight" in code["before"]
    model = load(document["file"], model=models.create_model("tinyfactory:tiny"))
    assert {float(p.logvar.detach().max()) for p in bayesify.posteriors(model)} == {-6.0}
    assert {str(p.prior) for p in bayesify.posteriors(model)} == {"N(w0, 0.5^2)"}


@pytest.mark.parametrize("sigma", [("--initial-std", "0.08rms"), ("--relative-std", 0.08)])
def test_convert_relative_to_each_tensor(sigma: tuple[object, object]) -> None:
    options = (*sigma, "--prior-std", 0.25, "--relative-prior")
    document = json.loads(run("convert", "tinyfactory:tiny", "--json", *options).stdout)
    model = load(document["file"], model=models.create_model("tinyfactory:tiny"))
    weight = next(p for p in bayesify.posteriors(model) if p.name == "head.weight")
    rms = float(weight.mean.detach().square().mean().sqrt())
    std = float(weight.logvar.detach().max().div(2).exp())
    assert std == pytest.approx(0.08 * rms, rel=1e-5)
    assert str(weight.prior) == "N(0, (0.25 rms)^2)"


def test_resnet50_has_no_layer_norm() -> None:
    result = run("convert", "resnet50", "--skip", "LayerNorm", "--dry-run")
    assert "LayerNorm" in result.stderr
    assert "53 BatchNorm2d" in result.stderr
    assert "25,557,032 of 25,557,032 parameters (100.00%)" in result.stdout
    assert os.listdir() == []
    assert "53 BatchNorm2d" in failure(
        "convert", "resnet50", "--skip", "LayerNorm", "--strict", code=2
    )


def test_the_plan_tells_the_sigma_of_the_file() -> None:
    document = json.loads(run("convert", "tinyfactory:tiny", "--json").stdout)
    stats = json.loads(run("inspect", document["file"], "--json").stdout)["posterior"]
    for row in document["rows"]:
        assert stats[row["name"]]["max_std"] == pytest.approx(row["std"], rel=1e-5), row["name"]


def test_show_prints_code_with_draws() -> None:
    result = run("convert", "test_vit", "--dry-run", "--show", "blocks.0.attn", "--quiet")
    assert "blocks.0.attn: Attention.forward, as it was" in result.stdout
    assert "scaled_dot_product_attention" in result.stdout
    assert "blocks.0.attn.qkv and 1 alike: Linear.forward" in result.stdout
    assert "weight = draw(self, 'weight', autocast = True)" in result.stdout
    assert os.listdir() == []
    whole = run(
        "convert", "tinyfactory:tiny", "--img-size", 4, "--dry-run", "--show", ".", "--quiet"
    )
    assert "the model: Net.forward, as it was" in whole.stdout
    assert "draw(self, 'weight', autocast = True)" in whole.stdout


def test_verbose_has_a_row_for_each_parameter() -> None:
    result = run("convert", "tinyfactory:tiny", "--dry-run", "--verbose")
    expected = [n for n, _ in models.create_model("tinyfactory:tiny").named_parameters()]
    found = [line.split()[0] for line in result.stdout.splitlines()[2 : 2 + len(expected)]]
    assert found == expected


def test_the_seed_makes_the_weights() -> None:
    contents = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("convert", "tinyfactory:tiny", "--seed", seed, "--out", name, "--quiet")
        contents.append(Path(name).read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_weights_come_from_a_file(folder: Path) -> None:
    model = models.create_model("tinyfactory:tiny")
    torch.save(model.state_dict(), "weights.pt")
    result = run("convert", "tinyfactory:tiny", "--weights", "weights.pt", "--img-size", 4)
    assert "random" not in result.stderr
    back = bayesify.to_deterministic(
        load("tiny.bbb.safetensors", model=models.create_model("tinyfactory:tiny"))
    ).state_dict()
    assert all(torch.equal(back[k], v) for k, v in model.state_dict().items())
    assert read_header("tiny.bbb.safetensors")["info"] == {"weights": "weights.pt"}


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("resnet50.a1_in1k", "resnet50.a1_in1k.bbb.safetensors"),
        ("torchvision:resnet18", "resnet18.bbb.safetensors"),
        ("a.b:make", "make.bbb.safetensors"),
        ("hf_hub:timm/x", "timm_x.bbb.safetensors"),
    ],
)
def test_default_names(name: str, file: str) -> None:
    assert default_name(name) == file


def test_parts_start_where_names_differ() -> None:
    def row(name: str, action: str = "bayes") -> PlanRow:
        return PlanRow(name, (), "Linear", (1,), 1, action, "", "", "weight", 1.0)

    nested = [row("net.body.0.w"), row("net.body.1.w"), row("net.body.2.w", "frozen")]
    assert {k: len(v) for k, v in parts(tuple(nested)).items()} == {
        ("net.body.*", "posterior"): 2,
        ("net.body.*", "frozen"): 1,
    }
    assert list(parts((row("w"), row("a.w")))) == [("w", "posterior"), ("a", "posterior")]
    assert list(parts((row("fc.w"), row("fc.b")))) == [("fc", "posterior")]


def test_convert_with_estimators() -> None:
    file = converted("--estimator", "flipout", "--estimator", "head=local")
    found = {row["name"]: row["estimator"] for row in read_header(file)["posterior"]}
    plan = bayesify.plan(
        models.create_model("tinyfactory:tiny"), estimator={"head": "local", "*": "flipout"}
    )
    assert found == {row.name: row.estimator for row in plan.rows}
    assert set(found.values()) == {"weight", "local", "flipout"}
    shown = run("convert", "tinyfactory:tiny", "--estimator", "flipout", "--dry-run").stdout
    assert "flipout" in shown
    message = failure("convert", "tinyfactory:tiny", "--dry-run", "--estimator", "flip", code=2)
    assert "No estimator is called" in message


# -- the other commands ----------------------------------------------------------------------


def test_inspect_reads_the_file_back() -> None:
    file = converted("--skip", "LayerNorm")
    model = load(file, model=models.create_model("tinyfactory:tiny"))
    document = json.loads(run("inspect", file, "--json").stdout)
    assert document["posterior"] == bayesify.posterior_stats(model)
    assert document["header"] == read_header(file)
    shown = run("inspect", file).stdout
    assert "tinyfactory:tiny (tinyfactory.Net)" in shown
    assert "411 of 435 parameters (94.48%)" in shown
    assert "skip=LayerNorm" in shown
    assert "blocks.0.linear.weight" in shown


def test_inspect_tells_of_fixed_elements() -> None:
    model = bayesify.to_bbb(torch.nn.Embedding(6, 2, padding_idx=0))
    bayesify.save(model, "words.safetensors")
    shown = run("inspect", "words.safetensors").stdout
    assert "weight: 2 elements are fixed: no draw, no KL." in shown
    assert "10 of 12 parameters" in shown


def test_the_whole_path() -> None:
    file, data, model = converted(), dataset(), ("--model", "tinyfactory:tiny")
    options = ("--epochs", 6, "--lr", 0.02, "--batch-size", 10, "--kl-weight", 0.1)
    fitted = run("fit", file, data, *model, "--out", "fit.safetensors", *options)
    assert "s = 0.025 (num_data, N = 40)" in " ".join(fitted.stderr.split())
    assert "noise budget" in fitted.stderr
    losses = [float(line.split()[1]) for line in fitted.stdout.splitlines()[2:8]]
    assert losses[-1] < losses[0] / 2
    header = read_header("fit.safetensors")
    assert header["info"]["classes"] == ["0", "1", "2"]
    assert header["info"]["fit"]["kl_weight"] == 0.1
    assert header["model"]["spec"]["name"] == "tinyfactory:tiny"

    again = run("fit", file, data, *model, "--out", "again.safetensors", *options, "--json")
    assert Path("again.safetensors").read_bytes() == Path("fit.safetensors").read_bytes()
    assert len(json.loads(again.stdout)["losses"]) == 6

    trained = load("fit.safetensors", model=models.create_model("tinyfactory:tiny").eval())
    config = InputConfig((3, 4, 4), (0.5,) * 3, (0.5,) * 3)
    test = load_dataset(data, split="test")
    command = ("eval", "fit.safetensors", data, *model, "-k", 4, "--resamples", 50)
    measured = json.loads(run(*command, "--json").stdout)["rows"]
    expected = training.evaluate(
        trained, test, num_samples=4, model_config=config, control=True, resamples=50
    )
    assert measured == json.loads(json.dumps([asdict(row) for row in expected]))
    kinds = [row["prediction"] for row in measured]
    assert kinds == ["at the means", "temperature scaled", "MC average"]
    shown = run(*command).stdout
    assert max(map(len, shown.splitlines())) <= 80
    for row in measured:
        kind, k = row["prediction"], row["num_samples"]
        lines = [line[len(kind) :].split() for line in shown.splitlines() if line.startswith(kind)]
        shares = [f"{row['accuracy']:.2%}", f"{row['top5']:.2%}"]
        scores = [f"{row[name]:.4f}" for name in ("nll", "ece", "brier", "aurc")]
        uncertainties = ("adaptive_ece", "classwise_ece", "mce", "entropy", "mutual_information")
        split = ("uncertainty", "resolution", "reliability", "residual")
        assert lines[:3] == [
            [str(k), *shares, *scores],
            [f"{row[name]:.4f}" for name in uncertainties if row[name] is not None],
            [f"{row['parts'][name]:.4f}" for name in split],
        ]
        assert lines[3][1:] == [
            "{:.4f}-{:.4f}".format(*row["intervals"][name]) for name in ("nll", "ece", "brier")
        ]
    assert f"Temperature {measured[1]['temperature']:.3f}" in shown

    rows = json.loads(
        run("predict", "fit.safetensors", data, *model, "-k", 4, "-b", 7, "--json").stdout
    )
    images = prepare(torch.stack([test.read(i)[0] for i in range(20)]), config)
    summary = inference.predict(trained, images, num_samples=4, seed=0, reduce="probabilities")
    assert [int(row["label"]) for row in rows] == [test.read(i)[1] for i in range(20)]
    assert [int(row["class"]) for row in rows] == summary.mean.argmax(1).tolist()
    for key, value in (
        ("probability", summary.mean.max(1).values),
        ("entropy", summary.predictive_entropy),
        ("mutual information", summary.mutual_information),
    ):
        np.testing.assert_allclose([row[key] for row in rows], value.numpy(), atol=1e-6)


def test_predict_on_files_into_files() -> None:
    file = converted()
    Image.new("RGB", (9, 7), (255, 0, 0)).save("red.png")
    Image.new("L", (9, 7), 128).save("grey.png")
    command = ("predict", file, "red.png", "grey.png", "--model", "tinyfactory:tiny", "-k", 2)
    shown = run(*command).stdout.splitlines()
    assert [line.split()[0] for line in shown[2:4]] == ["red.png", "grey.png"]
    rows = json.loads(run(*command, "--json").stdout)
    assert [sorted(row) for row in rows] == [
        ["class", "entropy", "error", "image", "mutual information", "probability"]
    ] * 2
    run(*command, "--out", "a.json")
    assert json.loads(Path("a.json").read_text()) == rows
    run(*command, "--out", "a.csv", "--limit", 1)
    with open("a.csv", newline="") as handle:
        [row] = csv.DictReader(handle)
    assert float(row["probability"]) == rows[0]["probability"]
    assert "exists" in failure(*command, "--out", "a.csv", code=1)
    assert "must end in .csv or .json" in failure(*command, "--out", "a.txt", code=2)


def test_a_timm_model_needs_no_model_option() -> None:
    run("convert", "test_resnet", "--num-classes", 10, "--img-size", 32, "--quiet")
    command = ("eval", "test_resnet.bbb.safetensors", dataset(), "-k", 1, "--json")
    rows = json.loads(run(*command).stdout)["rows"]
    assert rows == json.loads(run(*command).stdout)["rows"]
    assert rows != json.loads(run(*command, "--seed", 1).stdout)["rows"]


def test_eval_shows_the_parts_of_the_brier_score_of_a_model_that_errs() -> None:
    command = ("eval", converted(), dataset(), "--model", "tinyfactory:tiny", "-k", 1)
    [row, *_] = json.loads(run(*command, "--json").stdout)["rows"]
    names = ("uncertainty", "resolution", "reliability", "residual")
    parts = [f"{row['parts'][name]:.4f}" for name in names]
    assert len(set(parts)) == 4
    lines = [line.split() for line in run(*command).stdout.splitlines()]
    start = lines.index(["Brier,", "in", "parts", "UNC", "RES", "REL", "rest"])
    assert lines[start + 2] == ["at", "the", "means", *parts]


def test_json_has_no_infinity() -> None:
    file = converted("--logvar", -1000)  # sigma is 0 in float32
    document = json.loads(run("inspect", file, "--json").stdout)
    assert document["posterior"]["head.weight"]["max_snr"] is None


def test_models_are_listed() -> None:
    found = json.loads(run("models", "*resnet18", "--json").stdout)
    by_name = {row["name"]: row for row in found}
    assert by_name["resnet18"]["source"] == "timm"
    assert by_name["resnet18"]["parameters"] == 11_689_512
    assert by_name["torchvision:resnet18"]["source"] == "torchvision"
    assert {row["structural"] for row in found} == {"ok"}
    result = run("models", "test_vit*", "--source", "timm")
    assert re.search(r"^test_vit +371,240 +ok +ok", result.stdout, re.MULTILINE)
    assert "verified" in result.stderr


def test_models_that_are_in_no_table_are_not_called_verified(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bayesify.zoo.verified", dict)
    (row,) = json.loads(run("models", "test_vit", "--failed", "--json").stdout)
    assert (row["structural"], row["numeric"]) == ("not run", "not run")


def test_an_unknown_pattern_names_the_closest_model() -> None:
    assert "torchvision:resnet18" in failure(
        "models", "resnet1800", "--source", "torchvision", code=2
    )


# -- prune -----------------------------------------------------------------------------------


def test_prune_writes_a_file() -> None:
    file = converted("--logvar", -4)
    model = ("--model", "tinyfactory:tiny")
    shown = run("prune", file, *model, "--sparsity", 0.5, "--only", "blocks").stdout
    assert re.search(r"^blocks.0.linear.weight +36 +18 +50.0% +0 of 6", shown, re.MULTILINE)
    assert "Wrote tiny.pruned.bbb.safetensors" in shown
    pruned = load("tiny.pruned.bbb.safetensors", model=models.create_model("tinyfactory:tiny"))
    expected = load(file, model=models.create_model("tinyfactory:tiny"))
    bayesify.prune_(expected, 0.5, only="blocks")
    for key, value in expected.state_dict().items():
        assert torch.equal(pruned.state_dict()[key], value)
    header = read_header("tiny.pruned.bbb.safetensors")
    assert header["info"]["pruned"]["sparsity"] == 0.5
    assert header["info"]["weights"] == "random"
    assert header["input"] == read_header(file)["input"]

    options = ("--score", "magnitude", "--scope", "global", "--sparsity", 0.8, "--min-dim", 1)
    result = run("prune", file, *model, *options, "--out", "b", "--json")
    document = json.loads(result.stdout)
    assert document["pruned"] == round(0.8 * document["elements"])
    assert {row["name"] for row in document["rows"]} == {site.name for site in sites(expected)}
    assert run("prune", file, *model, *options, "--out", "b", "--force", "--quiet").stdout == ""


def test_prune_units() -> None:
    file = converted("--logvar", -4)
    command = ("prune", file, "--model", "tinyfactory:tiny", "--json")
    document = json.loads(
        run(*command, "--unit", "channels", "--sparsity", 0.5, "--only", "blocks.0.linear").stdout
    )
    found = {row["name"]: (row["pruned"], row["dead_outputs"]) for row in document["rows"]}
    assert found["blocks.0.linear.weight"] == (18, 3)
    assert found["blocks.0.linear.bias"] == (3, 3)
    assert document["pruned"] == 21
    assert "no multiples of 4" in failure(
        *command[:-1], "--unit", "2:4", "--only", "stem", "--out", "b", code=2
    )


def test_timm_loads_the_pruned_means() -> None:
    import timm

    run("convert", "test_vit", "--num-classes", 10, "--quiet")
    file = "test_vit.bbb.safetensors"
    run("prune", file, "--sparsity", 0.8, "--deterministic")
    plain: Any = timm.create_model("test_vit", num_classes=10)
    plain.load_state_dict(load_file("test_vit.pruned.safetensors"))
    expected = bayesify.to_deterministic(bayesify.prune_(load(file), 0.8))
    for key, value in expected.state_dict().items():
        assert torch.equal(plain.state_dict()[key], value)
    assert float((plain.blocks[0].mlp.fc1.weight == 0).float().mean()) == pytest.approx(0.8, 1e-3)
    images = torch.randn(2, *plain.pretrained_cfg["input_size"])
    assert torch.equal(plain.eval()(images), expected.eval()(images))
    run("convert", "test_vit", "--num-classes", 10, "--weights", "test_vit.pruned.safetensors",
        "--out", "again", "--quiet")  # fmt: skip
    document = json.loads(run("prune", file, "--unit", "heads", "--sparsity", 0.5, "--json").stdout)
    assert all(r["pruned"] for r in document["rows"] if r["name"].endswith("qkv.weight"))
    assert sum(r["pruned"] for r in document["rows"] if ".mlp." in r["name"]) == 0
    run("prune", file, "--unit", "2:4", "--only", "blocks", "--out", "half", "--json")
    half = load("half").get_parameter("blocks.0.mlp.fc1.weight") == 0
    assert bool((half.view(-1, 4).sum(1) == 2).all())


def test_prune_draws_a_curve() -> None:
    pytest.importorskip("matplotlib")
    file = converted("--logvar", -4)
    command = (
        "prune",
        file,
        "--model",
        "tinyfactory:tiny",
        "--curve",
        "--data",
        dataset(),
        "-k",
        3,
    )
    scores = ("--score", "snr", "--score", "random")
    shares = ("--sparsity", 0.6, "--sparsity", 0)
    document = json.loads(run(*command, *scores, *shares, "--plot", "c.png", "--json").stdout)
    rows = document["rows"]
    assert [(r["score"], r["sparsity"]) for r in rows[::2]] == [
        ("snr", 0.0), ("snr", 0.6), ("random", 0.0), ("random", 0.6)
    ]  # fmt: skip
    test = load_dataset("colours.safetensors", split="test")
    config = InputConfig((3, 4, 4), (0.5,) * 3, (0.5,) * 3)
    expectations: dict[Any, Any] = {"snr": rows[2:4], "random": rows[6:8]}
    for score, two in expectations.items():
        model = load(file, model=models.create_model("tinyfactory:tiny"))
        bayesify.prune_(model, 0.6, score=score)
        expected = training.evaluate(model, test, num_samples=3, model_config=config)
        for row, found in zip(expected, two, strict=True):
            assert [getattr(row, c) for c in ("prediction", "accuracy", "nll", "ece")] == [
                found[c] for c in ("prediction", "accuracy", "nll", "ece")
            ]
    assert rows[0]["nll"] == rows[4]["nll"]
    with Image.open("c.png") as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1 << 20) or ()) > 10
    shown = run(*command, "--sparsity", 0.6).stdout
    assert re.search(rf"^snr +60% +MC average .* {rows[3]['nll']:.4f}", shown, re.MULTILINE)
    assert len(run(*command, "--only", "head").stdout.splitlines()) == 2 + 2 * 12


# -- failures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["convert", "resnet5000"], 2, "timm has no model 'resnet5000'. Closest: resnet50"),
        (["convert", "torchvision:resnet5000"], 2, "torchvision has no model"),
        (["convert", "no_such_package:factory"], 2, "cannot be imported"),
        (["convert", "tinyfactory:no_parameters"], 1, "no parameter"),
        (["convert", "tinyfactory:integers"], 1, "integer"),
        (["convert", "tinyfactory:tiny", "--skip", "x", "--strict"], 2, "'x' matches nothing"),
        (["convert", "tinyfactory:tiny", "--skip", "re:("], 2, "not a valid regular expression"),
        (["convert", "tinyfactory:tiny", "--only", "LayerNorm", "--skip", "LayerNorm"], 1, "No"),
        (["convert", "tinyfactory:tiny", "--preset", "most"], 2, "Unknown preset 'most'"),
        (["convert", "tinyfactory:tiny", "--prior-std", "0"], 2, "std must be a number"),
        (["convert", "tinyfactory:tiny", "--prior-mean", "first"], 2, "a number or initial"),
        (["convert", "tinyfactory:tiny", "--logvar", "nan"], 2, "initial_std must be a number"),
        (["convert", "tinyfactory:tiny", "--logvar", "5000"], 2, "initial_std must be a number"),
        (["convert", "tinyfactory:tiny", "--relative-std", "0"], 2, "fraction must be"),
        (["convert", "tinyfactory:tiny", "--relative-std", "1", "--logvar", "1"], 2, "give one"),
        (["convert", "tinyfactory:tiny", "--initial-std", "1", "--logvar", "1"], 2, "give one"),
        (["convert", "tinyfactory:tiny", "--initial-std", "5%"], 2, "0.05rms, got '5%'"),
        (["convert", "tinyfactory:tiny", "--num-classes", "7"], 2, "does not reach the factory"),
        (["convert", "tinyfactory:tiny", "--weights", "none.pt"], 2, "no weights file none.pt"),
        (["convert", "tinyfactory:tiny", "--weights", "nan.safetensors"], 2, "NaN"),
        (["convert", "tinyfactory:tiny", "--weights", "cut.safetensors"], 2, "may be cut short"),
        (["convert", "tinyfactory:tiny", "--pretrained"], 2, "Only timm and torchvision publish"),
        (["convert", "tinyfactory:tiny", "--show", "hed", "--img-size", "4"], 2, "Closest: head"),
        (["convert", "tinyfactory:tiny", "--show", "head"], 2, "img_size"),
        (["convert", "tinyfactory:tiny", "--show", "head", "--img-size", "9"], 2, "3 x 9 x 9"),
        (["convert", "tinyfactory:tiny", "--out", "old"], 1, "old exists: give another name"),
        (["convert", "tinyfactory:tiny", "--out", "."], 1, "is a folder"),
        (["convert", "tinyfactory:tiny", "--out", "none/x"], 1, "There is no folder"),
        (["inspect", "none"], 1, "none does not exist"),
        (["inspect", "old"], 1, "no readable safetensors file"),
        (["inspect", "cut.safetensors"], 1, "no readable safetensors file"),
        (["inspect", "nan.safetensors"], 1, "--weights FILE"),
        (["eval", "tiny.bbb.safetensors", "no-data"], 2, "no data set or folder 'no-data'"),
        (["eval", "tiny.bbb.safetensors", "DATA"], 2, "--model package.module:factory"),
        (["eval", "tiny.bbb.safetensors", "DATA", "MODEL", "-k", "0"], 2, "num_samples"),
        (["eval", "tiny.bbb.safetensors", "DATA", "MODEL", "-b", "0"], 2, "batch_size"),
        (["eval", "tiny.bbb.safetensors", "DATA", "MODEL", "--resamples", "1"], 2, "resamples"),
        (["eval", "tiny.bbb.safetensors", "DATA", "MODEL", "--device", "abacus"], 2, "'abacus'"),
        (["predict", "tiny.bbb.safetensors", "DATA", "MODEL", "-k", "0"], 2, "num_samples"),
        (["predict", "tiny.bbb.safetensors", "a.png", "MODEL"], 2, "no image file 'a.png'"),
        (["fit", "tiny.bbb.safetensors", "DATA", "MODEL", "-o", "old"], 1, "old exists"),
        (["fit", "tiny.bbb.safetensors", "DATA", "MODEL", "-o", "x", "--epochs", "0"], 2, "epochs"),
        (["fit", "tiny.bbb.safetensors", "fashion-sample", "MODEL", "-o", "x"], 2, "10 classes"),
        (["prune", "tiny.bbb.safetensors", "MODEL"], 2, "--sparsity 0.8"),
        (["prune", "tiny.bbb.safetensors", "MODEL", "--sparsity", "1"], 2, "[0, 1), got 1.0"),
        (["prune", "tiny.bbb.safetensors", "MODEL", "S", "--score", "sn"], 2, "'magnitude'"),
        (["prune", "tiny.bbb.safetensors", "MODEL", "S", "--only", "x"], 2, "matches nothing"),
        (["prune", "tiny.bbb.safetensors", "MODEL", "S", "--only", "LayerNorm"], 2, "No tensor"),
        (["prune", "tiny.bbb.safetensors", "MODEL", "S", "S"], 2, "needs --curve"),
        (["prune", "tiny.bbb.safetensors", "MODEL", "S", "--unit", "heads"], 2, "has no heads"),
        (["prune", "tiny.bbb.safetensors", "MODEL", "S", "--unit", "2:4"], 2, "leave out --spar"),
        (["prune", "tiny.bbb.safetensors", "MODEL", "S", "--data", "x"], 2, "belong to --curve"),
        (["prune", "tiny.bbb.safetensors", "MODEL", "S", "--out", "old"], 1, "old exists"),
        (["prune", "tiny.bbb.safetensors", "MODEL", "--curve"], 2, "--data DATA"),
        (["prune", "tiny.bbb.safetensors", "MODEL", "C", "--out", "x"], 2, "writes no model"),
        (["prune", "tiny.bbb.safetensors", "MODEL", "C", "--plot", "x.gif"], 2, "end in .png"),
        (["prune", "tiny.bbb.safetensors", "MODEL", "C", "--unit", "2:4"], 2, "no curve"),
        (["prune", "tiny.bbb.safetensors", "C"], 2, "--model package.module:factory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_failures(arguments: list[str], code: int, message: str) -> None:
    converted()
    data = dataset()
    Path("old").write_bytes(b"something else")
    state = models.create_model("tinyfactory:tiny").state_dict()
    state["head.weight"][0, 0] = torch.nan
    save_file(state, "nan.safetensors")
    Path("cut.safetensors").write_bytes(Path("nan.safetensors").read_bytes()[:-9])
    if "convert" in arguments:
        Path("tiny.bbb.safetensors").unlink()
    given = {
        "DATA": [data], "MODEL": ["--model", "tinyfactory:tiny"], "S": ["--sparsity", "0.5"],
        "C": ["--curve", "--data", data],
    }  # fmt: skip
    command = [word for argument in arguments for word in given.get(argument, [argument])]
    assert message in failure(*command, code=code)
    assert Path("old").read_bytes() == b"something else"


def test_a_folder_that_is_not_writable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "not writable" in failure("convert", "tinyfactory:tiny", code=1)


def test_force_overwrites() -> None:
    file = converted()
    before = file.read_bytes()
    converted("--force", "--logvar", -3)
    assert file.read_bytes() != before


def test_a_deterministic_file_is_no_model_and_a_bayesian_one_no_weights() -> None:
    file = converted()
    message = failure("convert", "tinyfactory:tiny", "--weights", file, "--out", "x", code=2)
    assert "not in the model" in message


def test_wrong_usage_is_2() -> None:
    for arguments in (["convert"], ["convert", "x", "--nonsense"], ["bake"], ["fit", "a", "b"]):
        run(*arguments, code=2)


def test_debug_shows_the_traceback() -> None:
    result = run("convert", "resnet5000", "--debug", code=2)
    assert "Traceback" in result.stderr
    assert "bayesify.errors.ModelError: " in result.stderr


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> nn.Module:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "create_model", interrupt)
    assert "Interrupted" in failure("convert", "tinyfactory:tiny", code=130)


def test_an_unforeseen_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> nn.Module:
        raise ZeroDivisionError("division by [red]zero[/]")

    monkeypatch.setattr(models, "create_model", broken)
    message = failure("convert", "tinyfactory:tiny", code=1)
    assert "ZeroDivisionError: division by [red]zero[/] Run it with --debug" in message


# -- the whole -------------------------------------------------------------------------------


def python(code: str, *path: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path)))}
    result = subprocess.run(
        # as for a console script, the present folder is not searched
        [sys.executable, "-c", f"import sys; del sys.path[0]\n{code}"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


RUN = """
import sys
from bayesify.cli.app import main
def run(*arguments):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as end:
        assert end.code == 0, end.code
"""


@pytest.mark.parametrize("arguments", [("--help",), ("convert", "--help")], ids=str)
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    shown = python(
        f"{RUN}\nrun(*{arguments!r})\n"
        "heavy = {'torch', 'numpy', 'timm', 'torchvision', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert "Usage: bayesify" in shown


def test_the_import_leaves_torchs_compilers_alone() -> None:
    python(
        "import sys, bayesify\n[getattr(bayesify, name) for name in bayesify.__all__]\n"
        "found = {'torch.utils.benchmark', 'torch.utils.cpp_extension'} & set(sys.modules)\n"
        "assert not found, found"
    )


def test_version() -> None:
    assert run("--version").stdout == f"bayesify {bayesify.__version__}\n"


def test_help_names_every_command_and_completion() -> None:
    shown = run("--help").stdout
    for word in (
        "convert",
        "inspect",
        "fit",
        "eval",
        "predict",
        "prune",
        "export",
        "report",
        "models",
        "--install-completion",
    ):
        assert word in shown
    installed = bool(metadata.entry_points(group="bayesify.recipes"))
    assert ("recipe" in shown.split()) == installed
    assert all(preset in run("convert", "--help").stdout for preset in PRESETS)


def test_a_factory_in_the_present_folder_is_found() -> None:
    Path("here_only.py").write_text(FACTORY)
    python(f"{RUN}\nrun('convert', 'here_only:tiny', '--quiet', '--dry-run')")


def test_recipes_are_found_by_their_entry_points(tmp_path: Path) -> None:
    library = tmp_path / "recipes"
    information = library / "soup-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: soup\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[bayesify.recipes]\nsoup = soup:app\n")
    (library / "soup.py").write_text(
        "import typer\napp = typer.Typer()\n"
        "@app.command()\ndef cook(pot: str): print('cooked in', pot)\n"
        "@app.command()\ndef eat(): print('eaten')\n"
    )
    shown = python(f"{RUN}\nrun('recipe', '--help')", library)
    assert "soup" in shown
    cooked = python(f"{RUN}\nrun('recipe', 'soup', 'cook', 'copper')", library)
    assert cooked == "cooked in copper\n"
    python(f"{RUN}\nrun('--help')\nassert 'soup' not in sys.modules", library)
