"""Estimators that draw no whole weight: what an operation on a weight is exchanged for.

Each leaves the distribution of an example's output as it is and makes the noise of the examples of
a batch independent or uncorrelated, so that gradients vary less. One file has one estimator;
:func:`register_estimator` adds another. ``"weight"``, the draw of the whole, is none of them.
"""

from . import flipout as flipout
from . import local as local
from .posterior import Posterior as Posterior
from .registry import UnknownEstimatorError as UnknownEstimatorError
from .registry import check_estimator as check_estimator
from .registry import register_estimator as register_estimator
from .registry import registered as registered
