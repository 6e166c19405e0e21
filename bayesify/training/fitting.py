"""The supervised fit: batches in, a trained posterior out."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from ..classes import classes_of, name_classes_
from ..data import ImageData
from ..errors import ArgumentError
from ..likelihoods import Categorical, Likelihood
from ..models import InputConfig
from ..numeric import whole
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
from .examples import Inputs
from .feeds import as_loader
from .matching import by_name
from .progress import FitResult, Progress
from .randomness import seeded
from .readable import readable
from .resume import held_checkpoint, read_fit
from .run import Run
from .task import Task, likelihood_for

logger = logging.getLogger(__name__)


# long: half of it is its arguments
@documented(FitSettings, Reading)
def fit(  # noqa: D417 - the others are fields of FitSettings and Reading
    model: nn.Module,
    train: Data | DataLoader[Any],
    *,
    epochs: int,
    lr: float,
    batch_size: int | None = None,
    likelihood: Likelihood | Mapping[Any, Likelihood] | None = None,
    loss: Loss | None = None,
    num_data: int | None = None,
    inputs: Inputs | None = None,
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

    Every step draws the weights w and minimises by AdamW, of the B examples of a batch,

    .. math:: -\frac1B \sum_i c_i \log p(y_i | f(x_i; w)) + \frac{\beta}{N} \mathrm{KL}

    where log p is the log density of an example, the sum over its targets, and c its weight, or 1:
    a weight of 2 is the same as to have an example twice. Losses and the noise budget are shown for
    one target: divided by the mean number of targets of an example in the first batch, as gradients
    are where ``max_grad_norm`` looks at them.

    The learning rates rise over ``warmup`` and then fall to 0 as a cosine. Afterwards the
    statistics of BatchNorm are gathered anew at the posterior means, from one more epoch of the
    same batches, augmented if those of the fit were. The model is left in ``eval()`` on
    ``device``; the global random states of torch, numpy and Python are as before.

    Args:
        model: Converted or not: without a posterior there is no KL, all else is the same.
        train: An :class:`bayesify.data.ImageData` or any torch Dataset of (input, target), or
            (input, target, weight), with a length N; the last batch of an epoch is left out where
            it would be smaller. Or a DataLoader, whose order and batches are taken as they come (a
            smaller batch has its share of a step), or a stream (an IterableDataset) with
            ``num_data``. A classifier gets the names of an ``ImageData``'s classes, or, where it
            knows names from an earlier fit or a file, finds the classes among them: a part of them,
            in any order.
        likelihood: What the outputs mean (:mod:`bayesify.likelihoods`), or a mapping from outputs
            to likelihoods. The model keeps it (:func:`bayesify.set_likelihood_`). None takes that
            of the model, or else guesses :class:`Categorical` where the targets are class numbers
            (batch,) and the outputs logits (batch, classes).
        loss: Instead of a likelihood, of what has none: from the model's output and the targets to
            a mean over the examples.
        num_data: Number N of examples that the posterior is of, for streams; by default those of
            ``train``.
        inputs: Of batches that are dicts, the name of the entry that is the model's argument, or
            names of several that are its keyword arguments, the others being targets; or a function
            from a batch to (input, target) or (input, target, weight).
        checkpoint: File of the fit's state, written after every epoch, every ten minutes, and on
            Ctrl-C, SIGTERM and SIGHUP, which then end the fit after the step that it is in. It
            stays: remove it once the model is saved.
        resume: Go on with the state in ``checkpoint``, with the same model, data and arguments. On
            the CPU the result is that of a fit without interruption, bit for bit (with ``workers``
            unless the data set draws random numbers of its own).
        device: Where the model is moved to; None leaves it where it is.
        model_config: How images are prepared, for an ``ImageData``; None asks the model.
        on_look: Gets the number of images that were looked at for ``skip_unreadable``, and of all.
        on_start: Gets one line on the likelihood, if it was guessed, the KL's scale and the noise
            budget, as soon as they are known.
        on_step: Gets a :class:`Progress` after every step.

    Returns:
        A :class:`FitResult`.

    Raises:
        ArgumentError: An argument has a value that cannot work, nothing says what the outputs mean,
            they do not fit the targets, all targets of an epoch are masked, or labels are missing,
            soft, out of range or all the same.
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
    given = isinstance(train, DataLoader | IterableDataset)
    if isinstance(train, DataLoader):
        if batch_size is not None:
            raise ArgumentError("fit: a DataLoader has a batch_size of its own: leave it out.")
        batch_size = train.batch_size or 1
    elif batch_size is None:
        raise ArgumentError("fit: batch_size is missing, the number of examples in a batch.")
    settings, reading = taken(FitSettings, locals()), taken(Reading, locals())
    if num_data is not None:
        num_data = whole("fit: num_data", num_data, "a whole number above 0")
    if given:
        if checkpoint is not None:
            raise ArgumentError(
                "fit: checkpoint needs an order of the examples that can be gone on from: give the "
                "data set itself, not a DataLoader or a stream."
            )
        train = as_loader(train, settings.batch_size, reading.workers)
    else:
        check_data(train)
    if not any(p.requires_grad for p in model.parameters()):
        raise ArgumentError(f"{type(model).__name__} has no trainable parameter: nothing to fit.")
    meaning, own = likelihood_for(model, likelihood, loss)
    classifies = (
        isinstance(own, nn.CrossEntropyLoss) or isinstance(meaning, Categorical)
        or (meaning is None and own is None)
    )  # fmt: skip
    with held_checkpoint(checkpoint, resume) as path:
        saved = read_fit(path) if path is not None and resume else None
        known = None if saved is None else saved.get("unreadable")
        unreadable: list[int] = []
        if not isinstance(train, DataLoader):
            train, unreadable = readable(
                train, workers=reading.workers, skip=reading.skip_unreadable, known=known,
                on_look=on_look,
            )  # fmt: skip
        if classifies and isinstance(train, ImageData):
            train = by_name(train, model)
        target = device_of(model) if device is None else torch.device(device)
        check_amp(target, amp)
        named = None
        if isinstance(train, ImageData) and classes_of(model) is None:
            named = train.classes, train.name
        run = Run(
            model, train, settings, Task(model, meaning, own, named), target, model_config, reading,
            path, unreadable, on_start, on_step, inputs, num_data,
        )  # fmt: skip
        if saved is not None:
            run.check_resumable(saved)
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
