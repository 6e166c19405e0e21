"""The supervised fit of a posterior, and how good its predictions are on labelled data."""

from .diagnosis import without_gradient
from .evaluation import Evaluation, evaluate
from .fitting import fit
from .laplace import LaplaceResult, fit_laplace_
from .measures import ClassEvaluation, DensityEvaluation, Prediction, RegressionEvaluation
from .progress import FitResult, LogvarTravel, Progress
from .recalibration import recalibrate_
from .resume import Interrupted

__all__ = [
    "ClassEvaluation",
    "DensityEvaluation",
    "Evaluation",
    "FitResult",
    "Interrupted",
    "LaplaceResult",
    "LogvarTravel",
    "Prediction",
    "Progress",
    "RegressionEvaluation",
    "evaluate",
    "fit",
    "fit_laplace_",
    "recalibrate_",
    "without_gradient",
]
