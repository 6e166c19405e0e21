"""cli/fit.py and the OOD data of cli/evaluate.py, by the commands."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

import bayesify
from bayesify import models, training
from bayesify.cli.app import app
from bayesify.data import load_dataset
from bayesify.models import InputConfig
from bayesify.storage import load, read_header

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FACTORY = """
from torch import nn


def net():
    return nn.Sequential(nn.Conv2d(3, 6, 4), nn.Flatten(), nn.Linear(6, 3))
"""
MODEL = ("--model", "fitfactory:net")
CONFIG = InputConfig((3, 4, 4), (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with a converted model, a data set and OOD images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("fitfactory.py").write_text(FACTORY)
    labels = torch.arange(40) % 3
    images = torch.randint(0, 60, (40, 4, 4, 3)) + 70 * labels.view(-1, 1, 1, 1)
    tensors = {"images": images.to(torch.uint8), "labels": labels}
    save_file(
        {**tensors, **{f"test_{k}": v[:30].clone() for k, v in tensors.items()}}, "d.safetensors"
    )
    others = torch.randint(0, 256, (25, 4, 4, 3)).to(torch.uint8)
    save_file({"images": others, "labels": torch.arange(25) % 2}, "s.safetensors")
    run("convert", "fitfactory:net", "--img-size", 4, "--out", "net", "--quiet", "--logvar", -5)
    yield
    sys.modules.pop("fitfactory", None)


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


def fit(*arguments: object, code: int = 0) -> Result:
    return run("fit", "net", "d.safetensors", *MODEL, "-b", 10, *arguments, code=code)


def words(result: Result) -> str:
    return " ".join(result.stderr.replace("│", " ").split())


def loaded(file: str) -> Any:
    return load(file, model=models.create_model("fitfactory:net"))


def test_every_option_reaches_the_fit() -> None:
    shown = fit(
        "--epochs", 2, "--lr", 0.01, "--logvar-lr", 0.2, "--kl-weight", 0.3, "--kl-warmup", 0.5,
        "--kl-shape", "cosine", "--warmup", 0.2, "--weight-decay", 0.1, "--max-grad-norm", "inf",
        "--average", 0.5, "--draws-per-step", 2, "--accumulate", 2, "--augment", "flip-crop",
        "--holdout", 0.25, "--patience", 2, "--seed", 4, "--out", "a",
    ).stdout  # fmt: skip
    model = loaded("net")
    result = training.fit(
        model, load_dataset("d.safetensors", split="train"), batch_size=10, epochs=2, lr=0.01,
        logvar_lr=0.2, kl_weight=0.3, kl_warmup=0.5, kl_shape="cosine", warmup=0.2,
        weight_decay=0.1, max_grad_norm=float("inf"), average=0.5, draws_per_step=2, accumulate=2,
        augment="flip-crop", holdout=0.25, patience=2, seed=4, model_config=CONFIG,
    )  # fmt: skip
    fitted = loaded("a").state_dict()
    assert all(torch.equal(v, fitted[k]) for k, v in model.state_dict().items())
    for loss, held in zip(result.losses, result.holdout_losses, strict=True):
        assert f"{loss:.3g}" in shown
        assert f"{held:.3g}" in shown
    assert "kept" in shown
    assert result.logvars is not None
    assert f"Log variances moved by {result.logvars.mean:.3g} on average" in shown
    assert f"add up to {result.logvars.bound:.3g}" in shown
    info = read_header(Path("a"))["info"]["fit"]
    assert info["max_grad_norm"] is None
    assert info["logvars"]["moved"] == result.logvars.moved
    assert not Path("a.resume").exists()


def test_interrupted_and_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = training.fit

    def interrupted(*args: Any, on_step: Any, **kwargs: Any) -> Any:
        def step(progress: training.Progress) -> None:
            on_step(progress)
            if progress.step == 5:
                os.kill(os.getpid(), signal.SIGINT)

        return original(*args, on_step=step, **kwargs)

    fit("--epochs", 3, "--out", "whole")
    with monkeypatch.context() as patched:
        patched.setattr(training, "fit", interrupted)
        message = words(fit("--epochs", 3, "--out", "a", code=130))
    assert "Interrupted after step 5 of 12" in message
    assert "--resume" in message
    assert not Path("a").exists()
    assert "go on with it" in words(fit("--epochs", 3, "--out", "a", code=1))
    assert "epochs=4 (began with 3)" in words(fit("--epochs", 4, "-o", "a", "--resume", code=2))
    fit("--epochs", 3, "--out", "a", "--resume")
    assert Path("a").read_bytes() == Path("whole").read_bytes()
    assert not Path("a.resume").exists()


def test_laplace_by_the_command() -> None:
    shown = fit(
        "--method", "laplace-diag", "--fisher", "exact", "--temperature", 0.5, "--out", "a",
        "--max-examples", 12, "--prior-precision", "marglik",
    ).stdout  # fmt: skip
    model = loaded("net")
    result = bayesify.fit_laplace_(
        model, load_dataset("d.safetensors", split="train"), batch_size=10, fisher="exact",
        temperature=0.5, max_examples=12, prior_precision="marglik", model_config=CONFIG,
    )  # fmt: skip
    fitted = loaded("a").state_dict()
    assert all(torch.equal(v, fitted[k]) for k, v in model.state_dict().items())
    assert "Fisher information of 12 images for 40" in shown
    assert f"{result.prior_precision:.4g}" in shown
    assert {str(p.prior) for p in bayesify.posteriors(loaded("a"))} == {
        str(p.prior) for p in bayesify.posteriors(model)
    }
    shown = fit("--method", "laplace-diag", "--augment", "flip-crop", "-o", "b").stdout
    assert "held-out NLL" in shown
    numbers = json.loads(
        fit("--method", "laplace-diag", "--prior-precision", 3, "-o", "c", "--json").stdout
    )
    assert numbers["prior_precision"] == 3.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "laplace-diag", "--epochs", "3"], "--epochs does nothing with --method"),
        (["--fisher", "exact"], "--fisher does nothing with --method vi"),
        (["--method", "laplace-diag", "--prior-precision", "x"], "'holdout' or 'marglik'"),
        (["--patience", "1"], "held-out training examples"),
        (["--resume"], "nothing to resume"),
    ],
)
def test_wrong_options(arguments: list[str], message: str) -> None:
    code = 1 if arguments == ["--resume"] else 2
    assert message in words(fit(*arguments, "--out", "a", code=code))
    assert not Path("a").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_cut_short_is_one_clear_error(workers: int) -> None:
    for name in ("a", "b", "c"):
        Path("tree", name).mkdir(parents=True)
        for i in range(3):  # of different sizes and modes
            mode = ("RGB", "L", "RGBA")[i]
            Image.new(mode, (4 + i, 9 - i)).save(Path("tree", name, f"{i}.png"))
    run("fit", "net", "tree", *MODEL, "-b", 3, "--epochs", 1, "--out", "a", "--quiet")
    whole = Path("tree/b/1.png").read_bytes()
    Path("tree/b/1.png").write_bytes(whole[: len(whole) // 2])
    command = ("fit", "net", "tree", *MODEL, "-b", 3, "--epochs", 1, "--out", "b")
    message = words(run(*command, "--workers", workers, code=2))
    assert "tree/b/1.png cannot be read" in message
    assert "Traceback" not in message


def test_ood_images_are_shown_for_each_row() -> None:
    command = ("eval", "net", "d.safetensors", *MODEL, "-k", 3, "--ood", "s.safetensors")
    document = json.loads(run(*command, "--json").stdout)
    expected = training.evaluate(
        loaded("net"), load_dataset("d.safetensors", split="test"), num_samples=3, control=True,
        ood=load_dataset("s.safetensors", split="test"), model_config=CONFIG,
    )  # fmt: skip
    assert [row["ood"] for row in document["rows"]] == [row.ood for row in expected]
    assert (document["images"], document["ood_images"]) == (30, 25)
    shown = run(*command).stdout
    assert max(map(len, shown.splitlines())) <= 80
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    for row in expected:
        assert row.ood is not None
        for score, found in row.ood.items():
            numbers = " ".join(
                f"{found[key]:.4f}" for key in ("auroc", "aupr_out", "aupr_in", "fpr95")
            )
            assert f"{row.prediction} {score} {numbers}" in lines
    assert "Out of distribution: 25 images" in shown


def test_the_settings_that_a_fit_writes_repeat_it() -> None:
    shown = fit("--epochs", 2, "--lr", 0.01, "--holdout", 0.25, "--out", "a.bbb.safetensors").stdout
    assert "Wrote a.bbb.safetensors, and its settings in a.bbb.toml." in " ".join(shown.split())
    config = ("fit", "--config", "a.bbb.toml", *MODEL)
    run(*config, "--out", "b")
    assert Path("b").read_bytes() == Path("a.bbb.safetensors").read_bytes()
    assert tomllib.loads(Path("b.toml").read_text())["fit"]["lr"] == 0.01
    # options beat --set, which beats the file
    run(*config, "-o", "c", "--set", "fit.epochs=3", "--set", "fit.lr=0.02", "--lr", 0.03)
    asked = read_header(Path("c"))["info"]["fit"]
    assert (asked["epochs"], asked["lr"], asked["holdout"]) == (3, 0.03, 0.25)
    before = Path("a.bbb.safetensors").read_bytes()
    assert "--force to replace it" in words(run(*config, "-o", "a.bbb.safetensors", code=2))
    run(*config, "--force")
    assert Path("a.bbb.safetensors").read_bytes() == before
    # a part of the settings will do
    Path("part.toml").write_text('[run]\nmethod = "laplace-diag"\n[fit]\nprior_precision = 3\n')
    numbers = json.loads(fit("--config", "part.toml", "-o", "d", "--json").stdout)
    assert (numbers["prior_precision"], numbers["config"]) == (3.0, "d.toml")
    again = json.loads(run("fit", "--config", "d.toml", *MODEL, "-o", "e", "--json").stdout)
    assert again["mean_std"] == numbers["mean_std"]


def test_a_config_that_cannot_be_taken() -> None:
    def refused(text: str, *arguments: object) -> str:
        Path("a.toml").write_text(text)
        message = words(fit("--config", "a.toml", "-o", "x", *arguments, code=2))
        assert not Path("x").exists()
        assert not Path("x.toml").exists()
        return message

    assert "fit.epoch (the nearest is fit.epochs)" in refused("[fit]\nepoch = 3")
    assert "fit: epochs must be a whole number above 0, got 1.5" in refused("[fit]\nepochs = 1.5")
    assert "fit.lr does nothing with --method laplace-diag" in refused(
        "[fit]\nlr = 1", "--method", "laplace-diag"
    )
    # a file does not choose which code runs
    Path("a.toml").write_text('[run]\nfile = "net"\ndata = "timm:torch/cifar10@x"\nout = "x"')
    message = words(run("fit", "--config", "a.toml", *MODEL, code=2))
    assert "a.toml names the data set 'timm:torch/cifar10@x'" in message
    assert "a file does not choose which code runs" in message
    message = words(run("fit", "--config", "a.toml", "net", "timm:torch/cifar10@x", *MODEL, code=2))
    assert "does not choose" not in message
    Path("a.toml").write_text('[run]\nmodel = "fitfactory:net"')
    assert "there is no setting run.model" in words(run("fit", "--config", "a.toml", code=2))
    assert "--resume do nothing with --method laplace-diag" in refused(
        "", "--method", "laplace-diag", "--resume"
    )
