"""The diagonal of the Fisher information at the posterior means, example by example."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ..errors import ArgumentError
from ..inference import Given, class_logits
from ..posterior import bayesian_sites
from ..scope import at_mean
from ..settings.training import FisherKind
from .batches import pair
from .labels import LabelCheck

_GRADIENTS = 1 << 27
"""Numbers that the gradients in memory together may have: half a GiB in float32."""

logger = logging.getLogger(__name__)


def fisher_diagonal(
    model: nn.Module,
    batches: Iterable[Any],
    kind: FisherKind,
    *,
    device: torch.device,
    seed: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[dict[str, Tensor], int]:
    r"""Mean over examples of the squared derivatives of a class's log probability.

    .. math:: F_{ii} = \frac1n \sum_x \mathbb{E}_{y} \Big[
              \Big(\frac{\partial \log p(y|x, \mu)}{\partial \mu_i}\Big)^2 \Big]

    ``exact``: the expectation over the classes by the model's own probabilities, with as many
    backward passes as there are classes. For logits and cross entropy this is the diagonal of the
    generalised Gauss-Newton matrix too. ``mc``: one class drawn from them, without bias.
    ``empirical``: the true label, which is not the Fisher information but its usual stand-in; it
    goes to 0 where the examples were learnt by heart.

    Each example has a gradient of its own, by ``torch.func.vmap`` of ``grad`` over a functional
    call of the whole model: right for any layer, also convolutions and shared weights, as long as
    examples do not mix in ``eval()``. A forward that vmap cannot batch runs example by example.

    Returns:
        ``{name: F}`` in float64 over the Bayesian parameters, tied ones once, and n.

    Reference:
        Kunstner, Balles, Hennig, 2019, arXiv:1905.12558 (the three kinds); Martens, 2020,
        arXiv:1412.1193, section 9 (Fisher and Gauss-Newton).
    """
    if kind not in get_args(FisherKind):
        raise ArgumentError(
            f"fisher must be one of {', '.join(map(repr, get_args(FisherKind)))}, got {kind!r}."
        )
    means = {site.name: site.mean.detach() for site in bayesian_sites(model)}
    wide = torch.float32 if device.type == "mps" else torch.float64
    total = {k: torch.zeros(v.shape, dtype=wide, device=v.device) for k, v in means.items()}
    generator = torch.Generator().manual_seed(seed)
    labels_checked = LabelCheck(True, "fit_laplace_", "It is for classifiers alone.")
    squares = _Squares(model)
    together = max(1, _GRADIENTS // sum(mean.numel() for mean in means.values()))
    count = 0
    with _at_means_in_eval(model):
        for inputs, labels in map(pair, batches):
            inputs = inputs.to(device)
            with torch.no_grad():
                output = Given((inputs,)).call(model)
            labels_checked.look(output, labels)  # the loss must be theirs, also where none is read
            weighted: list[tuple[Tensor, Tensor | None]]
            if kind == "empirical":
                weighted = [(labels.to(device), None)]
            else:
                probs = class_logits(output, "fit_laplace_").to(wide).softmax(-1)
                if kind == "mc":
                    drawn = torch.multinomial(probs.cpu(), 1, generator=generator)[:, 0]
                    weighted = [(drawn.to(device), None)]
                else:
                    weighted = [
                        (torch.full_like(probs[:, c], c, dtype=torch.int64), probs[:, c])
                        for c in range(probs.shape[1])
                    ]
            for classes, weights in weighted:
                for start in range(0, len(inputs), together):
                    part = slice(start, start + together)
                    factors = None if weights is None else weights[part]
                    found = squares(means, inputs[part].clone(), classes[part], factors)
                    for name, value in found.items():
                        total[name] += value
            count += len(inputs)
            if on_batch is not None:
                on_batch(count)
    if count == 0:
        raise ArgumentError("The Fisher information needs at least one example.")
    return {name: value / count for name, value in total.items()}, count


class _Squares:
    """Squared gradients summed over a batch, one gradient an example."""

    def __init__(self, model: nn.Module) -> None:
        def log_prob(means: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
            logits = class_logits(functional_call(model, means, (x[None],)), "fit_laplace_")
            return logits.log_softmax(-1).gather(1, label.view(1, 1)).sum()

        self.each = grad(log_prob)
        self.together = vmap(self.each, in_dims=(None, 0, 0))
        self.can_batch = True

    def __call__(
        self, means: dict[str, Tensor], inputs: Tensor, labels: Tensor, weights: Tensor | None
    ) -> dict[str, Tensor]:
        if self.can_batch:
            try:
                found = self.together(means, inputs, labels)
                return {name: _sum(value, weights) for name, value in found.items()}
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                logger.info("vmap cannot batch this forward (%s): one example at a time.", error)
                self.can_batch = False
        total: dict[str, Tensor] = {}
        for i in range(len(inputs)):
            weight = None if weights is None else weights[i : i + 1]
            for name, value in self.each(means, inputs[i], labels[i]).items():
                square = _sum(value[None], weight)
                total[name] = total[name] + square if name in total else square
        return total


def _sum(gradients: Tensor, weights: Tensor | None) -> Tensor:
    """Sum over the examples of their squared gradients, by their weights."""
    squares = gradients.square()
    if weights is not None:
        squares *= weights.to(squares.dtype).view(-1, *(1,) * (squares.dim() - 1))
    return squares.sum(0)


@contextlib.contextmanager
def _at_means_in_eval(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with at_mean(model):
            yield
    finally:
        for module, training in flags:
            module.training = training
