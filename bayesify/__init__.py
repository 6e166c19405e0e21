"""bayesify turns any PyTorch model into a Bayesian one: a Gaussian posterior over every weight."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if sys.version_info < (3, 10):  # noqa: UP036 - a checkout; pip refuses
    raise ImportError(
        f"bayesify needs Python 3.10 or newer, {sys.executable} is {sys.version.split()[0]}: "
        "make an environment with a newer one, as by python3.12 -m venv"
    )

if TYPE_CHECKING:
    from .conversion import BBBConfig as BBBConfig
    from .conversion import RelativeStd as RelativeStd
    from .convert import extend_ as extend_
    from .convert import to_bbb as to_bbb
    from .convert import to_bbb_ as to_bbb_
    from .convert import to_deterministic as to_deterministic
    from .divergence import kl_divergence as kl_divergence
    from .errors import ArgumentError as ArgumentError
    from .errors import BayesifyError as BayesifyError
    from .errors import BiasBeforeNormWarning as BiasBeforeNormWarning
    from .errors import CheckpointError as CheckpointError
    from .errors import DataError as DataError
    from .errors import LostPosteriorWarning as LostPosteriorWarning
    from .errors import ModelError as ModelError
    from .errors import NoMatchError as NoMatchError
    from .errors import NoMatchWarning as NoMatchWarning
    from .errors import SigmaBelowSpacingWarning as SigmaBelowSpacingWarning
    from .errors import UnsupportedModuleError as UnsupportedModuleError
    from .errors import UnsupportedVersionError as UnsupportedVersionError
    from .estimators import register_estimator as register_estimator
    from .export import Ensemble as Ensemble
    from .export import ensemble as ensemble
    from .export import export_onnx as export_onnx
    from .export import export_safetensors as export_safetensors
    from .export import export_torch as export_torch
    from .export import to_program as to_program
    from .fixed import fix_ as fix_
    from .inference import calibrate_ as calibrate_
    from .inference import predict as predict
    from .inference import recompute_batchnorm_ as recompute_batchnorm_
    from .likelihoods import likelihood_of as likelihood_of
    from .likelihoods import set_likelihood_ as set_likelihood_
    from .models import InputConfig as InputConfig
    from .models import ModelSpec as ModelSpec
    from .models import create_model as create_model
    from .models import input_config as input_config
    from .objective import elbo_loss as elbo_loss
    from .objective import kl_scale as kl_scale
    from .objective import kl_schedule as kl_schedule
    from .objective import noise_budget as noise_budget
    from .optim import check_optimizer as check_optimizer
    from .optim import param_groups as param_groups
    from .planning import ConversionPlan as ConversionPlan
    from .planning import plan as plan
    from .posterior import posterior_stats as posterior_stats
    from .posterior import posteriors as posteriors
    from .posterior import set_prior_ as set_prior_
    from .posterior import stddev as stddev
    from .priors import GaussianPrior as GaussianPrior
    from .priors import LivePrior as LivePrior
    from .priors import ScaleMixturePrior as ScaleMixturePrior
    from .pruning import keep_pruned_ as keep_pruned_
    from .pruning import latency as latency
    from .pruning import multiply_adds as multiply_adds
    from .pruning import prune_ as prune_
    from .pruning import prune_n_of_m_ as prune_n_of_m_
    from .pruning import prune_units_ as prune_units_
    from .pruning import sparsity as sparsity
    from .pruning import sparsity_schedule as sparsity_schedule
    from .pruning import to_semi_structured as to_semi_structured
    from .rewriter.variants import generated_code as generated_code
    from .rewriter.variants import rungs as rungs
    from .scope import at_mean as at_mean
    from .scope import draws as draws
    from .scope import one_draw as one_draw
    from .scope import sampled as sampled
    from .storage import load as load
    from .storage import save as save
    from .training import evaluate as evaluate
    from .training import fit as fit
    from .training import fit_laplace_ as fit_laplace_
    from .training import recalibrate_ as recalibrate_
    from .training import without_gradient as without_gradient

__version__ = "0.1.0"

# Resolved at first use (PEP 562), so that `bayesify --help` does not import torch.
_HOMES = {
    "conversion": "BBBConfig RelativeStd",
    "planning": "ConversionPlan plan",
    "convert": "extend_ to_bbb to_bbb_ to_deterministic",
    "errors": "ArgumentError BayesifyError CheckpointError DataError LostPosteriorWarning "
    "ModelError NoMatchError NoMatchWarning BiasBeforeNormWarning SigmaBelowSpacingWarning "
    "UnsupportedModuleError UnsupportedVersionError",
    "estimators": "register_estimator",
    "export": "Ensemble ensemble export_onnx export_safetensors export_torch to_program",
    "fixed": "fix_",
    "inference": "calibrate_ predict recompute_batchnorm_",
    "likelihoods": "likelihood_of set_likelihood_",
    "models": "InputConfig ModelSpec create_model input_config",
    "divergence": "kl_divergence",
    "objective": "elbo_loss kl_schedule kl_scale noise_budget",
    "optim": "check_optimizer param_groups",
    "posterior": "posterior_stats posteriors set_prior_ stddev",
    "priors": "GaussianPrior LivePrior ScaleMixturePrior",
    "pruning": "keep_pruned_ latency multiply_adds prune_ prune_n_of_m_ prune_units_ sparsity "
    "sparsity_schedule to_semi_structured",
    "rewriter.variants": "generated_code rungs",
    "scope": "at_mean draws one_draw sampled",
    "storage": "load save",
    "training": "evaluate fit fit_laplace_ recalibrate_ without_gradient",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'bayesify' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
