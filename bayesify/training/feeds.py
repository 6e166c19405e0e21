"""Where the batches of a fit come from: an order of its own over a data set, or a user's loader."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from ..errors import ArgumentError
from ..models import InputConfig
from ..numeric import count
from ..settings.training import FitSettings, Reading
from .batches import Order, batches_in_order, check_data, shuffled_batches, split


class Feed(ABC):
    """Batches by epoch.

    Args:
        num_data: Number N of examples that the posterior is of.
        batches: Batches in an epoch.
        batch_size: Examples in a batch that is not a smaller last one; None: as many as in the
            first.
    """

    def __init__(self, num_data: int, batches: int, batch_size: int | None) -> None:
        self.num_data, self.batches, self.batch_size = num_data, batches, batch_size

    @abstractmethod
    def epoch(self, number: int, first: int = 0) -> Iterator[Any]:
        """The batches of an epoch, from one of them on."""


class OwnOrder(Feed):
    """A data set in an order that seed and epoch decide."""

    def __init__(
        self, loader: DataLoader[Any], order: Order, num_data: int, batch_size: int
    ) -> None:
        super().__init__(num_data, order.batches, batch_size)
        self.loader, self.order = loader, order

    def epoch(self, number: int, first: int = 0) -> Iterator[Any]:
        self.order.epoch, self.order.first = number, first
        return iter(self.loader)


class GivenLoader(Feed):
    """A user's DataLoader, in its own order; one over a stream goes on where it was."""

    def __init__(self, loader: DataLoader[Any], num_data: int | None, accumulate: int) -> None:
        self.loader = loader
        self.stream = isinstance(loader.dataset, IterableDataset)
        size = loader.batch_size
        if not self.stream:
            number = examples_of(loader) if num_data is None else num_data
            batches = len(loader)
        elif num_data is None or size is None:
            what = "num_data=, the number of training examples"
            if num_data is not None:
                what = "the DataLoader a batch_size"
            raise ArgumentError(
                f"fit: {type(loader.dataset).__name__} is a stream, which does not say how long an "
                f"epoch is: give {what}."
            )
        else:
            number = num_data
            batches = max(1, number // size if loader.drop_last else -(-number // size))
        if batches < accumulate:
            raise ArgumentError(
                f"fit: accumulate={accumulate} batches are more than the {batches} of the "
                "DataLoader: lower it."
            )
        size = None if size is None else min(size, number)
        super().__init__(number, batches // accumulate * accumulate, size)
        self.running: Iterator[Any] | None = None

    def epoch(self, number: int, first: int = 0) -> Iterator[Any]:
        if not self.stream:
            samplers: list[Any] = [self.loader.sampler, self.loader.batch_sampler]
            for sampler in samplers:
                if hasattr(sampler, "set_epoch"):
                    sampler.set_epoch(number)
            return islice(iter(self.loader), first, self.batches)
        if self.running is None:
            self.running = self._again_and_again()
        return islice(self.running, self.batches - first)

    def _again_and_again(self) -> Iterator[Any]:
        while True:
            empty = True
            for batch in self.loader:
                empty = False
                yield batch
            if empty:
                raise ArgumentError(
                    f"{type(self.loader.dataset).__name__} gave no example: there is nothing to "
                    "fit. Is it a generator that was used up?"
                )


def examples_of(loader: DataLoader[Any]) -> int:
    """How many examples a loader's posterior is of; a sampler that resamples is warned of.

    Raises:
        ArgumentError: There is none.
    """
    dataset: Any = loader.dataset
    size = check_data(dataset)
    sampler: Any = loader.sampler
    if type(loader.batch_sampler) not in (BatchSampler, type(None)):
        sampler = getattr(loader.batch_sampler, "sampler", loader.batch_sampler)
    resamples = isinstance(sampler, WeightedRandomSampler) or (
        isinstance(sampler, RandomSampler) and sampler.replacement
    )
    if resamples:
        warnings.warn(
            f"The DataLoader draws its examples by a {type(sampler).__name__}: the posterior is "
            f"that of the resampled data, counted as N = {size:,} examples. To weigh examples "
            "without changing which there are, give batches (input, target, weight).",
            UserWarning,
            stacklevel=6,
        )
    if resamples or isinstance(sampler, DistributedSampler) or loader.batch_size is None:
        return size
    try:
        listed = len(sampler)
    except TypeError:
        return size
    if listed == 0:
        raise ArgumentError("The DataLoader's sampler lists no example: there is nothing to fit.")
    return min(size, listed)


def feed_of(
    train: Any,
    settings: FitSettings,
    reading: Reading,
    num_data: int | None,
    config: InputConfig | None,
    device: torch.device,
) -> tuple[Feed, DataLoader[Any] | None]:
    """The batches of a fit, and those that are held out.

    Raises:
        ArgumentError: The data cannot be used so.
    """
    if isinstance(train, DataLoader):
        if settings.holdout:
            raise ArgumentError(
                "fit: holdout sets examples of a data set aside, and a DataLoader has an order of "
                "its own: give the data set, or leave holdout out."
            )
        return GivenLoader(train, num_data, settings.accumulate), None
    size = check_data(train)
    indices, held = split(size, settings.holdout, settings.seed)
    common: dict[str, Any] = {"model_config": config, "workers": reading.workers}
    loader, order = shuffled_batches(
        train, indices, batch_size=settings.batch_size, accumulate=settings.accumulate,
        augment=settings.augment, seed=settings.seed, pin=device.type == "cuda", **common,
    )  # fmt: skip
    number = len(indices) if num_data is None else num_data
    own = OwnOrder(loader, order, number, min(settings.batch_size, len(indices)))
    if not held:
        return own, None
    return own, batches_in_order(train, batch_size=settings.batch_size, indices=held, **common)


def as_loader(data: Any, batch_size: int | None, workers: int) -> Any:
    """A stream as the DataLoader that batches it; anything else as it is."""
    if not isinstance(data, IterableDataset) or batch_size is None:
        return data
    return DataLoader(data, count("fit: batch_size", batch_size), num_workers=workers)
