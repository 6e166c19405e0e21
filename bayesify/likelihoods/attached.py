"""The likelihood that a model keeps, beside its modules and not among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import ArgumentError
from .categorical import Categorical
from .heads import Heads
from .likelihood import Likelihood

KEPT = "_bayesify_likelihood"

CHOICES = (
    "likelihood=Gaussian() for real numbers, Bernoulli() for yes or no, Categorical(dim=...) for "
    "classes, FromDistribution(f) for any other distribution (bayesify.likelihoods)"
)


def set_likelihood_(
    model: nn.Module, likelihood: Likelihood | Mapping[Any, Likelihood] | None
) -> nn.Module:
    """Say what the outputs of a model mean; :func:`bayesify.fit` does so too.

    The model keeps the likelihood, but not among its modules: its parameters are in neither
    ``model.parameters()`` nor ``state_dict()``, :func:`bayesify.param_groups` gives them a group of
    their own, and :func:`bayesify.save` writes them beside the posterior.

    Args:
        model: Converted or not; of a compiled model, or one inside DistributedDataParallel, the
            model itself keeps it.
        likelihood: A likelihood, a mapping from outputs to likelihoods (:class:`Heads`), or None
            for none.

    Returns:
        ``model``.

    Raises:
        ArgumentError: ``likelihood`` is no such thing.

    >>> import bayesify
    >>> from bayesify.likelihoods import Gaussian
    >>> model = set_likelihood_(bayesify.to_bbb(nn.Linear(2, 1)), Gaussian("learned", outputs=1))
    >>> likelihood_of(model)
    Gaussian(noise='learned', dim=-1)
    """
    inner = _inside(model)
    if likelihood is None:
        inner.__dict__.pop(KEPT, None)
    else:
        inner.__dict__[KEPT] = as_likelihood(likelihood)
    return model


def likelihood_of(model: nn.Module) -> Likelihood | None:
    """What the outputs of a model mean; None where nothing says it."""
    found: Likelihood | None = _inside(model).__dict__.get(KEPT)
    return found


def temperature_of(model: nn.Module) -> float:
    """What a model's logits of classes are divided by; 1 where nothing says it."""
    found = likelihood_of(model)
    return found.temperature if isinstance(found, Categorical) else 1.0


def as_likelihood(value: Any) -> Likelihood:
    """A likelihood as it is, a mapping of some as :class:`Heads`.

    Raises:
        ArgumentError: It is neither.
    """
    if isinstance(value, Likelihood):
        return value
    if isinstance(value, Mapping):
        return Heads(value)
    given = f"the class {value.__name__}, without ()" if isinstance(value, type) else repr(value)
    raise ArgumentError(f"A likelihood is needed: {CHOICES}; got {given:.200}.")


def _inside(model: Any) -> Any:
    """The model inside a compiled or a data-parallel one."""
    inner = getattr(model, "_orig_mod", model)
    parallel = isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel)
    return inner.module if parallel else inner
