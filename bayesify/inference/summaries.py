"""What is kept of the outputs of many draws: a stack, moments, probabilities."""

from __future__ import annotations

import math
import os
import warnings
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..likelihoods import Likelihood, main_output
from ..torch_private import pytree
from ..welford import Welford

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class ProbabilitySummary(NamedTuple):
    """What K draws say of the classes of each example; entropies in nats.

    Attributes:
        mean: Mean over the draws of the class probabilities, (batch, classes).
        std: Standard deviation over the draws (divisor K) of the probabilities, (batch, classes).
        predictive_entropy: Entropy of ``mean``: the whole uncertainty, (batch,).
        expected_entropy: Mean of the draws' entropies: the uncertainty that more data would leave.
        mutual_information: Their difference: the uncertainty about the weights, at least 0.
    """

    mean: Tensor
    std: Tensor
    predictive_entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor


class Moments(NamedTuple):
    """Mean and standard deviation (divisor K) over the draws, in the structure of the output."""

    mean: Any
    std: Any


class Collector(ABC):
    """Takes the outputs of the draws one by one."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.count = 0

    @abstractmethod
    def add(self, output: Any) -> None: ...

    @abstractmethod
    def result(self) -> Any: ...


class _Structured(Collector):
    """A collector that treats each tensor of the output by itself and keeps the structure."""

    def __init__(self, num_samples: int) -> None:
        super().__init__(num_samples)
        self.leaves: list[Any] = []
        self.structure: Any = None

    def add(self, output: Any) -> None:
        leaves, structure = pytree.tree_flatten(output, is_leaf=is_cache)
        leaves = [None if is_cache(leaf) else leaf for leaf in leaves]
        if self.count == 0:
            self.structure = structure
            self.leaves = [self.first(v) if isinstance(v, Tensor) else v for v in leaves]
            self.shapes = [v.shape if isinstance(v, Tensor) else None for v in leaves]
        elif structure != self.structure:
            raise ArgumentError(
                "predict: two draws gave outputs of different structure, which cannot be "
                "combined. Call the model in one_draw(model) draw by draw."
            )
        for kept, shape, leaf in zip(self.leaves, self.shapes, leaves, strict=True):
            if shape is None:
                _check_plain(kept, leaf)
            elif not isinstance(leaf, Tensor) or leaf.shape != shape:
                raise ArgumentError(
                    f"predict: an output has the shape {tuple(shape)} in one draw and "
                    f"{tuple(getattr(leaf, 'shape', ()))} in another, so that they cannot be "
                    "combined. Call the model in one_draw(model) draw by draw."
                )
            else:
                self.update(kept, leaf)
        self.count += 1

    @abstractmethod
    def first(self, leaf: Tensor) -> Any: ...

    @abstractmethod
    def update(self, kept: Any, leaf: Tensor) -> None: ...


def _physical_memory() -> float:
    """Bytes of memory of this machine, infinite where it does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # not POSIX
        return math.inf


class Stack(_Structured):
    def first(self, leaf: Tensor) -> Tensor:
        needed = self.num_samples * leaf.nbytes
        try:
            if leaf.device.type == "cpu" and needed > _physical_memory():
                raise MemoryError  # the system would promise it and end the process later
            return leaf.new_empty((self.num_samples, *leaf.shape))
        except (MemoryError, RuntimeError) as error:
            raise ArgumentError(
                f"predict: {self.num_samples:,} stacked outputs need {needed / 2**30:,.1f} GiB, "
                f"more than {leaf.device} has. Take reduce='probabilities' or 'moments', whose "
                "memory does not depend on num_samples, or smaller batches."
            ) from error

    def update(self, kept: Tensor, leaf: Tensor) -> None:
        kept[self.count] = leaf

    def result(self) -> Any:
        return pytree.tree_unflatten(self.leaves, self.structure)


class RunningMoments(_Structured):
    def first(self, leaf: Tensor) -> Welford:
        if leaf.is_complex():
            raise ArgumentError("predict: complex outputs have no moments here; take reduce=None.")
        return Welford(leaf)

    def update(self, kept: Welford, leaf: Tensor) -> None:
        kept.add(leaf)

    def result(self) -> Moments:
        pairs = [v.moments() if isinstance(v, Welford) else (v, v) for v in self.leaves]
        mean, std = (pytree.tree_unflatten([p[i] for p in pairs], self.structure) for i in (0, 1))
        return Moments(mean, std)


class Probabilities(Collector):
    """Class probabilities of logits, divided by a temperature in every draw."""

    def __init__(self, num_samples: int, temperature: float = 1.0) -> None:
        super().__init__(num_samples)
        self.temperature = temperature

    def add(self, output: Any) -> None:
        logits = class_logits(
            output, "predict: reduce='probabilities'", "Take reduce='moments' or None."
        )
        if self.count == 0:
            warn_of_probabilities(logits, "predict: reduce='probabilities'")
        log_probs = (logits.to(_wide_dtype(logits)) / self.temperature).log_softmax(-1)
        probs = log_probs.exp()
        entropy = torch.special.entr(probs).sum(-1)
        if self.count == 0:
            self.dtype = torch.promote_types(logits.dtype, torch.float32)
            self.probs, self.entropy = Welford(probs), torch.zeros_like(entropy)
        self.probs.add(probs)
        self.entropy += entropy
        self.count += 1

    def result(self) -> ProbabilitySummary:
        mean, std = self.probs.moments()
        predictive = torch.special.entr(mean).sum(-1)
        expected = self.entropy / self.count
        information = (predictive - expected).clamp_min(0.0)
        return ProbabilitySummary(
            *(v.to(self.dtype) for v in (mean, std, predictive, expected, information))
        )


class Mixed(Collector):
    """What a likelihood makes of the outputs: a :class:`bayesify.likelihoods.Predictive`."""

    def __init__(self, num_samples: int, likelihood: Likelihood) -> None:
        super().__init__(num_samples)
        self.gathered = likelihood.gather()

    def add(self, output: Any) -> None:
        self.gathered.add(output)

    def result(self) -> Any:
        return self.gathered.result()


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def is_cache(value: Any) -> bool:
    """Whether it holds keys and values of earlier tokens, as Hugging Face's models keep them."""
    return any(kind.__name__ == "Cache" for kind in type(value).__mro__)


def _check_plain(first: Any, other: Any) -> None:
    """What is no tensor must be a plain value, and the same in every draw."""
    if not isinstance(first, _PLAIN):
        raise ArgumentError(
            f"predict: the output holds a {type(first).__name__}, of which the tensors cannot be "
            "reached. torch.export.register_dataclass makes a dataclass known; or call the model "
            "in one_draw(model) draw by draw."
        )
    if first != other:
        raise ArgumentError(
            f"predict: the output holds {first!r} in one draw and {other!r} in another, and only "
            "tensors can be combined. Call the model in one_draw(model) draw by draw."
        )


def warn_of_probabilities(logits: Tensor, wanted_by: str) -> None:
    """Say that what a model gave for logits look like probabilities, of which none is a softmax."""
    if logits.dtype not in (torch.float32, torch.float64) or not logits.numel():
        return
    if bool((logits >= 0).all() & ((logits.sum(-1) - 1).abs() < 1e-5).all()):
        warnings.warn(
            f"{wanted_by} takes the model's output for logits, but every row of it is at least 0 "
            "and sums to 1: it seems to end in a softmax, and another one is taken. Let it give "
            "the logits.",
            UserWarning,
            stacklevel=2,
        )


def class_logits(output: Any, wanted_by: str, instead: str = "") -> Tensor:
    """The logits (batch, classes) in what a classifier gave.

    The one place that knows on which axis classes are: all that takes a softmax, a largest class
    or a cross entropy of a model's output asks here.

    Args:
        output: As :func:`main_output` takes it.
        wanted_by: Who asks, for the message.
        instead: What to do with another output, a sentence.

    Raises:
        ArgumentError: They are no table of at least two classes.
    """
    logits = main_output(output)
    if logits.dim() == 2 and logits.shape[1] >= 2 and logits.is_floating_point():
        return logits
    advice = [instead] if instead else []
    if logits.dim() == 1 or logits.shape[1:] == (1,):
        z = "z[:, None]" if logits.dim() == 1 else "z"
        advice.append(
            "If it is the logit z of a sigmoid, let the model give those of both classes, "
            f"torch.nn.functional.pad({z}, (1, 0))."
        )
    elif logits.dim() > 2 and not instead:
        advice.append("Of dense outputs, let the model give one row for each pixel or token.")
    raise ArgumentError(
        f"{wanted_by} needs logits of the shape (batch, classes), with at least 2 classes; the "
        f"model gave {logits.dtype} of {tuple(logits.shape)}. {' '.join(advice)}".rstrip()
    )
