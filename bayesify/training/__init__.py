"""The supervised fit of a posterior, and how good its predictions are on labelled data."""

from .diagnosis import without_gradient
from .evaluation import Evaluation, Prediction, evaluate
from .fitting import fit
from .laplace import LaplaceResult, fit_laplace_
from .progress import FitResult, LogvarTravel, Progress
from .resume import Interrupted

__all__ = [
    "Evaluation",
    "FitResult",
    "Interrupted",
    "LaplaceResult",
    "LogvarTravel",
    "Prediction",
    "Progress",
    "evaluate",
    "fit",
    "fit_laplace_",
    "without_gradient",
]
