"""How good the predictions of ours, of the peers and of simple controls are, on CIFAR-10.

    python benchmarks/posterior.py --data cifar10.safetensors --weights WEIGHTS --ood ood.npz
        [--methods "ours, beta 0.3" ensemble] [--seeds 0 1 2] [--epochs 2] [--out FILE]
    python benchmarks/posterior.py --table

The first form measures each (method, seed) that FILE does not have yet, one JSON line each, so that
it can be interrupted; the second writes the tables of docs/posterior.md and README.md. WEIGHTS are
those of the CIFAR ResNet-20; benchmarks/cifar_resnet20.py makes the data files. ``--holdout``
measures on the last 5,000 training images, which no method trains on then, instead of the test
images. With the weights of benchmarks/cifar_proxy.py, which does not know them either, and
``--train-images`` as many as it learnt, hyperparameters are chosen so, and never on the test set.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import posterior_table
import torch
from cifar_proxy import HOLDOUT
from cifar_resnet20 import ood_images, pretrained
from paired import keep_memory
from posterior_methods import LAYOUT, METHODS, Predictor, Setup
from torch import Tensor

from bayesify.corruptions import CIFAR10_C, SEVERITIES, corrupt
from bayesify.data import InMemory, load_dataset, prepare
from bayesify.metrics import ClassificationMetrics, cross_fitted_temperature, ood_metrics
from bayesify.models import input_config
from bayesify.provenance import machine, provenance

RESULT = Path(__file__).parent / "results" / "posterior.jsonl"
TRIALS = RESULT.with_name("posterior_trials.jsonl")
SCALED = {
    "deterministic": "temperature scaling",
    "fine-tuned": "fine-tuned, temperature scaling",
    posterior_table.OURS: f"{posterior_table.OURS}, temperature scaling",
}


class Images:
    """The images that predictions are measured on, as the network takes them."""

    def __init__(self, options: argparse.Namespace, config: Any) -> None:
        self.config = config
        split = "train" if options.holdout else "test"
        data = load_dataset(options.data, split=split)
        source: Any = data.source
        stored, labels = source.images, source.labels
        if options.holdout:
            stored, labels = stored[-HOLDOUT:], labels[-HOLDOUT:]
        self.stored, self.labels = stored[: options.test_images], labels[: options.test_images]
        self.ood = ood_images(options.ood)[0].movedim(-1, 1)[: options.ood_images]
        # a subset that is the same in every run, of all classes
        chosen = np.random.default_rng(0).permutation(len(self.stored))
        self.subset = torch.from_numpy(chosen[: options.corrupted_images].copy())


class Predictions(NamedTuple):
    """Class probabilities of every set of images, on the CPU."""

    test: Tensor
    outside: Tensor
    corrupted: dict[str, list[Tensor]]


def predictions(predictor: Predictor, images: Images, setup: Setup) -> Predictions:
    def of(prepared: Tensor) -> Tensor:
        with torch.no_grad(), setup.autocast():
            batches = (x.to(setup.device, **LAYOUT) for x in prepared.split(500))
            return torch.cat([predictor(x).double().cpu() for x in batches])

    corrupted = {}
    chosen = images.stored[images.subset]
    for kind in CIFAR10_C if len(chosen) else ():
        changed = (corrupt(chosen, kind, severity, table=CIFAR10_C) for severity in SEVERITIES)
        corrupted[kind] = [of(prepare(x, images.config)) for x in changed]
    return Predictions(
        of(prepare(images.stored, images.config)),
        of(prepare(images.ood, images.config)),
        corrupted,
    )


def tempered(found: Predictions, labels: Tensor) -> Predictions:
    """The control: each test image by a temperature fitted on others, all else by their mean."""

    def logits(probs: Tensor) -> Tensor:
        return probs.clamp_min(torch.finfo(torch.float64).tiny).log()

    fitted = cross_fitted_temperature(logits(found.test), labels, 5, 0)
    temperature = float(fitted.temperatures.mean())

    def soft(probs: Tensor) -> Tensor:
        return (logits(probs) / temperature).softmax(-1)

    corrupted = {kind: [soft(p) for p in each] for kind, each in found.corrupted.items()}
    return Predictions(fitted.probs, soft(found.outside), corrupted)


def quality(probs: Tensor, labels: Tensor, resamples: int = 0) -> dict[str, Any]:
    metrics = ClassificationMetrics()
    metrics.update(probs.float(), labels)
    found = metrics.compute()
    row: dict[str, Any] = {key: found[key] for key in ("accuracy", "nll", "ece", "brier")}
    if resamples:
        ends = metrics.intervals(resamples, seed=0)
        row["intervals"] = {key: [ends[key].low, ends[key].high] for key in ends}
    return row


def stranger_score(probs: Tensor) -> Tensor:
    """1 - max probability, without the rounding of the difference."""
    return probs.scatter(1, probs.argmax(1, keepdim=True), 0.0).double().sum(1)


def measure(found: Predictions, images: Images) -> dict[str, Any]:
    """All numbers of one method."""
    labels = images.labels[images.subset]
    return {
        "test": quality(found.test, images.labels, resamples=200),
        "ood": ood_metrics(stranger_score(found.test), stranger_score(found.outside)),
        "corrupted": {k: [quality(p, labels) for p in v] for k, v in found.corrupted.items()},
    }


def runs(options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    for seed in options.seeds:
        for name in options.methods:
            if METHODS[name].seeded or seed == options.seeds[0]:
                yield name, seed


def done(path: Path, settings: dict[str, Any]) -> set[tuple[str, int]]:
    """What the file has of these settings; only a file of trials may have others."""
    if not path.exists():
        return set()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    same = set()
    # results are all of one network, also those from before it was noted; trials are of several
    noted = {} if settings["holdout"] else {"network": settings["network"]}
    for row in rows:
        used = noted | row["settings"]
        other = {k for k in settings if used.get(k) != settings[k]}
        if not other:
            same.add((row["method"], row["seed"]))
        elif not settings["holdout"]:
            raise SystemExit(f"{path} was measured with other {sorted(other)}: give another --out.")
    return same


def run(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    # on a GPU as on the CPU: float32 is float32, and a seed one result
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    train = load_dataset(options.data, split="train")
    source: Any = train.source
    last = len(train) - HOLDOUT if options.holdout else len(train)
    few = InMemory(
        source.images[:last][: options.train_images], source.labels[:last][: options.train_images]
    )
    setup = Setup(
        network=lambda dropout: pretrained(options.weights, dropout).to(**LAYOUT),
        train=replace(train, source=few),
        device=device, epochs=options.epochs, samples=options.samples, members=options.members,
        augment=options.augment, lr=options.lr, logvar_lr=options.logvar_lr,
        ivon_lr=options.ivon_lr,
        relative_std=options.relative_std, prior_std=options.prior_std, anchor=options.anchor,
        average=options.average, draws_per_step=options.draws_per_step,
        freeze_batchnorm=options.freeze_batchnorm,
        laplace_examples=options.laplace_examples, amp=options.amp,
    )  # fmt: skip
    images = Images(options, input_config(pretrained(options.weights)))
    hidden = {"network", "train", "device"}
    settings = {k: v for k, v in vars_of(setup).items() if k not in hidden} | {
        "train_images": len(few), "test_images": len(images.stored),
        "ood_images": len(images.ood), "corrupted_images": len(images.subset),
        "holdout": options.holdout, "network": digest(options.weights),
    }  # fmt: skip
    known = done(options.out, settings)
    where = machine(options.device)
    source_of_rows = {"device": options.device, "machine": where, **provenance("torch")}
    for name, seed in runs(options):
        if (name, seed) in known:
            continue
        started = time.perf_counter()
        predictor = METHODS[name].make(setup, seed)
        fit_seconds = time.perf_counter() - started
        found = predictions(predictor, images, setup)
        seconds = {"fit": fit_seconds, "predict": time.perf_counter() - started - fit_seconds}
        each = {name: found}
        if name in SCALED:
            each[SCALED[name]] = tempered(found, images.labels)
        written = [
            {
                "method": label, "seed": seed, **measure(probs, images), "seconds": seconds,
                "settings": settings, **source_of_rows,
            }
            for label, probs in each.items()
        ]  # fmt: skip
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a", encoding="utf-8") as file:  # a control and its own together
            file.write("".join(json.dumps(row) + "\n" for row in written))
        for row in written:
            shown = {k: round(v, 4) for k, v in row["test"].items() if isinstance(v, float)}
            auroc = round(row["ood"]["auroc"], 4)
            print(row["method"], seed, shown, f"OOD {auroc}",
                  {k: round(v) for k, v in row["seconds"].items()}, flush=True)  # fmt: skip


def digest(path: Path) -> str:
    """Tells one file of weights from another."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]


def width(text: str) -> float | None:
    return None if text == "none" else float(text)


def vars_of(setup: Setup) -> dict[str, Any]:
    """The fields, without a copy of the data."""
    return {name: getattr(setup, name) for name in setup.__dataclass_fields__}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="write docs/posterior.md and end")
    parser.add_argument("--data", help="CIFAR-10 as a safetensors file")
    parser.add_argument("--weights", type=Path, help="of the CIFAR ResNet-20, safetensors")
    parser.add_argument("--ood", type=Path, help="OOD images of 32 x 32 pixels, npz or safetensors")
    parser.add_argument("--out", type=Path, help=f"{RESULT.name}, or {TRIALS.name} with --holdout")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--holdout", action="store_true")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--amp", action="store_true", help="train and predict under autocast to bfloat16"
    )
    sizes = parser.add_argument_group("how much")
    sizes.add_argument("--epochs", type=int, default=2)
    sizes.add_argument("--samples", type=int, default=30, help="draws K")
    sizes.add_argument("--members", type=int, default=5, help="of the ensemble")
    sizes.add_argument("--train-images", type=int, default=50_000)
    sizes.add_argument("--test-images", type=int, default=10_000)
    sizes.add_argument("--ood-images", type=int, default=10_000)
    sizes.add_argument("--corrupted-images", type=int, default=1000, help="at each of 25 settings")
    sizes.add_argument("--laplace-examples", type=int, default=Setup.laplace_examples)
    choices = parser.add_argument_group("hyperparameters, of all that is fine-tuned")
    choices.add_argument("--augment", default=Setup.augment)
    choices.add_argument("--lr", type=float, default=Setup.lr)
    choices.add_argument("--logvar-lr", type=float, default=Setup.logvar_lr)
    choices.add_argument("--ivon-lr", type=float, default=Setup.ivon_lr)
    choices.add_argument("--relative-std", type=float, default=Setup.relative_std)
    choices.add_argument("--prior-std", type=float, default=Setup.prior_std)
    choices.add_argument(
        "--anchor", type=width, default=Setup.anchor, metavar="WIDTH",
        help="of the prior of ours around the pretrained weights, in RMS of each tensor; none: a "
        "prior around 0, of --prior-std",
    )  # fmt: skip
    choices.add_argument("--average", type=float, default=Setup.average)
    choices.add_argument("--draws-per-step", type=int, default=Setup.draws_per_step)
    choices.add_argument(
        "--freeze-batchnorm", action=argparse.BooleanOptionalAction,
        default=Setup.freeze_batchnorm,
    )  # fmt: skip
    options = parser.parse_args()
    if options.table:
        posterior_table.write(options.out or RESULT, TRIALS)
        return
    options.out = options.out or (TRIALS if options.holdout else RESULT)
    if None in (options.data, options.weights, options.ood):
        parser.error("--data, --weights and --ood are needed")
    run(options)


if __name__ == "__main__":
    keep_memory()
    main()
