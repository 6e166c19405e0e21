"""Flipout: one draw for the whole batch, with random signs for each example."""

from __future__ import annotations

import torch
from torch import Tensor

from .posterior import Posterior
from .registry import Lookup, Operation, register_estimator

_IN, _OUT = 2, 3  # streams of noise


def linear(
    operation: Operation, input: Tensor, weight: Posterior, bias: Posterior | Tensor | None
) -> Tensor:
    r"""One shared deviation of the weights, with random signs for each example.

    .. math:: y_n = x_n \mu_w + \mu_b + \big((x_n \circ s_n)\, \Delta_w + \Delta_b\big) \circ r_n

    The signs are those of channels: within one example the weights are the same everywhere, so
    that the joint distribution of all outputs of an example is exact. They belong to the scope:
    a layer that is called twice on one batch has the same weights for each example.

    Reference:
        Wen, Vicol, Ba, Tran and Grosse, 2018, arXiv:1803.04386, section 3.1, equation 4.
    """
    deviation = weight.deviation()
    shift, of_bias = (bias.mean, bias.deviation()) if isinstance(bias, Posterior) else (bias, None)
    axis = 1 - weight.mean.dim()  # of the channels: spatial dimensions come after them
    center = operation(input, weight.mean, shift)
    deviating = operation(input * _signs(weight, _IN, input, axis), deviation, of_bias)
    return torch.addcmul(center, deviating, _signs(weight, _OUT, center, axis))


def embedding(lookup: Lookup, weight: Posterior) -> Tensor:
    """Look up one shared deviation, with random signs of the columns for each example."""
    deviation = weight.deviation()
    center, deviating = lookup(weight.mean), lookup(deviation)
    return torch.addcmul(center, deviating, _signs(weight, _OUT, center, -1))


def _signs(weight: Posterior, stream: int, tensor: Tensor, axis: int) -> Tensor:
    """A sign for each channel, anew for each index of the first dimension if there is one more."""
    size = [1] * tensor.dim()
    size[axis] = tensor.shape[axis]
    if tensor.dim() > -axis:
        size[0] = tensor.shape[0]
    normal = weight.noise(size, torch.float32, tensor.device, stream)
    return torch.ones_like(normal).copysign(normal).to(tensor.dtype)


register_estimator("flipout", linear=linear, embedding=embedding)
