"""What a run leaves behind is taken by timm and by the other commands."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from typer.testing import CliRunner

import bayesify
from bayesify.cli.app import app
from bayesify.data import load_dataset
from byov_small import CONFIG, small_data, small_run
from recipes.byov import export, train
from recipes.byov.config import BYOVConfig
from recipes.byov.data.batches import eval_batches
from recipes.byov.data.training import open_images
from recipes.byov.model import build_encoder, build_student
from recipes.byov.presets import PRESETS

IMAGES = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, nn.Module]]:
    """A finished run, and the networks as they were in memory at its end."""
    folder = tmp_path_factory.mktemp("byov")
    kept: dict[str, nn.Module] = {}
    with pytest.MonkeyPatch.context() as patch:

        def keep(config: Any, run: Any, model: Any, teacher: Any, *rest: Any) -> export.Results:
            kept["student"] = copy.deepcopy(model.encoder).eval()
            kept["teacher"] = copy.deepcopy(teacher.network.encoder).eval()
            return export.export(config, run, model, teacher, *rest)

        patch.setattr(train, "export", keep)
        train.train(replace(CONFIG, prior="teacher", epochs=2), small_run(folder))
    return folder, kept


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_timm_loads_the_means_bit_for_bit(
    finished: tuple[Path, dict[str, nn.Module]], name: str
) -> None:
    folder, kept = finished
    call = export.timm_call(CONFIG, folder / "run" / f"{name}.safetensors")
    model = eval(call, {"timm": timm}).eval()
    with torch.no_grad():
        assert torch.equal(model(IMAGES), kept[name](IMAGES))
    assert "'" not in call  # the command line prints it between these
    assert call.startswith('timm.create_model("vit_tiny_patch16_224", num_classes=0, in_chans=1')


def test_bayesian_encoder_has_the_student_and_the_probe(
    finished: tuple[Path, dict[str, nn.Module]],
) -> None:
    folder, kept = finished
    model: Any = bayesify.load(folder / "run" / "encoder.safetensors")
    student: Any = kept["student"]
    with torch.no_grad():
        assert torch.equal(model.forward_features(IMAGES), student.forward_features(IMAGES))
        logits = model(IMAGES)
    assert logits.shape == (4, 2)
    assert not logits[:, :1].equal(torch.zeros(4, 1))
    saved = {p.name: p.logvar for p in bayesify.posteriors(model)}
    for posterior in bayesify.posteriors(student):
        assert torch.equal(saved[posterior.name], posterior.logvar)
    assert set(saved) - {p.name for p in bayesify.posteriors(student)} == {
        "head.weight", "head.bias",
    }  # fmt: skip
    assert all(isinstance(p.prior, bayesify.GaussianPrior) for p in bayesify.posteriors(model))


def test_the_other_commands_take_the_file(
    finished: tuple[Path, dict[str, nn.Module]], tmp_path: Path
) -> None:
    folder, _ = finished
    file, data = str(folder / "run" / "encoder.safetensors"), str(folder / "small.safetensors")
    fitted = str(tmp_path / "fitted.bbb.safetensors")
    for command in (
        ["eval", file, data, "--num-samples", "2"],
        ["fit", file, data, "--out", fitted, "--epochs", "1"],
        ["inspect", file],
        ["prune", file, "--sparsity", "0.5", "--out", str(tmp_path / "pruned.bbb.safetensors")],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output


def test_evaluation_sees_the_images_of_training(tmp_path: Path) -> None:
    """The file says how images are prepared, and the recipe prepared them so."""
    source = open_images(CONFIG, small_run(tmp_path))
    shown = bayesify.input_config(build_encoder(CONFIG, None), img_size=28, in_chans=1)
    [(ours, _)] = eval_batches(source, "train", batch_size=64)
    image, _ = load_dataset(str(small_data(tmp_path)), split="train").dataset(shown)[5]
    torch.testing.assert_close(ours[5], image)


def test_supervised_twin_is_exported_with_its_own_classifier(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    outcome = train.train(replace(CONFIG, objective="supervised"), run)
    assert outcome.results is not None
    assert outcome.results.teacher is None
    assert outcome.results.encoder is not None
    model = bayesify.load(outcome.results.encoder)
    test = load_dataset(run.data, split="test")
    shown = bayesify.input_config(model, img_size=28, in_chans=1)
    rows = bayesify.evaluate(model, test, num_samples=2, model_config=shown)
    assert rows[0].accuracy > 0.6


@pytest.mark.parametrize("name", [n for n in PRESETS if ":" not in PRESETS[n].config.encoder])
def test_timm_call_of_every_preset_builds_the_encoder(name: str) -> None:
    config: BYOVConfig = PRESETS[name].config
    call = export.timm_call(config, Path("x")).replace(', checkpoint_path="x"', "")
    built: nn.Module = eval(call, {"timm": timm})
    student: Any = build_student(config, 10)
    assert {k: v.shape for k, v in built.state_dict().items()} == {
        k: v.shape for k, v in student.encoder.state_dict().items()
    }
