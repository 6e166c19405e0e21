"""The largest spread of the weights at which draws keep the function of the means."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .. import gaussian
from ..errors import ArgumentError
from ..likelihoods import main_output
from ..numeric import positive, real
from ..posterior import bayesian_sites
from ..scope import as_seed, at_mean
from .given import Given
from .running import Draws, check_batch, check_samples, evaluating
from .summaries import class_logits


def calibrate_(
    model: nn.Module,
    batch: Any,
    *,
    target_agreement: float = 0.99,
    target_change: float | None = None,
    num_samples: int = 8,
    seed: int = 0,
) -> float:
    """Scale every sigma by one factor: the largest at which draws keep the function of the means.

    The factor is found by bisection to within 3 %, with the same noise at every factor.

    Args:
        model: A converted model; only its log variances change.
        batch: The input tensor, or a tuple of the model's positional arguments.
        target_agreement: For logits (batch, classes): at least this share, in (0, 1], of the
            drawn outputs has the largest class of the means' output.
        target_change: For any other output, instead of the agreement: the root mean square of
            ``output - output at the means`` is at most this share of that of the means' output.
        num_samples: Number of draws that are compared with the means, at least 1.
        seed: Of those draws.

    Returns:
        The factor by which every sigma was multiplied.

    Raises:
        ArgumentError: An argument has a value that cannot work, or no factor from 2**-20 to 2**20
            meets the target. Upon any error the log variances are as they were.
        UnsupportedModuleError: ``model`` has no posterior.

    >>> import torch, bayesify
    >>> model = bayesify.to_bbb(torch.nn.Linear(3, 2), initial_std=1.0)
    >>> calibrate_(model, torch.randn(64, 3)) < 1.0
    True
    """
    target_agreement = real(
        "calibrate_: target_agreement", target_agreement, "in (0, 1]", lambda v: 0.0 < v <= 1.0
    )
    if target_change is not None:
        expected = "a positive finite number"
        target_change = real("calibrate_: target_change", target_change, expected, positive)
    num_samples = check_samples("calibrate_", num_samples)
    found = bayesian_sites(model)
    inputs = batch if isinstance(batch, tuple) else (batch,)
    check_batch("calibrate_", inputs)
    base = int(as_seed(seed))
    kept = [site.raw.detach().clone() for site in found]
    held = [site.held for site in found]

    def scale(factor: float) -> None:
        for site, raw, fixed in zip(found, kept, held, strict=True):
            kind = site.slot.parameterization
            logvar = gaussian.logvar_from_raw(raw, kind) + 2.0 * math.log(factor)
            scaled = gaussian.raw_from_logvar(logvar, kind)
            site.raw.copy_(scaled if fixed is None else torch.where(fixed, raw, scaled))

    with torch.no_grad(), evaluating(model):
        with at_mean(model):
            reference = main_output(Given(inputs).call(model))
        if target_change is None:
            class_logits(
                reference,
                "calibrate_: target_agreement",
                "Give target_change=0.05, say, for any other output.",
            )

        def keeps(exponent: float) -> bool:
            scale(2.0**exponent)
            outputs = Draws(model, num_samples, base).outputs(inputs, {})
            compared = [main_output(output) for output in outputs]
            if target_change is None:
                labels = reference.argmax(-1)
                shares = [(c.argmax(-1) == labels).double().mean().item() for c in compared]
                return sum(shares) / num_samples >= target_agreement
            changes = [(c.double() - reference.double()).square().mean().item() for c in compared]
            scale_of = reference.double().square().mean().item()
            return sum(changes) / num_samples <= target_change**2 * scale_of

        try:
            exponent = _largest(keeps)
            scale(2.0**exponent)
        except BaseException:
            for site, raw in zip(found, kept, strict=True):
                site.raw.copy_(raw)
            raise
    return float(2.0**exponent)


def _largest(keeps: Callable[[float], bool]) -> float:
    """The largest exponent of two that ``keeps``, to within 0.04."""
    grows = keeps(0.0)
    edge = 0.0
    while keeps(edge + 1.0 if grows else edge - 1.0) == grows:
        edge += 1.0 if grows else -1.0
        if abs(edge) == 20.0:
            raise ArgumentError(
                "calibrate_: the output does not depend on the drawn weights: no factor up to "
                "2**20 misses the target."
                if grows
                else "calibrate_: no factor down to 2**-20 meets the target. Does the output hold "
                "NaN or ties, or random numbers of the model's own?"
            )
    low, high = (edge, edge + 1.0) if grows else (edge - 1.0, edge)
    while high - low > 0.04:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low
