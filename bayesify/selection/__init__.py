"""Which parameters become Bayesian: ``skip``, ``only`` and presets, their patterns, their notes."""

from .decision import Selection as Selection
from .decision import assign as assign
from .decision import select as select
from .patterns import PRESETS as PRESETS
from .patterns import Filter as Filter
from .patterns import ParsedPattern as ParsedPattern
from .patterns import Pattern as Pattern
from .patterns import Preset as Preset
from .patterns import Recorded as Recorded
from .patterns import parse_patterns as parse_patterns
