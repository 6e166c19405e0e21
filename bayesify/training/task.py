"""What a fit minimises of a batch: by a likelihood, given or guessed, or by a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ArgumentError
from ..likelihoods import (
    Categorical,
    Likelihood,
    as_likelihood,
    likelihood_of,
    set_likelihood_,
    to_json,
)
from ..likelihoods.attached import CHOICES
from ..torch_private import pytree
from .batches import Loss
from .examples import Batch, moved
from .labels import LabelCheck

ASK = f"Say what the outputs mean: {CHOICES}; or give a loss= of your own."


class Task:
    """The loss of a batch.

    Args:
        model: Which keeps the likelihood once it has seen an output.
        likelihood: What the outputs mean; None guesses it from the first output and targets.
        loss: Of the outputs and targets of a batch, instead of a likelihood.
        named: The classes of the data set and its name, where the outputs are to get these names.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | None,
        loss: Loss | None,
        named: tuple[Sequence[str], str] | None,
    ) -> None:
        self.model, self.likelihood, self.loss = model, likelihood, loss
        self.guessed = likelihood is None and loss is None
        self.labels = LabelCheck(self.guessed, "fit without a likelihood", ASK, named)
        self.given = None if likelihood is None else to_json(likelihood)
        self.per_example = 1.0
        """Mean number of targets of an example, in the first batch that has any."""
        self.seen = 0
        """Targets in this epoch."""
        self.settled = loss is not None
        self.counted = False

    def settle(self, outputs: Any, batch: Batch) -> str | None:
        """Take the first output: what it means, and the shape of what is learnt of it.

        Returns:
            What was guessed, in words; None if nothing was.

        Raises:
            ArgumentError: The outputs and targets do not fit, or nothing can be guessed.
        """
        words = None
        if self.likelihood is None:
            if not isinstance(batch.targets, Tensor):
                raise ArgumentError(f"Nothing says what several targets mean. {ASK}")
            self.labels.look(outputs, batch.targets)
            self.likelihood = Categorical()
            words = f"likelihood {self.likelihood!r}, guessed from whole numbers for targets"
        elif isinstance(self.likelihood, Categorical) and isinstance(batch.targets, Tensor):
            self.labels.wanted = batch.targets.dim() == 1
            self.labels.ignored = self.likelihood.ignore_index
        device = batch_device(outputs)
        self.likelihood.to(device)
        self.likelihood.check(outputs, batch.targets)
        with torch.no_grad():  # noise that is learnt gets its shape
            self.likelihood.objective(outputs, moved(batch.targets, device))
        set_likelihood_(self.model, self.likelihood)
        self.settled = True
        self._take_mean(self.likelihood.counts(batch.targets))
        return words

    def __call__(self, outputs: Any, batch: Batch, device: torch.device) -> Tensor:
        """The loss of a batch, a mean over its examples.

        Raises:
            ArgumentError: Outputs and targets do not fit.
        """
        if self.loss is not None:
            if batch.weights is not None:
                raise ArgumentError(
                    "A batch has weights, and a loss gives one number for all examples: give a "
                    "likelihood, or weigh within the loss."
                )
            return self.loss(outputs, moved(batch.targets, device))
        assert self.likelihood is not None
        self.labels.look(outputs, batch.targets)
        self.likelihood.check(outputs, batch.targets)
        values = self.likelihood.objective(outputs, moved(batch.targets, device))
        if batch.weights is not None:
            values = values * batch.weights.to(values)
        return -values.mean()

    def count(self, batch: Batch) -> None:
        """Take note of the targets of a batch."""
        if self.likelihood is None:
            return
        counts = self.likelihood.counts(batch.targets)
        self.seen += int(counts.sum())
        self._take_mean(counts)

    def _take_mean(self, counts: Tensor) -> None:
        if not self.counted and bool(counts.any()):
            self.per_example, self.counted = float(counts.double().mean()), True

    def end_of_epoch(self) -> None:
        """Refuse an epoch of which nothing could be learnt.

        Raises:
            ArgumentError: Every target was masked, or in the first epoch every label was the same.
        """
        if self.likelihood is not None and self.seen == 0:
            raise ArgumentError(
                "Every target of an epoch is masked (NaN, ignore_index, or a mask of False): there "
                "is nothing to learn from. Are the targets lost?"
            )
        self.seen = 0
        self.labels.end_of_epoch()

    # -- for a fit that goes on ------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a resumed fit needs of it, beside the likelihood's tensors."""
        return {"per_example": self.per_example, "counted": self.counted, "seen": self.seen}

    @property
    def measure(self) -> Likelihood | Loss:
        """What held-out examples are measured by."""
        found = self.loss or self.likelihood
        assert found is not None
        return found

    def load(self, saved: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
        """Go on with what :meth:`state` gave."""
        self.per_example = float(saved["per_example"])
        self.counted, self.seen = bool(saved["counted"]), int(saved["seen"])
        if self.loss is None:
            self.likelihood = Categorical() if self.likelihood is None else self.likelihood
            self.likelihood.load_state_dict(tensors)
            self.likelihood.to(device)
            set_likelihood_(self.model, self.likelihood)
            self.settled = True


def batch_device(outputs: Any) -> torch.device:
    """Where outputs are."""
    leaves = [v for v in pytree.tree_leaves(outputs) if isinstance(v, Tensor)]
    return leaves[0].device if leaves else torch.device("cpu")


def likelihood_for(
    model: nn.Module, likelihood: Any, loss: Loss | None
) -> tuple[Likelihood | None, Loss | None]:
    """What was asked for: a likelihood, or a loss, or neither, which is to be guessed.

    ``F.cross_entropy`` itself is what is guessed too.

    Raises:
        ArgumentError: Both were given.
    """
    if likelihood is not None and loss is not None:
        raise ArgumentError("Give a likelihood or a loss, not both: a likelihood is its own loss.")
    if likelihood is not None:
        return as_likelihood(likelihood), None
    if loss is not None and loss is not F.cross_entropy:
        return None, loss
    kept = likelihood_of(model)
    return (kept, None) if loss is None else (None, None)
