"""What was verified of each model of timm and torchvision, as `benchmarks/zoo.py` recorded it."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

ASSET = "zoo.json"


@dataclass(frozen=True)
class Verified:
    """What was checked of one model, and how it ended.

    Attributes:
        name: As :func:`bayesify.create_model` takes it.
        parameters: Number of its parameters.
        tensors: Number of its tensors that become Bayesian.
        structural: ``ok``, ``failed`` or ``not run``: every parameter in use is drawn and none is
            read as it is, in eval and train mode; classes, methods and keys are kept.
        numeric: ``ok``, ``failed`` or ``not run``: outputs and gradients are bit for bit those of
            the plain model with the drawn weights; ``shallow``: ok for the same model with fewer
            layers; ``alike``: not run, but ok for ``numeric_of``, a model of the same modules.
        numeric_of: The model whose numbers were compared.
        graphs: Share of its owners of parameters that became graphs; the others take the fallback.
        note: Why something failed or is missing, or what the original itself refuses.
        date: When it was checked last.
        versions: Of torch and of the library that has the model.
    """

    name: str
    parameters: int
    tensors: int
    structural: str
    numeric: str
    numeric_of: str
    graphs: float
    note: str
    date: str
    versions: str

    @property
    def failed(self) -> bool:
        """Whether a check failed."""
        return "failed" in (self.structural, self.numeric)


@functools.cache
def verified() -> Mapping[str, Verified]:
    """The table by name; a model that is not in it was not checked."""
    text = files("bayesify").joinpath("assets", ASSET).read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    rows = (dict(zip(document["columns"], row, strict=True)) for row in document["rows"])
    return {row["name"]: Verified(**row) for row in rows}
