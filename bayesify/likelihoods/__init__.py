"""What a model's output means: the density of a target, and what many draws predict."""

from .attached import as_likelihood as as_likelihood
from .attached import likelihood_of as likelihood_of
from .attached import set_likelihood_ as set_likelihood_
from .attached import temperature_of as temperature_of
from .bernoulli import Bernoulli as Bernoulli
from .categorical import Categorical as Categorical
from .from_distribution import FromDistribution as FromDistribution
from .heads import Heads as Heads
from .heads import picked as picked
from .likelihood import Likelihood as Likelihood
from .likelihood import Target as Target
from .mixtures import Normals as Normals
from .normal import Gaussian as Gaussian
from .outputs import main_output as main_output
from .predictive import Bounds as Bounds
from .predictive import Predictive as Predictive
from .stored import from_json as from_json
from .stored import to_json as to_json
from .stored import unstored as unstored
