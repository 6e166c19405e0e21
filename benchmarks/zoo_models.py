"""The models of timm and torchvision by name, without data or whole, and what they are given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

import bayesify

Call = tuple[tuple[Any, ...], dict[str, Any]]


def names() -> list[str]:
    """All models of timm and torchvision, as bayesify names them."""
    return timm.list_models() + [f"torchvision:{n}" for n in torchvision.models.list_models()]


def signature(model: nn.Module) -> str:
    """Of all modules the class and the names of own parameters, buffers and children.

    How many layers there are does not count: children called by numbers are left out.
    """
    kinds = {
        (
            f"{type(module).__module__}.{type(module).__qualname__}",
            tuple(name for name, value in module._parameters.items() if value is not None),
            tuple(module._buffers),
            tuple(name for name in module._modules if not name.isdigit()),
        )
        for module in model.modules()
    }
    return hashlib.sha256(json.dumps(sorted(kinds)).encode()).hexdigest()[:12]


def family(name: str) -> str:
    """The module of timm or torchvision that defines the model."""
    library, _, builder = name.rpartition(":")
    if not library:
        return str(timm.models.model_entrypoint(name).__module__)
    return str(torchvision.models.get_model_builder(builder).__module__)


# -- building --------------------------------------------------------------------------------


def detects(name: str) -> bool:
    builder = name.partition(":")[2]
    return (
        bool(builder) and ".detection." in torchvision.models.get_model_builder(builder).__module__
    )


def build(name: str, **options: Any) -> nn.Module:
    """A model by name; detectors get a low threshold, so that there are boxes."""
    torch.manual_seed(0)
    if detects(name):
        kind = name.partition(":")[2]
        limits = {} if kind.startswith("ssd") else {"min_size": 64, "max_size": 96}
        threshold = "box_score_thresh" if "rcnn" in kind else "score_thresh"
        options = {threshold: 0.0, **limits, **options}
        if "rcnn" in kind:
            options |= {"rpn_pre_nms_top_n_test": 50, "rpn_post_nms_top_n_test": 20}
    return bayesify.create_model(name, model_args=options)


def build_on_meta(name: str, **options: Any) -> nn.Module:
    """A model without memory for its parameters."""
    return on_meta(partial(build, name, **options))


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """What ``make`` builds, without memory; what cannot be built there is built and moved."""
    try:
        with torch.device("meta"):
            return make()
    except Exception:
        return make().to("meta")


# -- inputs ----------------------------------------------------------------------------------


def native_size(name: str, model: nn.Module) -> int:
    if detects(name):
        return 64
    known = getattr(model, "pretrained_cfg", None)
    if known:
        return int(known["input_size"][-1])
    if isinstance(fixed := getattr(model, "image_size", None), int):
        return fixed  # torchvision's VisionTransformer
    builder = name.partition(":")[2]
    weights = torchvision.models.get_model_weights(builder)
    for weight in weights:
        crop = getattr(weight.transforms(), "crop_size", None)
        if crop:
            return int(crop[-1])
    return 128 if builder.startswith("raft") else 224


def inputs(name: str, model: nn.Module, batch: int, size: int, device: str) -> Call:
    """Arguments of one call with square images of ``size`` pixels."""
    generator = torch.Generator().manual_seed(batch)

    def noise(*shape: int) -> Tensor:
        if device == "meta":
            return torch.empty(shape, device=device)
        return torch.empty(shape).normal_(generator=generator)

    builder = name.partition(":")[2]
    if detects(name):
        images = [noise(3, size, size + 8 * k) for k in range(batch)]
        boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0], [10.0, 20.0, 60.0, 60.0]])
        target = {"boxes": boxes, "labels": torch.tensor([1, 1])}
        if builder.startswith("mask"):
            masks = torch.zeros(2, size, size, dtype=torch.uint8)
            masks[0, 4:40, 4:40], masks[1, 20:60, 10:60] = 1, 1
        targets = []
        for image in images:
            entry = dict(target)
            if builder.startswith("mask"):
                entry["masks"] = nn.functional.pad(masks, (0, image.shape[-1] - size))
            if builder.startswith("keypoint"):
                entry["keypoints"] = torch.tensor([[[20.0, 20.0, 1.0]] * 17] * 2)
            targets.append(entry)
        return (images, targets), {}
    if builder.startswith("raft"):
        return (noise(batch, 3, size, size), noise(batch, 3, size, size)), {"num_flow_updates": 2}
    if type(model).__module__.startswith("torchvision.models.video"):
        frames = 16 if builder.startswith(("mvit", "s3d")) else 4
        return (noise(batch, 3, frames, size, size),), {}
    channels = getattr(model, "pretrained_cfg", {}).get("input_size", (3,))[0]
    return (noise(batch, channels, size, size),), {}
