"""What can be set: each setting once, with its type, range, default and text; nothing needs torch.

The functions take the fields as arguments, the command line makes its options of them.
"""

from .evaluation import EvaluateSettings as EvaluateSettings
from .evaluation import Measuring as Measuring
from .evaluation import PredictSettings as PredictSettings
from .evaluation import ReportSettings as ReportSettings
from .export import ProgramSettings as ProgramSettings
from .fields import Shown as Shown
from .fields import Within as Within
from .pruning import NofMSettings as NofMSettings
from .pruning import PruneSettings as PruneSettings
from .pruning import UnitSettings as UnitSettings
from .tables import TableSettings as TableSettings
from .training import FitSettings as FitSettings
from .training import LaplaceSettings as LaplaceSettings
from .training import Reading as Reading
