"""A data set of labelled images by its name, batches as a model wants them, and tables."""

from ..images import read_image as read_image
from .dataset import Files as Files
from .dataset import ImageData as ImageData
from .dataset import InMemory as InMemory
from .dataset import loader as loader
from .preparation import prepare as prepare
from .preparation import resize_and_crop as resize_and_crop
from .sources import KINDS as KINDS
from .sources import MAX_CLASSES as MAX_CLASSES
from .sources import Split as Split
from .sources import load_dataset as load_dataset
from .tables import Coding as Coding
from .tables import Table as Table
from .tables import coding_of as coding_of
from .tables import is_table as is_table
from .tables import read_table as read_table
