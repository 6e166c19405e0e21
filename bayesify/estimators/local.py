"""Local reparameterisation: the outputs are drawn, each element by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from .posterior import Posterior
from .registry import Lookup, Operation, register_estimator


def linear(
    operation: Operation, input: Tensor, weight: Posterior, bias: Posterior | Tensor | None
) -> Tensor:
    r"""Draw the output of a linear operation rather than its weight.

    .. math:: y = x \mu_w + \mu_b + \sqrt{x^2 \sigma_w^2 + \sigma_b^2}\, \epsilon

    Every element has noise of its own. Over the positions of an image, or the tokens of a
    sentence, weights thus differ, where one draw of the weight has them in common: the
    distribution of each element is exact, the covariance between positions is left out.

    Reference:
        Kingma, Salimans and Welling, 2015, arXiv:1506.02557, section 2.3, equation 6.
    """
    shift, shift_var = (bias.mean, bias.var) if isinstance(bias, Posterior) else (bias, None)
    center = operation(input, weight.mean, shift)
    half = center.dtype == torch.float16  # squares of small numbers are zero there
    dtype = torch.float32 if half else weight.mean.dtype
    var = weight.var.to(dtype)
    shift_var = None if shift_var is None else shift_var.to(dtype)
    if half:
        with torch.autocast(center.device.type, enabled=False):
            variance = operation(input.float().square(), var, shift_var)
    else:
        variance = operation(input.square(), var, shift_var)
    # not 0, where a square root has no gradient; nor less, which fast convolutions can give
    std = variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt().to(center.dtype)
    return torch.addcmul(center, std, weight.noise(center.shape, center.dtype, center.device))


def embedding(lookup: Lookup, weight: Posterior) -> Tensor:
    """Draw the rows that are looked up, one by one; nothing is drawn of the others."""
    center = lookup(weight.mean)
    std = weight.std_of(lookup(weight.spread)).to(center.dtype)
    return torch.addcmul(center, std, weight.noise(center.shape, center.dtype, center.device))


register_estimator("local", linear=linear, embedding=embedding)
