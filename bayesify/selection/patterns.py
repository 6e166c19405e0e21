"""The patterns of ``skip`` and ``only``, of Python and of the command line.

A pattern is one of:

==========================  =======================================================================
``nn.LayerNorm``            a class: every module of it (``isinstance``) with its whole subtree
``LayerNorm``, ``Batch*``   a class name or a glob on class names; subclasses match their base
``patch_embed``             a module's qualified name: its whole subtree
``head.bias``, ``*.attn``   a qualified module or parameter name or a glob on these; ``*`` also
                            crosses dots
``re:(^|\\.)bias$``          a regular expression, searched in the qualified parameter names
``@last-layer``             the classifier: what ``model.get_classifier()`` returns (timm), or else
                            the last module in definition order that owns a tensor of two or more
                            dimensions
``@before-batchnorm``       the biases that a BatchNorm takes off again, see
                            :func:`.absorbed_biases.before_batchnorm`
==========================  =======================================================================

Matching is case-sensitive. ``skip`` beats ``only``. A tied parameter counts under all its names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import ArgumentError

Pattern = str | type[nn.Module]

LAST_LAYER = "@last-layer"
BEFORE_BATCHNORM = "@before-batchnorm"
_TOKENS = (LAST_LAYER, BEFORE_BATCHNORM)


@dataclass(frozen=True)
class Preset:
    """A named selection: two lists of patterns and what they are for."""

    only: tuple[str, ...]
    skip: tuple[str, ...]
    doc: str


PRESETS: dict[str, Preset] = {
    "full": Preset((), (), "Every floating-point parameter."),
    # CondConv2d (timm) and DeformConv2d (torchvision) do not derive from torch's _ConvNd.
    "no-conv": Preset((), ("_ConvNd", "CondConv2d", "DeformConv2d"), "All but the convolutions."),
    "linear-only": Preset(
        ("Linear", r"re:(^|\.)(in_proj_weight|in_proj_bias|[qkv]_proj_weight)$"),
        (),
        "Linear layers only, as in the paper; nn.MultiheadAttention's input projections are "
        "linear weights and count.",
    ),
    "no-layernorm": Preset((), ("LayerNorm",), "All but LayerNorm and its subclasses."),
    "last-layer": Preset((LAST_LAYER,), (), "The classifier only."),
}


class Recorded(str):
    """A regular expression out of a file, which is not run: it could take for ever.

    It stands for the parameters that it had chosen when the file was written.

    Args:
        text: The pattern, ``re:`` and all.
        names: Of the parameters that it stands for.
        known: Of all parameters that it was asked about.
    """

    names: frozenset[str]
    known: frozenset[str]

    def __new__(
        cls, text: str, names: frozenset[str] = frozenset(), known: frozenset[str] = frozenset()
    ) -> Recorded:
        self = super().__new__(cls, text)
        self.names, self.known = names, known
        return self


def parse_patterns(value: Pattern | Sequence[Pattern]) -> tuple[Pattern, ...]:
    """Turn what a user gave as ``skip`` or ``only`` into a tuple of distinct patterns.

    The command line and the Python functions share this parser. A string is split at commas
    (``"LayerNorm,patch_embed"``) unless it starts with ``re:``; then it is one regular expression,
    and so a regular expression cannot be one of several in the same string.

    Args:
        value: a string, a subclass of ``nn.Module``, or a sequence of these.

    Returns:
        The patterns in the order given, each once.

    Raises:
        ArgumentError: a pattern is empty, of a wrong type, a regular expression that does not
            compile, or a token that does not exist.
    """
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    patterns = (pattern for item in items for pattern in _parse_item(item))
    return tuple(dict.fromkeys(patterns))


def _parse_item(item: object) -> list[Pattern]:
    if isinstance(item, Recorded) or (isinstance(item, type) and issubclass(item, nn.Module)):
        return [item]
    if not isinstance(item, str):
        shown = f"a {type(item).__name__} module" if isinstance(item, nn.Module) else repr(item)
        raise ArgumentError(
            f"Bad pattern: {shown}. A pattern is a string or a subclass of torch.nn.Module; "
            f"skip and only take one or a sequence of them."
        )
    text = item.strip()
    if text.startswith("re:"):
        _check_regex(text)
        return [text]
    parts: list[Pattern] = []
    for part in (piece.strip() for piece in text.split(",")):
        if not part:
            raise ArgumentError(f"Empty pattern in {item!r}: give a class name or a module's name.")
        if part.startswith("re:"):
            raise ArgumentError(
                f"Pattern {item!r} holds a regular expression in a comma list: give "
                f"the regular expression as a pattern of its own."
            )
        if part.startswith("@") and part not in _TOKENS:
            raise ArgumentError(f"Unknown token {part!r}: there are {', '.join(_TOKENS)}.")
        parts.append(part)
    return parts


def _check_regex(pattern: str) -> None:
    if pattern == "re:":
        raise ArgumentError("Empty pattern 're:': put a regular expression after the colon.")
    try:
        re.compile(pattern[3:])
    except (re.error, OverflowError, RecursionError) as error:
        raise ArgumentError(
            f"Pattern {pattern!r} is not a valid regular expression: {error}."
        ) from error


def text_of(pattern: Pattern) -> str:
    return pattern if isinstance(pattern, str) else pattern.__name__


def shown(pattern: Pattern) -> str:
    return repr(pattern) if isinstance(pattern, str) else pattern.__name__
