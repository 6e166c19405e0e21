"""The estimators by name, and what generated code calls to run one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from .. import torch_private
from ..errors import ArgumentError
from ..posterior import given, tensors_of
from .posterior import Posterior, slot_of

Operation = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""The operation of a layer, given an input, a weight and a bias."""
Lookup = Callable[[Tensor], Tensor]
"""The lookup of an embedding, given a table of the shape of its weight."""
OnLinear = Callable[[Operation, Tensor, Posterior, Posterior | Tensor | None], Tensor]
OnEmbedding = Callable[[Lookup, Posterior], Tensor]


class Registered(NamedTuple):
    """One estimator: what it does in the place of each kind of operation, None where nothing."""

    linear: OnLinear | None
    embedding: OnEmbedding | None


_ESTIMATORS: dict[str, Registered] = {}


def register_estimator(
    name: str, *, linear: OnLinear | None = None, embedding: OnEmbedding | None = None
) -> None:
    r"""Add an estimator, for ``to_bbb(model, estimator=name)``.

    An estimator computes the output of an operation that reads a weight, without the weight being
    drawn as a whole. What it computes must have, for each example, the distribution that

    .. math:: y = f(x, \mu_w + \sigma_w \epsilon_w, \mu_b + \sigma_b \epsilon_b),
              \qquad \epsilon \sim N(0, I)

    has, at least in mean and variance of each element: prediction and ELBO take it for that. It
    reads the parameters through its :class:`Posterior` arguments, so that gradients reach
    mean and spread, and takes all noise from :meth:`Posterior.noise` or :meth:`Posterior.deviation`
    and never from torch's generator, so that it is a function of the scope's seed.

    Weights that are read by other operations, or by more than one, are drawn whole.

    Args:
        name: What users choose it by, also in a file of a model: an identifier.
        linear: In the place of ``F.linear`` and of each convolution: a function of ``operation``,
            ``input``, ``weight`` and ``bias``. ``operation(input, weight, bias)`` is the layer's
            own, with its stride, padding and groups, and linear in all three; call it with tensors
            of the shapes of the parameters. ``bias`` is a :class:`Posterior`, or a tensor where it
            is drawn whole or has no posterior, or None. None draws these weights whole.
        embedding: In the place of ``F.embedding``: a function of ``lookup`` and ``weight``.
            ``lookup(table)`` looks the indices of the call up. None draws these weights whole.

    Shape:
        - ``input``: (batch, ...), an example being an index of the first dimension, or one example.
        - ``weight.mean``: (out, in), (out, in / groups, \*kernel); of a transposed convolution
          (in, out / groups, \*kernel); of an embedding (rows, columns).
        - ``bias.mean``: (out,).
        - Gives: that of ``operation(input, weight.mean, bias.mean)`` or ``lookup(weight.mean)``.

    Raises:
        ArgumentError: The name is no identifier or is taken, or no function was given.

    >>> def shared(operation, input, weight, bias):  # the draw itself, as "weight" has it
    ...     bias = bias.draw() if isinstance(bias, Posterior) else bias
    ...     return operation(input, weight.mean + weight.deviation(), bias)
    >>> register_estimator("shared", linear=shared)
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ArgumentError(
            f"An estimator's name must be an identifier, such as 'local', got {name!r:.60}."
        )
    if name == "weight" or name in _ESTIMATORS:
        raise ArgumentError(
            f"An estimator is called {name!r} already. Take another name: files of models that "
            "name it would run another estimator than they were trained with."
        )
    functions = [function for function in (linear, embedding) if function is not None]
    if not functions or not all(map(callable, functions)):
        raise ArgumentError(
            f"Estimator {name!r} needs a function for linear=, for embedding=, or for both, got "
            f"{linear!r:.60} and {embedding!r:.60}."
        )
    _ESTIMATORS[name] = Registered(linear, embedding)


class UnknownEstimatorError(ArgumentError):
    """A name that no estimator has; a file of a model may come with one."""

    def __init__(self, name: object) -> None:
        *first, last = (repr(known) for known in ("weight", *_ESTIMATORS))
        super().__init__(
            f"No estimator is called {name!r:.60}: there are {', '.join(first)} and {last}. One "
            "of your own must be registered by bayesify.register_estimator before its name is "
            "used, in every process."
        )


def registered(name: str) -> Registered:
    """The estimator of that name.

    Raises:
        UnknownEstimatorError: None is registered under it.
    """
    found = _ESTIMATORS.get(name)
    if found is None:
        raise UnknownEstimatorError(name)
    return found


def check_estimator(name: Any) -> str:
    """A name under which weights can be drawn: a registered one, or ``"weight"``.

    Raises:
        UnknownEstimatorError: It is no such name.
    """
    if isinstance(name, str) and (name == "weight" or name in _ESTIMATORS):
        return name
    raise UnknownEstimatorError(name)


# -- what generated code calls -----------------------------------------------------------------


def estimate(
    name: str, operation: Callable[..., Tensor], module: nn.Module, weight: str,
    bias: str | Tensor | None, input: Tensor, *args: Any, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Run an estimator in the place of a linear operation.

    A weight that stands in the place of the posterior, as ``functional_call`` puts it there, is
    used as it is.

    Args:
        name: Of the estimator.
        operation: The function of torch.
        module: It holds weight and bias.
        weight: Attribute of the weight.
        bias: Attribute of the bias, or the bias itself.
        input: That of the operation.
        *args: What follows the bias.
        **kwargs: Further arguments of the operation.
    """

    def run(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return operation(input, weight, bias, *args, **kwargs)

    here = _given_or_posterior(module, bias) if isinstance(bias, str) else bias
    found = given(module, weight, slot_of(module, weight))
    if found is not None:
        return run(input, found, here.draw() if isinstance(here, Posterior) else here)
    linear = registered(name).linear
    assert linear is not None  # the pass has asked
    return linear(run, input, _posterior(module, weight), here)


def estimate_embedding(
    name: str, module: nn.Module, weight: str, input: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Run an estimator in the place of a lookup; arguments as of :func:`estimate`."""
    slot = slot_of(module, weight)
    found = given(module, weight, slot)
    if found is not None:
        return F.embedding(input, found, *args, **kwargs)

    def lookup(table: Tensor) -> Tensor:
        # the fallback of a module around this one must not exchange the mean for a draw
        with torch_private.DisableTorchFunction():
            return F.embedding(input, table, *args, **kwargs)

    embedding = registered(name).embedding
    assert embedding is not None  # the pass has asked
    with torch_private.DisableTorchFunction():
        # themselves, not views: their gradients may be sparse
        tensors = tensors_of(module, weight, slot)
    return embedding(lookup, Posterior(module, weight, slot, tensors))


def _given_or_posterior(module: nn.Module, attribute: str) -> Tensor | Posterior:
    found = given(module, attribute, slot_of(module, attribute))
    return _posterior(module, attribute) if found is None else found


def _posterior(module: nn.Module, attribute: str) -> Posterior:
    slot = slot_of(module, attribute)
    mean, raw = tensors_of(module, attribute, slot)
    # under another name: the fallback of a module around this one exchanges the mean for a draw
    with torch_private.DisableTorchFunction():
        return Posterior(module, attribute, slot, (mean.view_as(mean), raw))
