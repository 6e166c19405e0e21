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
from ..inference import Given
from ..likelihoods import Categorical, Likelihood, likelihood_of, main_output
from ..posterior import bayesian_sites
from ..scope import at_mean
from ..settings.training import FisherKind
from ..torch_private import pytree
from .examples import Inputs, moved, read_batch
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
    likelihood: Likelihood | None = None,
    inputs: Inputs | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[dict[str, Tensor], int]:
    r"""Mean over examples of the squared derivatives of a target's log density.

    .. math:: F_{ii} = \frac1n \sum_x \mathbb{E}_{y} \Big[
              \Big(\frac{\partial \log p(y|x, \mu)}{\partial \mu_i}\Big)^2 \Big]

    ``exact``: the expectation over the targets by the model's own distribution, by the likelihood's
    :meth:`curvature <bayesify.likelihoods.Likelihood.curvature>`, with as many backward passes as
    it has vectors, such as one for each class. It is the diagonal of the generalised Gauss-Newton
    matrix. ``mc``: one target drawn from that distribution, without bias. ``empirical``: the true
    target, which is not the Fisher information but its usual stand-in; it goes to 0 where the
    examples were learnt by heart. Masked targets count for nothing.

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
    known = likelihood_of(model) if likelihood is None else likelihood
    guess = LabelCheck(known is None, "fit_laplace_", "Without a likelihood it is for classifiers.")
    meaning = Categorical() if known is None else known
    meaning.to(device)
    squares = _Squares(model, meaning)
    together = max(1, _GRADIENTS // sum(mean.numel() for mean in means.values()))
    count = 0
    with _at_means_in_eval(model):
        for batch in batches:
            read = read_batch(batch, inputs)
            given = read.arguments(device)
            with torch.no_grad():
                output = Given(*given).call(model)
                if isinstance(known, Categorical) and isinstance(read.targets, Tensor):
                    guess.wanted = read.targets.dim() == 1
                    guess.ignored = known.ignore_index
                guess.look(output, read.targets)  # also where no label is read
                meaning.check(output, read.targets)
                targets = moved(read.targets, device)
                what: Iterable[Any] = [targets]
                if kind == "mc":
                    what = [meaning.sample(output, targets, generator)]
                elif kind == "exact":
                    what = meaning.curvature(output, targets)
                for each in what:
                    for start in range(0, read.size, together):
                        part = slice(start, start + together)
                        chosen = pytree.tree_map(
                            lambda t, part=part: t[part].clone(), (given, each)
                        )
                        for name, value in squares(means, *chosen, along=kind == "exact").items():
                            total[name] += value
            count += read.size
            if on_batch is not None:
                on_batch(count)
    if count == 0:
        raise ArgumentError("The Fisher information needs at least one example.")
    return {name: value / count for name, value in total.items()}, count


class _Squares:
    """Squared gradients summed over a batch, one gradient an example."""

    def __init__(self, model: nn.Module, likelihood: Likelihood) -> None:
        def output(means: dict[str, Tensor], given: Any) -> Any:
            args, kwargs = pytree.tree_map(lambda t: t[None], given)
            return functional_call(model, means, args, kwargs)

        def score(means: dict[str, Tensor], given: Any, target: Any) -> Tensor:
            one = pytree.tree_map(lambda t: t[None], target)
            return likelihood.log_densities(output(means, given), one).sum()

        def along(means: dict[str, Tensor], given: Any, vector: Tensor) -> Tensor:
            return (main_output(output(means, given))[0] * vector).sum()

        self.each = {False: grad(score), True: grad(along)}
        self.can_batch = True

    def __call__(
        self, means: dict[str, Tensor], given: Any, what: Any, *, along: bool
    ) -> dict[str, Tensor]:
        each = self.each[along]
        if self.can_batch:
            try:
                found = vmap(each, in_dims=(None, 0, 0))(means, given, what)
                return {name: _sum(value) for name, value in found.items()}
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                logger.info("vmap cannot batch this forward (%s): one example at a time.", error)
                self.can_batch = False
        total: dict[str, Tensor] = {}
        size = len(next(t for t in pytree.tree_leaves(what) if isinstance(t, Tensor)))
        for i in range(size):
            one = pytree.tree_map(lambda t, i=i: t[i], (given, what))
            for name, value in each(means, *one).items():
                square = value.square()
                total[name] = total[name] + square if name in total else square
        return total


def _sum(gradients: Tensor) -> Tensor:
    """Sum over the examples of their squared gradients."""
    return gradients.square().sum(0)


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
