"""Which parameters become Bayesian: the ``skip`` and ``only`` patterns of Python and command line.

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
                            :func:`.unseen.before_batchnorm`
==========================  =======================================================================

Matching is case-sensitive. ``skip`` beats ``only``. A tied parameter counts under all its names.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

from torch import nn

from bayesify.absorbed_biases import before_batchnorm
from bayesify.errors import ArgumentError, NoMatchError

Pattern = str | type[nn.Module]

_LAST_LAYER = "@last-layer"
_BEFORE_BATCHNORM = "@before-batchnorm"
_TOKENS = (_LAST_LAYER, _BEFORE_BATCHNORM)
_MAX_LISTED = 6


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
    "last-layer": Preset((_LAST_LAYER,), (), "The classifier only."),
}


@dataclass(frozen=True)
class Selection:
    """What ``select`` decided.

    Attributes:
        skipped: reason by parameter name: the skip pattern as given, or ``"not in only"``. Holds
            every name of a tied parameter, in the order of ``named_parameters``.
        notes: what the user should see: patterns that matched nothing, near misses, patterns with
            two meanings, class globs that took a container's other layers too.
        unmatched: the patterns that matched no floating-point parameter.
    """

    skipped: dict[str, str]
    notes: tuple[str, ...]
    unmatched: tuple[str, ...]


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
    if isinstance(item, type) and issubclass(item, nn.Module):
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


def select(
    model: nn.Module,
    *,
    skip: Pattern | Sequence[Pattern] = (),
    only: Pattern | Sequence[Pattern] = (),
    preset: str | None = None,
    strict: bool = False,
) -> Selection:
    """Decide which floating-point parameters of ``model`` are left deterministic, and why.

    A parameter is selected if no skip pattern matches any of its names and, where there are
    ``only`` patterns, one of them matches any of its names. With a preset, ``skip`` adds to the
    preset's list, and a parameter must be in both the preset's ``only`` and the one given.

    Args:
        model: any module; nothing in it is changed.
        skip: patterns of what to leave out; see the module's text.
        only: patterns of what to take; none means everything.
        preset: a key of ``PRESETS``.
        strict: raise, rather than note, patterns that match nothing.

    Returns:
        The reasons by parameter name, and what the user should be told.

    Raises:
        ArgumentError: a bad pattern, or a preset that does not exist.
        NoMatchError: under ``strict``, patterns that match nothing; one message names them all.
            The patterns of a preset are judged together: it fails if all of them match nothing.
    """
    base = _preset(preset)
    given = {"skip": parse_patterns(skip), "only": parse_patterns(only)}
    view = _View(model)
    base_matches = {
        "skip": [_match(view, pattern) for pattern in base.skip],
        "only": [_match(view, pattern) for pattern in base.only],
    }
    matches = {side: [_match(view, p) for p in given[side]] for side in given}

    reasons: dict[int, str] = {}
    for match in base_matches["skip"] + matches["skip"]:
        for parameter in match.parameters:
            reasons.setdefault(parameter, _text(match.pattern))
    allowed = _union(base_matches["only"]) if base.only else view.all
    wanted = allowed & _union(matches["only"]) if matches["only"] else allowed
    skipped = {
        name: reasons.get(parameter, "not in only")
        for name, parameter in view.parameters.items()
        if parameter in reasons or parameter not in wanted
    }

    missed: list[str] = []
    notes: list[str] = []
    unmatched: list[Pattern] = []
    base_group = base_matches["skip"] + base_matches["only"]
    if base_group and not _union(base_group):
        patterns = base.skip + base.only
        label = f"preset={preset!r} ({', '.join(patterns)})"
        missed.append(_no_match_note(view, label, base_group[0]))
        unmatched += patterns
    # A near miss is news only if no other pattern has settled the parameter's fate.
    open_to = {"skip": wanted - set(reasons), "only": allowed - wanted - set(reasons)}
    for side, group in matches.items():
        for match in group:
            label = f"{side}={_shown(match.pattern)}"
            if match.parameters:
                notes += _match_notes(view, label, match, open_to[side])
            else:
                missed.append(_no_match_note(view, label, match))
                unmatched.append(match.pattern)
    if strict and missed:
        remedy = "Correct or drop these patterns, or select without strict."
        raise NoMatchError("\n".join([*missed, remedy]))
    return Selection(skipped, (*missed, *notes), tuple(_text(p) for p in unmatched))


def assign(
    model: nn.Module, choices: Sequence[tuple[Pattern, str]], *, what: str, strict: bool = False
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Give each floating-point parameter the value of the first pattern that matches it.

    Args:
        model: any module; nothing in it is changed.
        choices: (pattern, value) in the order in which they are tried.
        what: the argument that they were given as, for messages.
        strict: raise, rather than note, patterns that match nothing.

    Returns:
        The values by parameter name, all names of a tied one, and notes on patterns that match
        nothing.

    Raises:
        NoMatchError: under ``strict``, a pattern matches nothing.
    """
    view = _View(model)
    values: dict[int, str] = {}
    missed = []
    for pattern, value in choices:
        match = _match(view, pattern)
        if not match.parameters:
            missed.append(_no_match_note(view, f"{what}={{{_shown(pattern)}: {value!r}}}", match))
        for parameter in match.parameters:
            values.setdefault(parameter, value)
    if strict and missed:
        raise NoMatchError("\n".join([*missed, "Correct or drop these patterns."]))
    found = {name: values[p] for name, p in view.parameters.items() if p in values}
    return found, tuple(missed)


def _preset(name: str | None) -> Preset:
    if name is None:
        return PRESETS["full"]
    if name not in PRESETS:
        raise ArgumentError(f"Unknown preset {name!r}. Known presets: {', '.join(PRESETS)}.")
    return PRESETS[name]


class _View:
    """Names, classes and floating-point parameters of a model, read once for all patterns.

    A parameter is known by its ``id``, so that all names of a tied one stand for the same thing;
    the ids live no longer than this object, which the model outlives.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.parameters = {
            name: id(parameter)
            for name, parameter in nn.Module.named_parameters(model, remove_duplicate=False)
            if parameter.is_floating_point()
        }
        self.all = set(self.parameters.values())
        # What lies at or below every qualified name, of a module or of a parameter.
        self.inside: dict[str, set[int]] = {name: set() for name in self.modules}
        for name, parameter in self.parameters.items():
            self.inside[name] = {parameter}
            while name:
                name = name.rpartition(".")[0]
                self.inside[name].add(parameter)
        self.class_names = {kind: _class_names(kind) for kind in map(type, self.modules.values())}

    def below(self, names: Iterable[str]) -> set[int]:
        return set().union(*(self.inside[name] for name in names))

    def own(self, path: str) -> set[int]:
        parameters = self.modules[path]._parameters
        return {id(p) for p in parameters.values() if id(p) in self.all}

    def count(self, paths: Iterable[str]) -> Counter[str]:
        """How many different modules of each class name the paths hold."""
        different = {id(self.modules[path]): self.modules[path] for path in paths}
        return Counter(type(module).__name__ for module in different.values())


@dataclass(frozen=True)
class _Match:
    pattern: Pattern
    as_class: list[str]  # paths of the modules whose class matches
    as_name: list[str]  # qualified names of modules and parameters that match
    parameters: set[int]


def _match(view: _View, pattern: Pattern) -> _Match:
    as_class: list[str] = []
    as_name: list[str] = []
    if isinstance(pattern, type):
        as_class = [path for path, module in view.modules.items() if isinstance(module, pattern)]
    elif pattern == _LAST_LAYER:
        as_name = _last_layer(view)
    elif pattern == _BEFORE_BATCHNORM:
        as_name = [name for name in before_batchnorm(view.model) if name in view.parameters]
    elif pattern.startswith("re:"):
        search = re.compile(pattern[3:]).search
        as_name = [name for name in view.parameters if search(name)]
    else:
        fits = partial(fnmatchcase, pat=pattern) if _is_glob(pattern) else pattern.__eq__
        kinds = {kind for kind, names in view.class_names.items() if any(map(fits, names))}
        as_class = [path for path, module in view.modules.items() if type(module) in kinds]
        as_name = [name for name in view.inside if name and fits(name)]
    return _Match(pattern, as_class, as_name, view.below([*as_class, *as_name]))


def _class_names(kind: type) -> frozenset[str]:
    return frozenset(base.__name__ for base in kind.__mro__ if base not in nn.Module.__mro__)


def _is_glob(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")


def _union(matches: Iterable[_Match]) -> set[int]:
    return set().union(*(match.parameters for match in matches))


def _last_layer(view: _View) -> list[str]:
    get_classifier = getattr(view.model, "get_classifier", None)
    if callable(get_classifier):
        found = get_classifier()
        heads = {id(head) for head in (found if isinstance(found, (tuple, list)) else [found])}
        paths = [path for path, module in view.modules.items() if id(module) in heads]
        if view.below(paths):
            return paths
    last: str | None = None
    for path, module in view.model.named_modules():
        tensors = (p for p in module._parameters.values() if p is not None)
        if any(p.dim() >= 2 and p.is_floating_point() for p in tensors):
            last = path
    if last is None:
        return []
    # A parametrized layer keeps its weight in a child module, and its bias in itself.
    parts = last.split(".")
    if "parametrizations" in parts:
        last = ".".join(parts[: parts.index("parametrizations")])
    return [path for path, module in view.modules.items() if module is view.modules[last]]


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

    def members(self, view: _View) -> list[str]:
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


def _is_leaf(view: _View, path: str) -> bool:
    prefix = f"{path}." if path else ""
    children = (
        f"{prefix}{name}"
        for name, child in view.modules[path]._modules.items()
        if child is not None and name != "parametrizations"
    )
    return bool(view.inside[path]) and not view.below(children)


def _no_match_note(view: _View, label: str, match: _Match) -> str:
    kind = type(view.model).__name__
    if not view.all:
        return f"{label} matches nothing: this model ({kind}) has no floating-point parameters."
    if match.as_class or match.as_name:
        paths = [*match.as_class, *(name for name in match.as_name if name in view.modules)]
        return (
            f"{label} matches only modules without floating-point parameters in this model "
            f"({kind}): {_listing(view.count(paths))}."
        )
    return " ".join([f"{label} matches nothing in this model ({kind}).", *_nearest(view, match)])


def _nearest(view: _View, match: _Match) -> list[str]:
    """Sentences that name what the model has instead."""
    pattern = match.pattern
    if pattern == _LAST_LAYER:
        return ["It has no layer with a tensor of two or more dimensions."]
    if pattern == _BEFORE_BATCHNORM:
        return ["It has no bias right before a BatchNorm."]
    if isinstance(pattern, str) and pattern.startswith("re:"):
        examples = dict.fromkeys(_collapse(name) for name in view.parameters)
        return [f"Its parameters have names such as {_quoted(list(examples)[:3])}."]
    text = _text(pattern)
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


def _match_notes(view: _View, label: str, match: _Match, open_to: set[int]) -> list[str]:
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
    if _is_glob(_text(match.pattern)):
        notes += _container_notes(view, label, match)
    for family in _FAMILIES:
        members = family.members(view) if family.named_by(_text(match.pattern)) else []
        hit = set(members).intersection(match.as_class)
        left = view.count(path for path in members if view.inside[path] <= open_to)
        if hit and left:
            notes.append(f"{label} takes {_listing(view.count(hit))}, not {_listing(left)}.")
    return notes


def _container_notes(view: _View, label: str, match: _Match) -> list[str]:
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


def _text(pattern: Pattern) -> str:
    return pattern if isinstance(pattern, str) else pattern.__name__


def _shown(pattern: Pattern) -> str:
    return repr(pattern) if isinstance(pattern, str) else pattern.__name__


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
