"""Damaged files of every kind that bayesify reads, through the functions and commands that do."""

from __future__ import annotations

import io
import json
import os
import random
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import bayesify
from bayesify import BBBConfig, GaussianPrior, ScaleMixturePrior, create_model, storage
from bayesify.data import load_dataset
from bayesify.training import fit
from recipes.byov.config import BYOVConfig, RunConfig
from recipes.byov.data.sources import open_images
from recipes.byov.evaluation.runs import open_run
from recipes.byov.train import train
from recipes.byov.train_log import Watcher

from . import mutations
from .section import FAULT, Section, Trial, judged

CANARY = """
from pathlib import Path
Path({marker!r}).touch()
import torch

def run(*arguments, **named):
    return torch.nn.Linear(2, 1)

weight = run
"""
DAMAGE = Callable[[bytes, random.Random], bytes]


class Kind(NamedTuple):
    """One kind of file: a whole one, how it is damaged, and what opens it."""

    path: Path
    damage: DAMAGE
    open: Callable[[Path], object]
    takes_whole: bool = True


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.head(self.embed(x).mean(1))
        return hidden


def _net() -> Any:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 3))


def _parts() -> Any:
    return nn.ModuleDict({"first": _net(), "second": _net(), "head": nn.Linear(3, 2)})


def _state(model: nn.Module) -> list[Any]:
    """All of a model that a failed load may not change."""
    found: list[Any] = []
    for name, module in model.named_modules():
        found.append((name, type(module), list(module.__dict__), list(module._forward_hooks)))
        found.append([list(d) for d in (module._parameters, module._buffers)])
    return found


def _into(build: Callable[[], nn.Module]) -> Callable[[Path], object]:
    """Reads a file in all ways, into a model that must be left as it was if that fails."""

    def read(path: Path) -> None:
        storage.describe(storage.read_header(path))
        storage.read_stats(path)
        for model in (build(), bayesify.to_bbb(build())):
            kept, values = _state(model), {k: v.clone() for k, v in model.state_dict().items()}
            try:
                storage.load(path, model)
            except bayesify.BayesifyError:
                same = all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
                if _state(model) != kept or not same:
                    raise AssertionError("a failed load has changed the model") from None
                raise
            bayesify.kl_divergence(model)
            break

    return read


def _by_name(path: Path) -> None:
    storage.describe(storage.read_header(path))
    storage.load(path)


def _bayesian_files(folder: Path) -> dict[str, Kind]:
    mixture, initial = ScaleMixturePrior(), GaussianPrior(0.3, mean="initial", relative=True)
    plain: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
        "plain": (_net, {}),
        "tied": (Tied, {}),
        "prior means": (_net, {"prior": initial}),
        "mixture": (_net, {"prior": mixture}),
        "softplus": (_net, {"config": BBBConfig(parameterization="softplus")}),
        "estimators": (_net, {"estimator": {"0": "flipout", "3": "local"}}),
        "partial": (_net, {"skip": ["BatchNorm2d", "re:bias$"], "initial_std": 0.1}),
    }
    models = {name: (build, bayesify.to_bbb(build(), **a)) for name, (build, a) in plain.items()}
    models["pruned"] = _net, bayesify.prune_(bayesify.to_bbb(_net()), 0.5)
    parts = _parts()
    for part, options in (("first", {"skip": "1"}), ("head", {"prior": mixture})):
        bayesify.to_bbb_(parts[part], **options)
    models["several conversions"] = _parts, parts

    kinds = {}
    for name, (build, model) in models.items():
        path = folder / f"{name}.safetensors"
        storage.save(model, path, info={"classes": ["a", "b", "c"]})
        kinds[name] = Kind(path, _tensors("bayesify"), _into(build))
    for name in ("test_resnet", "test_vit", "torchvision:squeezenet1_1"):
        path = folder / f"{name.replace(':', '-')}.safetensors"
        model = create_model(name, num_classes=4, img_size=None if ":" in name else 32)
        storage.save(bayesify.to_bbb(model), path)
        kinds[f"named, {name}"] = Kind(path, _tensors("bayesify"), _by_name)
    return kinds


def _tensors(key: str | None) -> DAMAGE:
    return lambda data, rng: mutations.safetensors(data, key, rng)


def _archive(data: bytes, rng: random.Random) -> bytes:
    """Damage of a zip: of its bytes, or of a member that is lost, renamed or damaged by itself."""
    if rng.random() < 0.5:
        return mutations.bytes_(data, rng)
    with io.BytesIO() as file:
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
            chosen = rng.choice(old.namelist())
            for name in old.namelist():
                content = old.read(name)
                if name == chosen:
                    way = rng.randrange(3)
                    if way == 0:
                        continue
                    if way == 1:
                        name = rng.choice(old.namelist()) + rng.choice(("", ".old"))
                    else:
                        content = mutations.bytes_(content, rng)
                new.writestr(name, content)
        return file.getvalue()


def _lines(data: bytes, rng: random.Random) -> bytes:
    """Damage of a file of JSON lines."""
    if rng.random() < 0.3:
        return mutations.bytes_(data, rng)
    lines = data.decode().splitlines()
    at = rng.randrange(len(lines))
    lines[at] = mutations.dumped(mutations.json_(json.loads(lines[at]), rng))
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def _weights(folder: Path) -> dict[str, Kind]:
    state = create_model("test_resnet", num_classes=4).state_dict()
    save_file(state, folder / "weights.safetensors")
    torch.save(state, folder / "weights.pt")
    program = folder / "program.pt2"
    bayesify.export_torch(bayesify.to_bbb(_net()).eval(), program, torch.zeros(1, 1, 4, 4))

    def weights(path: Path) -> None:
        create_model("test_resnet", num_classes=4, weights=path)

    def anything(path: Path) -> None:
        create_model("test_resnet", num_classes=4, weights=path)
        storage.load(path, _net())

    return {
        "weights": Kind(folder / "weights.safetensors", _tensors(None), weights),
        "weights of torch": Kind(folder / "weights.pt", _archive, weights),
        "program": Kind(program, _archive, anything, takes_whole=False),
    }


def _data(folder: Path) -> dict[str, Kind]:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (24, 8, 8, 1), dtype=np.uint8))
    labels = torch.arange(24) % 3
    whole = {"images": images, "labels": labels}
    save_file(whole | {"test_" + k: v.clone() for k, v in whole.items()}, folder / "d.safetensors")
    np.savez_compressed(folder / "d.npz", images=images.numpy(), labels=labels.numpy())
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        for number in range(6):
            with io.BytesIO() as file:
                Image.fromarray(images[number, :, :, 0].numpy()).save(file, "PNG")
                for name, content in ((f"{number}.png", file.getvalue()), (f"{number}.cls", b"1")):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))

    def dataset(path: Path) -> None:
        load_dataset(str(path), split="train").read(0)
        load_dataset(str(path), split="test").read(0)

    def shards(path: Path) -> None:
        found = open_images(f"wds:{path.parent}")[0]
        for number in range(len(found)):
            found.read(number)

    return {
        "data": Kind(folder / "d.safetensors", _tensors(None), dataset),
        "npz": Kind(folder / "d.npz", _archive, lambda path: open_images(str(path))),
        "shard": Kind(folder / "train-0.tar", mutations.bytes_, shards),
    }


class _Ended(Exception):
    pass


def _resume(folder: Path) -> dict[str, Kind]:
    generator = torch.Generator().manual_seed(0)
    points = TensorDataset(torch.randn(12, 2, generator=generator), torch.arange(12) % 3)

    def run(path: Path, resume: bool, steps: int | None) -> None:
        def look(progress: Any) -> None:
            if steps is not None and progress.step >= steps:
                raise _Ended

        torch.manual_seed(0)
        model = bayesify.to_bbb(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))
        fit(
            model, points, epochs=2, batch_size=4, lr=1e-3, checkpoint=path, resume=resume,
            average=0.9, holdout=0.25, on_step=look,
        )  # fmt: skip

    path = folder / "fit.state"
    try:
        run(path, False, 4)
    except _Ended:
        pass
    if not path.exists():
        raise RuntimeError("the fit has left no state")
    return {"resume": Kind(path, _tensors("bayesify.state"), lambda p: run(p, True, None))}


def _run_folder(folder: Path) -> dict[str, Kind]:
    save_file(
        {
            f"{split}{key}": value
            for split in ("", "test_")
            for key, value in (
                ("images", torch.randint(0, 256, (32, 14, 14, 1)).to(torch.uint8)),
                ("labels", torch.arange(32) % 2),
            )
        },
        folder / "small.safetensors",
    )
    arguments = {"patch_size": 7, "embed_dim": 8, "depth": 1, "num_heads": 2}
    config = BYOVConfig(
        encoder="vit_tiny_patch16_224", encoder_args=arguments, image_size=14, channels=1,
        augmentation="cifar", projector_hidden=8, projector_out=4, batch_size=8, epochs=1,
        warmup_epochs=0.0,
    )  # fmt: skip
    run = RunConfig(
        data=str(folder / "small.safetensors"), out=folder / "run", device="cpu", log_every=1,
        monitor_images=8, stop_on_collapse=False, eval_every=0,
    )  # fmt: skip
    train(config, run, watcher=Watcher(log=lambda *_: None))
    [newest] = (folder / "run" / "checkpoints").glob("*.safetensors")

    def measure(path: Path) -> None:
        open_run(path.parent.parent, device="cpu")

    def from_log(path: Path) -> None:
        open_run(path.parent, device="cpu")

    return {
        "run": Kind(newest, _tensors("bayesify.state"), measure),
        "log of a run": Kind(folder / "run" / "log.jsonl", _lines, from_log),
    }


def _prepare(folder: Path) -> Trial:
    library = folder / "library"
    library.mkdir()
    marker = folder / "executed"
    (library / "canary.py").write_text(CANARY.format(marker=str(marker)))
    sys.path.insert(0, str(library))
    os.chdir(folder)  # what a file names relative to here is found
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    kinds: dict[str, Kind] = {}
    for make in (_bayesian_files, _weights, _data, _resume, _run_folder):
        kinds |= make(folder)
    names = list(kinds)
    whole = {name: kind.path.read_bytes() for name, kind in kinds.items()}

    def trial(index: int) -> str:
        rng = random.Random(f"file {index}")
        name = names[index % len(names)]
        kind = kinds[name]
        undamaged = index < len(names)
        kind.path.write_bytes(whole[name] if undamaged else kind.damage(whole[name], rng))
        try:
            outcome = judged(lambda: kind.open(kind.path))
        finally:
            kind.path.write_bytes(whole[name])
        if marker.exists():
            marker.unlink()
            outcome = f"{FAULT}: executed what the file names"
        elif undamaged and (outcome == "taken") != kind.takes_whole:
            outcome = f"{FAULT}: the undamaged file is {outcome}"
        return f"{outcome} [{name}]" if outcome.startswith(FAULT) else outcome

    return trial


FILES = Section(
    "files",
    "a file of one of 21 kinds, with damaged bytes, JSON or tables of tensors, is opened",
    share=2_000,
    full=20_000,
    prepare=_prepare,
)
