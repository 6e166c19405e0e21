"""A Bayesian model in one safetensors file: its tensors, and in JSON how to build it again.

The tensors are the state_dict (posterior means, log variances, buffers; tied tensors once) and,
for a prior around the initial weights, those weights as ``<name>_prior_mean``. The only metadata
key is ``bayesify``, a JSON text with sorted keys:

============= =================================================================================
format        version of this layout, an integer
model         ``class``, and ``spec``: the :class:`bayesify.models.ModelSpec`, or null
input         the :class:`bayesify.models.InputConfig`, or null
elements      ``total`` and ``bayesian``: parameters of the model, those with a posterior
conversions   ``root`` and the arguments of each conversion, for layers that are added later; of a
              function among the patterns its name and the parameters that it chose
posterior     one row for each Bayesian parameter: ``name``, ``aliases``, ``slot`` (the name that
              its noise is keyed by), ``parameterization``, ``prior``, ``prior_scale``
likelihood    ``kind`` and ``args`` of the likelihood, or null; its tensors are
              ``__likelihood__.<name>``. Its args are null where its code is the user's
aliases       state_dict keys that are stored under another key
versions      of the packages that wrote the file
info          what the caller of :func:`save` added
============= =================================================================================
"""

from .. import requirements
from .files import check_target as check_target
from .files import replacing as replacing
from .json_text import parse_json as parse_json
from .layout import classes_in as classes_in
from .layout import describe as describe
from .layout import input_of as input_of
from .layout import read_header as read_header
from .locks import locked as locked
from .reading import load as load
from .reading import read_stats as read_stats
from .undoing import left_as_it_was as left_as_it_was
from .writing import save as save

requirements.check("safetensors")
