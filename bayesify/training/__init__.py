"""The supervised fit of a posterior, and how good its predictions are on labelled data."""

from .evaluation import Evaluation, Prediction, evaluate
from .fitting import fit
from .progress import FitResult, LogvarTravel, Progress
from .resume import Interrupted

__all__ = [
    "Evaluation",
    "FitResult",
    "Interrupted",
    "LogvarTravel",
    "Prediction",
    "Progress",
    "evaluate",
    "fit",
]
