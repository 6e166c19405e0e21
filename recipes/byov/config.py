"""What a run is: every setting with its unit and its source, and presets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from bayesify import ArgumentError
from bayesify.settings import Shown, Within
from bayesify.settings.fields import (
    Count,
    NotNegative,
    PartShare,
    Positive,
    Seed,
    Share,
    Whole,
    checked,
    nearest,
    plain,
    refuse,
    settings_of,
)
from bayesify.settings.files import config_text

Objective = Literal["byol", "supervised"]
Conversion = Literal["full", "no-conv", "linear-only", "no-layernorm", "none"]
PriorName = Literal["zero", "teacher-mean", "teacher"]
HeadNorm = Literal["batch", "group", "layer", "none"]
HeadInit = Literal["default", "modified"]
PredictorName = Literal["mlp", "linear", "batch-optimal", "none"]
BetaShape = Literal["cosine", "linear", "constant"]
Reduction = Literal["num_weights", "num_data", "sum"]
OptimizerName = Literal["adamw", "lars"]
Augmentation = Literal["imagenet", "cifar"]
Parameterization = Literal["exp", "softplus"]

UNSEEN_SHIFTS = ("encoder.*norm.bias", "projector.3.bias")
"""Patterns for ``skip``: the biases of a ViT's last norm and of the projector's last layer. The
BatchNorm behind the next layer subtracts what they add, so that no loss depends on them and their
posterior becomes their prior."""

RUN_FILE = "run.toml"
"""Name of the file, in the folder of a run, that says all of its settings."""

_PATCH = re.compile(r"_patch(\d+)")


@dataclass(frozen=True)
class BYOVConfig:
    """What is trained and how: two runs of one config and one code give the same numbers.

    Sources: [BYOV] arXiv:2312.03213; [BYOL] Grill et al., arXiv:2006.07733 and its code; [BN-free]
    Richemond et al., arXiv:2010.10241; [EMA] Busbridge et al., arXiv:2307.13813; "assumed" where
    none of them says it.

    Args:
        objective: "byol", or "supervised": cross entropy of the same encoder, same KL. [BYOV] 4.3
        init_std: Standard deviation of the initial means of Linear layers, patch embedding and
            tokens, cut off at 2 in absolute value. [BYOV] appendix C: 0.02, at a width of 768
            presumably; narrow encoders see little but the average patch with it
        conversion: Which parameters get a posterior: a preset of bayesify, or "none" for
            deterministic BYOL. [BYOV] table 1
        skip: Patterns of bayesify for further parameters without a posterior, such as
            encoder.fc_norm.bias. [BYOV]: none
        prior: "zero" is N(0, I), "teacher-mean" N(mu_T, I), "teacher" N(mu_T, Sigma_T). [BYOV] 3
        prior_var_floor: Least variance of Sigma_T, which starts at 0. Assumed
        parameterization: "exp" trains the log variance; "softplus" a rho, sigma = softplus(rho), of
            which a step moves the log variance up to twice as far. [BYOV] appendix C: exp
        logvar_init: Log variance of every weight at the start, log of squared weight units.
            [BYOV] appendix C: -10
        relative_std: Standard deviation of every weight at the start, in units of its tensor's root
            mean square, in place of logvar_init; 0 is logvar_init. Assumed: 0
        kl_reduction: What the summed KL is divided by: number of weights, of images, or 1. Assumed
        beta_start: KL weight at the first step. [BYOV] table 1: 0
        beta_end: KL weight at the last step. [BYOV] table 1: 1
        beta_shape: Way from the one to the other over the whole run. [BYOV] figure 6: cosine
        estimator: How bayesify draws; one draw a step for both views. [BYOV] appendix B: weight
        encoder: A model of timm, or package.module:factory. [BYOV] says ViT; size assumed
        encoder_args: Further arguments of the encoder's architecture, a JSON object. Assumed
        image_size: Side of a square view, pixels. [BYOL]: 224
        channels: Of an image: 1 grey, 3 colour. [BYOL]: 3
        projector_hidden: Hidden width of projector and predictor. [BYOL]: 4096
        projector_out: Width of projection and prediction. [BYOL]: 256
        predictor: "mlp" like the projector; "linear"; "batch-optimal", the ridge regression of a
            batch; or "none". [BYOL]: mlp; the others: talk of its authors
        predictor_lr_ratio: Learning rate of the predictor over that of the rest. [BYOL]: 1
        head_norm: Of the hidden layers: batch; group, with weight standardisation; layer; none.
            [BYOL]: batch; [BN-free]: group
        head_init: "default" as init_std says, or "modified", He's, which keeps the variance where
            no norm does. [BYOV] appendix C: default; [BN-free] names no formula, so assumed
        freeze_patch_embed: Leave the patch embedding at its random start. MoCo v3, off in [BYOV]
        augmentation: Published probabilities of both views: "imagenet", or "cifar" without blur;
            what changes only colour is left out on grey images. [BYOL] appendix B; solo-learn
        augmentation_strength: Factor on colour jitter and on the probabilities of grayscale, blur
            and solarise; smallest crops are raised to this power. [BYOL]: 1
        min_crop: Least area of a crop, share of the image. [BYOL]: 0.08
        negatives_weight: Weight of a term that pushes a prediction off the other images' targets.
            [BYOL] figure 5: 0
        batch_size: Images of one optimizer step over all processes. [BYOV] appendix B: 8192
        epochs: Passes over the training images. Assumed
        seed: Of everything random.
        optimizer: "adamw" or "lars". [BYOL]: lars for ResNets; AdamW for ViT assumed
        lr: Highest learning rate for 256 images in a batch; grows with batch_size / 256. Assumed
        logvar_lr_ratio: Learning rate of the log variances over that of the means; Adam moves a
            log variance by at most the sum of its rates. [BYOV] silent: 1; short runs 5 to 20
        weight_decay: On matrices only, never on log variances. [BYOV] appendix C: 0
        betas: Of AdamW. MoCo v3 and [EMA]: 0.9, 0.95
        momentum: Of LARS. [BYOL]: 0.9
        trust_coefficient: Of LARS. [BYOL]: 1e-3
        warmup_epochs: Epochs in which the rate rises linearly from 0. [BYOL]: 10
        clip_norm: Gradients are scaled down to this norm; 0 is never. DINO: 3; [BYOL]: never
        tau_base: EMA factor of the teacher at the first step. [BYOL]: 0.996 for 1000 epochs,
            0.99 for 300
        tau_end: The same at the last step, reached as a cosine. [BYOL]: 1
        tau_batch: Batch size that tau_base was chosen for, images: at another one tau becomes
            tau ** (batch_size / tau_batch); 0 leaves it. [EMA]
    """

    objective: Objective = "byol"
    init_std: Positive = 0.02
    conversion: Conversion = "full"
    skip: tuple[str, ...] = ()
    prior: PriorName = "zero"
    prior_var_floor: Positive = 1e-6
    parameterization: Parameterization = "exp"
    logvar_init: float = -10.0
    relative_std: NotNegative = 0.0
    kl_reduction: Reduction = "num_weights"
    beta_start: NotNegative = 0.0
    beta_end: NotNegative = 1.0
    beta_shape: BetaShape = "cosine"
    estimator: str = "weight"
    encoder: str = "vit_base_patch16_224"
    encoder_args: Annotated[Mapping[str, Any], Shown(metavar="JSON")] = field(default_factory=dict)
    image_size: Count = 224
    channels: int = 3
    projector_hidden: Count = 4096
    projector_out: Count = 256
    predictor: PredictorName = "mlp"
    predictor_lr_ratio: NotNegative = 1.0
    head_norm: HeadNorm = "batch"
    head_init: HeadInit = "default"
    freeze_patch_embed: bool = False
    augmentation: Augmentation = "imagenet"
    augmentation_strength: NotNegative = 1.0
    min_crop: Annotated[float, Within(above=0, most=1)] = 0.08
    negatives_weight: NotNegative = 0.0
    batch_size: Count = 4096
    epochs: Count = 300
    seed: Seed = 0
    optimizer: OptimizerName = "adamw"
    lr: Positive = 1.5e-4
    logvar_lr_ratio: NotNegative = 1.0
    weight_decay: NotNegative = 0.0
    betas: tuple[PartShare, PartShare] = (0.9, 0.95)
    momentum: Share = 0.9
    trust_coefficient: Positive = 1e-3
    warmup_epochs: NotNegative = 10.0
    clip_norm: NotNegative = 0.0
    tau_base: Share = 0.99
    tau_end: Share = 1.0
    tau_batch: Whole = 0

    def __post_init__(self) -> None:
        refuse("This configuration cannot work", checked(self) or _problems(self))

    @property
    def bayesian(self) -> bool:
        """Whether the student has a posterior."""
        return self.conversion != "none"

    @property
    def left_out(self) -> str:
        """What ``skip`` leaves out, in words; nothing if it is empty."""
        return "unseen shifts" if self.skip == UNSEEN_SHIFTS else ", ".join(self.skip)

    @property
    def patch(self) -> int | None:
        """Side of a patch in pixels, as far as the encoder's name or arguments tell."""
        given = self.encoder_args.get("patch_size")
        if isinstance(given, int):
            return given
        named = _PATCH.search(self.encoder)
        return int(named[1]) if named else None

    @property
    def tau_start(self) -> float:
        """``tau_base`` at this batch size, by the rule tau ** kappa of [EMA]."""
        kappa = self.batch_size / self.tau_batch if self.tau_batch else 1.0
        return float(self.tau_base**kappa)

    @property
    def peak_lr(self) -> float:
        """Highest learning rate of the means."""
        return self.lr * self.batch_size / 256

    def to_json(self) -> dict[str, Any]:
        """Plain values that :meth:`from_json` reads."""
        return plain(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BYOVConfig:
        """The config that :meth:`to_json` gave."""
        for name in sorted({*data} - {*settings_of(cls)}):
            near = nearest(name, settings_of(cls))
            raise ArgumentError(f"BYOVConfig has no field {name}; the nearest is {near}.")
        return cls(**data)


@dataclass(frozen=True)
class RunConfig:
    """On what, where and how a run is carried out.

    Args:
        data: fashion-sample, a folder with one folder of images for each class, timm:NAME@ROOT, a
            safetensors file, or shards of WebDataset.
        out: Folder for log, checkpoints and results.
        device: cpu, cuda, cuda:1; auto takes what there is.
        workers: Processes that read and augment images; 0 augments batches on the device.
        amp: Autocast to bfloat16. Choice 32 of the README
        accumulate: Micro-batches into which each process splits its share of a batch. P processes
            with A of them give the numbers of one process with P * A.
        compile: Compile student and teacher by torch.compile.
        checkpoint_activations: Recompute activations in backward, for less memory.
        shard: Split weights, gradients and the optimizer's state over the processes by FSDP2, for a
            student that is too large for one device. The first process holds the student once as
            a whole when it measures and exports.
        sync_batchnorm: One BatchNorm statistic over all CUDA processes. [BYOL]: on
        skip_broken: Take the next image in place of one that cannot be read, and count it.
        log_every: Optimizer steps between two lines of the log.
        tensorboard: Write the log's numbers for TensorBoard too, into the folder tensorboard of
            ``out``. Needs the extra tensorboard.
        eval_every: Epochs between two kNN measurements; 0 is never.
        monitor_images: Training images held back as queries of that kNN; they are still trained on,
            without labels. No test image is looked at before the end.
        checkpoint_every: Epochs between two checkpoints.
        keep_last: Newest checkpoints that are kept, beside the best.
        stop_on_collapse: Stop when embeddings stay collapsed after the warm-up.
        baselines: Also measure the kNN of raw pixels and of the untrained encoder.
    """

    data: str = "fashion-sample"
    out: Path = Path("byov-run")
    device: str = "auto"
    workers: Whole = 0
    amp: bool = False
    accumulate: Count = 1
    compile: bool = False
    checkpoint_activations: bool = False
    shard: bool = False
    sync_batchnorm: bool = True
    skip_broken: bool = False
    log_every: Count = 10
    tensorboard: bool = False
    eval_every: Whole = 1
    monitor_images: Count = 1000
    checkpoint_every: Count = 1
    keep_last: Count = 2
    stop_on_collapse: bool = True
    baselines: bool = False

    def __post_init__(self) -> None:
        both = "shard cannot be combined with compile: leave one of them out."
        found = checked(self)
        refuse("This run cannot work", [*found, *([both] if self.shard and self.compile else [])])


def run_text(config: BYOVConfig, run: RunConfig) -> str:
    """What :data:`RUN_FILE` holds."""
    return config_text(
        "A run of BYOV: bayesify recipe byov train --config run.toml --out ANOTHER repeats it.",
        {"byov": config, "run": run},
    )


def differences(mine: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """``name: mine, other`` for every value that is not the same in two configs as JSON."""
    return [
        f"{name}: {mine.get(name)!r} here, {other.get(name)!r} there"
        for name in sorted({*mine, *other})
        if mine.get(name) != other.get(name)
    ]


def _problems(c: BYOVConfig) -> list[str]:
    """What forbids a run though each field may be as it is."""
    found = []

    def want(good: bool, message: str) -> None:
        if not good:
            found.append(message)

    want(c.channels in (1, 3), f"channels must be 1 or 3, not {c.channels}.")
    want(
        c.warmup_epochs < c.epochs,
        f"warmup_epochs must be below epochs ({c.epochs}), not {c.warmup_epochs:g}.",
    )
    want(
        c.beta_shape != "constant" or c.beta_start == c.beta_end,
        f"beta_shape 'constant' needs beta_start == beta_end, not {c.beta_start} and {c.beta_end}.",
    )
    want(
        c.objective == "supervised" or c.head_norm != "batch" or c.batch_size > 1,
        "batch_size 1 leaves BatchNorm nothing to average: take more, or head_norm 'group', "
        "'layer' or 'none'.",
    )
    want(
        not c.negatives_weight or c.batch_size > 1,
        "negatives_weight needs a batch_size above 1: there is no other image.",
    )
    want(
        c.patch is None or c.image_size % c.patch == 0,
        f"image_size ({c.image_size}) must be a multiple of the encoder's patch ({c.patch}).",
    )
    want(
        c.objective == "byol" or c.prior == "zero",
        f"prior {c.prior!r} needs a teacher: objective 'supervised' has none.",
    )
    want(
        not c.relative_std or c.logvar_init == BYOVConfig.logvar_init,
        "logvar_init has no use with a relative_std: each tensor starts at its own.",
    )
    want(not c.skip or c.bayesian, "skip has no use with conversion 'none': nothing is converted.")
    want(
        c.predictor != "none" or c.predictor_lr_ratio == 1.0,
        "predictor_lr_ratio has no use with predictor 'none'.",
    )
    return found
