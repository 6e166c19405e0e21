"""Predict with many draws, and fit what depends on the weights to the posterior means."""

from .batchnorm import gather_batchnorm_ as gather_batchnorm_
from .batchnorm import recompute_batchnorm_ as recompute_batchnorm_
from .calibrate import calibrate_ as calibrate_
from .given import Given as Given
from .predictor import Predictor as Predictor
from .predictor import Reduce as Reduce
from .predictor import predict as predict
from .summaries import Moments as Moments
from .summaries import ProbabilitySummary as ProbabilitySummary
from .summaries import class_logits as class_logits
from .summaries import warn_of_probabilities as warn_of_probabilities
