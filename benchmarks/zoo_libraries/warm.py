"""Imported once by the server from which `zoo_others.py` forks: these imports take seconds."""

import torch
import zoo_checks

import bayesify

from . import huggingface

torch.set_num_threads(1)
assert zoo_checks
assert huggingface
# a first trace imports much of torch
bayesify.to_bbb(torch.nn.Linear(2, 2))(torch.zeros(1, 2))
