"""Which parameters become Bayesian: ``skip``, ``only`` and presets together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import nn

from ..errors import ArgumentError, NoMatchError
from .matching import View, match_of, union
from .notes import match_notes, no_match_note
from .patterns import (
    PRESETS,
    ParsedPattern,
    Pattern,
    Preset,
    Recorded,
    parse_patterns,
    shown,
    text_of,
)

Value = TypeVar("Value", bound=str)


@dataclass(frozen=True)
class Selection:
    """What ``select`` decided.

    Attributes:
        skipped: reason by parameter name: the skip pattern as given, or ``"not in only"``. Holds
            every name of a tied parameter, in the order of ``named_parameters``.
        notes: what the user should see: patterns that matched nothing, near misses, patterns with
            two meanings, class globs that took a container's other layers too.
        unmatched: the patterns that matched no floating-point parameter.
        skip: the patterns given, those that are functions with what they have chosen.
        only: likewise.
    """

    skipped: dict[str, str]
    notes: tuple[str, ...]
    unmatched: tuple[str, ...]
    skip: tuple[ParsedPattern, ...] = ()
    only: tuple[ParsedPattern, ...] = ()


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
        skip: patterns of what to leave out, as :mod:`.patterns` has them.
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
    view = View(model)
    base_matches = {
        "skip": [match_of(view, pattern) for pattern in base.skip],
        "only": [match_of(view, pattern) for pattern in base.only],
    }
    matches = {side: [match_of(view, p) for p in given[side]] for side in given}

    reasons: dict[int, str] = {}
    skipping = base_matches["skip"] + matches["skip"]
    # what is recorded stands for all that was skipped, by whichever pattern
    for match in sorted(skipping, key=lambda m: isinstance(m.pattern, Recorded)):
        for parameter in match.parameters:
            reasons.setdefault(parameter, text_of(match.pattern))
    allowed = union(base_matches["only"]) if base.only else view.all
    wanted = allowed & union(matches["only"]) if matches["only"] else allowed
    skipped = {
        name: reasons.get(parameter, "not in only")
        for name, parameter in view.parameters.items()
        if parameter in reasons or parameter not in wanted
    }

    missed: list[str] = []
    notes: list[str] = []
    unmatched: list[ParsedPattern] = []
    base_group = base_matches["skip"] + base_matches["only"]
    if base_group and not union(base_group):
        patterns = base.skip + base.only
        label = f"preset={preset!r} ({', '.join(patterns)})"
        missed.append(no_match_note(view, label, base_group[0]))
        unmatched += patterns
    # A near miss is news only if no other pattern has settled the parameter's fate.
    open_to = {"skip": wanted - set(reasons), "only": allowed - wanted - set(reasons)}
    for side, group in matches.items():
        for match in group:
            label = f"{side}={shown(match.pattern)}"
            if match.parameters:
                notes += match_notes(view, label, match, open_to[side])
            else:
                missed.append(no_match_note(view, label, match))
                unmatched.append(match.pattern)
    if strict and missed:
        remedy = "Correct or drop these patterns, or select without strict."
        raise NoMatchError("\n".join([*missed, remedy]))
    asked = {side: tuple(match.pattern for match in group) for side, group in matches.items()}
    unmatched_texts = tuple(text_of(p) for p in unmatched)
    return Selection(skipped, (*missed, *notes), unmatched_texts, asked["skip"], asked["only"])


@dataclass(frozen=True)
class Assignment(Generic[Value]):
    """What ``assign`` decided.

    Attributes:
        values: by parameter name, all names of a tied one.
        notes: on patterns that match nothing.
        choices: those given, patterns that are functions with what they have chosen.
    """

    values: dict[str, Value]
    notes: tuple[str, ...]
    choices: tuple[tuple[ParsedPattern, Value], ...]


def assign(
    model: nn.Module,
    choices: Sequence[tuple[ParsedPattern, Value]],
    *,
    what: str,
    strict: bool = False,
) -> Assignment[Value]:
    """Give each floating-point parameter the value of the first pattern that matches it.

    Args:
        model: any module; nothing in it is changed.
        choices: (pattern, value) in the order in which they are tried.
        what: the argument that they were given as, for messages.
        strict: raise, rather than note, patterns that match nothing.

    Raises:
        NoMatchError: under ``strict``, a pattern matches nothing.
    """
    view = View(model)
    values: dict[int, Value] = {}
    missed, asked = [], []
    for pattern, value in choices:
        match = match_of(view, pattern)
        asked.append((match.pattern, value))
        if not match.parameters:
            missed.append(no_match_note(view, f"{what}={{{shown(pattern)}: {value!r}}}", match))
        for parameter in match.parameters:
            values.setdefault(parameter, value)
    if strict and missed:
        raise NoMatchError("\n".join([*missed, "Correct or drop these patterns."]))
    found = {name: values[p] for name, p in view.parameters.items() if p in values}
    return Assignment(found, tuple(missed), tuple(asked))


def _preset(name: str | None) -> Preset:
    if name is None:
        return PRESETS["full"]
    if name not in PRESETS:
        raise ArgumentError(f"Unknown preset {name!r}. Known presets: {', '.join(PRESETS)}.")
    return PRESETS[name]
