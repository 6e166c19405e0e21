"""bayesify turns any PyTorch model into a Bayesian one: a Gaussian posterior over every weight."""

from .convert import BBBConfig as BBBConfig
from .convert import ConversionPlan as ConversionPlan
from .convert import plan as plan
from .convert import to_bbb as to_bbb
from .convert import to_bbb_ as to_bbb_
from .convert import to_deterministic as to_deterministic
from .errors import *  # noqa: F403
from .posterior import posterior_stats as posterior_stats
from .posterior import posteriors as posteriors
from .posterior import set_prior_ as set_prior_
from .posterior import stddev as stddev
from .priors import GaussianPrior as GaussianPrior
from .priors import LivePrior as LivePrior
from .priors import ScaleMixturePrior as ScaleMixturePrior
from .scope import at_mean as at_mean
from .scope import draws as draws
from .scope import one_draw as one_draw
from .scope import sampled as sampled
