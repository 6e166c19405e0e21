"""A model by its name: bayesify's own, from timm or torchvision, or from a user's own function."""

import difflib
import importlib
import inspect
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from torch import nn

from .. import requirements
from ..errors import ModelError
from ..numeric import count
from .mlp import mlp
from .weights import load_weights

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
class ModelSpec:
    """How to build a model: enough to build the same architecture again from a file.

    Args:
        name: A timm name (``resnet50``, ``resnet50.a1_in1k``), ``torchvision:resnet50``,
            ``bayesify:mlp`` (:func:`bayesify.models.mlp`, whose arguments are ``model_args``), or
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
    def source(self) -> Literal["bayesify", "timm", "torchvision", "factory"]:
        """Where the name leads."""
        if self.name.startswith("bayesify:"):
            return "bayesify"
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
        builders = {
            "bayesify": _own, "timm": _timm, "torchvision": _torchvision, "factory": _factory,
        }  # fmt: skip
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
        load_weights(model, Path(weights))
    return model


def _closest(name: str, known: Iterable[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.0))


def _own(spec: ModelSpec, pretrained: bool) -> nn.Module:
    if spec.name != "bayesify:mlp":
        raise ModelError(f"bayesify has no model {spec.name!r} of its own, only bayesify:mlp.")
    if pretrained or (spec.num_classes, spec.in_chans, spec.img_size) != (None, None, None):
        raise ModelError(
            "bayesify:mlp has no published weights and takes no images. It is the network of a "
            "table: bayesify fit TABLE.csv --target COLUMN --out FILE."
        )
    try:
        return mlp(**spec.model_args)
    except TypeError as error:
        raise _build_error(spec, False, error) from error


def _timm(spec: ModelSpec, pretrained: bool) -> nn.Module:
    requirements.check("timm")
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
    requirements.check("torchvision")
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
