"""Settings of :func:`bayesify.fit` and :func:`bayesify.fit_laplace_`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from .fields import (
    Count,
    NotNegative,
    PartShare,
    Positive,
    Seed,
    Share,
    Shown,
    SkipUnreadable,
    Whole,
    Within,
    checked,
    refuse,
)

KLReduction = Literal["num_data", "num_weights", "sum"]
KLShape = Literal["linear", "cosine"]
AugmentName = Literal["none", "flip-crop", "resized-crop", "rand-augment"]
Augment = AugmentName | Callable[[Any], Any]
FisherKind = Literal["mc", "exact", "empirical"]

_RATES = Shown(panel="Learning rates and KL")
_DATA = Shown(panel="Data and draws")


@dataclass(frozen=True)
class Reading:
    """How a fit reads its data.

    Args:
        workers: Processes that read the data.
    """

    workers: Whole = 0
    skip_unreadable: SkipUnreadable = False

    def __post_init__(self) -> None:
        refuse("fit", checked(self))


@dataclass(frozen=True, kw_only=True)
class _Common:
    """What both ways of fitting have.

    Args:
        batch_size: Examples in a batch.
        augment: Random changes of the images.

            They are those of an ``ImageData``: ``"none"``, ``"flip-crop"``, ``"resized-crop"``,
            ``"rand-augment"``, or a callable from a stored image to another, uint8 (C, H, W), such
            as any composition of torchvision's v2 transforms.
        seed: Seed of all that is random: batches, draws, augmentation and dropout.
    """

    batch_size: Annotated[Count, Shown(letter="-b")] = 128
    augment: Annotated[Augment, _DATA] = "none"
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class FitSettings(_Common):
    """The settings of :func:`bayesify.fit`.

    Args:
        epochs: Passes over the data.
        lr: Highest learning rate of means and deterministic parameters.
        logvar_lr: Highest learning rate of the log variances. By default ``10 * lr``.

            Adam moves a log variance by no more than about its rate in a step; the result's
            ``logvars`` says how far they came.
        kl_weight: The factor beta before the KL. Below 1 the posterior is tempered.
        kl_reduction: What the KL is divided by (the factor s): training examples, weights, or
            nothing.

            See :func:`bayesify.elbo_loss`.
        kl_warmup: Share of the run in which beta rises from 0.
        kl_shape: How beta rises.
        warmup: Share of the run in which the learning rates rise linearly. Then they fall to 0 as a
            cosine.
        weight_decay: Of AdamW, on means alone. The prior pulls them too: leave it at 0 with a KL.
        max_grad_norm: Gradients are scaled down to this norm. With inf they never are.
        average: Share of the run, at its end, over whose steps the weights are averaged.

            Of T steps the model gets :math:`\\frac1n \\sum_{t=T-n+1}^T \\theta_t`, n being that
            share of T, for means and log variances alike; at 0 it gets :math:`\\theta_T`. Held-out
            losses are those of the average as far as it has come.
        draws_per_step: Draws of the weights whose losses a step averages, one after the other.
        accumulate: Batches whose losses a step averages, each with draws of its own.

            A step takes ``accumulate * batch_size`` examples in the memory of one batch.
        holdout: Share of the training examples that is held out. The weights of the epoch with the
            least loss there are kept. Examples that the given weights have seen test nothing.
        patience: Stop after so many epochs without a lower held-out loss. By default never.
        freeze_batchnorm: BatchNorm keeps and uses the running statistics that it has.

            It normalises as in ``eval()``: for the fine-tuning of a pretrained network.
        amp: Autocast to bfloat16, where that is safe.

            Means, log variances and KL stay in float32. A processor without bfloat16 arithmetic is
            slower with it; a warning says so.
    """

    epochs: Count = 10
    lr: Annotated[Positive, _RATES] = 1e-3
    logvar_lr: Annotated[NotNegative | None, _RATES] = None
    kl_weight: Annotated[NotNegative, _RATES] = 1.0
    kl_reduction: Annotated[KLReduction, _RATES] = "num_data"
    kl_warmup: Annotated[Share, _RATES] = 0.0
    kl_shape: Annotated[KLShape, _RATES] = "linear"
    warmup: Annotated[PartShare, _RATES] = 0.05
    weight_decay: Annotated[NotNegative, _RATES] = 0.0
    max_grad_norm: Annotated[float, Within(above=0, finite=False), _RATES] = 1.0
    average: Annotated[Share, _RATES] = 0.0
    draws_per_step: Annotated[Count, _DATA] = 1
    accumulate: Annotated[Count, _DATA] = 1
    holdout: Annotated[PartShare, _DATA] = 0.0
    patience: Annotated[Count | None, _DATA] = None
    freeze_batchnorm: Annotated[bool, _DATA] = False
    amp: bool = False

    def __post_init__(self) -> None:
        refuse("fit", checked(self))
        if self.patience is not None and self.holdout == 0.0:
            refuse("fit", ["patience needs held-out training examples to watch: give holdout=0.1, "
                           "say."])  # fmt: skip

    @property
    def logvar_rate(self) -> float:
        """``logvar_lr``, or what it is by default."""
        return 10 * self.lr if self.logvar_lr is None else self.logvar_lr


CHANGEABLE = frozenset(
    {"lr", "logvar_lr", "kl_weight", "weight_decay", "max_grad_norm", "patience", "amp"}
)
"""What a resumed fit may have otherwise: the order of the data and the form of the state stay."""


@dataclass(frozen=True, kw_only=True)
class LaplaceSettings(_Common):
    """The settings of :func:`bayesify.fit_laplace_`.

    Args:
        fisher: mc: a label drawn from the model for each example; exact: all classes, C times as
            slow; empirical: the true labels.

            ``"mc"`` is unbiased, ``"exact"`` the generalised Gauss-Newton matrix, see
            :mod:`bayesify.training.fisher`.
        prior_precision: Factor on the prior's precision. A number, holdout (by the NLL of draws on
            held-out training examples, changed by ``augment``) or marglik (marginal likelihood).

            ``"marglik"`` suits small networks: large ones have so many weights that the data say
            nothing of that their noise destroys the network. The model's prior changes accordingly.
        temperature: Factor on every variance. Below 1 the posterior is cold.
        max_examples: Examples, chosen at random, that stand for all of them. By default all.
        holdout: Share of the training examples that is held out where they choose the prior.

            A network knows the images that it was trained on by heart, and no uncertainty would
            help there; changed by ``augment`` as much as that it errs about as often as on new
            images, they are the next best thing.
    """

    fisher: FisherKind = "mc"
    prior_precision: Annotated[Positive | Literal["holdout", "marglik"], Shown(metavar="X")] = (
        "holdout"
    )
    temperature: Positive = 1.0
    max_examples: Count | None = None
    holdout: Annotated[float, Within(above=0, below=1), _DATA] = 0.02

    def __post_init__(self) -> None:
        refuse("fit_laplace_", checked(self))
        if self.augment != "none" and self.prior_precision != "holdout":
            refuse(
                "fit_laplace_",
                ["augment changes held-out images, and there are none: take "
                 "prior_precision='holdout', or leave it out."],
            )  # fmt: skip
