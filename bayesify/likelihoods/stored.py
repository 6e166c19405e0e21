"""Likelihoods as plain values and tensors, both ways: a file brings no code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .bernoulli import Bernoulli
from .categorical import Categorical
from .heads import Heads
from .likelihood import Likelihood
from .normal import Gaussian


def to_json(likelihood: Likelihood) -> dict[str, Any]:
    """``kind`` and ``args`` of a likelihood; its tensors are its ``state_dict()``."""
    if isinstance(likelihood, Heads):
        heads = [[name, to_json(head)] for name, head in likelihood.items()]
        return {"kind": "Heads", "args": {"heads": heads}}
    for kind in (Bernoulli, Categorical, Gaussian):
        if type(likelihood) is kind:
            return {"kind": kind.__name__, "args": likelihood.arguments()}
    return {"kind": type(likelihood).__name__, "args": None}


def from_json(data: Any, tensors: Mapping[str, Tensor]) -> Likelihood:
    """The likelihood that :func:`to_json` and ``state_dict()`` gave; anything else raises.

    Args:
        data: What :func:`to_json` gave.
        tensors: The state of the likelihood by name.
    """
    left = dict(tensors)
    found = _built(data, left, 0)
    if left:
        raise ValueError(f"{min(left)} belongs to no likelihood")
    return found


def unstored(data: Any) -> list[str]:
    """The kinds in what :func:`to_json` gave that a file cannot hold."""
    if data["kind"] == "Heads":
        return [kind for _, head in data["args"]["heads"] for kind in unstored(head)]
    return [str(data["kind"])] if data["args"] is None else []


def _built(data: Any, left: dict[str, Tensor], depth: int) -> Likelihood:
    kind, arguments = data["kind"], data["args"]
    if not isinstance(kind, str) or depth > 4:
        raise TypeError(f"{kind!r:.60} is no likelihood")
    if not isinstance(arguments, dict) or arguments.keys() & {"location", "scale", "weight"}:
        raise TypeError(f"{arguments!r:.60} are no arguments of a likelihood")
    if kind == "Heads":
        heads = {}
        for place, (name, head) in enumerate(arguments["heads"]):
            prefix = f"each.{place}."
            own = {k.removeprefix(prefix): left.pop(k) for k in list(left) if k.startswith(prefix)}
            heads[name] = _built(head, own, depth + 1)
            left |= {prefix + key: value for key, value in own.items()}
        return Heads(heads)
    scores = _optional(left, "scores")
    found: Likelihood
    if kind == "Gaussian":
        found = _gaussian(arguments, left)
    elif kind == "Bernoulli":
        found = Bernoulli(**arguments, pos_weight=_optional(left, "pos_weight"))
    elif kind == "Categorical":
        found = Categorical(**arguments, weight=_optional(left, "weight"))
    else:
        raise ValueError(f"{kind!r:.60} is no likelihood")
    if scores is not None:
        if scores.dim() != 1 or not len(scores) or not bool((scores.diff() >= 0).all()):
            raise ValueError("scores are no sorted numbers")
        found.scores = scores.float().clone()
    return found


def _gaussian(arguments: dict[str, Any], left: dict[str, Tensor]) -> Gaussian:
    noise = left.pop("log_noise", None)
    gaussian = Gaussian(
        **arguments, location=_real(left.pop("location")), scale=_real(left.pop("scale"))
    )
    if noise is not None:
        if gaussian.noise != "learned" or noise.dim() != 1 or noise.numel() == 0:
            raise ValueError("log_noise is not that of a learned noise")
        if not bool(torch.isfinite(_real(noise)).all()):
            raise ValueError("log_noise is not finite")
        gaussian.log_noise = nn.Parameter(_real(noise).float().clone())
    return gaussian


def _optional(left: dict[str, Tensor], name: str) -> Tensor | None:
    return _real(left.pop(name)) if name in left else None


def _real(value: Tensor) -> Tensor:
    if not value.is_floating_point() or value.element_size() < 2:
        raise ValueError(f"a tensor of a likelihood is of {value.dtype}")
    return value
