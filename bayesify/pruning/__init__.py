"""Pruning: weights whose posterior says little are set to exactly 0, and stay there.

A pruned weight has mean 0 and sigma 0, so that each of its draws is exactly 0; the KL divergence
leaves it out. The mask has no tensor of its own: a weight is pruned where its trained spread
(``weight_logvar`` or ``weight_rho``) holds :data:`bayesify.posterior.PRUNED_RAW`. The keys of the
state_dict are those of before, and whatever carries the posterior (``save`` and ``load``, a
state_dict, a copy, a pickle) carries the mask too.
"""

from .elements import Score as Score
from .elements import prune_ as prune_
from .elements import prune_n_of_m_ as prune_n_of_m_
from .elements import sparsity_schedule as sparsity_schedule
from .masks import keep_pruned_ as keep_pruned_
from .semi_structured import SemiStructured as SemiStructured
from .semi_structured import to_semi_structured as to_semi_structured
from .statistics import MultiplyAdds as MultiplyAdds
from .statistics import Sparsity as Sparsity
from .statistics import SparsityRow as SparsityRow
from .statistics import latency as latency
from .statistics import multiply_adds as multiply_adds
from .statistics import sparsity as sparsity
from .units import prune_units_ as prune_units_
