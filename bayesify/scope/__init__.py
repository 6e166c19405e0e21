"""Draw scopes, modes and seeds: inside one scope every parameter is drawn once.

The outermost call of a converted model opens a scope; a parameter read inside it is drawn when the
scope opens, or at its first read if an earlier call of the same method has not read it (an expert
of a mixture, a branch that was skipped), and kept until the scope closes. The scope of a call is of
its thread; the blocks around it are of its context, so that tasks and copied contexts carry them.
"""

from .blocks import open_modes as open_modes
from .calls import enter as enter
from .calls import read as read
from .checkpoints import recording as recording
from .drawing import AT_MEAN as AT_MEAN
from .drawing import Scope as Scope
from .drawing import draws as draws
from .drawing import grad_mode as grad_mode
from .drawing import realise as realise
from .local import LOCAL as LOCAL
from .modes import at_mean as at_mean
from .modes import held as held
from .modes import modules_of as modules_of
from .modes import one_draw as one_draw
from .modes import sampled as sampled
from .seeds import as_seed as as_seed
from .seeds import distinct_keys as distinct_keys
from .seeds import new_seed as new_seed
