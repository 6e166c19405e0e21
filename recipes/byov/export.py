"""What a run leaves behind: the Bayesian encoder, and both encoders as plain timm checkpoints."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import bayesify
from bayesify import GaussianPrior, set_prior_, to_deterministic
from bayesify.metrics import knn_accuracy
from bayesify.storage import check_target, replacing

from .config import RUN_FILE, BYOVConfig, RunConfig
from .data.dataset import Source
from .evaluation.features import Reading, encoded, features
from .model import Student, build_student, encoder_spec
from .runtime.distributed import World
from .runtime.online_probe import OnlineProbe
from .teacher import Teacher


@dataclass(frozen=True)
class Results:
    """Files of a run and what its encoder is worth.

    Args:
        encoder: Bayesian student encoder, with the online probe as its classifier; None without a
            posterior.
        student: Means of the student encoder, as timm loads them.
        teacher: The teacher's encoder likewise; None of the supervised baseline.
        numbers: kNN accuracies on the test images.
    """

    encoder: Path | None
    student: Path
    teacher: Path | None
    numbers: dict[str, float]


def check_files(out: Path) -> None:
    """Whether what a run writes in the end can be written, before it begins.

    Raises:
        CheckpointError: Something other than a file is in a file's place.
    """
    files = "encoder.safetensors", "student.safetensors", "teacher.safetensors", "log.jsonl"
    for name in (*files, RUN_FILE):
        if (out / name).exists():
            check_target(out / name, overwrite=True)


def export(
    config: BYOVConfig,
    run: RunConfig,
    model: nn.Module,
    teacher: Teacher | None,
    probe: OnlineProbe | None,
    source: Source,
    reading: Reading,
    world: World,
) -> Results:
    """Write the files of a finished run and measure the encoder on the test images."""
    numbers: dict[str, float] = {}
    made = Results(
        run.out / "encoder.safetensors" if config.bayesian else None,
        run.out / "student.safetensors",
        run.out / "teacher.safetensors" if teacher is not None else None,
        numbers,
    )
    if world.first:
        model.eval()
        if made.encoder is not None:
            bayesify.save(
                bayesian_encoder(model, probe),
                made.encoder,
                spec=encoder_spec(config, source.num_classes or None),
                info={"classes": list(source.classes), "byov": config.to_json()},
                overwrite=True,
            )
        plain = to_deterministic(model) if config.bayesian else model
        _write(without_classifier(plain), made.student)
        if made.teacher is not None and teacher is not None:
            _write(without_classifier(teacher.network), made.teacher)
        if source.num_classes and source.test is not None:
            numbers |= _measure(config, run, model, source, reading)
    world.wait()
    return made


def bayesian_encoder(model: nn.Module, probe: OnlineProbe | None) -> nn.Module:
    """A copy of the student's encoder, prior N(0, I), with the online probe as its classifier.

    Where there are no labels, and so no probe, the classifier is a new one of 1,000 zeros.
    """
    if not isinstance(model, Student):
        return copy.deepcopy(model)
    encoder: Any = copy.deepcopy(model.encoder)
    set_prior_(encoder, GaussianPrior())
    device = next(encoder.parameters()).device
    encoder.reset_classifier(1000 if probe is None else probe.linear.out_features)
    encoder.to(device)
    head = encoder.get_classifier()
    with torch.no_grad():
        for name, parameter in (("weight", head.weight), ("bias", head.bias)):
            parameter.copy_(0.0 if probe is None else getattr(probe.linear, name))
    whole: nn.Module = encoder
    return whole


def without_classifier(model: nn.Module) -> nn.Module:
    """The encoder as ``timm.create_model(..., num_classes=0)`` has it."""
    if isinstance(model, Student):
        return model.encoder
    encoder: Any = copy.deepcopy(model)
    encoder.reset_classifier(0)
    whole: nn.Module = encoder
    return whole


def timm_call(config: BYOVConfig, path: Path) -> str:
    """The Python call that builds the encoder of ``path`` again."""
    arguments: dict[str, Any] = {"num_classes": 0, "in_chans": config.channels}
    if config.patch is not None:
        arguments["img_size"] = config.image_size
    arguments |= config.encoder_args
    # double quotes, so that it can stand between single ones in a shell
    shown = "".join(
        f", {name}={json.dumps(value) if isinstance(value, str) else repr(value)}"
        for name, value in arguments.items()
    )
    return f'timm.create_model("{config.encoder}"{shown}, checkpoint_path="{path}")'


def _write(encoder: nn.Module, path: Path) -> None:
    tensors: dict[str, Tensor] = {
        key: value.detach().to("cpu", copy=True).contiguous()
        for key, value in encoder.state_dict().items()
    }
    with replacing(path, overwrite=True) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def _measure(
    config: BYOVConfig, run: RunConfig, model: nn.Module, source: Source, reading: Reading
) -> dict[str, float]:
    """kNN on the test images: the bank is all training images."""

    def knn(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
        return knn_accuracy(*train, *test)

    found = {}
    if run.baselines:
        found["knn_pixels"] = knn(
            *(encoded(lambda x: x.flatten(1), source, s, reading) for s in ("train", "test"))
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            untrained = build_student(config, source.num_classes or None).to(reading.device)
        found["knn_untrained"] = knn(
            *(features(untrained, source, s, reading) for s in ("train", "test"))
        )
    found["knn_trained"] = knn(*(features(model, source, s, reading) for s in ("train", "test")))
    return found
