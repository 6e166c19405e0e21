"""Tables for the commands: a network for one, and what a file of it says of other rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    from ..data import Coding
    from ..models import ModelSpec
    from ..settings import EvaluateSettings, PredictSettings, TableSettings


class NewModel(NamedTuple):
    """A model that was made for a table, as :class:`bayesify.cli.checkpoint.Opened` has one."""

    model: nn.Module
    spec: ModelSpec
    input: None
    header: dict[str, Any]


class TableModel(NamedTuple):
    """A model of a table, and how it reads one."""

    model: nn.Module
    coding: Coding


def refuse_for_table(file: str | Path, given: Mapping[str, Any]) -> None:
    """Refuse options that a table has no use for.

    Args:
        file: The table, or the file of one.
        given: What is to be said of each option, by its name; what is None or False is not given.

    Raises:
        ArgumentError: One is given.
    """
    from ..errors import ArgumentError

    wrong = [name for name, value in given.items() if value not in (None, False)]
    if wrong:
        raise ArgumentError(f"{', '.join(wrong)}: of no use for a table ({file}). Leave it out.")


def refuse_table(file: Path, data: str) -> None:
    """Refuse a table as the data of a file of images.

    Raises:
        ArgumentError: It is one.
    """
    from ..data import is_table
    from ..errors import ArgumentError

    if is_table(data):
        raise ArgumentError(
            f"{data} is a table, and the model in {file} was not fitted to one. Fit one first: "
            f"bayesify fit {data} --target COLUMN --out FILE"
        )


def new_model(file: Path, settings: TableSettings, seed: int) -> tuple[NewModel, TensorDataset]:
    """A Bayesian network with random weights for a table, and its rows."""
    import torch
    from torch.utils.data import TensorDataset

    from ..classes import name_classes_
    from ..conversion import RelativeStd
    from ..convert import to_bbb_
    from ..data import coding_of, read_table
    from ..errors import ArgumentError
    from ..likelihoods import Categorical, Gaussian, set_likelihood_
    from ..models import ModelSpec
    from . import render

    with render.status(f"Reading {file}..."):
        table = read_table(file)
    if settings.target is None:
        raise ArgumentError(
            "--target is missing, the column that is predicted. "
            f"{file} has {', '.join(map(repr, table.columns))}."
        )
    wanted = settings.likelihood
    kind: Any = None if wanted is None else "class" if wanted == "categorical" else "number"
    coding, notes = coding_of(
        table, settings.target, kind=kind, ignore=settings.ignore, categorical=settings.categorical
    )
    inputs, targets = coding.inputs(table), coding.targets(table)
    outputs = len(coding.classes or "1") * (2 if wanted == "predicted" else 1)
    arguments = {"inputs": coding.width, "hidden": [*settings.hidden], "outputs": outputs}
    spec = ModelSpec("bayesify:mlp", model_args=arguments)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = to_bbb_(spec.build(), estimator="local", initial_std=RelativeStd(0.05))
    if coding.classes is None:
        noise: Any = "predicted" if wanted == "predicted" else "learned"
        set_likelihood_(model, Gaussian(noise).standardise_(targets))
        said = f"a number: Gaussian({noise!r}). For classes: --likelihood categorical."
    else:
        set_likelihood_(name_classes_(model, coding.classes), Categorical())
        said = f"one of {len(coding.classes)} classes: Categorical()."
        if kind is None and all(map(_is_number, coding.classes)):
            said += " For numbers: --likelihood gaussian."
    for line in (f"The target {settings.target!r} is {said}", *notes):
        render.note(line)
    info = {"weights": "random", "table": coding.to_json()}
    return NewModel(model, spec, None, {"info": info}), TensorDataset(inputs, targets)


def draw_weights_(model: nn.Module) -> None:
    """Let a fitted model draw weights, so that what it says of a row depends on no other row.

    The local estimator, which trains better, draws anew for each place in a batch.
    """
    from ..posterior import owner_state, sites

    for site in sites(model):
        site.slot.estimator = "weight"
    for module in model.modules():
        owner = owner_state(module)
        if owner is not None:
            owner.variants.clear()  # they are code for the estimators of before


def open_table_model(file: Path, header: Mapping[str, Any], device: torch.device) -> TableModel:
    """The model in a file that was fitted to a table.

    Raises:
        CheckpointError: It cannot be read.
    """
    from .. import storage
    from ..data import Coding
    from ..errors import CheckpointError
    from ..likelihoods import Categorical, Gaussian, likelihood_of

    coding = Coding.from_json(header["info"]["table"])
    model = storage.load(file, device=device)
    kind = Gaussian if coding.classes is None else Categorical
    spec = header["model"]["spec"]
    width = spec["model_args"].get("inputs") if spec["name"] == "bayesify:mlp" else coding.width
    if not isinstance(likelihood_of(model), kind) or width != coding.width:
        raise CheckpointError(
            f"What {file} says of its table does not fit its model. Fetch it or fit it anew."
        )
    return TableModel(model, coding)


def measured(
    opened: TableModel, data: str, settings: EvaluateSettings, device: torch.device
) -> tuple[int, list[Any]]:
    """The number of rows of a table, and how good the predictions of their targets are."""
    from torch.utils.data import TensorDataset

    from .. import training
    from ..data import read_table
    from . import render

    table = read_table(data)
    rows = TensorDataset(opened.coding.inputs(table), opened.coding.targets(table))
    control = opened.coding.classes is not None and len(table) > 1
    with render.progress("Measuring") as bar:
        found = training.evaluate(
            opened.model, rows, device=device, control=control, on_step=bar.to, **vars(settings)
        )
    return len(table), found


def predicted(
    opened: TableModel,
    data: str,
    limit: int | None,
    settings: PredictSettings,
    device: torch.device,
    described: Any,
) -> tuple[int, Iterator[dict[str, Any]]]:
    """The number of rows that are predicted, and one answer for each, in order.

    Args:
        opened: The model.
        data: The table.
        limit: The first rows only.
        settings: How predictions are made.
        device: Where.
        described: Gives the answers of a batch's mean probabilities.
    """
    import torch

    from ..data import read_table
    from ..inference import Predictor

    table = read_table(data)
    inputs = opened.coding.inputs(table)[:limit]
    known = table.columns.get(opened.coding.target)
    classes = opened.coding.classes is not None
    predictor = Predictor(
        opened.model, num_samples=settings.num_samples, seed=settings.seed,
        reduce="probabilities" if classes else "predictive",
    )  # fmt: skip

    def rows() -> Iterator[dict[str, Any]]:
        row = 0
        for batch in inputs.split(settings.batch_size):
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.amp):
                found = predictor(batch.to(device))
            for answer in described(found) if classes else _numbers(found):
                target = {} if known is None else {opened.coding.target: known[row]}
                row += 1
                yield {"row": row, **target, **answer}

    return len(inputs), rows()


def _numbers(found: Any) -> Iterator[dict[str, Any]]:
    """Mean, standard deviations and ends of the central 90 % interval of each row."""
    low, high = found.interval(0.9)
    columns = {
        "mean": found.mean, "std": found.std, "aleatoric_std": found.aleatoric_std,
        "epistemic_std": found.epistemic_std, "q05": low, "q95": high,
    }  # fmt: skip
    for values in zip(*(column.flatten().tolist() for column in columns.values()), strict=True):
        yield dict(zip(columns, values, strict=True))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
