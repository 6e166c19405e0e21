"""Settings of ``bayesify fit TABLE``: what of a table is fitted, and by what network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from .fields import Count, Shown, checked, refuse

_PANEL = "Where FILE is a table"
_COLUMN = Shown(panel=_PANEL, metavar="COLUMN")


@dataclass(frozen=True, kw_only=True)
class TableSettings:
    """What of a table is fitted, and by what network.

    Args:
        target: The column that is predicted from the others.
        likelihood: gaussian: a number, its noise is learned. predicted: a number, its noise depends
            on the other columns. categorical: a class. By default texts, and whole numbers with at
            most ten different values, are classes.
        ignore: Leaves a column out. Repeatable.
        categorical: A column of numbers that are names of categories. Repeatable.
        hidden: Units of a hidden layer of the network. Repeatable.
    """

    target: Annotated[str | None, _COLUMN] = None
    likelihood: Annotated[
        Literal["gaussian", "predicted", "categorical"] | None, Shown(panel=_PANEL, metavar="KIND")
    ] = None
    ignore: Annotated[tuple[str, ...], _COLUMN] = ()
    categorical: Annotated[tuple[str, ...], _COLUMN] = ()
    hidden: Annotated[tuple[Count, ...], Shown(panel=_PANEL, metavar="UNITS")] = (50,)

    def __post_init__(self) -> None:
        refuse("fit", checked(self))
