"""A model by its name, its weights from a file, and how images are prepared for it."""

from .inputs import CropMode as CropMode
from .inputs import InputConfig as InputConfig
from .inputs import Interpolation as Interpolation
from .inputs import input_config as input_config
from .mlp import mlp as mlp
from .spec import SPEC as SPEC
from .spec import ModelSpec as ModelSpec
from .spec import create_model as create_model
