"""A model by its name: from timm, from torchvision, or from a function of the user's own."""

import difflib
import importlib
import inspect
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from .errors import ModelError
from .numeric import count, positive, real, whole

Interpolation = Literal["nearest", "bilinear", "bicubic"]
CropMode = Literal["center", "squash"]

_MAX_INPUT = 1 << 26
"""Numbers of one input, 0.3 GB in float32: more is a mistake, or a file that asks for memory."""
_FACTORY = re.compile(r"(?P<module>[A-Za-z_][\w.]*):(?P<attribute>[A-Za-z_]\w*)")
# What a saved model may not choose: a download, a path, or what ModelSpec has a field for.
_RESERVED = {
    **dict.fromkeys(["num_classes", "in_chans", "img_size"], "it is a field of its own"),
    **dict.fromkeys(
        ["pretrained", "pretrained_backbone", "weights", "weights_backbone"], "use pretrained=True"
    ),
    **dict.fromkeys(["checkpoint_path", "cache_dir"], "use weights=FILE"),
    **dict.fromkeys(["pretrained_cfg", "pretrained_cfg_overlay"], "name the tag: resnet50.a1_in1k"),
}


SPEC = "_bayesify_spec"
"""Attribute under which a model keeps the :class:`ModelSpec` that built it."""


@dataclass(frozen=True)
class InputConfig:
    """What a model wants to see: how an image becomes the tensor it is given.

    Args:
        size: Channels, height, width; their product is at most 2**26.
        mean: Subtracted from the image, which is scaled to [0, 1]; one number a channel.
        std: Divides afterwards; one number a channel, above 0.
        interpolation: Of the resize; antialiased.
        crop_pct: Side of the central crop over the side that the image is resized to, in
            [0.05, 20]; a crop larger than the image (above 1) is filled up with black, as in timm.
        crop_mode: ``center`` keeps the aspect ratio and cuts what is over, ``squash`` keeps all.

    Raises:
        ModelError: If a value cannot work.
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation = "bilinear"
    crop_pct: float = 1.0
    crop_mode: CropMode = "center"

    def __post_init__(self) -> None:
        expected = "(channels, height, width), each a whole number above 0"
        if len(self.size) != 3:
            raise ModelError(f"size must be {expected}, not {self.size!r}.")
        size = tuple(whole("size", side, expected, kind=ModelError) for side in self.size)
        object.__setattr__(self, "size", size)
        if math.prod(size) > _MAX_INPUT:
            raise ModelError(
                f"size must have at most {_MAX_INPUT:,} numbers (channels x height x width), "
                f"not {size}."
            )
        if not len(self.mean) == len(self.std) == self.size[0]:
            raise ModelError(
                f"mean and std need one number for each of the {self.size[0]} channels, "
                f"not {len(self.mean)} and {len(self.std)}."
            )
        mean = tuple(_each("mean", self.mean, "finite", math.isfinite))
        object.__setattr__(self, "mean", mean)
        std = tuple(_each("std", self.std, "finite and above 0", positive))
        object.__setattr__(self, "std", std)
        if self.interpolation not in get_args(Interpolation):
            raise ModelError(
                f"interpolation must be one of {get_args(Interpolation)}, "
                f"not {self.interpolation!r}."
            )
        if self.crop_mode not in get_args(CropMode):
            raise ModelError(
                f"crop_mode must be one of {get_args(CropMode)}, not {self.crop_mode!r}."
            )
        expected = "a number from 0.05 to 20"
        crop_pct = real(
            "crop_pct", self.crop_pct, expected, lambda v: 0.05 <= v <= 20.0, kind=ModelError
        )
        object.__setattr__(self, "crop_pct", crop_pct)


@dataclass(frozen=True)
class ModelSpec:
    """How to build a model: enough to build the same architecture again from a file.

    Args:
        name: A timm name (``resnet50``, ``resnet50.a1_in1k``), ``torchvision:resnet50``, or
            ``package.module:factory``, a callable that returns an nn.Module.
        num_classes: Outputs of the classifier; None keeps the architecture's own. A factory takes
            it in ``model_args`` instead.
        in_chans: Channels of the input; None keeps the architecture's own.
        img_size: Side of the square input in pixels; None keeps the architecture's own.
        model_args: Further arguments of the architecture; a factory gets these and nothing else.

    Raises:
        ModelError: If a value cannot work.
    """

    name: str
    num_classes: int | None = None
    in_chans: int | None = None
    img_size: int | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ModelError(
                f"A model's name must be a text such as 'resnet50', not {self.name!r}."
            )
        for key in ("num_classes", "in_chans", "img_size"):
            value = getattr(self, key)
            if value is not None:
                object.__setattr__(self, key, count(key, value, kind=ModelError))
        if not isinstance(self.model_args, Mapping):
            raise ModelError(f"model_args must be a dict, not {self.model_args!r}.")
        if self.source != "factory":
            for key in self.model_args:
                if key in _RESERVED:
                    raise ModelError(f"model_args cannot hold {key!r}: {_RESERVED[key]}.")

    @property
    def source(self) -> Literal["timm", "torchvision", "factory"]:
        """Where the name leads."""
        if self.name.startswith("torchvision:"):
            return "torchvision"
        return "factory" if ":" in self.name else "timm"

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists, numbers and texts that :meth:`from_json` reads.

        Raises:
            ModelError: If ``model_args`` holds something that JSON cannot.
        """
        try:
            plain: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ModelError(f"model_args of {self.name!r} cannot be saved: {error}.") from error
        return plain

    @classmethod
    def from_json(cls, data: Any, *, allow_factory: bool = False) -> "ModelSpec":
        """Return the spec that :meth:`to_json` gave.

        Args:
            data: The dict.
            allow_factory: Take the name of a factory too. Building it imports and calls what the
                name says, so allow it only for a dict that did not come from a file.

        Raises:
            ModelError: If ``data`` is no such dict, or names a factory that is not allowed.
        """
        known = [item.name for item in fields(cls)]
        if not isinstance(data, dict) or "name" not in data or not set(data) <= set(known):
            raise ModelError(f"A saved model must be a dict with the keys {known}, not {data!r}.")
        spec = cls(**data)
        if spec.source == "factory" and not allow_factory:
            raise ModelError(
                f"The file names the factory {spec.name!r}, and a file does not choose which code "
                "runs. Build the model yourself and give it as model=."
            )
        return spec

    def build(self, *, pretrained: bool = False) -> nn.Module:
        """Build the model, in training mode, with random or pretrained weights.

        Args:
            pretrained: Fetch the weights that timm or torchvision publishes.

        Raises:
            ModelError: If the name is unknown, an argument does not fit, or there are no weights.
        """
        builders = {"timm": _timm, "torchvision": _torchvision, "factory": _factory}
        model = builders[self.source](self, pretrained)
        if not isinstance(model, nn.Module):
            raise ModelError(
                f"{self.name!r} returned {type(model).__name__}; expected an nn.Module."
            )
        model.__dict__[SPEC] = self  # so that a file of the model can say how to build it
        return model


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    img_size: int | None = None,
    weights: Path | str | None = None,
    pretrained: bool = False,
    model_args: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a model by its name and give it its weights.

    Args:
        name: As in :class:`ModelSpec`.
        num_classes: As in :class:`ModelSpec`.
        in_chans: As in :class:`ModelSpec`.
        img_size: As in :class:`ModelSpec`.
        weights: A .safetensors file, or a torch file with a state_dict, also under the key
            ``state_dict`` or ``model``. Every key and shape must match, nothing is unpickled.
        pretrained: Fetch the weights that timm or torchvision publishes.
        model_args: As in :class:`ModelSpec`.

    Returns:
        The model, in training mode.

    Raises:
        ModelError: If the name is unknown, an argument does not fit, the weights cannot be fetched
            or read, do not fit the model, or hold NaN or infinity.

    >>> type(create_model("resnet18", num_classes=10)).__name__
    'ResNet'
    """
    if weights is not None and pretrained:
        raise ModelError("Give either weights=FILE or pretrained=True, not both.")
    spec = ModelSpec(name, num_classes, in_chans, img_size, model_args or {})
    model = spec.build(pretrained=pretrained)
    if weights is not None:
        _load_weights(model, Path(weights))
    return model


def input_config(
    model: nn.Module,
    *,
    img_size: int | None = None,
    in_chans: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> InputConfig:
    """Say how images are prepared for a model; what is given here overrides what the model says.

    timm's models say it themselves. torchvision's get 224 pixels and ImageNet's mean and standard
    deviation. A model from elsewhere may say it as timm's do, by an attribute ``pretrained_cfg``: a
    dict of ``input_size``, ``mean``, ``std``, ``interpolation`` and ``crop_pct``. Without one it
    needs ``img_size`` and gets mean and standard deviation 0.5.

    Args:
        model: The model, converted or not.
        img_size: Side of the square input in pixels: give the one that the model was built with.
        in_chans: Channels of the input: give the number that the model was built with.
        mean: One number a channel. By default the model's own; with other than its usual channels,
            the average of its own in each channel.
        std: As ``mean``.

    Raises:
        ModelError: If the model does not say its input size and ``img_size`` is not given.
    """
    pretrained_cfg = getattr(model, "pretrained_cfg", None)
    if isinstance(pretrained_cfg, dict):
        from timm.data.config import resolve_model_data_config

        known = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        # timm's "border" pads, which six models of 1,300 use; cutting the centre is the nearest.
        crop_mode: CropMode = "squash" if known["crop_mode"] == "squash" else "center"
    elif type(model).__module__.startswith("torchvision."):
        side = getattr(model, "image_size", 224)  # VisionTransformer accepts only this size
        known = {
            "input_size": (3, side, side),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "interpolation": "bilinear",
            "crop_pct": 0.875,
        }
        crop_mode = "center"
    elif img_size is not None:
        known = {
            "input_size": (3, img_size, img_size),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
        }
        crop_mode = "center"
    else:
        raise ModelError(
            f"{type(model).__name__} does not say what size of image it takes. "
            "Give img_size (and in_chans, when it is not 3)."
        )
    channels, height, width = known["input_size"]
    if img_size is not None:
        height = width = img_size
    if in_chans is not None:
        channels = in_chans
    return InputConfig(
        size=(channels, height, width),
        mean=mean or _per_channel(known["mean"], channels),
        std=std or _per_channel(known["std"], channels),
        interpolation=known["interpolation"],
        crop_pct=known["crop_pct"],
        crop_mode=crop_mode,
    )


def _per_channel(values: Iterable[float], channels: int) -> tuple[float, ...]:
    values = tuple(values)
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def _each(
    what: str, values: Iterable[Any], expected: str, fits: Callable[[float], bool]
) -> Iterable[float]:
    return (real(f"each number of {what}", v, expected, fits, kind=ModelError) for v in values)


def _closest(name: str, known: Iterable[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.0))


def _timm(spec: ModelSpec, pretrained: bool) -> nn.Module:
    import timm
    from timm.models import get_pretrained_cfg, is_model_pretrained

    architecture = spec.name.partition(".")[0]
    if not timm.is_model(architecture):
        raise ModelError(
            f"timm has no model {spec.name!r}. Closest: {_closest(spec.name, timm.list_models())}. "
            "Other kinds of names: torchvision:resnet50, package.module:factory."
        )
    try:
        published = get_pretrained_cfg(spec.name)
    except RuntimeError as error:
        tagged = timm.list_models(f"{architecture}.*", pretrained=True)
        raise ModelError(
            f"timm has {architecture!r} but not {spec.name!r}. "
            f"Closest: {_closest(spec.name, tagged) or architecture}."
        ) from error
    if pretrained and not is_model_pretrained(spec.name):
        raise ModelError(
            f"timm publishes no weights for {spec.name!r}. Give them as --weights FILE."
        )
    arguments = dict(spec.model_args)
    if spec.num_classes is not None:
        arguments["num_classes"] = spec.num_classes
    if spec.in_chans is not None:
        arguments["in_chans"] = spec.in_chans
    if spec.img_size is not None:
        # Not every architecture has the argument img_size. timm passes this size on to those that
        # have it, and reports it in resolve_model_data_config for all. The channels stay those of
        # the published weights, from which timm adapts the first convolution.
        channels = published.input_size[0] if published is not None else 3
        size = (channels, spec.img_size, spec.img_size)
        arguments["pretrained_cfg_overlay"] = {"input_size": size}
    try:
        model: nn.Module = timm.create_model(spec.name, pretrained=pretrained, **arguments)
    except Exception as error:
        raise _build_error(spec, pretrained, error) from error
    return model


def _torchvision(spec: ModelSpec, pretrained: bool) -> nn.Module:
    from torchvision import models

    name = spec.name.removeprefix("torchvision:")
    known = models.list_models()
    if name not in known:
        raise ModelError(f"torchvision has no model {name!r}. Closest: {_closest(name, known)}.")
    if spec.in_chans not in (None, 3):
        raise ModelError(
            f"torchvision's models take 3 channels, not {spec.in_chans}: leave in_chans out "
            "(grey images are repeated), or use a model of timm."
        )
    arguments = dict(spec.model_args)
    if spec.num_classes is not None:
        arguments["num_classes"] = spec.num_classes
    if spec.img_size is not None and name.startswith("vit_"):
        arguments["image_size"] = spec.img_size
    if (
        not pretrained
        and "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters
    ):
        arguments["weights_backbone"] = None  # detection models download a backbone by default
    try:
        model: nn.Module = models.get_model(
            name, weights="DEFAULT" if pretrained else None, **arguments
        )
    except Exception as error:
        raise _build_error(spec, pretrained, error) from error
    return model


def _factory(spec: ModelSpec, pretrained: bool) -> object:
    match = _FACTORY.fullmatch(spec.name)
    if match is None:
        raise ModelError(
            f"{spec.name!r} is no model name. Expected a timm name (resnet50), "
            "torchvision:resnet50, or package.module:factory."
        )
    if pretrained:
        raise ModelError(f"Only timm and torchvision publish weights, {spec.name!r} does not.")
    if spec.num_classes is not None:
        raise ModelError(
            f"num_classes does not reach the factory {spec.name!r}: put it in model_args, "
            "under the name that the factory has for it."
        )
    try:
        module = importlib.import_module(match["module"])
    except Exception as error:  # an import runs any code
        raise ModelError(
            f"The module of {spec.name!r} cannot be imported: {type(error).__name__}: {error}. "
            "Is its folder on PYTHONPATH?"
        ) from error
    factory = getattr(module, match["attribute"], None)
    if not callable(factory):
        what = "nothing" if factory is None else f"a {type(factory).__name__}"
        raise ModelError(
            f"Module {match['module']!r} has {what} called {match['attribute']!r}; expected a "
            f"callable that returns an nn.Module. Closest: "
            f"{_closest(match['attribute'], dir(module))}."
        )
    try:
        return factory(**spec.model_args)
    except Exception as error:
        raise _build_error(spec, False, error) from error


def _build_error(spec: ModelSpec, pretrained: bool, error: Exception) -> ModelError:
    """Say why a model could not be built; nothing tells a failed download from a wrong argument."""
    reason = f"{type(error).__name__}: {error}"
    if pretrained:
        return ModelError(
            f"The pretrained weights of {spec.name!r} could not be fetched or used ({reason}). "
            "Is this machine offline? Then fetch them elsewhere and give them as --weights FILE."
        )
    given = {key: value for key, value in asdict(spec).items() if key != "name" and value}
    return ModelError(f"{spec.name!r} cannot be built with {given} ({reason}).")


def _load_weights(model: nn.Module, path: Path) -> None:
    """Load the file into a new model, strictly; after an error the model is of no use."""
    state = _read_state(path)
    own = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    for prefix in ("module.", "_orig_mod."):  # left by DistributedDataParallel and torch.compile
        if not any(key.startswith(prefix) for key in own):
            consume_prefix_in_state_dict_if_present(state, prefix)
    missing: Iterable[str] = own.keys() - state
    unexpected: Iterable[str] = state.keys() - own
    reshaped = [
        f"{key} (file {tuple(state[key].shape)}, model {tuple(own[key].shape)})"
        for key in own.keys() & state
        if state[key].shape != own[key].shape
    ]
    strange = [
        f"{key} ({reason})"
        for key, value in state.items()
        if (reason := _strange(value, own.get(key)))
    ]
    broken = [
        key for key in (own.keys() & state if not strange else ()) if _broken(state[key], own[key])
    ]
    if not reshaped and not strange:
        # The model's own answer: some modules complete or rename the keys of older files.
        missing, unexpected = model.load_state_dict(state, strict=False)
    problems = {
        "missing from the file": sorted(missing),
        "not in the model": sorted(unexpected),
        "of another shape": sorted(reshaped),
        "that hold no numbers of the model's kind": sorted(strange),
        "with NaN or infinity": sorted(broken),
    }
    found = [
        f"{len(keys)} {what}: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}"
        for what, keys in problems.items()
        if keys
    ]
    if found:
        raise ModelError(
            f"The weights in {path} cannot be loaded into {type(model).__name__}. Tensors: "
            f"{'; '.join(found)}. Check the model's name and num_classes"
            f"{', and whether the training diverged.' if broken else '.'}"
        )


def _strange(value: Tensor, own: Tensor | None) -> str | None:
    """Why a tensor of a file cannot be a weight, or None."""
    if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
        return f"{value.layout}, {value.dtype}, {value.device}: make it dense, with data"
    if own is None or value.dtype == own.dtype:
        return None
    if value.is_complex() or own.is_complex():
        return f"{value.dtype} in the file, {own.dtype} in the model"
    if value.is_floating_point() and value.element_size() < 2:
        return f"{value.dtype}, which needs a scale that no model here has: save it wider"
    return None


def _broken(value: Tensor, own: Tensor) -> bool:
    """Whether a tensor of a file holds NaN, or infinity where the model has none."""
    if not value.is_floating_point() and not value.is_complex():
        return False
    if value.element_size() < 2:  # torch does not look into these
        value, own = value.float(), own.float()
    # A mask saved as a buffer may hold infinity, as it then does in the new model too.
    return bool(value.isnan().any() or (value.isinf().any() and not own.isinf().any()))


def _read_state(path: Path) -> dict[str, Tensor]:
    """Read the state_dict in a file, without unpickling anything but tensors."""
    if not os.path.isfile(path):
        raise ModelError(f"There is no weights file {path}.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:  # also a dtype that torch does not have
            raise ModelError(
                f"{path} is no readable safetensors file ({error}); it may be cut short."
            ) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{path} cannot be read as a torch file of tensors ({reason}). It is damaged, or holds "
            "Python objects, which are never loaded: save its state_dict alone."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state:
        raise ModelError(f"{path} holds {type(state).__name__}; expected a non-empty state_dict.")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ModelError(
                f"{path} holds no state_dict: its entry {key!r} is a {type(value).__name__}."
            )
    return dict(state)
