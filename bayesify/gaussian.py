"""Closed forms of a Gaussian with independent weights: the reference of everything above."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Parameterization = Literal["exp", "softplus"]
HELD = -2048.0
"""A trained spread below this is that of a pruned or fixed weight, where a tensor has such.

Sigma is 0, also in float64, by exp and by softplus. The kernels have the same number.
"""


def draw(mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """Reparameterised draw ``w = mean + std * noise``.

    Args:
        mean: Posterior mean.
        std: Posterior standard deviation, broadcast against ``mean``.
        noise: Standard normal noise of ``mean``'s shape.

    Returns:
        A tensor of ``mean``'s shape and dtype, differentiable in ``mean`` and ``std``.

    Reference:
        Kingma and Welling, 2014, arXiv:1312.6114, section 2.4; Blundell et al., 2015,
        arXiv:1505.05424, section 3.2.
    """
    return (mean.to(noise.dtype) + std.to(noise.dtype) * noise).to(mean.dtype)


def std_from_raw(raw: Tensor, parameterization: Parameterization) -> Tensor:
    """Standard deviation from the trained parameter: ``exp(raw / 2)`` or ``softplus(raw)``."""
    return torch.exp(0.5 * raw) if parameterization == "exp" else F.softplus(raw)


def var_from_raw(raw: Tensor, parameterization: Parameterization) -> Tensor:
    """Variance from the trained parameter: ``exp(raw)`` or ``softplus(raw) ** 2``."""
    return torch.exp(raw) if parameterization == "exp" else F.softplus(raw).square()


def logvar_from_raw(raw: Tensor, parameterization: Parameterization) -> Tensor:
    """Log of the variance from the trained parameter."""
    return raw if parameterization == "exp" else 2.0 * torch.log(F.softplus(raw))


def raw_from_logvar(logvar: Tensor, parameterization: Parameterization) -> Tensor:
    """The trained parameter that gives ``logvar``; inverse of :func:`logvar_from_raw`."""
    if parameterization == "exp":
        return logvar
    std = torch.exp(0.5 * logvar)
    # log(expm1(s)) without cancellation for small s or overflow for large s
    return std + torch.log(-torch.expm1(-std))


def kl_divergence(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | float,
    prior_var: Tensor | float,
    *,
    held: Tensor | None = None,
) -> Tensor:
    r"""KL divergence from N(mean, exp(logvar)) to N(prior_mean, prior_var), summed.

    .. math:: \mathrm{KL} = \tfrac12 \sum_i \left( \frac{e^{\ell_i} + (\mu_i - m_i)^2}{v_i}
              - 1 + \log v_i - \ell_i \right)

    Args:
        mean: Posterior mean.
        logvar: Log of the posterior variance, of ``mean``'s shape.
        prior_mean: Mean of the prior, broadcast against ``mean``.
        prior_var: Variance of the prior, broadcast against ``mean``; positive.
        held: Weights that do not count.

    Returns:
        A scalar in nats, in float32 or better.

    Reference:
        Kingma and Welling, 2014, arXiv:1312.6114, appendix B.
    """
    dtype = torch.promote_types(torch.promote_types(mean.dtype, logvar.dtype), torch.float32)
    mean, logvar = mean.to(dtype), logvar.to(dtype)
    log_prior_var: Tensor | float
    if isinstance(prior_var, Tensor):
        prior_var = prior_var.to(dtype)
        log_prior_var = torch.log(prior_var)
    else:
        log_prior_var = math.log(prior_var)
    if isinstance(prior_mean, Tensor):
        prior_mean = prior_mean.to(dtype)
    log_ratio = logvar - log_prior_var
    # expm1(r) - r keeps its precision where posterior and prior nearly agree
    terms = (mean - prior_mean).square() / prior_var + torch.expm1(log_ratio) - log_ratio
    if held is not None:
        terms = terms.masked_fill(held, 0.0)
    return 0.5 * terms.sum()


def log_density(value: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """Elementwise log density of N(mean, std**2) at ``value``, in nats."""
    log_std = torch.log(std) if isinstance(std, Tensor) else math.log(std)
    return -0.5 * ((value - mean) / std).square() - log_std - 0.5 * math.log(2.0 * math.pi)


def signal_to_noise(mean: Tensor, std: Tensor) -> Tensor:
    """Signal-to-noise ratio ``|mean| / std`` of each weight (Blundell et al., 2015, section 5).

    Of a pruned weight, where both are 0, it is 0.
    """
    return (mean.abs() / std).masked_fill(mean == 0, 0.0)
