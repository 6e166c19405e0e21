"""What a user should know of a pattern: no match, a near miss, two meanings."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .matching import Match, View, is_glob
from .patterns import BEFORE_BATCHNORM, LAST_LAYER, Filter, Recorded, text_of

_MAX_LISTED = 6


@dataclass(frozen=True)
class _Family:
    """Layers that users name in one breath.

    A ``leaf`` family counts only modules without parameters in children: ConvNeXtBlock and
    LinearNorm are no layers of the kind their name says.
    """

    words: tuple[str, ...]
    label: str
    leaf: bool

    def named_by(self, name: str) -> bool:
        return any(word in name.lower() for word in self.words)

    def members(self, view: View) -> list[str]:
        return [
            path
            for path, module in view.modules.items()
            if self.named_by(type(module).__name__)
            and (_is_leaf(view, path) if self.leaf else view.inside[path])
        ]


_FAMILIES = (
    _Family(("norm",), "normalisation layers", leaf=True),
    _Family(("conv",), "convolutions", leaf=True),
    _Family(("linear",), "linear layers", leaf=True),
    _Family(("attention", "attn"), "attention modules", leaf=False),
    _Family(("embed",), "embedding modules", leaf=False),
)


def _is_leaf(view: View, path: str) -> bool:
    prefix = f"{path}." if path else ""
    children = (
        f"{prefix}{name}"
        for name, child in view.modules[path]._modules.items()
        if child is not None and name != "parametrizations"
    )
    return bool(view.inside[path]) and not view.below(children)


def no_match_note(view: View, label: str, match: Match) -> str:
    kind = type(view.model).__name__
    if not view.all:
        return f"{label} matches nothing: this model ({kind}) has no floating-point parameters."
    if isinstance(match.pattern, Filter):
        return _true_of_none(view, label, match)
    if match.as_class or match.as_name:
        paths = [*match.as_class, *(name for name in match.as_name if name in view.modules)]
        return (
            f"{label} matches only modules without floating-point parameters in this model "
            f"({kind}): {_listing(view.count(paths))}."
        )
    return " ".join([f"{label} matches nothing in this model ({kind}).", *_nearest(view, match)])


def _true_of_none(view: View, label: str, match: Match) -> str:
    kind = type(view.model).__name__
    if not match.as_name:
        return f"{label} is true of no module of this model ({kind})."
    return (
        f"{label} is true only of modules that hold no floating-point parameter themselves, in "
        f"this model ({kind}): {_listing(view.count(match.as_name))}. A function is asked of every "
        "module for itself: let it be true of the layers inside as well."
    )


def _nearest(view: View, match: Match) -> list[str]:
    """Sentences that name what the model has instead."""
    pattern = match.pattern
    if isinstance(pattern, Recorded):
        return ["What it had chosen is not there."]
    if pattern == LAST_LAYER:
        return ["It has no layer with a tensor of two or more dimensions."]
    if pattern == BEFORE_BATCHNORM:
        return ["It has no bias right before a BatchNorm."]
    if isinstance(pattern, str) and pattern.startswith("re:"):
        examples = dict.fromkeys(_collapse(name) for name in view.parameters)
        return [f"Its parameters have names such as {_quoted(list(examples)[:3])}."]
    text = text_of(pattern)
    may_be_class = "." not in text
    may_be_name = not text.lstrip("*?_")[:1].isupper()
    counts = view.count(path for path in view.modules if view.inside[path])
    sentences: list[str] = []
    close: list[str] = []
    if may_be_class:
        listed: Counter[str] = Counter()
        for family in _FAMILIES:
            members = view.count(family.members(view)) if family.named_by(text) else Counter()
            if members:
                sentences.append(f"Its {family.label}: {_listing(members)}.")
                listed |= members
        close = [name for name in _closest(text, counts) if name not in listed]
        if isinstance(pattern, type) and text in counts:
            sentences.append(f"Its {text} is another class; the string {text!r} takes it by name.")
            close = []
    if may_be_name:
        close += _closest(_collapse(text), {_collapse(name) for name in view.inside if name})
    if close:
        sentences.append(f"Close names: {_quoted(close)}.")
    if not sentences and may_be_class:
        layers = view.count(path for path in view.modules if view.own(path))
        sentences.append(f"Its layers: {_listing(layers)}.")
    if may_be_name and not close:
        top = [name for name in view.inside if name and "." not in name and view.inside[name]]
        sentences.append(f"Its top names: {_quoted(top)}.")
    return sentences


def match_notes(view: View, label: str, match: Match, open_to: set[int]) -> list[str]:
    if not view.below(match.as_class):
        return []
    notes: list[str] = []
    if view.below(match.as_name):
        classes = view.count(path for path in match.as_class if view.inside[path])
        matched = set(match.as_name)
        top = [name for name in match.as_name if name.rpartition(".")[0] not in matched]
        names = list(dict.fromkeys(_collapse(name) for name in top if view.inside[name]))
        notes.append(
            f"{label} has two meanings and takes both: the class ({_listing(classes)}) and "
            f"the name ({_quoted(names)})."
        )
    if is_glob(text_of(match.pattern)):
        notes += _container_notes(view, label, match)
    for family in _FAMILIES:
        members = family.members(view) if family.named_by(text_of(match.pattern)) else []
        hit = set(members).intersection(match.as_class)
        left = view.count(path for path in members if view.inside[path] <= open_to)
        if hit and left:
            notes.append(f"{label} takes {_listing(view.count(hit))}, not {_listing(left)}.")
    return notes


def _container_notes(view: View, label: str, match: Match) -> list[str]:
    """A glob such as ``Conv*`` means layers, but also matches ConvNeXt and so all in it."""
    matched = set(match.as_class)
    if not any(_is_leaf(view, path) for path in matched):
        return []
    extra = view.below(matched) - set().union(*(view.own(path) for path in matched))
    others = [path for path in view.modules if view.own(path) & extra]
    if not others:
        return []
    containers = [path for path in matched if view.inside[path] & extra]
    where = "the model itself" if "" in matched else _listing(view.count(containers))
    return [f"{label} also takes what is inside {where}: {_listing(view.count(others))}."]


def _listing(counts: Counter[str]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return _some([f"{count} {name}" for name, count in ordered])


def _quoted(names: Sequence[str]) -> str:
    return _some([repr(name) for name in names])


def _some(texts: Sequence[str]) -> str:
    more = len(texts) - _MAX_LISTED
    return ", ".join(texts[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def _collapse(name: str) -> str:
    """``blocks.3.attn`` -> ``blocks.*.attn``, a pattern for the whole stack."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _closest(wanted: str, names: Iterable[str]) -> list[str]:
    """The names most like ``wanted``, whatever their case: those that end in it come first."""
    by_lower = {name.lower(): name for name in sorted(names)}
    low = wanted.lower()
    ends = [name for key, name in by_lower.items() if key == low or key.endswith(f".{low}")]
    alike = difflib.get_close_matches(low, by_lower, n=3, cutoff=0.7)
    return list(dict.fromkeys([*ends, *(by_lower[key] for key in alike)]))[:3]
