"""Batches of labelled examples: for a fit in an order that seed and epoch decide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from ..data import ImageData
from ..errors import ArgumentError
from ..loading import Loader
from ..models import InputConfig, input_config
from ..numeric import count
from ..seeds import fold
from .augmentation import Augment, Augmented, augmentation

Data = ImageData | Dataset[Any]
Loss = Callable[[Any, Tensor], Tensor]

_HOLDOUT = 1  # members of the families of seeds that one seed gives
_ORDER = 2


class Order(Sampler[list[Any]]):
    """Batches of indices: one order for each seed and epoch, from any batch of it on.

    Args:
        indices: The examples that there are.
        batch_size: Examples in a batch.
        batches: Batches in an epoch; examples beyond them wait for another epoch's order.
        seed: Of the orders.
        augmented: Give ``(index, seed)`` instead of an index, with a seed for each example and
            epoch.
    """

    def __init__(
        self, indices: Sequence[int], batch_size: int, batches: int, seed: int, augmented: bool
    ) -> None:
        self.indices = torch.as_tensor(indices)
        self.batch_size = batch_size
        self.batches = batches
        self.seed = seed
        self.augmented = augmented
        self.epoch = 0
        self.first = 0

    def __len__(self) -> int:
        return self.batches - self.first

    def __iter__(self) -> Iterator[list[Any]]:
        seed = fold(self.seed, _ORDER, self.epoch)
        generator = torch.Generator().manual_seed(seed)
        order = self.indices[torch.randperm(len(self.indices), generator=generator)].tolist()
        for batch in range(self.first, self.batches):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(index, fold(seed, index)) for index in chosen] if self.augmented else chosen


def shuffled_batches(
    data: Data,
    indices: Sequence[int],
    *,
    batch_size: int,
    accumulate: int,
    augment: Augment,
    model_config: InputConfig | None,
    workers: int,
    seed: int,
    pin: bool,
) -> tuple[DataLoader[Any], Order]:
    """The loader of a fit and its order, of which the caller sets ``epoch`` and ``first``.

    Every batch is of one size and an epoch a whole number of steps, as long as the data allow: a
    smaller batch would weigh its examples more, and BatchNorm refuses one example alone.
    """
    workers = count("workers", workers, least=0)
    batches = max(1, len(indices) // batch_size)
    if batches < accumulate:
        raise ArgumentError(
            f"fit: accumulate={accumulate} batches of batch_size={batch_size} are more than the "
            f"{len(indices)} training examples: lower one of them."
        )
    dataset = _dataset(data, model_config, augment)
    order = Order(indices, batch_size, batches // accumulate * accumulate, seed, augment != "none")
    loader: Loader[Any] = Loader(
        dataset,
        batch_sampler=order,
        generator=torch.Generator().manual_seed(seed),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin,
    )
    return loader, order


def batches_in_order(
    data: Data,
    *,
    batch_size: int,
    model_config: InputConfig | None,
    workers: int,
    indices: Sequence[int] | None = None,
    augment: Augment = "none",
    seed: int = 0,
) -> DataLoader[Any]:
    """All examples, or those of ``indices``, in their order; the last batch may be smaller.

    Augmented examples are the same on every pass.
    """
    batch_size, workers = count("batch_size", batch_size), count("workers", workers, least=0)
    chosen: list[Any] = list(range(check_data(data)) if indices is None else indices)
    if augment != "none":
        chosen = [(index, fold(seed, index)) for index in chosen]
    return Loader(
        Subset(_dataset(data, model_config, augment), chosen),
        batch_size,
        generator=torch.Generator(),  # else a number of the global generator goes to each pass
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def _dataset(data: Data, model_config: InputConfig | None, augment: Augment) -> Any:
    """A torch Dataset of what the model takes: by index, or by (index, seed) where augmented."""
    if isinstance(data, ImageData):
        assert model_config is not None
        if augment == "none":
            return data.dataset(model_config)
        return Augmented(data, model_config, augmentation(augment, model_config))
    if augment != "none":
        raise ArgumentError(
            "augment works on an ImageData (bayesify.load_dataset). Augment in the Dataset itself, "
            f"or leave augment='none' for a {type(data).__name__}."
        )
    return data


def config_for(data: Any, model: nn.Module, given: InputConfig | None) -> InputConfig | None:
    """How images are prepared for the model; nothing for a data set that does so itself."""
    if not isinstance(data, ImageData):
        return None
    return given or input_config(model)


def split(size: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of ``size`` examples to train on, and a random ``share`` of them to hold out."""
    if share == 0.0:
        return list(range(size)), []
    held = max(1, round(share * size))
    if held >= size:
        raise ArgumentError(f"fit: holdout={share} of {size} examples leaves none to train on.")
    generator = torch.Generator().manual_seed(fold(seed, _HOLDOUT))
    order = torch.randperm(size, generator=generator).tolist()
    return sorted(order[held:]), sorted(order[:held])


def pair(batch: Any) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a batch.

    Raises:
        ArgumentError: It is anything but two tensors.
    """
    if isinstance(batch, list | tuple) and len(batch) == 2:
        inputs, targets = batch
        if isinstance(inputs, Tensor) and isinstance(targets, Tensor):
            return inputs, targets
    what = type(batch).__name__
    if isinstance(batch, list | tuple):
        what = f"{len(batch)} values ({', '.join(type(v).__name__ for v in batch)})"
    raise ArgumentError(
        "Each example must be an input tensor and its label; the data set gave batches of "
        f"{what}. Labels missing? Let __getitem__ return (input, label)."
    )


def check_data(data: Any) -> int:
    """The number of examples.

    Raises:
        ArgumentError: There is none, or ``data`` is no data set of known length.
    """
    length = getattr(data, "__len__", None)
    if length is None or not isinstance(data, ImageData | Dataset):
        raise ArgumentError(
            "The data must be an ImageData (bayesify.load_dataset) or a torch Dataset with a "
            f"length, got {type(data).__name__}."
        )
    size = int(length())
    if size == 0:
        raise ArgumentError("The data set is empty: there is nothing to fit or to measure.")
    return size


def device_of(model: nn.Module) -> torch.device:
    """Where the model is."""
    first = next(model.parameters(), None)
    if first is None:
        raise ArgumentError(f"{type(model).__name__} has no parameter: there is nothing to fit.")
    return first.device
