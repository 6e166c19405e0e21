"""What every likelihood has: a density for each target, summed for each example."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ..errors import ArgumentError
from ..numeric import whole
from .outputs import main_output
from .predictive import Gathered, Predictive
from .predictive import Target as Target


class Likelihood(nn.Module, ABC):
    """The density of a target given a model's output, and what K outputs predict of it.

    Every target of an example has a density of its own, and those of an example are added. A target
    that is masked adds 0: one that is NaN, has the ``ignore_index`` of :class:`Categorical`, or
    where the mask of a pair (target, mask) is False.

    Where a label or a number is out of range is looked at where that waits for no device: on the
    CPU. On another device its density is NaN.
    """

    scores: Tensor | None
    """Of held-out targets, sorted: what :meth:`Predictive.conformal` stands on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scores", None)

    # -- densities -------------------------------------------------------------------------------

    def log_prob(self, output: Any, target: Target) -> Tensor:
        """Log density of each example: the sum over its targets, masked ones left out.

        Args:
            output: What the model gave: a tensor, or an object with ``.logits``.
            target: The targets, or a pair (targets, mask).

        Shape:
            output (batch, ...), target as the likelihood says, result (batch,).

        Returns:
            Nats, in float32 or in float64 if the output is.

        Raises:
            ArgumentError: The shapes do not fit, or a target has a value that it cannot have.
        """
        self.check(output, target)
        return per_example(self.log_densities(output, target))

    def objective(self, output: Any, target: Target) -> Tensor:
        """What a fit maximises for each example, (batch,): :meth:`log_prob`, or a variant of it."""
        return per_example(self.log_densities(output, target))

    def log_densities(self, output: Any, target: Target) -> Tensor:
        """Log density of each target by itself, (batch, ...), 0 where it is masked.

        Raises:
            ArgumentError: The shapes do not fit.
        """
        return self.density(self.distribution(output), target)

    @abstractmethod
    def check(self, output: Any, target: Target) -> None:
        """Refuse targets of values that cannot be, if they are on the CPU.

        Raises:
            ArgumentError: With the first that is wrong.
        """

    @abstractmethod
    def mask(self, target: Target) -> Tensor | None:
        """Which targets count, of the shape of the targets; None if all do."""

    def check_shapes(self) -> None:
        """Refuse a likelihood that learns something of no known shape yet.

        Raises:
            ArgumentError: It must see an output first.
        """

    def counts(self, target: Target) -> Tensor:
        """How many targets each example has, masked ones left out, (batch,)."""
        plain, _ = split(target)
        mask = self.mask(target)
        if mask is None:
            return torch.full(plain.shape[:1], plain[:1].numel(), device=plain.device)
        return mask.flatten(1).sum(1) if mask.dim() > 1 else mask.long()

    # -- what the output says of a target --------------------------------------------------------

    @abstractmethod
    def distribution(self, output: Any) -> Distribution:
        """The distribution of the targets, as torch has it: one for each target of the batch."""

    @abstractmethod
    def density(self, found: Any, target: Target) -> Tensor:
        """Log density of each target, given what :meth:`distribution` gave; 0 where masked."""

    def moments(self, found: Any) -> tuple[Tensor, Tensor]:
        """Mean and variance of each target, given what :meth:`distribution` gave."""
        return found.mean, found.variance

    def sample(self, output: Any, target: Target, generator: torch.Generator | None) -> Target:
        """Targets drawn from the model's own distribution, masked where ``target`` is."""
        raise ArgumentError(f"{type(self).__name__} has no samples of its own here.")

    def curvature(self, output: Any, target: Target) -> Iterator[Tensor]:
        r"""Vectors :math:`v_m` of the output's shape whose products add up to the curvature.

        .. math:: \sum_m v_m v_m^T
                  = \mathbb{E}_y \big[ -\partial^2 \log p(y|f) / \partial f^2 \big]

        at each example's output f, that is the Fisher information in f. With the Jacobian J of f it
        gives the generalised Gauss-Newton matrix :math:`\sum_m (J^T v_m) (J^T v_m)^T`.

        Args:
            output: As :meth:`log_prob`.
            target: As :meth:`log_prob`; only its mask is read.

        Raises:
            ArgumentError: This likelihood has no closed form of it.
        """
        raise ArgumentError(
            f"{type(self).__name__} has no closed form of its curvature: take fisher='mc'."
        )

    # -- what K outputs predict ------------------------------------------------------------------

    def gather(self) -> Gathered:
        """What takes the outputs of draws one by one and gives a :class:`Predictive`."""
        return Gathered(self)

    def predictive(self, outputs: Iterable[Any]) -> Predictive:
        """What the outputs of K draws predict together: the mixture of their distributions.

        Args:
            outputs: One output for each draw, or a tensor of them, (K, batch, ...).

        Raises:
            ArgumentError: There is none, or their shapes differ.
        """
        gathered = self.gather()
        for output in outputs:
            gathered.add(output)
        return gathered.result()

    # -- recalibration ---------------------------------------------------------------------------

    @property
    def scale_name(self) -> str:
        """The attribute that :func:`bayesify.recalibrate_` fits.

        Raises:
            ArgumentError: There is none.
        """
        raise ArgumentError(
            f"recalibrate_: {type(self).__name__} has no temperature and no scale of its noise."
        )

    def scores_of(self, predictive: Any, target: Target) -> Tensor:
        """How far each target that counts is from what was predicted, (targets,): by default one
        less the probability of what was observed.
        """
        plain, _ = split(target)
        mask = self.mask(target)
        scores: Tensor = 1 - predictive.log_prob(target).exp()
        if mask is None:
            return scores.flatten()
        return scores[mask.to(scores.device).view(plain.shape)]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        scores = state_dict.get(prefix + "scores")
        if isinstance(scores, Tensor):
            self.scores = torch.empty_like(scores)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.arguments().items())

    def arguments(self) -> dict[str, Any]:
        """The plain arguments that make such a likelihood anew; its tensors are in its state."""
        return {}


def per_example(values: Tensor) -> Tensor:
    """The sum over everything but the first dimension."""
    return values.flatten(1).sum(1) if values.dim() > 1 else values


def split(target: Target) -> tuple[Tensor, Tensor | None]:
    """The targets and the mask that came with them.

    Raises:
        ArgumentError: They are no tensors, or the mask is no bool of the targets' shape.
    """
    plain: Any = target
    mask: Any = None
    if isinstance(target, tuple | list) and len(target) == 2:
        plain, mask = target
    if not isinstance(plain, Tensor) or not (mask is None or isinstance(mask, Tensor)):
        raise ArgumentError(
            "A target must be a tensor, or a pair (target, mask) of tensors, got "
            f"{type(target).__name__}."
        )
    if plain.dim() == 0 or plain.is_complex():
        raise ArgumentError(
            f"Targets must be real numbers of the shape (batch, ...), got {described(plain)}."
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != plain.shape):
        raise ArgumentError(
            f"The mask of a target must be torch.bool of the target's shape {tuple(plain.shape)}, "
            f"True where the target counts, got {described(mask)}."
        )
    return plain, mask


def with_nan(target: Target) -> tuple[Tensor, Tensor | None]:
    """The targets, and which of them count where NaN stands for one that is not known."""
    plain, mask = split(target)
    if plain.is_floating_point():
        known = ~plain.isnan()
        mask = known if mask is None else mask & known
    return plain, mask


def logits_in(output: Any, name: str) -> Tensor:
    """The output as numbers that a density can be computed of: float32 or float64.

    Raises:
        ArgumentError: It is none.
    """
    found = main_output(output)
    if not found.is_floating_point() or found.dim() == 0:
        raise ArgumentError(
            f"{name} takes a model's output for real numbers (batch, ...), got {described(found)}."
        )
    return found if found.dtype == torch.float64 else found.float()


def placed(target: Tensor, mask: Tensor | None, output: Tensor) -> tuple[Tensor, Tensor | None]:
    """Both on the device of the output."""
    target = target.to(output.device)
    return target, None if mask is None else mask.to(output.device)


def masked_to(values: Tensor, mask: Tensor | None, fill: float | Tensor) -> Tensor:
    """``values``, and ``fill`` where the mask is False."""
    if mask is None:
        return values
    return torch.where(
        mask, values, torch.as_tensor(fill, dtype=values.dtype, device=values.device)
    )


def fitted(target: Tensor, shape: torch.Size, axis: int | None, name: str, advice: str) -> Tensor:
    """A target in the shape of the output: it may lack an axis that has one element there.

    Raises:
        ArgumentError: It has another shape.
    """
    if target.shape == shape:
        return target
    if axis is not None and 0 < axis < len(shape) and shape[axis] == 1:
        if target.dim() == len(shape) - 1 and target.unsqueeze(axis).shape == shape:
            return target.unsqueeze(axis)
    raise ArgumentError(
        f"{name}: targets of the shape {tuple(target.shape)} do not fit outputs of "
        f"{tuple(shape)}. {advice}"
    )


def axis_of(dim: int, dims: int, name: str) -> int:
    """The axis that ``dim`` names in a tensor of so many dimensions; 0 means that there is none.

    Raises:
        ArgumentError: The tensor has none such.
    """
    if dims == 1 and dim == -1:
        return 0
    axis = dim + dims if dim < 0 else dim
    if not 0 < axis < dims:
        raise ArgumentError(
            f"{name}(dim={dim}): an output of {dims} dimensions has the axes 1 to {dims - 1} (or "
            f"-1 to {1 - dims}); axis 0 is the batch."
        )
    return axis


def axis_number(name: str, dim: Any) -> int:
    """``dim`` as an axis that is not the batch."""
    number = whole(f"{name}: dim", dim, "the number of an axis", least=-64, below=64)
    if number == 0:
        raise ArgumentError(f"{name}: dim must not be 0, which is the batch.")
    return number


def may_look(tensor: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device or ending a trace."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
