"""The supervised fit: batches in, a trained posterior out."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from ..classes import classes_of, name_classes_
from ..data import ImageData
from ..errors import ArgumentError
from ..models import InputConfig
from ..objective import KLReduction
from ..signals import waiting_signals
from .augmentation import Augment
from .autocast import check_amp
from .batches import (
    Data,
    Loss,
    check_data,
    device_of,
)
from .matching import by_name
from .progress import FitResult, Progress
from .randomness import seeded
from .readable import readable
from .resume import held_checkpoint, read_fit
from .run import Run
from .settings import KLShape, Settings

logger = logging.getLogger(__name__)


def fit(
    model: nn.Module,
    train: Data,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    loss: Loss = F.cross_entropy,
    logvar_lr: float | None = None,
    kl_weight: float = 1.0,
    kl_reduction: KLReduction = "num_data",
    kl_warmup: float = 0.0,
    kl_shape: KLShape = "linear",
    warmup: float = 0.05,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    average: float = 0.0,
    draws_per_step: int = 1,
    accumulate: int = 1,
    augment: Augment = "none",
    holdout: float = 0.0,
    patience: int | None = None,
    freeze_batchnorm: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
    amp: bool = False,
    model_config: InputConfig | None = None,
    workers: int = 0,
    skip_unreadable: bool = False,
    on_look: Callable[[int, int], None] | None = None,
    on_start: Callable[[str], None] = logger.info,
    on_step: Callable[[Progress], None] | None = None,
) -> FitResult:
    r"""Fit ``model`` to labelled examples: its posterior, or its weights if it is deterministic.

    Every step draws the weights and minimises :func:`bayesify.elbo_loss` of one batch by AdamW;
    the learning rates rise over ``warmup`` and then fall to 0 as a cosine. Afterwards the
    statistics of BatchNorm are gathered anew at the posterior means, from one more epoch of the
    same batches, augmented if those of the fit were. The model is left in ``eval()`` on
    ``device``; the global random states of torch, numpy and Python are as before.

    Args:
        model: Converted or not: without a posterior there is no KL, all else is the same.
        train: An :class:`bayesify.data.ImageData` or any torch Dataset of (input, target) with a
            length N. The last batch of an epoch is left out where it would be smaller. A classifier
            gets the names of an ``ImageData``'s classes, or, where it knows names from an earlier
            fit or a file, finds the classes among them: a part of them, in any order.
        epochs: Passes over the data, at least 1.
        batch_size: Examples in a batch, at least 1.
        lr: Highest learning rate of means and deterministic parameters, above 0.
        loss: Of a batch, from the model's output and the targets: a mean negative log likelihood
            per example for ``kl_reduction="num_data"``. That of ``cross_entropy``, the default,
            takes logits (batch, classes) and class numbers alone.
        logvar_lr: Highest learning rate of the log variances; ``10 * lr`` if None, since Adam
            moves a log variance by no more than about its rate in a step (the result's ``logvars``
            says how far they came).
        kl_weight: The factor beta, at least 0; below 1 a tempered posterior.
        kl_reduction: The factor s, see :func:`bayesify.elbo_loss`.
        kl_warmup: Share of the run in which beta rises from 0, from 0 to 1.
        kl_shape: How it rises: ``"linear"`` or ``"cosine"``.
        warmup: Share of the run in which the learning rates rise linearly, from 0 to below 1.
        weight_decay: Of AdamW; never on log variances. The prior already pulls the means, so leave
            it at 0 with a KL.
        max_grad_norm: Gradients are scaled down to this norm, above 0 (``math.inf``: never).
        average: Share of the run, at its end, over whose steps the parameters are averaged, from 0
            to 1: of T steps the model gets :math:`\frac1n \sum_{t=T-n+1}^T \theta_t`, n being that
            share of T, for means and log variances alike; at 0 it gets :math:`\theta_T`. Held-out
            losses are those of the average as far as it has come.
        draws_per_step: Draws of the weights whose losses a step averages, one after the other.
        accumulate: Batches whose losses a step averages: ``accumulate * batch_size`` examples in
            the memory of one batch, each batch with draws of its own.
        augment: Random changes of the images of an ``ImageData``: ``"none"``, ``"flip-crop"``,
            ``"resized-crop"``, ``"rand-augment"``, or a callable from a stored image to another,
            uint8 (C, H, W), such as any composition of torchvision's v2 transforms.
        holdout: Share of ``train`` that is held out, from 0 to below 1; the model gets the weights
            of the epoch with the least loss there. Only examples that the weights given have never
            seen make it a test of anything.
        patience: Stop after so many epochs without a lower held-out loss; None never stops.
        freeze_batchnorm: BatchNorm normalises with the running statistics that it has, as in
            ``eval()``, and keeps them: for the fine-tuning of a pretrained network.
        checkpoint: File of the fit's state, written after every epoch, every ten minutes, and on
            Ctrl-C, SIGTERM and SIGHUP, which then end the fit after the step that it is in. It
            stays: remove it once the model is saved.
        resume: Go on with the state in ``checkpoint``, with the same model, data and arguments. On
            the CPU the result is that of a fit without interruption, bit for bit (with ``workers``
            unless the data set draws random numbers of its own).
        seed: Of the batches' order, the draws, augmentation and dropout.
        device: Where the model is moved to; None leaves it where it is.
        amp: Autocast to bfloat16; means, log variances and KL stay in float32. A processor
            without bfloat16 arithmetic is slower with it; a warning says so.
        model_config: How images are prepared, for an ``ImageData``; None asks the model.
        workers: Processes that read the data.
        skip_unreadable: Leave out the images of an ``ImageData`` that cannot be read, with a
            warning; else they are an error. All are read once before the first step.
        on_look: Gets the number of images that were looked at for that, and of all.
        on_start: Gets one line on the KL's scale and the noise budget.
        on_step: Gets a :class:`Progress` after every step.

    Returns:
        A :class:`FitResult`.

    Raises:
        ArgumentError: An argument has a value that cannot work, the default loss finds no logits,
            or labels are missing, soft, out of range or all the same.
        BayesifyError: Loss or gradient is not finite; the message names the step and the layer, the
            model holds the weights before that step.
        CheckpointError: ``checkpoint`` cannot be written or resumed.
        DataError: ``train`` has classes that are not among those that the model knows, or images
            that cannot be read.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP; the message says how to go on.

    Reference:
        Blundell et al., 2015, arXiv:1505.05424, section 3; Loshchilov and Hutter, 2019,
        arXiv:1711.05101 (AdamW) and 2017, arXiv:1608.03983 (cosine); Izmailov et al., 2018,
        arXiv:1803.05407, algorithm 1 (average).

    >>> import torch, bayesify
    >>> data = torch.utils.data.TensorDataset(torch.randn(20, 2), torch.randint(3, (20,)))
    >>> model = bayesify.to_bbb(torch.nn.Linear(2, 3))
    >>> bayesify.fit(model, data, epochs=2, batch_size=10, lr=1e-2).steps
    4
    """
    check_data(train)
    settings = Settings(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        logvar_lr=10 * lr if logvar_lr is None else logvar_lr,
        kl_weight=kl_weight,
        kl_reduction=kl_reduction,
        kl_warmup=kl_warmup,
        kl_shape=kl_shape,
        warmup=warmup,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        average=average,
        draws_per_step=draws_per_step,
        accumulate=accumulate,
        augment=augment if isinstance(augment, str) else "callable",
        holdout=holdout,
        patience=patience,
        freeze_batchnorm=freeze_batchnorm,
        seed=seed,
        amp=amp,
    )
    if not any(p.requires_grad for p in model.parameters()):
        raise ArgumentError(f"{type(model).__name__} has no trainable parameter: nothing to fit.")
    classifies = loss is F.cross_entropy or isinstance(loss, nn.CrossEntropyLoss)
    with held_checkpoint(checkpoint, resume) as path:
        saved = read_fit(path) if path is not None and resume else None
        known = None if saved is None else saved.get("unreadable")
        train, unreadable = readable(
            train, workers=workers, skip=skip_unreadable, known=known, on_look=on_look
        )
        if classifies:
            train = by_name(train, model)
        target = device_of(model) if device is None else torch.device(device)
        check_amp(target, amp)
        run = Run(
            model, train, settings, loss, augment, target, model_config, workers, path, unreadable,
            on_step,
        )  # fmt: skip
        if saved is not None:
            run.check_resumable(saved)
        if run.bayesian:
            on_start(run.line_on_kl())
        with seeded(settings.seed, target):
            if saved is not None:
                run.load(saved)
                if run.step == run.steps:
                    warnings.warn(
                        f"The fit in {path} has ended after {run.steps} steps: its result is given "
                        "again and nothing is trained.",
                        UserWarning,
                        stacklevel=2,
                    )
            with waiting_signals(path is not None) as signals:
                run.train(signals)
            result = run.finish()
        if classifies and isinstance(train, ImageData) and classes_of(model) is None:
            name_classes_(model, train.classes)
        return result
