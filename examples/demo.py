"""Convert, fit, evaluate, save, load and predict on real images: `make demo`, minutes on a CPU.

A small network is fitted to 6,000 images of Fashion-MNIST twice from the same random weights, for
the same number of epochs: as it is, and after `bayesify.to_bbb`. The 2,000 test images then say
what the posterior is worth. The settings of both, such as the weight decay of the one and the KL
weight of the other, were chosen with `--holdout`: on training images that were not fitted.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

import bayesify
from bayesify.cli import render
from bayesify.data import load_dataset
from bayesify.inference import ProbabilitySummary
from bayesify.models import ModelSpec, input_config
from bayesify.provenance import machine, provenance
from bayesify.training import Evaluation, FitResult

SPEC = ModelSpec("test_efficientnet_gn", num_classes=10, in_chans=1, img_size=28)
EPOCHS = 20
COMMON: dict[str, Any] = {"batch_size": 100, "lr": 6e-3}
DETERMINISTIC: dict[str, Any] = {**COMMON, "weight_decay": 1.0}
BAYESIAN: dict[str, Any] = {**COMMON, "kl_weight": 0.05, "kl_warmup": 0.2}
PRIOR = bayesify.GaussianPrior(1.0, relative=True)
RELATIVE_STD = 0.02
NUM_SAMPLES = 20


class Data(NamedTuple):
    """What is fitted and what is measured; ``images`` and ``labels`` are those of ``test``."""

    train: Subset[Any]
    test: Subset[Any]
    images: Tensor  # uint8, as they are stored
    labels: Tensor
    classes: tuple[str, ...]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the demo and return what it writes to result.json."""
    options = parse(arguments)
    torch.set_num_threads(1)  # the tensors are small: threads would wait for each other
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    data = load(options.holdout)
    render.text(f"Fashion-MNIST: fit to {len(data.train)} images, measured on {len(data.test)}.")

    network = new_network(options.seed)
    fit("Deterministic network", network, data.train, options.epochs, options.seed, DETERMINISTIC)
    rows = bayesify.evaluate(network, data.test)

    model = bayesify.to_bbb(
        new_network(options.seed),
        prior=PRIOR,
        initial_std=bayesify.RelativeStd(RELATIVE_STD),
    )
    fitted = fit("Bayesian network", model, data.train, options.epochs, options.seed, BAYESIAN)
    with render.progress("Measuring") as bar:
        rows += bayesify.evaluate(model, data.test, num_samples=NUM_SAMPLES, on_step=bar.to)
    print_table(rows)

    file, picture = out / "model.bbb.safetensors", out / "demo.png"
    summary = save_load_predict(model, data.test, file)
    uncertain = mistakes_in_the_least_certain_tenth(summary, data.labels)
    render.text(f"The least certain tenth of the images holds {uncertain:.0%} of its mistakes.")
    draw(data, summary, picture)

    record = {
        "what": "examples/demo.py" + (" --holdout" if options.holdout else ""),
        "rows": [asdict(row) for row in rows],
        "mistakes_in_the_least_certain_tenth": uncertain,
        "final_loss": fitted.losses[-1],
        "final_kl": fitted.kl[-1],
        "kl_scale": fitted.kl_scale,
        "noise_budget": fitted.noise_budget,
        "settings": settings(options.seed, options.epochs),
        "seconds": round(time.perf_counter() - started, 1),
        "machine": machine(),
        **provenance("torch", "timm", "numpy"),
    }  # fmt: skip
    result = out / "result.json"
    result.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    render.text(f"Picture: {picture}   numbers: {result}   next: bayesify inspect {file}")
    return record


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and draws")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="passes over the data")
    parser.add_argument("--holdout", action="store_true", help="measure on training images")
    return parser.parse_args(arguments)


def settings(seed: int, epochs: int) -> dict[str, Any]:
    return {
        "model": SPEC.to_json(),
        "seed": seed,
        "epochs": epochs,
        "deterministic": DETERMINISTIC,
        "bayesian": BAYESIAN,
        "prior": str(PRIOR),
        "relative_std": RELATIVE_STD,
    }


def new_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return SPEC.build()


def load(holdout: bool) -> Data:
    config = input_config(SPEC.build(), img_size=SPEC.img_size, in_chans=SPEC.in_chans)
    train = load_dataset("fashion-sample", split="train")
    if holdout:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
        test, measured, fitted = train, order[:1000], order[1000:]
    else:
        test = load_dataset("fashion-sample", split="test")
        measured, fitted = list(range(len(test))), list(range(len(train)))
    images, labels = zip(*(test.read(index) for index in measured), strict=True)
    return Data(
        Subset(train.dataset(config), fitted),
        Subset(test.dataset(config), measured),
        torch.stack(images),
        torch.tensor(labels),
        train.classes,
    )


def fit(
    what: str,
    model: nn.Module,
    train: Dataset[Any],
    epochs: int,
    seed: int,
    settings: dict[str, Any],
) -> FitResult:
    with render.progress(what) as bar:
        bar.say(f"\n{what}: {epochs} epochs")
        result = bayesify.fit(
            model,
            train,
            epochs=epochs,
            seed=seed,
            on_start=bar.say,
            on_step=lambda p: bar.to(p.step, p.steps, f"epoch {p.epoch + 1} loss {p.loss:.3f}"),
            **settings,
        )
        bar.say(f"loss of the last epoch {result.losses[-1]:.3f}, {result.seconds:.0f} s")
    return result


def print_table(rows: list[Evaluation]) -> None:
    columns = ("prediction", "draws", "accuracy", "NLL", "ECE", "Brier")
    cells = [
        (
            row.prediction,
            row.num_samples,
            f"{row.accuracy:.2%}",
            f"{row.nll:.4f}",
            f"{row.ece:.4f}",
            f"{row.brier:.4f}",
        )
        for row in rows
    ]
    render.table(columns, cells)
    before, average = rows[0].nll, rows[-1].nll
    verdict = "beats" if average < before else "does NOT beat"
    render.text(
        f"The MC average {verdict} the deterministic network: NLL {average:.3f} against "
        f"{before:.3f} nats."
    )


def save_load_predict(model: nn.Module, test: Dataset[Any], file: Path) -> ProbabilitySummary:
    """Predict with what the file gives back, which must be what the model itself predicts."""
    bayesify.save(model, file, spec=SPEC, overwrite=True)
    loaded = bayesify.load(file)
    parts = []
    with render.progress("Predicting") as bar:
        batches = DataLoader(test, batch_size=250)
        for done, (inputs, _) in enumerate(batches, 1):
            parts.append(
                bayesify.predict(
                    loaded, inputs, num_samples=NUM_SAMPLES, seed=0, reduce="probabilities"
                )
            )
            bar.to(done, len(batches))
    own = bayesify.predict(model, inputs, num_samples=NUM_SAMPLES, seed=0, reduce="probabilities")
    if not torch.equal(own.mean, parts[-1].mean):
        raise SystemExit(f"{file} does not predict as the model that was saved in it.")
    render.text(f"Saved in {file} and loaded: the same predictions, bit for bit.")
    return ProbabilitySummary(*(torch.cat(values) for values in zip(*parts, strict=True)))


def mistakes_in_the_least_certain_tenth(summary: ProbabilitySummary, labels: Tensor) -> float:
    wrong = summary.mean.argmax(1) != labels
    uncertain = summary.predictive_entropy.argsort(descending=True)[: len(labels) // 10]
    return (wrong[uncertain].sum() / wrong.sum().clamp_min(1)).item()


def draw(data: Data, summary: ProbabilitySummary, file: Path) -> None:
    """Draw the images of least and most uncertainty, no two of one predicted class in a row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    order = summary.predictive_entropy.argsort().tolist()
    figure = plt.figure(figsize=(10, 8), layout="constrained")
    titles = (
        "Least uncertainty: the true class is green",
        "Most uncertainty: a wrong prediction is red",
    )
    parts: Any = figure.subfigures(2, 1)
    rows = first_of_each(order, summary), first_of_each(order[::-1], summary)
    for part, title, chosen in zip(parts, titles, rows, strict=True):
        part.suptitle(title, fontsize=11, fontweight="bold")
        axes = part.subplots(2, len(chosen), height_ratios=(1, 1.3), squeeze=False)
        for column, index in enumerate(chosen):
            picture, bars = axes[:, column]
            predicted, label = int(summary.mean[index].argmax()), int(data.labels[index])
            entropy = float(summary.predictive_entropy[index])
            picture.imshow(data.images[index, 0].numpy(), cmap="gray_r")
            picture.set_title(f"{data.classes[label]}\nentropy {entropy:.2g} nats", fontsize=9)
            picture.set_axis_off()
            colors = ["#9aa5b1"] * len(data.classes)
            colors[predicted] = "#d1495b"
            colors[label] = "#2e8b57"
            bars.barh(
                range(len(data.classes)),
                summary.mean[index].numpy(),
                xerr=summary.std[index].numpy(),
                color=colors,
                error_kw={"elinewidth": 0.8},
            )
            bars.set(xlim=(0, 1.05), yticks=range(len(data.classes)))
            bars.set_yticklabels(data.classes if column == 0 else [], fontsize=8)
            bars.tick_params(axis="x", labelsize=8)
            bars.invert_yaxis()
    figure.supxlabel(
        f"mean and standard deviation of the probability, {NUM_SAMPLES} draws", fontsize=9
    )
    figure.savefig(file, dpi=90)
    plt.close(figure)


def first_of_each(order: list[int], summary: ProbabilitySummary) -> list[int]:
    """The first five images in ``order`` whose predicted classes differ."""
    chosen: dict[int, int] = {}
    for index in order:
        chosen.setdefault(int(summary.mean[index].argmax()), index)
    return list(chosen.values())[:5]


if __name__ == "__main__":
    main()
