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
from ..settings.fields import documented, taken
from ..settings.training import Augment, FitSettings, KLReduction, KLShape, Reading
from ..signals import waiting_signals
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

logger = logging.getLogger(__name__)


@documented(FitSettings, Reading)
def fit(  # noqa: D417 - the others are fields of FitSettings and Reading
    model: nn.Module,
    train: Data,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    loss: Loss = F.cross_entropy,
    logvar_lr: float | None = FitSettings.logvar_lr,
    kl_weight: float = FitSettings.kl_weight,
    kl_reduction: KLReduction = FitSettings.kl_reduction,
    kl_warmup: float = FitSettings.kl_warmup,
    kl_shape: KLShape = FitSettings.kl_shape,
    warmup: float = FitSettings.warmup,
    weight_decay: float = FitSettings.weight_decay,
    max_grad_norm: float = FitSettings.max_grad_norm,
    average: float = FitSettings.average,
    draws_per_step: int = FitSettings.draws_per_step,
    accumulate: int = FitSettings.accumulate,
    augment: Augment = FitSettings.augment,
    holdout: float = FitSettings.holdout,
    patience: int | None = FitSettings.patience,
    freeze_batchnorm: bool = FitSettings.freeze_batchnorm,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    seed: int = FitSettings.seed,
    device: torch.device | str | None = None,
    amp: bool = FitSettings.amp,
    model_config: InputConfig | None = None,
    workers: int = Reading.workers,
    skip_unreadable: bool = Reading.skip_unreadable,
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
        loss: Of a batch, from the model's output and the targets: a mean negative log likelihood
            per example for ``kl_reduction="num_data"``. That of ``cross_entropy``, the default,
            takes logits (batch, classes) and class numbers alone.
        checkpoint: File of the fit's state, written after every epoch, every ten minutes, and on
            Ctrl-C, SIGTERM and SIGHUP, which then end the fit after the step that it is in. It
            stays: remove it once the model is saved.
        resume: Go on with the state in ``checkpoint``, with the same model, data and arguments. On
            the CPU the result is that of a fit without interruption, bit for bit (with ``workers``
            unless the data set draws random numbers of its own).
        device: Where the model is moved to; None leaves it where it is.
        model_config: How images are prepared, for an ``ImageData``; None asks the model.
        on_look: Gets the number of images that were looked at for ``skip_unreadable``, and of all.
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
    settings, reading = taken(FitSettings, locals()), taken(Reading, locals())
    check_data(train)
    if not any(p.requires_grad for p in model.parameters()):
        raise ArgumentError(f"{type(model).__name__} has no trainable parameter: nothing to fit.")
    classifies = loss is F.cross_entropy or isinstance(loss, nn.CrossEntropyLoss)
    with held_checkpoint(checkpoint, resume) as path:
        saved = read_fit(path) if path is not None and resume else None
        known = None if saved is None else saved.get("unreadable")
        train, unreadable = readable(
            train,
            workers=reading.workers,
            skip=reading.skip_unreadable,
            known=known,
            on_look=on_look,
        )
        if classifies:
            train = by_name(train, model)
        target = device_of(model) if device is None else torch.device(device)
        check_amp(target, amp)
        run = Run(
            model, train, settings, loss, target, model_config, reading.workers, path, unreadable,
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
