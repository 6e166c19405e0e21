"""What can be set: each setting once, with its type, range, default and text; nothing needs torch.

The functions take the fields as arguments, the command line makes its options of them.
"""

from .fields import Shown as Shown
from .fields import Within as Within
from .training import FitSettings as FitSettings
from .training import LaplaceSettings as LaplaceSettings
from .training import Reading as Reading
