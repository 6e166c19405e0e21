"""What a pattern matches in a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial

from torch import nn

from ..absorbed_biases import before_batchnorm
from .patterns import BEFORE_BATCHNORM, LAST_LAYER, Filter, ParsedPattern, Recorded


class View:
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
class Match:
    pattern: ParsedPattern  # of a function with what it has chosen
    as_class: list[str]  # paths of the modules whose class matches
    as_name: list[str]  # qualified names of modules and parameters that match
    parameters: set[int]


def match_of(view: View, pattern: ParsedPattern) -> Match:
    if isinstance(pattern, Filter):
        return _asked(view, pattern)
    as_class: list[str] = []
    as_name: list[str] = []
    if isinstance(pattern, type):
        as_class = [path for path, module in view.modules.items() if isinstance(module, pattern)]
    elif isinstance(pattern, Recorded):
        as_name = [name for name in view.parameters if name in pattern.names]
    elif pattern == LAST_LAYER:
        as_name = _last_layer(view)
    elif pattern == BEFORE_BATCHNORM:
        as_name = [name for name in before_batchnorm(view.model) if name in view.parameters]
    elif pattern.startswith("re:"):
        search = re.compile(pattern[3:]).search
        as_name = [name for name in view.parameters if search(name)]
    else:
        fits = partial(fnmatchcase, pat=pattern) if is_glob(pattern) else pattern.__eq__
        kinds = {kind for kind, names in view.class_names.items() if any(map(fits, names))}
        as_class = [path for path, module in view.modules.items() if type(module) in kinds]
        as_name = [name for name in view.inside if name and fits(name)]
    return Match(pattern, as_class, as_name, view.below([*as_class, *as_name]))


def _asked(view: View, pattern: Filter) -> Match:
    """What a function chooses: of the modules that it is true of the parameters held there."""
    paths = [path for path, module in view.modules.items() if pattern(module, path)]
    chosen = set().union(*map(view.own, paths))
    names = frozenset(name for name, parameter in view.parameters.items() if parameter in chosen)
    asked = replace(pattern, names=names, known=frozenset(view.parameters))
    return Match(asked, [], paths, chosen)


def _class_names(kind: type) -> frozenset[str]:
    return frozenset(base.__name__ for base in kind.__mro__ if base not in nn.Module.__mro__)


def is_glob(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")


def union(matches: Iterable[Match]) -> set[int]:
    return set().union(*(match.parameters for match in matches))


def _last_layer(view: View) -> list[str]:
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
