"""The student: a timm encoder with two small heads, made Bayesian as a whole."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesify import (
    ArgumentError,
    BBBConfig,
    GaussianPrior,
    ModelSpec,
    RelativeStd,
    create_model,
    plan,
    to_bbb_,
)
from bayesify.torch_private import BatchNormBase

from .config import BYOVConfig, HeadNorm

_GROUPS = 32
_RIDGE = 1e-3


class Branch(NamedTuple):
    """What one network makes of one view: (B, features), (B, out), (B, out)."""

    features: Tensor
    projection: Tensor
    prediction: Tensor


class Views(NamedTuple):
    """What the student makes of both views of a batch."""

    first: Branch
    second: Branch


class StandardisedLinear(nn.Linear):
    """A Linear layer whose weight has mean 0 and variance 1 / in_features over each row's inputs.

    Reference:
        Qiao et al., 2019, arXiv:1903.10520.
    """

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        var, mean = torch.var_mean(weight, dim=1, keepdim=True, correction=0)
        scale = torch.rsqrt(var * weight.shape[1] + 1e-10)
        return F.linear(input, (weight - mean) * scale, self.bias)


class MLP(nn.Sequential):
    """Linear, norm, ReLU, Linear; the output has no norm, as in BYOL."""

    def __init__(
        self, inputs: int, hidden: int, outputs: int, norm: HeadNorm, init_std: float | None
    ) -> None:
        linear = StandardisedLinear if norm == "group" else nn.Linear
        # A bias before a norm that takes the mean off would do nothing.
        super().__init__(
            linear(inputs, hidden, bias=norm == "none"),
            _norm(norm, hidden),
            nn.ReLU(),
            linear(hidden, outputs),
        )
        initialise_(self, init_std)


class Student(nn.Module):
    """Encoder, projector and predictor; called with both views, it draws its weights once.

    Args:
        encoder: Gives features (B, d).
        projector: (B, d) to (B, out).
        predictor: (B, out) to (B, out).
    """

    def __init__(self, encoder: nn.Module, projector: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.predictor = predictor
        self.apart = any(map(_ties_images, encoder.modules()))

    def forward(self, view1: Tensor, view2: Tensor) -> Views:
        """Both views; each BatchNorm sees one view at a time."""
        first, second = self.encode(view1, view2)
        return Views(self.branch(first), self.branch(second))

    def encode(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, d) of both views, in one batch where no statistics of it tie images.

        One batch of 2B takes half the kernels of two, whose launches bound small models on a GPU.
        """
        if self.apart:
            return self.encoder(view1), self.encoder(view2)
        first, second = self.encoder(torch.cat([view1, view2])).chunk(2)
        return first, second

    def branch(self, features: Tensor) -> Branch:
        projection = self.projector(features)
        return Branch(features, projection, self.predictor(projection))


def _ties_images(module: nn.Module) -> bool:
    """BatchNorm, and what keeps running statistics as it does, such as timm's EvoNorm-B."""
    running = any(name.startswith("running_") for name in module._buffers)
    return running or isinstance(module, BatchNormBase)


def encoder_spec(config: BYOVConfig, num_classes: int | None) -> ModelSpec:
    """How timm builds the encoder; ``num_classes`` of its classifier, None for timm's own."""
    arguments = dict(config.encoder_args)
    if ":" in config.encoder:  # a factory gets what is in model_args and nothing else
        arguments["in_chans"] = config.channels
        if num_classes is not None:
            arguments["num_classes"] = num_classes
        return ModelSpec(config.encoder, model_args=arguments)
    return ModelSpec(config.encoder, num_classes, config.channels, config.image_size, arguments)


def build_encoder(config: BYOVConfig, num_classes: int | None) -> nn.Module:
    """The encoder with its classifier, deterministic, initialised as the paper says.

    Raises:
        ArgumentError: A field of the config does not fit the encoder.
        ModelError: The encoder cannot be built.
    """
    spec = encoder_spec(config, num_classes)
    encoder: Any = create_model(
        spec.name,
        num_classes=spec.num_classes,
        in_chans=spec.in_chans,
        img_size=spec.img_size,
        model_args=spec.model_args,
    )
    if not hasattr(encoder, "reset_classifier") or not hasattr(encoder, "num_features"):
        raise ArgumentError(
            f"encoder {config.encoder!r} is no model of timm's kind: it lacks reset_classifier or "
            "num_features."
        )
    patch_embed = getattr(encoder, "patch_embed", None)
    if patch_embed is not None:
        _paper_init_(encoder, config.init_std)
    if config.freeze_patch_embed:
        if patch_embed is None:
            raise ArgumentError(f"freeze_patch_embed: {config.encoder!r} has no patch embedding.")
        patch_embed.requires_grad_(False)
    whole: nn.Module = encoder
    return whole


def build_student(config: BYOVConfig, num_classes: int | None) -> nn.Module:
    """The network to train, deterministic: a :class:`Student`, or the supervised classifier.

    Random numbers come from torch's global generator. Under ``torch.device("meta")`` nothing is
    computed; timm's ViTs can do that from timm 1.0.22 on.
    """
    encoder: Any = build_encoder(config, num_classes)
    if config.objective == "supervised":
        return encoder  # type: ignore[no-any-return]
    encoder.reset_classifier(0)
    hidden, out = config.projector_hidden, config.projector_out
    norm = config.head_norm
    init_std = config.init_std if config.head_init == "default" else None
    width = getattr(encoder, "head_hidden_size", None) or encoder.num_features
    projector = MLP(width, hidden, out, norm, init_std)
    predictor: nn.Module = nn.Identity()
    if config.predictor == "mlp":
        predictor = MLP(out, hidden, out, norm, init_std)
    elif config.predictor == "linear":
        predictor = initialise_(nn.Linear(out, out), init_std)
    return Student(encoder, projector, predictor)


def convert_(model: nn.Module, config: BYOVConfig) -> nn.Module:
    """Give ``model`` the posterior of the config, N(0, I) being the prior for now.

    Raises:
        ArgumentError: A pattern of ``config.skip`` matches nothing.
    """
    if not config.bayesian:
        return model
    wanted: Any = {
        "preset": config.conversion,
        "skip": config.skip,
        "prior": GaussianPrior(),
        "initial_std": RelativeStd(config.relative_std)
        if config.relative_std
        else math.exp(config.logvar_init / 2),
        "estimator": config.estimator,
        "config": BBBConfig(parameterization=config.parameterization),
    }
    if config.skip and (notes := plan(model, **wanted).notes):
        raise ArgumentError("; ".join(notes))  # after a day of training it is too late to read them
    return to_bbb_(model, **wanted)


def batch_optimal(projections: Tensor, targets: Tensor) -> Tensor:
    """The linear predictor that suits a batch best, by ridge regression on normalised targets.

    ``W = argmin |Z W - T|^2 + r |W|^2``, without gradient, applied to the projections.

    Shape:
        projections and targets (B, out), result (B, out).

    Reference:
        Talk of BYOL's authors: an optimal linear predictor on the batch, without a teacher's EMA.
    """
    with torch.no_grad(), torch.autocast(projections.device.type, enabled=False):
        z, t = projections.float(), F.normalize(targets.float(), dim=-1)
        gram = z.T @ z
        ridge = _RIDGE * gram.diagonal().mean().clamp_min(1e-12)
        weight = torch.linalg.solve(gram + ridge * torch.eye(len(gram), device=z.device), z.T @ t)
    predictions: Tensor = projections.float() @ weight
    return predictions


def initialise_(module: nn.Module, std: float | None) -> nn.Module:
    """A truncated normal, or He's where ``std`` is None, for every Linear layer; biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            if std is not None:
                nn.init.trunc_normal_(layer.weight, std=std)
            else:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


def _paper_init_(encoder: nn.Module, std: float) -> None:
    """The paper's truncated normal for all of a ViT; timm has others for patches and tokens."""
    initialise_(encoder, std)
    for layer in encoder.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.trunc_normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for name in ("pos_embed", "cls_token"):
        token = getattr(encoder, name, None)
        if isinstance(token, nn.Parameter):
            nn.init.trunc_normal_(token, std=std)


def _norm(norm: HeadNorm, width: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm1d(width)
    if norm == "group":
        return nn.GroupNorm(min(_GROUPS, width), width)
    return nn.LayerNorm(width) if norm == "layer" else nn.Identity()
