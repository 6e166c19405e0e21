"""What a converted model has been given since its conversion, and has no posterior."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import nn

from .conversion import Conversion
from .errors import LostPosteriorWarning
from .planning import classify
from .posterior import OwnerState, owner_state, raw_name, sites
from .selection import Recorded
from .validation import Found

_LISTED = 5
Place = tuple[int, str]
"""A module by its id, and the name of a parameter in it."""


@dataclass
class Part:
    """A module that a conversion was called on, and what it has been given since.

    ``new`` are the places that no plan has settled yet: the parameter's name in the whole model,
    and whether it requires a gradient.
    """

    module: nn.Module
    spec: Conversion
    new: dict[Place, tuple[str, bool]] = field(default_factory=dict)

    def selected(self) -> list[Found]:
        """What is new and selected by the conversion, or tied to a posterior elsewhere."""
        if not self.new:
            return []
        present = list(sites(self.module))
        return [
            item
            for item in classify(self.module, self.spec, present, strict=False)[0]
            if any((id(module), attribute) in self.new for _, module, attribute in item.places)
            and (item.action == "bayes" or any(has_slot(m, a) for _, m, a in item.places))
        ]

    def undecided(self) -> str:
        """What is new and a pattern cannot be asked about, as a sentence; empty if there is none.

        A file and a pickle hold what a function had chosen, but not the function.
        """
        recorded = [p for p in dict.fromkeys(self.spec.patterns) if isinstance(p, Recorded)]
        if not recorded or not self.new:
            return ""
        names = [
            f"{path}.{attribute}" if path else attribute
            for path, module in self.module.named_modules(remove_duplicate=False)
            for attribute in module._parameters
            if (id(module), attribute) in self.new
        ]
        unknown = [name for name in names if name not in recorded[0].known]
        if not unknown:
            return ""
        return (
            f"{', '.join(map(repr, recorded))} of the conversion stands for the parameters that it "
            "had chosen when the model was written: a regular expression of a file is not run, and "
            "a function is in no file. It does not choose among "
            f"{len(unknown)} new ones: {', '.join(unknown[:3])}{', ...' * (len(unknown) > 3)}."
        )


def has_slot(module: nn.Module, attribute: str) -> bool:
    """Whether a parameter has a posterior where this module holds it."""
    state = owner_state(module)
    return state is not None and attribute in state.slots


def _without(module: nn.Module, state: OwnerState | None) -> list[tuple[str, nn.Parameter]]:
    """The parameters of one module that have no posterior there."""
    own = [(name, p) for name, p in module._parameters.items() if p is not None]
    if state is None or not state.slots:
        return own
    held = {*state.slots, *(raw_name(a, slot) for a, slot in state.slots.items())}
    return [(name, p) for name, p in own if name not in held]


def converted_parts(model: nn.Module) -> list[Part]:
    """The outermost converted modules of a model, each with what is new in it.

    A settled place is new again if its parameter has a posterior elsewhere: it was tied since the
    conversion, and here it is read at its mean.
    """
    parts: list[Part] = []
    means: set[int] = set()
    known: list[tuple[int, Part, Place, tuple[str, bool]]] = []
    seen: set[int] = set()
    stack: list[tuple[nn.Module, str, Part | None, frozenset[str], str]]
    stack = [(model, "", None, frozenset(), "")]
    while stack:
        module, path, part, settled, inside = stack.pop()
        state = owner_state(module)
        if state is not None:
            if part is None or state.spec is not part.spec:
                part = Part(module, state.spec)
                parts.append(part)
            settled, inside = state.plain, ""
            means.update(id(module._parameters.get(attribute)) for attribute in state.slots)
        if part is not None:
            if id(module) in seen:
                continue
            seen.add(id(module))
            for name, parameter in _without(module, state):
                what = (path + name, parameter.requires_grad)
                if inside + name in settled:
                    known.append((id(parameter), part, (id(module), name), what))
                else:
                    part.new[id(module), name] = what
        for name, child in reversed(module._modules.items()):
            if child is not None:
                stack.append((child, f"{path}{name}.", part, settled, f"{inside}{name}."))
    for identity, part, place, what in known:
        if identity in means:
            part.new[place] = what
    return parts


def settle(model: nn.Module) -> None:
    """Note that what has no posterior in a model now is not to have one."""
    for owner in model.modules():
        state = owner_state(owner)
        if state is None:
            continue
        names: set[str] = set()
        stack, seen = [("", owner)], set()
        while stack:
            prefix, module = stack.pop()
            if module is not owner and (owner_state(module) is not None or module in seen):
                continue
            seen.add(module)
            names.update(prefix + name for name, _ in _without(module, owner_state(module)))
            stack += [(f"{prefix}{n}.", m) for n, m in module._modules.items() if m is not None]
        state.plain = frozenset(names)


def warn_of_unconverted(model: nn.Module, *, once: bool = False, stacklevel: int = 3) -> None:
    """Name what a conversion of ``model`` selects and what has no posterior: it came later.

    Args:
        model: any module.
        once: say nothing of what this has named before.
        stacklevel: as that of ``warnings.warn``, seen from here.
    """
    if torch.compiler.is_compiling():
        return
    parts = converted_parts(model)
    if not any(part.new for part in parts):
        return
    state = owner_state(parts[0].module)
    assert state is not None
    now = frozenset(what for part in parts for what in part.new.values())
    if once and now == state.warned:
        return
    state.warned = now
    names = [
        part.new[place][0]
        for part in parts
        for item in part.selected()
        for place in [(id(module), attribute) for _, module, attribute in item.places]
        if place in part.new
    ]
    undecided = list(filter(None, (part.undecided() for part in parts)))
    if not names:
        return
    shown = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
    count = f"{len(names)} parameter{'s' * (len(names) > 1)}"
    warnings.warn(
        f"{count} of {type(model).__name__} came after its conversion and without a posterior, "
        f"though the conversion selects such: {shown}. No call draws them and no KL counts them. "
        "Give them one with bayesify.extend_(model) and make the optimizer anew; or freeze them, "
        "or ignore bayesify.LostPosteriorWarning, if they are to stay deterministic."
        + "".join(f" {sentence}" for sentence in undecided),
        LostPosteriorWarning,
        stacklevel=stacklevel,
    )
