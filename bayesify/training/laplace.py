"""A posterior without training: the diagonal Laplace approximation around the given weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import gaussian
from ..classes import classes_of, name_classes_
from ..data import ImageData
from ..errors import ArgumentError
from ..likelihoods import Categorical, Likelihood, set_likelihood_
from ..models import InputConfig
from ..posterior import Site, bayesian_sites, gaussian_prior
from ..priors import GaussianPrior
from ..settings.fields import documented, taken
from ..settings.training import Augment, FisherKind, LaplaceSettings, Reading
from .batches import (
    Data,
    batches_in_order,
    check_data,
    config_for,
    device_of,
    split,
)
from .examples import Inputs
from .fisher import fisher_diagonal
from .holdout import held_out_loss
from .matching import by_name
from .readable import readable
from .task import likelihood_for

_EXPONENTS = tuple(0.5 * i for i in range(14, -1, -1))
"""Exponents of ten of the prior precisions that held-out examples are asked for, times 1/RMS**2."""


@dataclass(frozen=True)
class LaplaceResult:
    """What :func:`fit_laplace_` found.

    Args:
        prior_precision: Factor on the precision of the model's prior, which it now has.
        num_data: Training examples N, without those held out.
        examples: Examples that the Fisher information is a mean of.
        mean_std: Mean of the posterior standard deviations.
        log_marginal_likelihood: Per training example, in nats, up to the fit of the means; None
            where it was not asked for.
        tried: Pairs of prior precision and held-out loss, where that chose.
        seconds: Wall time.
        unreadable: Images that were left out because they cannot be read.
    """

    prior_precision: float
    num_data: int
    examples: int
    mean_std: float
    log_marginal_likelihood: float | None
    tried: tuple[tuple[float, float], ...]
    seconds: float
    unreadable: int = 0


# long: a third of it is its arguments
@documented(LaplaceSettings, Reading)
def fit_laplace_(  # noqa: D417 - the others are fields of LaplaceSettings and Reading
    model: nn.Module,
    train: Data,
    *,
    likelihood: Likelihood | Mapping[Any, Likelihood] | None = None,
    inputs: Inputs | None = None,
    fisher: FisherKind = LaplaceSettings.fisher,
    prior_precision: float | Literal["holdout", "marglik"] = LaplaceSettings.prior_precision,
    temperature: float = LaplaceSettings.temperature,
    holdout: float = LaplaceSettings.holdout,
    augment: Augment = LaplaceSettings.augment,
    max_examples: int | None = LaplaceSettings.max_examples,
    batch_size: int = LaplaceSettings.batch_size,
    seed: int = LaplaceSettings.seed,
    device: torch.device | str | None = None,
    model_config: InputConfig | None = None,
    workers: int = Reading.workers,
    skip_unreadable: bool = Reading.skip_unreadable,
    on_look: Callable[[int, int], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> LaplaceResult:
    r"""Set every log variance from one pass of Fisher information; the means stay as they are.

    .. math:: \sigma_i^2 = T \, / \, (N F_{ii} + \lambda / v_i)

    with N training examples, the prior's variance :math:`v_i`, one factor :math:`\lambda` for all
    weights and a temperature T. It takes a model at (or near) a minimum of the negative log
    likelihood with the prior.

    Args:
        model: A converted model whose priors are Gaussian.
        train: As in :func:`fit`, a data set.
        likelihood: What the outputs mean; None takes that of the model, or else
            :class:`Categorical` for class numbers (batch,). The model keeps it.
        inputs: As in :func:`fit`.
        device: Where the model is moved to; None leaves it where it is.
        model_config: As in :func:`fit`.
        on_look: As in :func:`fit`.
        on_step: Gets the number of examples done and of all, after every batch.

    Returns:
        A :class:`LaplaceResult`. The model is left in ``eval()``.

    Raises:
        ArgumentError: An argument has a value that cannot work, a prior is not Gaussian, or the
            outputs or targets do not fit the likelihood, or it has no closed form of the curvature
            that ``"exact"`` needs. Upon any error the log variances are as they were.
        UnsupportedModuleError: ``model`` has no posterior.

    Reference:
        MacKay, 1992, Neural Computation 4(3), sections 2 and 4; Ritter, Botev, Barber, 2018,
        https://openreview.net/forum?id=Skdvd2xAZ; Daxberger et al., 2021, arXiv:2106.14806.

    >>> import torch, bayesify
    >>> data = torch.utils.data.TensorDataset(torch.randn(20, 2), torch.randint(3, (20,)))
    >>> model = bayesify.to_bbb(torch.nn.Linear(2, 3))
    >>> bayesify.fit_laplace_(model, data, prior_precision=1.0).prior_precision
    1.0
    """
    started = time.perf_counter()
    settings, reading = taken(LaplaceSettings, locals()), taken(Reading, locals())
    check_data(train)
    meaning, _ = likelihood_for(model, likelihood, None)
    found = bayesian_sites(model)
    for site in found:
        if not isinstance(site.slot.prior, GaussianPrior):
            raise ArgumentError(
                f"fit_laplace_ needs Gaussian priors; that of {site.name!r} is {site.slot.prior}. "
                "Set another with set_prior_(model, GaussianPrior(1.0))."
            )
    train, unreadable = readable(
        train, workers=reading.workers, skip=reading.skip_unreadable, on_look=on_look
    )
    size = check_data(train)
    train = by_name(train, model)
    target = device_of(model) if device is None else torch.device(device)
    model.to(target)
    config = config_for(train, model, model_config)
    prior_precision, seed = settings.prior_precision, settings.seed
    by_holdout = prior_precision == "holdout"
    indices, held = split(size, settings.holdout if by_holdout else 0.0, seed)
    num_data = len(indices)
    wanted = settings.max_examples
    if wanted is not None and wanted < num_data:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(num_data, generator=generator)[:wanted].tolist()
        indices = sorted(indices[i] for i in chosen)
    common: dict[str, Any] = {
        "batch_size": settings.batch_size, "model_config": config, "workers": reading.workers,
    }  # fmt: skip
    batches = batches_in_order(train, indices=indices, **common)
    told = on_step

    def on_batch(done: int) -> None:
        if told is not None:
            told(done, len(indices))

    information, examples = fisher_diagonal(
        model,
        batches,
        settings.fisher,
        device=target,
        seed=seed,
        likelihood=meaning,
        inputs=inputs,
        on_batch=on_batch,
    )
    terms = [_Term.of(site, num_data * information[site.name]) for site in found]
    kept = [site.raw.detach().clone() for site in found]
    evidence: float | None = None
    tried: list[tuple[float, float]] = []
    try:
        if prior_precision == "marglik":
            scale, evidence = _most_likely(terms)
            evidence /= num_data
        elif by_holdout:
            check = batches_in_order(
                train, indices=held, augment=settings.augment, seed=seed, **common
            )

            def measure(precision: float) -> float:
                _set(terms, precision, settings.temperature)
                return held_out_loss(
                    model, check, meaning or Categorical(), target, False, seed, inputs
                )

            tried = _search(measure, terms)
            scale = min(tried, key=lambda pair: pair[1])[0]
        else:
            assert isinstance(prior_precision, float)
            scale = prior_precision
        _set(terms, scale, settings.temperature)
    except BaseException:
        with torch.no_grad():
            for site, raw in zip(found, kept, strict=True):
                site.raw.copy_(raw)
        raise
    for site in found:
        prior = site.slot.prior
        assert isinstance(prior, GaussianPrior)
        site.slot.prior = replace(prior, std=prior.std / math.sqrt(scale))
    set_likelihood_(model, meaning or Categorical())
    classifies = meaning is None or isinstance(meaning, Categorical)
    if classifies and isinstance(train, ImageData) and classes_of(model) is None:
        name_classes_(model, train.classes)
    model.eval()
    with torch.no_grad():
        stds = [site.std.double().sum().item() for site in found]
    weights = max(1, sum(site.weights for site in found))
    return LaplaceResult(
        prior_precision=scale,
        num_data=num_data,
        examples=examples,
        mean_std=sum(stds) / weights,
        log_marginal_likelihood=evidence,
        tried=tuple(tried),
        seconds=time.perf_counter() - started,
        unreadable=len(unreadable),
    )


@dataclass
class _Term:
    """One posterior tensor: the data's part of its precision, and its prior at factor 1."""

    site: Site
    data_precision: Tensor
    prior_precision: Tensor | float
    square: float  # sum of prior precision times squared distance from the prior's mean
    log_prior: float  # sum of the logs of the prior precisions
    held: Tensor | None

    @classmethod
    def of(cls, site: Site, data_precision: Tensor) -> _Term:
        mean, var = gaussian_prior(site)
        precision = 1.0 / var
        held = site.held
        wide = data_precision.dtype
        distance = (site.mean.detach().to(wide) - mean).square() * precision
        one = torch.ones_like(data_precision)
        if held is not None:
            distance, one = distance.masked_fill(held, 0.0), one.masked_fill(held, 0.0)
        log_prior = float((one * math.log(precision)).sum()) if isinstance(precision, float) else 0
        return cls(site, data_precision, precision, float(distance.sum()), float(log_prior), held)

    def precision(self, scale: float) -> Tensor:
        return self.data_precision + scale * self.prior_precision

    def log_determinant(self, scale: float) -> float:
        logs = self.precision(scale).log()
        return float(logs.sum() if self.held is None else logs.masked_fill(self.held, 0).sum())

    def count(self) -> int:
        left = self.data_precision.numel()
        return left if self.held is None else left - int(self.held.sum())


def _set(terms: list[_Term], scale: float, temperature: float) -> None:
    """Give the posterior the variances that belong to a prior."""
    with torch.no_grad():
        for term in terms:
            logvar = math.log(temperature) - term.precision(scale).log()
            raw = gaussian.raw_from_logvar(logvar, term.site.slot.parameterization)
            if term.held is not None:
                raw = torch.where(term.held, term.site.raw.to(raw.dtype), raw)
            term.site.raw.copy_(raw)


def _most_likely(terms: list[_Term]) -> tuple[float, float]:
    """The factor of the largest marginal likelihood and its logarithm, up to that of the means.

    ``log Z = log p(D|mean) - (scale * square - log|scale * prior| + log|posterior|) / 2``.
    """
    count = sum(term.count() for term in terms)
    square = sum(term.square for term in terms)
    log_prior = sum(term.log_prior for term in terms)

    def evidence(exponent: float) -> float:
        scale: float = 10.0**exponent
        posterior = sum(term.log_determinant(scale) for term in terms)
        return -0.5 * (scale * square - log_prior - count * math.log(scale) + posterior)

    best = max((float(e) for e in range(-6, 13)), key=evidence)
    step = 0.5
    while step > 1e-3:  # ever closer around the best power of ten
        best = max((best - step, best, best + step), key=evidence)
        step /= 2
    found: float = 10.0**best
    return found, evidence(best)


def _search(measure: Callable[[float], float], terms: list[_Term]) -> list[tuple[float, float]]:
    """Factors from that of a narrow posterior on, until the held-out loss has twice risen by 1 %.

    Narrow posteriors differ by less, and a rise among them is chance.
    """
    count = sum(term.count() for term in terms)
    unit = count / max(sum(term.square for term in terms), 1e-30)  # 1 / mean square, in prior units
    tried: list[tuple[float, float]] = []
    worse = 0
    for exponent in _EXPONENTS:
        tried.append((unit * 10.0**exponent, measure(unit * 10.0**exponent)))
        worse = worse + 1 if tried[-1][1] > 1.01 * min(loss for _, loss in tried) else 0
        if worse == 2:
            break
    return tried
