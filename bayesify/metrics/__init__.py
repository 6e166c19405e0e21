"""Quality of predictions: accuracy, calibration, selective prediction, OOD detection; of real
numbers errors, CRPS and coverage. And of
frozen features: nearest neighbours, a linear probe.

Every number is computed in float64 where the device has it, whatever the input's dtype: a bfloat16
softmax often holds a confidence of exactly 1, and small sums of logs cancel in float32.
"""

from .brier import (
    BrierDecomposition,
    BrierParts,
    TopLabelParts,
    brier_decomposition,
    brier_score,
    top_label_decomposition,
)
from .calibration import (
    ReliabilityBins,
    adaptive_calibration_error,
    classwise_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
    reliability_bins,
)
from .classification import ClassificationMetrics, Examples, classification_metrics
from .detection import ood_metrics
from .linear_probe import ProbeResult, linear_probe
from .nearest_neighbours import knn_accuracy, knn_scores
from .regression import (
    RegressionMetrics,
    calibration_curve,
    calibration_error,
    crps_normal_mixture,
    regression_metrics,
)
from .resampling import Interval, bootstrap_interval
from .selective import (
    RiskCoverage,
    area_under_risk_coverage,
    risk_coverage,
    selective_accuracy,
)
from .temperature import CrossFitted, cross_fitted_temperature, fit_temperature
from .uncertainty import entropy, mutual_information

__all__ = [
    "BrierDecomposition",
    "BrierParts",
    "ClassificationMetrics",
    "CrossFitted",
    "Examples",
    "Interval",
    "ProbeResult",
    "RegressionMetrics",
    "ReliabilityBins",
    "RiskCoverage",
    "TopLabelParts",
    "adaptive_calibration_error",
    "area_under_risk_coverage",
    "bootstrap_interval",
    "brier_decomposition",
    "brier_score",
    "calibration_curve",
    "calibration_error",
    "classification_metrics",
    "classwise_calibration_error",
    "cross_fitted_temperature",
    "crps_normal_mixture",
    "entropy",
    "expected_calibration_error",
    "fit_temperature",
    "knn_accuracy",
    "knn_scores",
    "linear_probe",
    "maximum_calibration_error",
    "mutual_information",
    "ood_metrics",
    "regression_metrics",
    "reliability_bins",
    "risk_coverage",
    "selective_accuracy",
    "top_label_decomposition",
]
