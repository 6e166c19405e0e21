"""A run, opened to be measured: its networks, its data, its log, and where its results lie."""

from __future__ import annotations

import copy
import json
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayesify import ArgumentError, CheckpointError, ModelError, posteriors
from bayesify.data import InMemory
from bayesify.devices import resolve_device
from bayesify.json_numbers import finite
from bayesify.provenance import commit, device_name
from bayesify.storage import replacing

from ..config import BYOVConfig, RunConfig
from ..data.dataset import Source, in_memory
from ..data.sources import Images
from ..data.training import open_images
from ..model import Student, build_student, convert_
from ..runtime import checkpoint
from ..runtime.log import read_log
from ..runtime.monitors import initial_logvars, posterior_summary
from ..trust import check_data, check_encoder
from .features import Reading, Rows, refresh_batchnorm_

CONVERGED = 0.3
"""Below this median standard deviation of logvar within a tensor, SNR ranks as magnitude does."""

_MEMORY = 8 * 2**30  # bytes
PRIORS = {"zero": "N(0, I)", "teacher-mean": "N(mu_T, I)", "teacher": "N(mu_T, Sigma_T)"}


@dataclass(frozen=True, eq=False)
class Run:
    """What a folder of ``bayesify recipe byov train`` holds.

    Args:
        folder: The folder.
        config: What was trained.
        data: Name of its data set.
        model: The student, or the supervised baseline, on the device and in ``eval()``.
        teacher: The teacher, a :class:`Student` without a posterior; None of that baseline.
        source: Its images.
        device: Where it is measured.
        step: Optimizer steps that the newest checkpoint has seen.
        steps: Of the whole run.
        workers: Processes that read images which are not in memory.
        log: Lines of its log.
        initial_logvar: Where the logvar of each tensor started, by name.
    """

    folder: Path
    config: BYOVConfig
    data: str
    model: nn.Module = field(repr=False)
    teacher: nn.Module | None = field(repr=False)
    source: Source = field(repr=False)
    device: torch.device
    step: int
    steps: int
    workers: int
    log: list[dict[str, Any]] = field(repr=False)
    initial_logvar: dict[str, float] = field(repr=False)

    @property
    def encoder(self) -> Any:
        """The network whose features are measured."""
        return self.model.encoder if isinstance(self.model, Student) else self.model

    def facts(self) -> dict[str, Any]:
        """What every result says of its run."""
        travel = None
        if self.config.bayesian:
            summary = posterior_summary(self.model, initial_logvar=self.initial_logvar)
            travel = summary.logvar_travel
        spread = logvar_spread(self.model) if self.config.bayesian else None
        return {
            "run": label(self.config),
            "seed": self.config.seed,
            "data": Path(self.data).name,
            "step": self.step,
            "steps": self.steps,
            "logvar_travel": travel,
            "logvar_spread": spread,
            "converged": spread is None or spread >= CONVERGED,
            "test_images": len(self.source.part("test")),
            "device": device_name(self.device),
            "commit": commit(),
            "config": self.config.to_json(),
        }


def newest_of(folder: Path) -> Path:
    """The newest checkpoint in a run's folder.

    Raises:
        ArgumentError: There is none.
    """
    there = os.path.isdir(folder / "checkpoints")  # else a name may be one that no file can have
    newest = checkpoint.latest(folder / "checkpoints") if there else None
    if newest is None:
        raise ArgumentError(
            f"{folder} holds no run: there is no checkpoint in {folder / 'checkpoints'}. Give the "
            "folder that `bayesify recipe byov train --out` wrote."
        )
    return newest


def open_run(
    folder: Path,
    *,
    data: str | None = None,
    encoder: str | None = None,
    encoder_args: Mapping[str, Any] | None = None,
    device: str = "auto",
    workers: int = 0,
) -> Run:
    """Open the newest checkpoint of a run.

    Args:
        folder: What ``--out`` of the training was.
        data: Its data set, where it lies elsewhere now; a run on one of timm's needs it.
        encoder: Its encoder, where that is a factory of your own: a file does not choose which code
            runs.
        encoder_args: What that factory was called with.
        device: As :class:`RunConfig` has it.
        workers: Processes that read training images; the test images are kept in memory, for they
            are looked at hundreds of times, unless they take more than 8 GiB.

    Raises:
        ArgumentError: The folder holds no run, the data set has no test images, or the file names
            code that was not named here.
        CheckpointError: The checkpoint is damaged.
        DataError: The data cannot be read.
    """
    newest = newest_of(folder)
    saved = checkpoint.read(newest)
    checkpoint.check_run(newest, saved)
    identity = saved["identity"]
    known = {f.name for f in fields(BYOVConfig)}
    try:
        config = BYOVConfig.from_json({k: v for k, v in identity.items() if k in known})
    except (ArgumentError, TypeError, AttributeError) as error:
        raise checkpoint.KIND.damaged(newest, error) from error
    check_encoder(newest, config, encoder, encoder_args)
    here = resolve_device(device)  # one, also where torchrun started more processes
    spec = data
    if spec is None:
        spec = identity["data"]["name"]
        check_data(newest, spec)
    with torch.random.fork_rng(devices=[]):
        _check_size(newest, config, saved)
        source = _images(config, spec, here)
        plain = build_student(config, source.num_classes)
    trained = tuple(saved.get("classes") or source.classes)  # older checkpoints do not say them
    if not isinstance(plain, Student) and trained != source.classes:
        raise ArgumentError(
            f"The classifier in {newest} has the classes {', '.join(trained)}, and {spec!r} has "
            f"{', '.join(source.classes)}: give the data set that it was trained on."
        )
    teacher = None
    if saved["teacher"] is not None and isinstance(plain, Student):
        teacher = _teacher(newest, plain, saved["teacher"]).to(here).eval()
    # its patterns may be regular expressions, which could take for ever: the tensors say the same
    spread = "_logvar" if config.parameterization == "exp" else "_rho"
    left = [n for n, _ in plain.named_parameters() if n + spread not in saved["student"]]
    model = convert_(plain, replace(config, skip=tuple(left) if config.skip else ()))
    # checkpoints that do not say it are of runs with one value for all tensors
    initial_logvar = initial_logvars(model) | (saved.get("initial_logvar") or {})
    try:
        model.load_state_dict(saved["student"])
    except RuntimeError as error:  # the supervised baseline's classifier has classes of its own
        raise ArgumentError(
            f"{newest} does not fit {spec!r}, which has {source.num_classes} classes: {error}"
        ) from error
    model.to(here).eval()
    if config.bayesian:  # statistics of training saw draws
        refresh_batchnorm_(model, config, source, Reading(here, workers=workers))
    log = read_log(folder / "log.jsonl") if (folder / "log.jsonl").exists() else []
    began = next((line for line in log if line["kind"] == "start"), {})
    steps = began.get("steps", saved["step"])
    return Run(
        folder,
        config,
        spec,
        model.eval(),
        teacher,
        source,
        here,
        saved["step"],
        steps,
        workers,
        log,
        initial_logvar,
    )


def _images(config: BYOVConfig, spec: str, device: torch.device) -> Source:
    """The data set, with its test images in memory where they fit.

    Raises:
        ArgumentError: It has no labelled test images.
    """
    source = open_images(config, RunConfig(data=spec)).to(device)
    if source.test is None or not source.num_classes:
        raise ArgumentError(
            f"{spec!r} has no labelled test images, without which nothing can be measured; "
            "give a data set that has with --data."
        )
    size = len(source.test) * source.channels * source.image_size**2
    if isinstance(source.test, InMemory) or size > _MEMORY:
        return source
    return replace(source, test=in_memory(source, "test")).to(device)


def _teacher(path: Path, student: Student, saved: Mapping[str, Tensor]) -> nn.Module:
    """The teacher's network, of the same architecture.

    Raises:
        CheckpointError: The tensors are of another one.
    """
    network = copy.deepcopy(student).float()
    state = {k: v for k, v in saved.items() if k.startswith("network.")}
    try:
        network.load_state_dict({k.removeprefix("network."): v for k, v in state.items()})
    except RuntimeError as error:
        raise checkpoint.KIND.damaged(path, error) from error
    return network


def _check_size(path: Path, config: BYOVConfig, saved: Mapping[str, Any]) -> None:
    """Compare shapes with those of a network without data, before the real one takes memory."""
    classes = saved.get("classes")
    if config.objective == "supervised" and not classes:  # an older checkpoint does not say them
        return
    held = saved["student"]
    try:
        with torch.device("meta"):
            network = build_student(config, len(classes) if classes else None)
    except ModelError:  # timm 1.0.15 asks for a number of a tensor; what else is wrong comes again
        return
    other = sorted(
        k for k, v in network.state_dict().items() if k not in held or held[k].shape != v.shape
    )
    if other:
        raise CheckpointError(
            f"{path} does not fit the network that it describes: {len(other)} tensors are missing "
            f"or of another shape ({', '.join(other[:3])})."
        )


def limited(run: Run, count: int) -> Run:
    """The run with ``count`` of its test images, evenly spread; all of them if it is 0."""
    images = run.source.part("test")
    if not 0 < count < len(images):
        return run
    rows = torch.linspace(0, len(images) - 1, count).long()
    if isinstance(images, InMemory):
        here = rows.to(images.images.device)
        some: Images = InMemory(images.images[here], images.labels[here])
    else:
        some = Rows(images, rows.tolist())
    return replace(run, source=replace(run.source, test=some))


@torch.no_grad()
def logvar_spread(model: nn.Module) -> float:
    """Median over the matrices of the standard deviation of logvar within one; 0 without any."""
    found = [
        float(p.logvar.float().std(correction=0)) for p in posteriors(model) if p.mean.ndim > 1
    ]
    return statistics.median(found) if found else 0.0


def label(config: BYOVConfig) -> str:
    """How a run is called in tables: what sets it apart from the paper's."""
    c = config
    if c.objective == "supervised":
        name = "supervised BBB" if c.bayesian else "supervised"
    else:
        name = f"BYOV {PRIORS[c.prior]}" if c.bayesian else "BYOL"
    if c.bayesian:
        if c.conversion != "full":
            name += f", {c.conversion}"
        if c.skip:
            name += f", without {c.left_out}"
        if (c.beta_start, c.beta_end) != (0.0, 1.0):
            name += f", beta {c.beta_start:g}->{c.beta_end:g}"
    if c.weight_decay:
        name += f", wd {c.weight_decay:g}"
    return name


def family(config: BYOVConfig) -> str:
    """What runs have in common that differ in their seed alone."""
    return json.dumps({k: v for k, v in config.to_json().items() if k != "seed"}, sort_keys=True)


def result_path(folder: Path, name: str) -> Path:
    """The file of one measurement of a run."""
    return folder / "results" / f"{name}.json"


def stored(
    run: Run, name: str, settings: Mapping[str, Any], measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """A measurement of a run, taken from its file if that has the same step and settings.

    Args:
        run: The run.
        name: Of the measurement, and of its file.
        settings: What its numbers depend on beside the run.
        measure: Makes it.
    """
    path = result_path(run.folder, name)
    wanted = {**settings, "data": Path(run.data).name}
    if path.exists():
        known: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if known["run"]["step"] == run.step and known["settings"] == wanted:
            return known
    made = {"measurement": name, "run": run.facts(), "settings": wanted, "numbers": measure()}
    write_json(path, made)
    kept: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return kept


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a result whole or not at all; what is not finite, which JSON lacks, becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(finite(_plain(value)), allow_nan=False) + "\n", "utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value
