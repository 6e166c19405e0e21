"""What the outputs of a classifier are called, and where the classes of a data set are among them.

The names are kept with the model: ``fit`` gives them, ``save`` and ``load`` carry them. A model
that was given another number of classes since, as timm counts them, has none.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from .errors import ArgumentError, DataError

_KEPT = "_bayesify_classes"
_LISTED = 12


def classes_of(model: nn.Module) -> tuple[str, ...] | None:
    """The names of a model's outputs, in their order; None where nothing says them."""
    inner = _inside(model)
    names, count = inner.__dict__.get(_KEPT, (None, None))
    known: tuple[str, ...] | None = names
    return known if count == getattr(inner, "num_classes", None) else None


def name_classes_(model: nn.Module, names: Sequence[str] | None) -> nn.Module:
    """Say what a model's outputs are called, or with None that nothing says it.

    Args:
        model: A classifier.
        names: One for each output, in their order; outputs beyond them have none.

    Raises:
        ArgumentError: A name is no text.

    >>> model = name_classes_(nn.Linear(4, 2), ["cat", "dog"])
    >>> classes_of(model)
    ('cat', 'dog')
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names or ()):
        raise ArgumentError(f"names must be a sequence of texts, or None, not {names!r}.")
    inner = _inside(model)
    inner.__dict__.pop(_KEPT, None)
    if names:
        inner.__dict__[_KEPT] = (tuple(names), getattr(inner, "num_classes", None))
    return model


def places(known: Sequence[str], classes: Sequence[str], data: str) -> tuple[int, ...] | None:
    """For each class of a data set, which of a model's outputs has its name.

    Args:
        known: Names of the outputs.
        classes: Names of the data set's classes, in the order of its labels.
        data: The data set, for the messages.

    Returns:
        The indices; None where one side has numbers for names and the labels can only be taken
        for places, which a warning says.

    Raises:
        DataError: The data set has a class that the model has not, or a name stands for two.
    """
    if tuple(known) == tuple(classes):
        return tuple(range(len(classes)))
    counts, own = Counter(known), Counter(classes)
    strange = [name for name in classes if name not in counts]
    nameless = (_numbered(classes) and len(classes) <= len(known)) or (
        _numbered(known) and len(classes) == len(known)
    )
    if strange and nameless:
        warnings.warn(
            f"{'The model' if _numbered(known) else repr(data)} has no names of classes: the "
            f"labels of {data!r} are taken by their number. {_both(known, classes, data)}",
            stacklevel=5,
        )
        return None
    if strange:
        raise DataError(
            f"{data!r} has classes that the model has not: {_listed(strange)}. "
            f"{_both(known, classes, data)} Give data with the model's names, or a model of these "
            "classes. If its outputs have another meaning now, say so: "
            "bayesify.classes.name_classes_(model, names)."
        )
    twice = [name for name in classes if counts[name] > 1 or own[name] > 1]
    if twice:
        raise DataError(
            f"The class {twice[0]!r} of {data!r} cannot be found by its name, for two are called "
            f"so. {_both(known, classes, data)} Give each class a name of its own."
        )
    return tuple(map(list(known).index, classes))


def check_count(classes: Sequence[str], outputs: int, data: str) -> None:
    """Refuse named classes of which nothing says which of a model's more outputs they are.

    Raises:
        DataError: Their numbers differ.
    """
    if len(classes) != outputs and not _numbered(classes):
        raise DataError(
            f"The model has {outputs} outputs without names and {data!r} {len(classes)} classes "
            f"({_listed(classes)}), so that nothing says which output is which class. Build it "
            f"with num_classes={len(classes)}, or name its outputs: "
            "bayesify.classes.name_classes_(model, names), which bayesify.save writes too."
        )


def _numbered(names: Sequence[str]) -> bool:
    """Whether the names are only those that classes without a name have."""
    return all(name == str(index) for index, name in enumerate(names))


def _both(known: Sequence[str], classes: Sequence[str], data: str) -> str:
    return f"The model has {_listed(known)}; {data!r} has {_listed(classes)}."


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _inside(model: Any) -> Any:
    """The model inside a compiled or a data-parallel one."""
    inner = getattr(model, "_orig_mod", model)
    parallel = isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel)
    return inner.module if parallel else inner
