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
a function                  ``(module, name) -> bool``, asked of every module with its qualified
                            name: the parameters that a module holds itself, not those inside it
==========================  =======================================================================

Matching is case-sensitive. ``skip`` beats ``only``. A tied parameter counts under all its names.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import ArgumentError

Pattern = str | type[nn.Module] | Callable[[nn.Module, str], bool]

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
    """What cannot be asked again: a regular expression or a function out of a file or a pickle.

    A regular expression of a file is not run, since it could take for ever; a function is not in
    it. It stands for the parameters that it had chosen.

    Args:
        text: The pattern, ``re:`` and all, or the name of the function.
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


@dataclass(frozen=True)
class Filter:
    """A function ``(module, name) -> bool`` as a pattern; a pickle of it is a :class:`Recorded`.

    Args:
        function: Is true of the modules whose own parameters it chooses.
        names: Of the parameters that it has chosen, where it has been asked.
        known: Of all parameters that it was asked about.

    Raises:
        ArgumentError: It cannot be called with a module and a name.
    """

    function: Callable[[nn.Module, str], bool] = field(hash=False)
    names: frozenset[str] = frozenset()
    known: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        try:
            inspect.signature(self.function).bind(None, "")
        except ValueError:  # written in C, it shows no signature
            pass
        except TypeError as error:
            raise ArgumentError(
                f"Bad pattern: {self} cannot be called with a module and its name ({error}). A "
                "function as a pattern is (module, name) -> bool."
            ) from None

    def __call__(self, module: nn.Module, name: str) -> bool:
        """What the function says of one module."""
        of = f"{name!r} ({type(module).__name__})" if name else f"the {type(module).__name__}"
        try:
            answer: object = self.function(module, name)
        except Exception as error:
            raise ArgumentError(
                f"The pattern {self} failed on {of}: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(answer, bool):
            raise ArgumentError(
                f"The pattern {self} gave a {type(answer).__name__} for {of}. A function as a "
                "pattern is (module, name) -> bool: let it give True or False."
            )
        return answer

    @property
    def recorded(self) -> Recorded:
        """What stands for it where code does not go."""
        return Recorded(str(self), self.names, self.known)

    def __str__(self) -> str:
        name = getattr(self.function, "__qualname__", type(self.function).__qualname__)
        return f"{name.rpartition('<locals>.')[2]}()"

    def __deepcopy__(self, memo: dict[int, Any]) -> Filter:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Recorded, (str(self), self.names, self.known)


ParsedPattern = str | type[nn.Module] | Filter


def parse_patterns(
    value: Pattern | Sequence[Pattern],
) -> tuple[ParsedPattern, ...]:
    """Turn what a user gave as ``skip`` or ``only`` into a tuple of distinct patterns.

    The command line and the Python functions share this parser. A string is split at commas
    (``"LayerNorm,patch_embed"``) unless it starts with ``re:``; then it is one regular expression,
    and so a regular expression cannot be one of several in the same string.

    Args:
        value: a string, a subclass of ``nn.Module``, a function ``(module, name) -> bool``, or a
            sequence of these.

    Returns:
        The patterns in the order given, each once.

    Raises:
        ArgumentError: a pattern is empty, of a wrong type, a regular expression that does not
            compile, a token that does not exist, or a function of other arguments.
    """
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    patterns = (pattern for item in items for pattern in _parse_item(item))
    return tuple(dict.fromkeys(patterns))


def _parse_item(item: object) -> list[ParsedPattern]:
    if isinstance(item, type) and issubclass(item, nn.Module):
        return [item]
    if isinstance(item, Recorded | Filter):
        return [item]
    if callable(item) and not isinstance(item, type | nn.Module):
        return [Filter(item)]
    if not isinstance(item, str):
        shown = f"a {type(item).__name__} module" if isinstance(item, nn.Module) else repr(item)
        raise ArgumentError(
            f"Bad pattern: {shown}. A pattern is a string, a subclass of torch.nn.Module, or a "
            "function (module, name) -> bool; skip and only take one or a sequence of them."
        )
    text = item.strip()
    if text.startswith("re:"):
        _check_regex(text)
        return [text]
    parts: list[ParsedPattern] = []
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


def text_of(pattern: ParsedPattern) -> str:
    return pattern.__name__ if isinstance(pattern, type) else str(pattern)


def shown(pattern: ParsedPattern) -> str:
    return repr(pattern) if isinstance(pattern, str) else text_of(pattern)
